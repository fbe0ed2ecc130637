"""Per-token tail budget: the smallest neurons that together stay below τ."""

import torch

from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.rules._base import Arrays, Rule, bisect, per_token_tail, scalar


class Tail(Rule):
    """Drops the smallest n_i while Σ_D ||n_i||² <= τ² Σ ||n_i||², n_i a neuron's output."""

    name = "tail"
    paper = "ours (docs/methods.md)"
    where = "inter"
    knob_name = "τ, share of the root of the summed squared neuron norms"
    known = "after gate and up: saves down_proj"
    search = "knob"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("inter",)

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        values, weights = cls.sample(calibration)
        return bisect(lambda tau: _mean_sparsity(values, weights, tau), sparsity)

    @classmethod
    def sample(cls, calibration: Calibration) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per layer the calibration values (T', d_ff) that are cut, and their weights (d_ff,)."""
        return calibration.inter, [layer.down_norm for layer in calibration.layers]

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        return scalar("tau", knob)

    @classmethod
    def shapes(cls, layers: list[Layer]) -> dict[str, tuple[int, ...]]:
        return {"tau": (1,)}

    def weight(self, index: int, layer: Layer, tap: str) -> torch.Tensor:
        return layer.down_norm

    def threshold(self, layer: int, tap: str, score: torch.Tensor) -> torch.Tensor:
        return per_token_tail(score, float(self.arrays["tau"][0]))


def _mean_sparsity(values: list[torch.Tensor], weights: list[torch.Tensor], tau: float) -> float:
    total = 0.0
    for value, weight in zip(values, weights, strict=True):
        score = value[::4].abs().float() * weight
        total += float((score <= per_token_tail(score, tau)).float().mean())
    return total / len(values)


RULE = Tail
