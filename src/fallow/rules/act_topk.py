"""Top-k as Sparsing Law's text has it: the k neurons with the largest gate activation per token."""

from fallow.models.capture import Calibration
from fallow.plan import Cut
from fallow.rules.topk import TopK


class ActTopK(TopK):
    """Keeps the k neurons with the largest |gate_act_i| of each token.

    The paper's code takes the smallest of a whole batch instead, a quantile per layer, which is
    `cats`.
    """

    name = "act_topk"
    paper = "arXiv:2411.02335 4.1 (Top-k)"
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("gate_act", "topk", knob)


RULE = ActTopK
