"""Per-token tail budget chosen before up_proj is read, by the weighted gate."""

import torch

from fallow.models.capture import Calibration
from fallow.rules._gate import GateFirst, gate_weights
from fallow.rules.tail import Tail


class GateTail(GateFirst, Tail):
    """Drops the smallest s_i while Σ_D s_i² <= τ² Σ s_i², s_i the score of `GateFirst`."""

    name = "gate_tail"
    paper = "ours (docs/methods.md)"

    @classmethod
    def sample(cls, calibration: Calibration) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        weights = torch.from_numpy(gate_weights(calibration)["weight.gate_act"])
        return calibration.gate_act, list(weights)


RULE = GateTail
