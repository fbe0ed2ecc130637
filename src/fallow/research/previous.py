"""What fired for the tokens before: neurons of neighbouring tokens overlap."""

import torch

from fallow.models.taps import Layer
from fallow.selectors._base import Bits, Seen
from fallow.selectors.static import Static

DECAY = 0.7  # about three tokens back


class Previous(Static):
    """Keeps the k neurons with the largest decaying mean of earlier tokens' out_norm.

    It starts from the calibration mean. The magnitudes are those of all neurons, inactive too: a
    bound on what the previous tokens tell, for which gate and up are read whole.
    """

    known = "before gate, but reads gate and up for the tokens behind: saves down_proj"

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        return stored.gate, stored.up

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        return 2 * 2 * layer.down_proj.in_features  # the mean, read and written in half precision

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        return 2 * layer.down_proj.in_features

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        return earlier_mean(self.tensor("mean", index, seen.out_norm), seen.out_norm)


def earlier_mean(start: torch.Tensor, out_norm: torch.Tensor) -> torch.Tensor:
    """The decaying mean of the tokens before each, (T, d_ff); `start` (d_ff,) before the first."""
    state, means = start.clone(), torch.empty_like(out_norm)
    for t, magnitude in enumerate(out_norm):
        means[t] = state
        state.lerp_(magnitude, 1 - DECAY)
    return means
