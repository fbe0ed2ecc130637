"""A cut of the k largest scores per token, of many tokens on a GPU, by one Triton kernel.

In torch it is eight passes over the scores and a `kthvalue` that reads them sixteen times.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fallow.models.cuts import weight_of
from fallow.models.taps import Layer, Tap
from fallow.plan import Cut


@triton.jit
def _keep_topk(values, weight, kept, width, k, BLOCK: tl.constexpr):
    """Zeroes all values (width,) of a token but the k with the largest |value| * weight."""
    first = tl.program_id(0).to(tl.int64) * width
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    value = tl.load(values + first + cols, mask=inside, other=0.0)
    score = tl.abs(value.to(tl.float32))
    if weight is not None:
        score = score * tl.load(weight + cols, mask=inside, other=0.0)
    # Non-negative floats are in the order of their bits as integers, and NaN is above everything.
    bits = tl.where(inside, score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    # The threshold is in (low, high]: more than k scores are above `low`, and no more above `high`.
    # Some fifteen steps find a gap between neighbours, where any threshold does.
    low = tl.full((), -1, tl.int32)
    high = tl.full((), 0x7F800000, tl.int32)  # infinity: NaN stays
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        above = tl.sum((bits > middle).to(tl.int32), 0)
        low = tl.where(above > k, middle, tl.where(above == k, middle - 1, low))
        high = tl.where(above > k, high, middle)
    tl.store(kept + first + cols, tl.where(bits > high, value, 0.0), mask=inside)


class KeepTopK(torch.autograd.Function):
    """Values (T, width) with all but k of each token set to zero; the choice has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, weight: torch.Tensor | None, k: int
    ) -> torch.Tensor:
        values = values.contiguous()
        kept = torch.empty_like(values)
        tokens, width = values.shape
        block = triton.next_power_of_2(width)
        warps = min(16, max(1, block // 512))
        _keep_topk[(tokens,)](values, weight, kept, width, k, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(kept)
        return kept

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return gradients[0] * (kept != 0), None, None  # what is kept is above a threshold of 0


def topk_taps(cuts: Sequence[Cut], layers: list[Layer]) -> dict[str, Tap]:
    """What `cut_taps` gives for the cuts of kind "topk", on a GPU."""
    return {cut.tap: _tap(cut, layers) for cut in cuts if cut.kind == "topk"}


def _tap(cut: Cut, layers: list[Layer]) -> Tap:
    weights = [weight_of(cut, i, layer) for i, layer in enumerate(layers)]

    def apply(index: int, value: torch.Tensor) -> torch.Tensor:
        k = round(float(cut.value[index]) * value.shape[1])
        kept: torch.Tensor = KeepTopK.apply(value, weights[index], k)
        return kept

    return apply
