"""The exact gate and what usually follows it: up's mean magnitude."""

import numpy as np
import torch

from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.rules._gate import gate_weights
from fallow.selectors._base import Arrays, Bits, Seen, Selector


class Gate(Selector):
    """Keeps the k neurons with the largest |gate_act_i| E|up_i| ||down_proj[:, i]||.

    The choice of the rule `gate_topk`, judged here beside other selectors.
    """

    name = "gate"
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        return stored.gate, 0.0

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        return {"weight": np.stack(gate_weights(calibration))}

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        return seen.gate_act.abs().float() * self.tensor("weight", index, seen.gate_act)


RULE = Gate
