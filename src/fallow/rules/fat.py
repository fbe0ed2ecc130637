"""FAT-ε: one fixed threshold on the gate's activation for all layers."""

from typing import Self

import numpy as np

from fallow.capture import Calibration
from fallow.rules._base import Rule, one_of
from fallow.taps import Layer


class Fat(Rule):
    """|gate_act| against one ε shared by every layer (P3 4.3)."""

    name = "fat"
    paper = "arXiv:2411.02335 4.1"
    where = "inter"
    knob_name = "ε, in units of gate_act, [0, ∞)"
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("gate_act",)

    @classmethod
    def fit(
        cls, calibration: Calibration, *, sparsity: float | None = None, knob: float | None = None
    ) -> Self:
        sparsity, knob = one_of(sparsity, knob, 0, float("inf"), cls.knob_name)
        if knob is None:
            assert sparsity is not None
            knob = calibration.histograms["gate_act"].pooled_quantile(sparsity)
        thresholds = np.full(len(calibration.layers), knob, dtype=np.float32)
        return cls(knob, {"threshold.gate_act": thresholds})


RULE = Fat
