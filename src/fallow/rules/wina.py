"""WINA: per-token top-k on weight-informed scores of every projection's input."""

import torch

from fallow.models.taps import Layer
from fallow.rules.topk import TopK


class Wina(TopK):
    """Keeps the inputs with the largest |x_j| ||W[:, j]|| of each token and projection."""

    name = "wina"
    paper = "arXiv:2505.19427"
    where = "input"
    knob_name = "share of inputs kept per token and projection"
    known = "before each projection: saves its columns"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return tuple(layer.projections)

    def weight(self, index: int, layer: Layer, tap: str) -> torch.Tensor:
        return layer.input_norms[tap]


RULE = Wina
