"""TEAL with errors relative to each token's output, and few, large steps."""

from typing import ClassVar

import numpy as np
import torch

from fallow.rules.teal import Teal

# One step saves ALPHA of the block's weights, but adds at most LARGEST_STEP to one projection's
# sparsity: under grouped-query attention k_proj is 1/120 of a block and could take no equal step.
ALPHA = 0.02
LARGEST_STEP = 0.1


class TealRelative(Teal):
    """As `teal`, but the projection is raised whose step costs least error per weight saved.

    Each token's error is relative to its output, so that attention sinks do not decide alone, and
    all tokens of a window are cut and count. Steps are capped, hence the error per weight.
    """

    name = "teal_relative"
    paper = "ours (docs/methods.md), after arXiv:2408.14690"
    options: ClassVar[dict[str, int]] = {}
    option_ranges: ClassVar[dict[str, range]] = {}
    highest = 0.95

    @classmethod
    def first_cut_token(cls, length: int) -> int:
        return 0

    @classmethod
    def steps(cls, sizes: np.ndarray, o_proj: int) -> np.ndarray:
        return np.minimum(ALPHA * sizes.sum() / sizes, LARGEST_STEP)

    @classmethod
    def error(cls, output: torch.Tensor, dense: torch.Tensor) -> float:
        change = (output - dense).norm(dim=-1)
        return float((change / dense.norm(dim=-1).clamp_min(1e-12)).mean())

    @classmethod
    def price(cls, error: float, before: float, weights: float) -> float:
        return (error - before) / weights


RULE = TealRelative
