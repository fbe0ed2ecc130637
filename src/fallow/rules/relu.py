"""The zero test: neurons whose gate activation is exactly 0."""

from fallow.common.errors import UsageError
from fallow.models.capture import Calibration
from fallow.plan import Cut
from fallow.rules._base import Rule


class Relu(Rule):
    """gate_act = 0: changes no output, and is natural sparsity. No parameter."""

    name = "relu"
    paper = "arXiv:2411.02335 4.1 (straightforward ReLU)"
    where = "inter"
    knob_name = "none, give 0"
    knob_range = (0.0, 0.0)
    known = "after gate: saves up_proj and down_proj"
    search = None

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        if sparsity > 0:
            raise UsageError("rule relu has no parameter: it cuts exact zeros; give --knob 0")
        return 0.0

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("gate_act", "threshold", knob)


RULE = Relu
