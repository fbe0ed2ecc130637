"""The zero test: neurons whose gate activation is exactly 0."""

import numpy as np

from fallow.common.errors import UsageError
from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.rules._base import Arrays, Rule


class Relu(Rule):
    """gate_act = 0: changes no output, and is natural sparsity. No parameter."""

    name = "relu"
    paper = "arXiv:2411.02335 4.1 (straightforward ReLU)"
    where = "inter"
    knob_name = "none, give 0"
    knob_range = (0.0, 0.0)
    known = "after gate: saves up_proj and down_proj"
    search = None

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("gate_act",)

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        if sparsity > 0:
            raise UsageError("rule relu has no parameter: it cuts exact zeros; give --knob 0")
        return 0.0

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        return {"threshold.gate_act": np.zeros(len(calibration.layers), dtype=np.float32)}


RULE = Relu
