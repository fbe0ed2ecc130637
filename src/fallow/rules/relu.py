"""The zero test: neurons whose gate activation is exactly 0."""

from typing import Self

import numpy as np

from fallow.capture import Calibration
from fallow.errors import UsageError
from fallow.rules._base import Rule
from fallow.taps import Layer


class Relu(Rule):
    """gate_act = 0: changes no output, and is natural sparsity. No knob."""

    name = "relu"
    paper = "arXiv:2411.02335 4.1 (straightforward ReLU)"
    where = "inter"
    knob_name = "none"
    known = "after gate: saves up_proj and down_proj"
    search = None

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("gate_act",)

    @classmethod
    def fit(
        cls, calibration: Calibration, *, sparsity: float | None = None, knob: float | None = None
    ) -> Self:
        if sparsity or knob:
            raise UsageError("rule relu has no knob: it cuts exact zeros; give --knob 0")
        thresholds = np.zeros(len(calibration.layers), dtype=np.float32)
        return cls(0.0, {"threshold.gate_act": thresholds})


RULE = Relu
