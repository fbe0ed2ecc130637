"""What a weight becomes in a packed file, as training sees it: rounded in every step.

The gradient passes as if nothing were rounded (straight-through estimator, arXiv:1308.3432 4), so
that weights learn to stand where rounding harms least. Formats of blocks of 32 are ggml's own to
the bit; those of 256 are fitted by one least-squares line a group, where the packer tries twenty.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

AT_ONCE = 1 << 25  # weights that are rounded together: 134 MB, and some copies of them

Round = Callable[[torch.Tensor], torch.Tensor]
"""Float32 values (rows, cols) to what a format keeps of them."""


class Rounded(nn.Module):
    """A parametrization: the weight (out, in) as a format keeps its rows, or its columns.

    Raises:
        KeyError: nothing here rounds to that format.
    """

    def __init__(self, kind: str, columns: bool = False) -> None:
        super().__init__()
        self.kind, self.round, self.columns = kind, ROUNDINGS[kind], columns
        self.error: torch.Tensor | None = None

    def renew(self) -> None:
        """To be called when the weight has changed: rounding costs as much as 500 tokens."""
        self.error = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.error is None:
            round_together([(self, weight)])
            assert self.error is not None
        return weight + self.error


@torch.no_grad()
def round_together(group: Sequence[tuple[Rounded, torch.Tensor]]) -> None:
    """Renews the errors of weights of one type; on a GPU many cost little more than one.

    Every row is whole blocks, so that rows of several matrices are rounded as one.
    """
    while group:
        sizes = np.cumsum([weight.numel() for _, weight in group])
        n = max(1, int(np.searchsorted(sizes, AT_ONCE, side="right")))
        now, group = group[:n], group[n:]
        rows = [weight.T if part.columns else weight for part, weight in now]
        values = torch.cat([r.float().flatten() for r in rows])
        errors = (now[0][0].round(values) - values).split([r.numel() for r in rows])
        for (part, _), row, error in zip(now, rows, errors, strict=True):
            error = error.view(row.shape)
            part.error = error.T if part.columns else error


def _half(values: torch.Tensor) -> torch.Tensor:
    """As a float16 in the file keeps it."""
    return values.half().float()


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / value, and 0 for 0."""
    return torch.where(values == 0, 0, 1 / values)


def _blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    return values.reshape(-1, size)


def _with_minimum(levels: int) -> Round:
    """Q4_1, Q5_1: 32 weights are d q + m, q from 0 to `levels`."""

    def to(values: torch.Tensor) -> torch.Tensor:
        x = _blocks(values, 32)
        low = x.amin(dim=1, keepdim=True)
        step = (x.amax(dim=1, keepdim=True) - low) / levels
        q = ((x - low) * _inverse(step) + 0.5).floor_().clamp_(0, levels)
        return (q * _half(step) + _half(low)).reshape(values.shape)

    return to


def _symmetric(lowest: int) -> Round:
    """Q4_0, Q5_0: 32 weights are d q, q from `lowest`, what the largest becomes, to -lowest - 1."""

    def to(values: torch.Tensor) -> torch.Tensor:
        x = _blocks(values, 32)
        extreme = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
        step = extreme / lowest
        q = (x * _inverse(step) + (0.5 - lowest)).floor_().clamp_(0, -2 * lowest - 1).add_(lowest)
        return (q * _half(step)).reshape(values.shape)

    return to


def _q8_0(values: torch.Tensor) -> torch.Tensor:
    x = _blocks(values, 32)
    step = x.abs().amax(dim=1, keepdim=True) / 127
    scaled = x * _inverse(step)
    q = torch.copysign((scaled.abs() + 0.5).floor(), scaled)
    return (q * _half(step)).reshape(values.shape)


def _lines(levels: int) -> Round:
    """Q4_K, Q5_K: 32 weights are s q - m, q from 0 to `levels`; s and m are six bits of 256's."""

    def to(values: torch.Tensor) -> torch.Tensor:
        x = values.reshape(-1, 8, 32)
        low = x.amin(dim=2, keepdim=True).clamp_max_(0)
        step = (x.amax(dim=2, keepdim=True) - low) / levels
        q = ((x - low) * _inverse(step)).round_().clamp_(0, levels)
        scale, minimum = _line(x, q, step, -low)
        d, dmin = (_half(v.amax(dim=1, keepdim=True) / 63) for v in (scale, minimum))
        scale = d * (scale * _inverse(d)).round_().clamp_(0, 63)
        minimum = dmin * (minimum * _inverse(dmin)).round_().clamp_(0, 63)
        q = ((x + minimum) * _inverse(scale)).round_().clamp_(0, levels)
        return (scale * q - minimum).reshape(values.shape)

    return to


def _line(
    x: torch.Tensor, q: torch.Tensor, step: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """s and m >= 0 of the line s q - m nearest to x, (n, 8, 1) each; step and start if none is."""
    n = x.shape[2]
    sq, sqq = (v.sum(dim=2, keepdim=True) for v in (q, q * q))
    sx, sqx = (v.sum(dim=2, keepdim=True) for v in (x, q * x))
    inverse = _inverse((n * sqq - sq * sq).clamp_min_(0))
    scale, minimum = (n * sqx - sq * sx) * inverse, (sq * sqx - sqq * sx) * inverse
    scale = torch.where(minimum < 0, sqx * _inverse(sqq), scale)
    good = (inverse > 0) & (scale > 0)
    return torch.where(good, scale, step), torch.where(good, minimum.clamp_min(0), start)


def _q6_k(values: torch.Tensor) -> torch.Tensor:
    x = values.reshape(-1, 16, 16)
    extreme = x.gather(2, x.abs().argmax(dim=2, keepdim=True))
    q = (x * _inverse(extreme / -32)).round_().clamp_(-32, 31)
    scale = (q * x).sum(dim=2, keepdim=True) * _inverse((q * q).sum(dim=2, keepdim=True))
    largest = scale.gather(1, scale.abs().argmax(dim=1, keepdim=True))
    d = _half(largest / -128)
    scale = d * (scale * _inverse(d)).round_().clamp_(-128, 127)
    q = (x * _inverse(scale)).round_().clamp_(-32, 31)
    return (scale * q).reshape(values.shape)


ROUNDINGS: dict[str, Round] = {
    "Q4_0": _symmetric(-8),
    "Q4_1": _with_minimum(15),
    "Q5_0": _symmetric(-16),
    "Q5_1": _with_minimum(31),
    "Q8_0": _q8_0,
    "Q4_K": _lines(15),
    "Q5_K": _lines(31),
    "Q6_K": _q6_k,
    "F16": _half,
    "BF16": lambda values: values.bfloat16().float(),
    "F32": lambda values: values,
}
