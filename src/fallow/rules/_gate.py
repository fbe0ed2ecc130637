"""What the rules share that choose neurons by their gate alone, before up_proj is read."""

import numpy as np
import torch

from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.rules._base import Arrays, Rule


class GateFirst(Rule):
    """Scores |gate_act_i| E|up_i| ||down_proj[:, i]||: a per-token rule, or a stage before another.

    E|up_i| is the calibration mean, so that this is the output's expected norm for a known gate.
    """

    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("gate_act",)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        return super().learn(calibration, knob) | gate_weights(calibration)

    @classmethod
    def shapes(cls, layers: list[Layer]) -> dict[str, tuple[int, ...]]:
        shape = (len(layers), layers[0].down_proj.in_features)
        return super().shapes(layers) | {"weight.gate_act": shape}

    def weight(self, index: int, layer: Layer, tap: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays["weight.gate_act"][index])


def gate_weights(calibration: Calibration) -> Arrays:
    """E|up_i| ||down_proj[:, i]|| per layer, (L, d_ff) float32."""
    norms = np.stack([layer.down_norm.numpy() for layer in calibration.layers])
    return {"weight.gate_act": calibration.mean_up * norms}
