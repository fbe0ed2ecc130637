"""Per-token tail budget: the smallest neurons that together stay below τ."""

import torch

from fallow.models.capture import Calibration
from fallow.models.cuts import per_token_tail
from fallow.plan import Cut
from fallow.rules._base import Rule, bisect, mean_zeros


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
        scores = cls.scores(calibration)

        def mean_sparsity(tau: float) -> float:
            return mean_zeros(scores, lambda score: score <= per_token_tail(score, tau))

        return bisect(mean_sparsity, sparsity)

    @classmethod
    def scores(cls, calibration: Calibration) -> list[torch.Tensor]:
        """Per layer those of some calibration values, (T', d_ff)."""
        weights = [layer.down_norm for layer in calibration.layers]
        return calibration.scores(calibration.inter, weights, step=4)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("inter", "tail", knob, "column_norm")


RULE = Tail
