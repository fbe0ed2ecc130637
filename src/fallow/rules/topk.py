"""Per-token top-k on the norm of each neuron's output: the oracle at equal budget."""

from typing import Self

import torch

from fallow.capture import Calibration
from fallow.rules._base import Rule, one_of, per_token_topk, scalar
from fallow.taps import Layer


class TopK(Rule):
    """Keeps the k neurons with the largest |inter_i| ||down_proj[:, i]|| of each token."""

    name = "topk"
    paper = "METHODS 4.3 (ours; arXiv:2411.02335 ranks |gate_act| per layer)"
    where = "inter"
    knob_name = "k / d_ff kept per token, (0, 1]"
    known = "after gate and up: saves down_proj"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("inter",)

    @classmethod
    def fit(
        cls, calibration: Calibration, *, sparsity: float | None = None, knob: float | None = None
    ) -> Self:
        sparsity, knob = one_of(sparsity, knob, 0, 1, cls.knob_name)
        kept = 1 - sparsity if sparsity is not None else knob
        assert kept is not None
        return cls(kept, scalar("kept", kept))

    def weight(self, layer: Layer, tap: str) -> torch.Tensor:
        return layer.down_norm

    def threshold(self, layer: int, tap: str, score: torch.Tensor) -> torch.Tensor:
        return per_token_topk(score, float(self.arrays["kept"][0]))


RULE = TopK
