"""What fired for the tokens before: neurons of neighbouring tokens overlap."""

import torch

from fallow.selectors._base import Seen
from fallow.selectors.static import Static
from fallow.taps import Layer

DECAY = 0.7  # about three tokens back


class Previous(Static):
    """Keeps the k neurons with the largest decaying mean of earlier tokens' out_norm.

    It starts from the calibration mean. The magnitudes are those of all neurons, idle ones too,
    which an engine that skips them does not know: a bound on what the previous tokens tell.
    """

    name = "previous"

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        return earlier_mean(torch.from_numpy(self.arrays["mean"][index]), seen.out_norm)


def earlier_mean(start: torch.Tensor, out_norm: torch.Tensor) -> torch.Tensor:
    """The decaying mean of the tokens before each, (T, d_ff); `start` (d_ff,) before the first."""
    state, means = start.clone(), torch.empty_like(out_norm)
    for t, magnitude in enumerate(out_norm):
        means[t] = state
        state.lerp_(magnitude, 1 - DECAY)
    return means


RULE = Previous
