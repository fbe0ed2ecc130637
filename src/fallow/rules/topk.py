"""Per-token top-k on the norm of each neuron's output: the oracle at equal budget."""

import torch

from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.rules._base import Arrays, Rule, per_token_topk, scalar


class TopK(Rule):
    """Keeps the k neurons with the largest |inter_i| ||down_proj[:, i]|| of each token."""

    name = "topk"
    paper = "ours (docs/methods.md); arXiv:2411.02335 4.1 ranks |gate_act| per layer"
    where = "inter"
    knob_name = "k / d_ff, the share kept per token"
    known = "after gate and up: saves down_proj"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("inter",)

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        return 1 - sparsity

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        return scalar("kept", knob)

    @classmethod
    def shapes(cls, layers: list[Layer]) -> dict[str, tuple[int, ...]]:
        return {"kept": (1,)}

    def weight(self, index: int, layer: Layer, tap: str) -> torch.Tensor:
        return layer.down_norm

    def threshold(self, layer: int, tap: str, score: torch.Tensor) -> torch.Tensor:
        return per_token_topk(score, float(self.arrays["kept"][0]))


RULE = TopK
