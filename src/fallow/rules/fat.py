"""FAT-ε: one fixed threshold on the gate's activation for all layers."""

from fallow.models.capture import Calibration
from fallow.plan import Cut
from fallow.rules._base import Rule


class Fat(Rule):
    """|gate_act| against one ε shared by every layer."""

    name = "fat"
    paper = "arXiv:2411.02335 4.1"
    where = "inter"
    knob_name = "ε, in units of gate_act"
    knob_range = (0.0, float("inf"))
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        return calibration.histograms["gate_act"].pooled_quantile(sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("gate_act", "threshold", knob)


RULE = Fat
