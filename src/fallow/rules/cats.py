"""CATS: a threshold per layer on the gate's activation."""

from fallow.models.capture import Calibration
from fallow.plan import Cut
from fallow.rules._base import Rule, layer_quantiles


class Cats(Rule):
    """|gate_act| against the layer's own quantile of |gate_act|."""

    name = "cats"
    paper = "arXiv:2404.08763"
    where = "inter"
    knob_name = "quantile of |gate_act| per layer"
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("gate_act", "threshold", layer_quantiles(calibration, "gate_act", knob))


RULE = Cats
