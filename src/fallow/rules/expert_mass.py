"""Top-p of the router's mass: the experts of a token that carry most of it."""

import math

import torch

from fallow.models.capture import Calibration
from fallow.models.cuts import per_token_tail
from fallow.plan import ROUTER, Cut
from fallow.rules._base import Rule, bisect, mean_zeros


class ExpertMass(Rule):
    """Drops a token's smallest experts while they have at most a share m of its router mass."""

    name = "expert_mass"
    paper = "ours (docs/methods.md); arXiv:2403.07652 chooses experts by top-p as it trains"
    where = "experts"
    knob_name = "m, share of a token's router mass that may be left out"
    known = "after the router: saves experts whole"
    search = "knob"

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        def drops(knob: float, value: torch.Tensor) -> torch.Tensor:
            return value <= per_token_tail(value, math.sqrt(knob))

        values = calibration.sample(ROUTER)
        return bisect(lambda knob: mean_zeros(values, lambda v: drops(knob, v)), sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        # Values are roots of shares, so that shares are their squares.
        return Cut(ROUTER, "tail", math.sqrt(knob))


RULE = ExpertMass
