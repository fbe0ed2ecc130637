"""Per-token tail budget: the smallest neurons that together stay below τ."""

import torch

from fallow.models.capture import Calibration
from fallow.models.cuts import per_token_tail
from fallow.plan import Cut
from fallow.rules._base import Rule, bisect


class Tail(Rule):
    """Drops the smallest n_i while Σ_D ||n_i||² <= τ² Σ ||n_i||², n_i a neuron's output."""

    name = "tail"
    paper = "ours (docs/methods.md)"
    where = "inter"
    knob_name = "τ, share of the root of the summed squared neuron norms"
    known = "after gate and up: saves down_proj"
    search = "knob"

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        values, weights = cls.sample(calibration)
        return bisect(lambda tau: _mean_sparsity(values, weights, tau), sparsity)

    @classmethod
    def sample(cls, calibration: Calibration) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per layer the calibration values (T', d_ff) that are cut, and their weights (d_ff,)."""
        return calibration.inter, [layer.down_norm for layer in calibration.layers]

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("inter", "tail", knob, "column_norm")


def _mean_sparsity(values: list[torch.Tensor], weights: list[torch.Tensor], tau: float) -> float:
    total = 0.0
    for value, weight in zip(values, weights, strict=True):
        score = value[::4].abs().float() * weight
        total += float((score <= per_token_tail(score, tau)).float().mean())
    return total / len(values)


RULE = Tail
