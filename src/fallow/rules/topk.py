"""Per-token top-k on the norm of each neuron's output: the oracle at equal budget."""

from fallow.models.capture import Calibration
from fallow.plan import Cut
from fallow.rules._base import Rule


class TopK(Rule):
    """Keeps the k neurons with the largest |inter_i| ||down_proj[:, i]|| of each token."""

    name = "topk"
    paper = "ours (docs/methods.md)"
    where = "inter"
    knob_name = "k / d_ff, the share kept per token"
    known = "after gate and up: saves down_proj"

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        return 1 - sparsity

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut | list[Cut]:
        return Cut("inter", "topk", knob, "column_norm")


RULE = TopK
