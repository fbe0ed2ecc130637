"""Per-token top-k chosen before up_proj is read: the gate, weighted by what usually follows."""

import numpy as np
import torch

from fallow.capture import Calibration
from fallow.rules._base import Arrays
from fallow.rules.topk import TopK
from fallow.taps import Layer


class GateTopK(TopK):
    """Keeps the k neurons with the largest |gate_act_i| E|up_i| ||down_proj[:, i]|| per token.

    E|up_i| is the calibration mean, so that this is the output's expected norm for a known gate.
    """

    name = "gate_topk"
    paper = "METHODS 5 (ours: gate only, per-token top-k)"
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("gate_act",)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        return super().learn(calibration, knob) | gate_weights(calibration)

    @classmethod
    def shapes(cls, layers: list[Layer]) -> dict[str, tuple[int, ...]]:
        return super().shapes(layers) | gate_shapes(layers)

    def weight(self, index: int, layer: Layer, tap: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays["weight.gate_act"][index])


def gate_weights(calibration: Calibration) -> Arrays:
    """E|up_i| ||down_proj[:, i]|| per layer, (L, d_ff) float32."""
    norms = np.stack([layer.down_norm.numpy() for layer in calibration.layers])
    return {"weight.gate_act": calibration.mean_up * norms}


def gate_shapes(layers: list[Layer]) -> dict[str, tuple[int, ...]]:
    return {"weight.gate_act": (len(layers), layers[0].down_proj.in_features)}


RULE = GateTopK
