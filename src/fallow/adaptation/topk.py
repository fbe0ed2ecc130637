"""A cut of the k largest scores per token, of many tokens on a GPU, by one Triton kernel.

In torch it is eight passes over the scores and a `kthvalue` that reads them sixteen times.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fallow.gpu import kernels
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
    bits = kernels.score(value, weight, cols, inside)
    low = tl.full((), -2, tl.int32)
    high = tl.full((), kernels.INFINITY, tl.int32)
    threshold = kernels.topk_threshold(bits, k, low, high)
    tl.store(kept + first + cols, tl.where(bits > threshold, value, 0.0), mask=inside)


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
