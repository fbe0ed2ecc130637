"""Per-token top-k chosen before up_proj is read: the gate, weighted by what usually follows."""

from fallow.models.capture import Calibration
from fallow.plan import Cut
from fallow.rules._gate import GATE_KNOWN, gate_weights
from fallow.rules.topk import TopK


class GateTopK(TopK):
    """Keeps the k neurons with the largest |gate_act_i| E|up_i| ||down_proj[:, i]|| per token."""

    name = "gate_topk"
    paper = "ours (docs/methods.md)"
    known = GATE_KNOWN

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("gate_act", "topk", knob, gate_weights(calibration))


RULE = GateTopK
