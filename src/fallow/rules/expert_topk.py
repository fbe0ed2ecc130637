"""Fewer experts for every token than the model was trained with."""

from fallow.models.capture import Calibration
from fallow.plan import ROUTER, Cut
from fallow.rules.topk import TopK


class ExpertTopK(TopK):
    """Keeps the k experts that the router gives the largest shares."""

    name = "expert_topk"
    paper = "ours (docs/methods.md)"
    where = "experts"
    knob_name = "k / n_experts, the share kept per token"
    known = "after the router: saves experts whole"

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut(ROUTER, "topk", knob)


RULE = ExpertTopK
