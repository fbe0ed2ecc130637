"""Per-token tail budget chosen before up_proj is read, by the weighted gate."""

import torch

from fallow.capture import Calibration
from fallow.rules._base import Arrays, bisect, per_token_tail
from fallow.rules.gate_topk import gate_shapes, gate_weights
from fallow.rules.tail import Tail
from fallow.taps import Layer


class GateTail(Tail):
    """Drops the smallest s_i while Σ_D s_i² <= τ² Σ s_i², s_i = |gate_act_i| E|up_i| c_i.

    c_i is ||down_proj[:, i]||; see `gate_topk` for E|up_i|.
    """

    name = "gate_tail"
    paper = "METHODS 4.3 and 5 (ours)"
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("gate_act",)

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        weights = torch.from_numpy(gate_weights(calibration)["weight.gate_act"])

        def mean_sparsity(tau: float) -> float:
            total = 0.0
            for gate_act, weight in zip(calibration.gate_act, weights, strict=True):
                score = gate_act[::4].abs().float() * weight
                total += float((score <= per_token_tail(score, tau)).float().mean())
            return total / len(calibration.layers)

        return bisect(mean_sparsity, sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        return super().learn(calibration, knob) | gate_weights(calibration)

    @classmethod
    def shapes(cls, layers: list[Layer]) -> dict[str, tuple[int, ...]]:
        return super().shapes(layers) | gate_shapes(layers)

    def weight(self, index: int, layer: Layer, tap: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays["weight.gate_act"][index])


RULE = GateTail
