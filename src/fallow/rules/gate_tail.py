"""Per-token tail budget chosen before up_proj is read, by the weighted gate."""

import torch

from fallow.models.capture import Calibration
from fallow.models.devices import tensor
from fallow.plan import Cut
from fallow.rules._gate import GATE_KNOWN, gate_weights
from fallow.rules.tail import Tail


class GateTail(Tail):
    """Drops the smallest s_i while Σ_D s_i² <= τ² Σ s_i², s_i the score of `gate_topk`."""

    name = "gate_tail"
    paper = "ours (docs/methods.md)"
    known = GATE_KNOWN

    @classmethod
    def scores(cls, calibration: Calibration) -> list[torch.Tensor]:
        device = calibration.layers[0].device
        weights = [tensor(weight, device) for weight in gate_weights(calibration)]
        return calibration.scores(calibration.gate_act, weights, step=4)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        return Cut("gate_act", "tail", knob, gate_weights(calibration))


RULE = GateTail
