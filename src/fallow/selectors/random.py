"""Neurons at random: the floor that any selector must beat."""

from typing import ClassVar

import torch

from fallow.models.taps import Layer
from fallow.selectors._base import Seen, Selector


class Random(Selector):
    """Keeps k neurons of each token, drawn anew for every token."""

    name = "random"
    known = "before gate: saves gate_proj, up_proj and down_proj"
    # No cett: its scores are no norms that a threshold could cut.
    options: ClassVar[dict[str, int]] = {}
    option_ranges: ClassVar[dict[str, range]] = {}

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)  # so that runs can be repeated
        return torch.rand(seen.out_norm.shape, generator=generator).to(seen.out_norm.device)


RULE = Random
