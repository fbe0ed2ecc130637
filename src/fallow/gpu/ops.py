"""Operators of sparse decoding for torch: one launch each, or two, that graphs can capture.

None waits for the device, and no shape depends on data. Thresholds are tensors (their bits as
int32), so that other thresholds need no new graph.
"""

import statistics
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import triton

from fallow.gpu import kernels

TOKENS = 8  # at most, in one call
MULTIPLE = 16  # of tokens in a matrix product of several

# Tiles (rows, columns, warps, programs per multiprocessor) by operator, for one token and for
# several, the default first; `tuning` chooses. One row of 4096 halves is 8 KB, and a
# multiprocessor needs some 20 KB under way to keep up with 3 TB/s at a latency of 0.8 µs.
Tile = tuple[int, int, int, int]
TILES: dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    "gemv": (
        ((4, 1024, 4, 0), (2, 1024, 4, 0), (8, 512, 4, 0), (8, 1024, 8, 0), (1, 4096, 4, 0)),
        ((16, 256, 4, 0), (32, 256, 4, 0), (32, 128, 4, 0)),
    ),
    "gather_rows": (
        ((2, 1024, 4, 16), (4, 1024, 4, 8), (1, 4096, 4, 16), (4, 1024, 4, 64)),
        ((16, 256, 4, 8), (32, 256, 4, 8), (16, 128, 4, 8)),
    ),
    "gather_sum": (
        ((16, 256, 4, 8), (32, 256, 4, 4), (16, 512, 8, 4), (8, 512, 4, 8), (32, 128, 4, 8)),
        ((32, 128, 4, 4), (64, 128, 4, 4), (32, 256, 4, 4)),
    ),
}
MOST_SPLITS = 32  # more of 256 columns are more registers than a thread has
_chosen: dict[tuple[Any, ...], Tile] = {}
_tuning = False


class tuning:
    """Inside, operators try their tiles on what they are called with, and keep the fastest."""

    def __enter__(self) -> None:
        global _tuning
        _tuning = True

    def __exit__(self, *_: object) -> None:
        global _tuning
        _tuning = False


def _launch(key: tuple[Any, ...], run: Callable[[Tile], torch.Tensor]) -> torch.Tensor:
    """`run` with the tile of this operator, (name, tokens, shapes)."""
    tiles = TILES[key[0]][key[1] > 1]
    if _tuning and key not in _chosen:
        _chosen[key] = min(tiles, key=lambda tile: _microseconds(lambda: run(tile)))
    return run(_chosen.get(key, tiles[0]))


def _microseconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median time on the device, with caches full of something else."""
    run()
    other = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def counters(device: torch.device) -> torch.Tensor:
    """Zeros that `gather_sum` counts with and leaves zero; made before a graph is captured."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


def _block_k(d: int, most: int) -> int:
    """Columns at once: a power of two that divides d well, at most `most`."""
    found = min(most, _power(d))
    while found > 256 and d % found:
        found //= 2
    return found


def _pad(tokens: int) -> int:
    return 1 if tokens == 1 else MULTIPLE


@torch.library.custom_op("fallow::gemv", mutates_args=())
def gemv(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, act: str) -> torch.Tensor:
    """act(x wᵀ + bias), (B, n), of x (B, d) and w (n, d)."""
    (batch, d), n = x.shape, len(w)
    out = x.new_empty(batch, n)

    def run(tile: Tile) -> torch.Tensor:
        rows, columns, warps, _ = tile
        block_k = max(16, _block_k(d, columns))
        kernels.gemv[(triton.cdiv(n, rows),)](
            x, w, bias, out, n, D=d, B=batch, PAD=_pad(batch), ACT=act, BLOCK_N=rows,
            BLOCK_K=block_k, num_warps=warps, num_stages=4,
        )  # fmt: skip
        return out

    return _launch(("gemv", batch, n, d, x.dtype), run)


@gemv.register_fake
def _(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, act: str) -> torch.Tensor:
    return x.new_empty(len(x), len(w))


@torch.library.custom_op("fallow::thresholds", mutates_args=())
def thresholds(values: torch.Tensor, weight: torch.Tensor | None, k: int) -> torch.Tensor:
    """Bits (S, B) of thresholds that leave k scores |values| * weight of each token above them.

    values (B, width); weight (S, width), or None for S = 1.
    """
    (batch, width), segments = values.shape, 1 if weight is None else len(weight)
    found = values.new_empty(segments, batch, dtype=torch.int32)
    block = _power(width)
    kernels.thresholds[(batch, segments)](
        values, weight, found, width, k, batch, BLOCK=block, num_warps=_warps(block)
    )
    return found


@thresholds.register_fake
def _(values: torch.Tensor, weight: torch.Tensor | None, k: int) -> torch.Tensor:
    segments = 1 if weight is None else len(weight)
    return values.new_empty(segments, len(values), dtype=torch.int32)


def _warps(block: int) -> int:
    """For a row in one program: sixteen values a thread, if that many threads are allowed."""
    return min(32, max(4, block // 512))


@torch.library.custom_op("fallow::select", mutates_args=())
def select(
    values: torch.Tensor, weight: torch.Tensor | None, threshold: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of active neurons (width,), their count (1,), and their values (B, width).

    Active are those of values (B, width) that in some token score above `threshold` (1,), bits; or
    without one, the k of each token that score highest. Past the count nothing is defined.
    """
    batch, width = values.shape
    indices = values.new_empty(width, dtype=torch.int32)
    count = values.new_empty(1, dtype=torch.int32)
    chosen = torch.empty_like(values)
    topk = threshold is None and batch == 1
    if threshold is None and batch > 1:
        threshold = thresholds(values, None if weight is None else weight[None], k)
    stride = 0 if threshold is None or threshold.numel() == 1 else 1
    block = _power(width)
    kernels.select[(1,)](
        values, weight, threshold, indices, count, chosen, width, k, stride, B=batch, TOPK=topk,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return indices, count, chosen


@select.register_fake
def _(
    values: torch.Tensor, weight: torch.Tensor | None, threshold: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = values.shape[1]
    indices = values.new_empty(width, dtype=torch.int32)
    return indices, values.new_empty(1, dtype=torch.int32), torch.empty_like(values)


@torch.library.custom_op("fallow::gather_rows", mutates_args=())
def gather_rows(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, indices: torch.Tensor,
    count: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """gates * (x w[indices]ᵀ + bias), (B, width), of what `select` gave; past the count undefined.

    x (B, d), w (width, d). What then scores at most `threshold` (1,), if there is one, is 0.
    """
    (batch, d), width = x.shape, gates.shape[1]
    out = torch.empty_like(gates)

    def run(tile: Tile) -> torch.Tensor:
        rows, columns, warps, programs = tile
        grid = min(triton.cdiv(width, rows), programs * _processors(x.device))
        kernels.gather_rows[(grid,)](
            x, w, bias, indices, count, gates, weight, threshold, out, width, D=d, B=batch,
            PAD=_pad(batch), BLOCK_N=rows, BLOCK_K=max(16, _block_k(d, columns)),
            num_warps=warps, num_stages=4,
        )  # fmt: skip
        return out

    return _launch(("gather_rows", batch, width, d, x.dtype, threshold is None), run)


@gather_rows.register_fake
def _(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, indices: torch.Tensor,
    count: torch.Tensor, gates: torch.Tensor, weight: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return torch.empty_like(gates)


@torch.library.custom_op("fallow::gather_sum", mutates_args=())
def gather_sum(
    values: torch.Tensor, up: torch.Tensor | None, act: str, weight: torch.Tensor | None,
    threshold: torch.Tensor | None, w: torch.Tensor, indices: torch.Tensor | None,
    count: torch.Tensor | None, bias: torch.Tensor | None, ends: list[int],
) -> torch.Tensor:  # fmt: skip
    """Σ_j values[:, j] w[j], (B, n), reading only rows of w (width, n) whose value is not 0.

    values (B, width), whose rows may be apart; with `up`, of the same strides, act(values) * up.
    With indices and count, as `select` gives them, value p is that of row indices[p]. With
    threshold (S, 1 or B) the values that score |value| * weight (S, width) no more are 0, for the
    columns of each of S <= 3 segments, which end at `ends`.
    """
    (batch, width), n = values.shape, w.shape[1]
    out = values.new_empty(batch, n)
    ends = [*ends[:-1], n, n][:2]
    edges = [0, *ends, n]
    per_segment = 0 if threshold is None else threshold.shape[1]

    def run(tile: Tile) -> torch.Tensor:
        rows, columns, warps, programs = tile
        columns = min(columns, max(16, _power(n)))
        blocks = sum(triton.cdiv(end - begin, columns) for begin, end in pairwise(edges))
        wanted = max(1, programs * _processors(values.device) // blocks)
        splits = min(MOST_SPLITS, _power(wanted + 1) // 2, _power(triton.cdiv(width, rows)))
        partial = values.new_empty(splits, batch, n, dtype=torch.float32)
        kernels.gather_sum[(blocks, splits)](
            values, up, weight, threshold, w, indices, count, bias, partial,
            counters(values.device), out, width, n, *ends, values.stride(0), per_segment,
            int(per_segment > 1), B=batch, PAD=_pad(batch), ACT=act, SPLITS=splits,
            BLOCK_R=rows, BLOCK_C=columns, num_warps=warps, num_stages=3,
        )  # fmt: skip
        return out

    listed = indices is not None
    return _launch(("gather_sum", batch, width, n, values.dtype, listed, up is None), run)


@gather_sum.register_fake
def _(
    values: torch.Tensor, up: torch.Tensor | None, act: str, weight: torch.Tensor | None,
    threshold: torch.Tensor | None, w: torch.Tensor, indices: torch.Tensor | None,
    count: torch.Tensor | None, bias: torch.Tensor | None, ends: list[int],
) -> torch.Tensor:  # fmt: skip
    return values.new_empty(len(values), w.shape[1])
