"""FAT-ε: one fixed threshold on the gate's activation for all layers."""

import numpy as np

from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.rules._base import Arrays, Rule


class Fat(Rule):
    """|gate_act| against one ε shared by every layer."""

    name = "fat"
    paper = "arXiv:2411.02335 4.1"
    where = "inter"
    knob_name = "ε, in units of gate_act"
    knob_range = (0.0, float("inf"))
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("gate_act",)

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        return calibration.histograms["gate_act"].pooled_quantile(sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        return {"threshold.gate_act": np.full(len(calibration.layers), knob, dtype=np.float32)}


RULE = Fat
