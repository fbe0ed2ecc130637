"""WINA: per-token top-k on weight-informed scores of every projection's input."""

from typing import Self

import torch

from fallow.capture import Calibration
from fallow.rules._base import Rule, one_of, per_token_topk, scalar
from fallow.taps import Layer


class Wina(Rule):
    """Keeps the inputs with the largest |x_j| ||W[:, j]|| of each token and projection."""

    name = "wina"
    paper = "arXiv:2505.19427"
    where = "input"
    knob_name = "share of inputs kept per token and projection, (0, 1]"
    known = "before each projection: saves its columns"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return tuple(layer.projections)

    @classmethod
    def fit(
        cls, calibration: Calibration, *, sparsity: float | None = None, knob: float | None = None
    ) -> Self:
        sparsity, knob = one_of(sparsity, knob, 0, 1, cls.knob_name)
        kept = 1 - sparsity if sparsity is not None else knob
        assert kept is not None
        return cls(kept, scalar("kept", kept))

    def weight(self, layer: Layer, tap: str) -> torch.Tensor:
        return layer.input_norms[tap]

    def threshold(self, layer: int, tap: str, score: torch.Tensor) -> torch.Tensor:
        return per_token_topk(score, float(self.arrays["kept"][0]))


RULE = Wina
