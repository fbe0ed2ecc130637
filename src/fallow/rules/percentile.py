"""Percentile thresholds: one scalar per layer and projection output."""

import numpy as np

from fallow.common.metrics import histogram_quantile
from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.plan import Cut
from fallow.rules._base import Rule, layer_quantiles


class Percentile(Rule):
    """|A| of gate_proj, up_proj and down_proj outputs against the layer's own q-th percentile.

    Eqs. 1-7 of the paper. The target q is the sparsity of each of the three outputs; that of
    `inter` is higher (the union of two sets of zeros). Variant for a fused gate_up_proj (Phi-3):
    the gate half alone is cut, at a joint percentile over gate and up values. Non-gated FFN: the
    pre-activation and the output.
    """

    name = "percentile"
    paper = "arXiv:2412.12178 II-D"
    where = "inter"
    knob_name = "q, percentile / 100 of each projection's output"
    known = "after gate and up: saves down_proj; zeros of the FFN output save nothing"

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> list[Cut]:
        layer = calibration.layers[0]
        taps = percentile_taps(layer)
        thresholds = {tap: layer_quantiles(calibration, tap, knob) for tap in taps}
        if layer.gate_up_proj is not None:
            thresholds["gate_pre"] = _joint_quantiles(calibration, knob)
        return [Cut(tap, "threshold", values) for tap, values in thresholds.items()]


def percentile_taps(layer: Layer) -> tuple[str, ...]:
    """Where a model of such layers is cut."""
    if layer.gate_up_proj is not None or not layer.gated:
        return ("gate_pre", "ffn_out")
    return ("gate_pre", "up", "ffn_out")


def _joint_quantiles(calibration: Calibration, q: float) -> np.ndarray:
    gate, up = (calibration.histograms[tap].counts for tap in ("gate_pre", "up"))
    values = [histogram_quantile(g + u, q) for g, u in zip(gate, up, strict=True)]
    return np.array(values, dtype=np.float32)


RULE = Percentile
