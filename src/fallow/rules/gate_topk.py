"""Per-token top-k chosen before up_proj is read: the gate, weighted by what usually follows."""

from fallow.rules._gate import GateFirst
from fallow.rules.topk import TopK


class GateTopK(GateFirst, TopK):
    """Keeps the k neurons with the largest |gate_act_i| E|up_i| ||down_proj[:, i]|| per token."""

    name = "gate_topk"
    paper = "ours (docs/methods.md)"


RULE = GateTopK
