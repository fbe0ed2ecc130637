"""Experts of a small share are skipped."""

import math

from fallow.models.capture import Calibration
from fallow.plan import ROUTER, Cut
from fallow.rules._base import Rule, bisect, mean_zeros


class ExpertShare(Rule):
    """Drops a token's experts with at most a share s of the router's mass on them all."""

    name = "expert_share"
    paper = "ours (docs/methods.md); as arXiv:2402.14800 skips the second of two experts"
    where = "experts"
    knob_name = "s, share of a token's router mass up to which an expert is left out"
    known = "after the router: saves experts whole"
    search = "knob"

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        values = calibration.sample(ROUTER)
        return bisect(lambda s: mean_zeros(values, lambda v: v <= math.sqrt(s)), sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut(ROUTER, "threshold", math.sqrt(knob))


RULE = ExpertShare
