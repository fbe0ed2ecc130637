"""Fewer experts for every token than the model was trained with."""

from fallow.models.capture import Calibration
from fallow.plan import ROUTER, Cut
from fallow.rules._base import Rule


class ExpertTopK(Rule):
    """Keeps the k experts that the router gives the largest shares."""

    name = "expert_topk"
    paper = "ours (docs/methods.md)"
    where = "experts"
    knob_name = "k / n_experts, the share kept per token"
    known = "after the router: saves experts whole"

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        return 1 - sparsity

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut(ROUTER, "topk", knob)


RULE = ExpertTopK
