"""The truth, which nothing can know before gate and up are read: the ceiling of all selectors."""

import torch

from fallow.models.taps import Layer
from fallow.selectors._base import Bits, Seen, Selector


class Oracle(Selector):
    """Keeps the k neurons with the largest |inter_i| ||down_proj[:, i]|| of each token."""

    name = "oracle"
    known = "after gate and up: saves down_proj"

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        return stored.gate, stored.up

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        return seen.out_norm


RULE = Oracle
