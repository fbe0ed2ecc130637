"""Top-p: the smallest set of a token's neurons that holds a share p of the sum of magnitudes."""

import torch

from fallow.models.capture import Calibration
from fallow.models.cuts import per_token_mass
from fallow.plan import Cut
from fallow.rules._base import Rule, bisect, mean_zeros


class TopP(Rule):
    """Keeps the fewest neurons of each token with Σ_kept |inter_i| >= p Σ |inter_i|."""

    name = "topp"
    paper = "arXiv:2509.00454 (top-p of the intermediate activations)"
    where = "inter"
    knob_name = "p, share of the sum of |inter_i| that is kept per token"
    known = "after gate and up: saves down_proj"

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        def sparsity_without(share: float) -> float:
            def drops(score: torch.Tensor) -> torch.Tensor:
                return score <= per_token_mass(score, share)

            return mean_zeros(scores, drops)

        scores = [value[::4].abs().float() for value in calibration.inter]
        return 1 - bisect(sparsity_without, sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("inter", "mass", 1 - knob)


RULE = TopP
