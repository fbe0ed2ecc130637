"""Operators of sparse decoding for torch: one launch each, that graphs can capture.

None waits for the device, and no shape depends on data. Thresholds are tensors (their bits as
int32), so that other thresholds need no new graph.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import triton

from fallow.gpu import kernels

TOKENS = 8  # at most, in one call
MULTIPLE = 16  # of tokens in a matrix product of several


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched."""

    rows: int
    columns: int
    warps: int = 4
    programs: int = 0  # per multiprocessor, where a kernel divides its work so
    group: int = 0  # rows of a program that reads `rows` at once


# By operator, for one token and for several, the default first; `tuning` chooses.
TILES: dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    "gemv": (
        (Tile(4, 1024), Tile(2, 1024), Tile(8, 1024, 8), Tile(1, 4096), Tile(2, 4096)),
        (Tile(16, 256), Tile(32, 256), Tile(32, 128)),
    ),
    "gather_rows": (
        (
            Tile(4, 1024), Tile(2, 1024), Tile(2, 4096), Tile(4, 1024, group=16),
            Tile(4, 1024, group=32), Tile(2, 4096, group=16), Tile(2, 4096, group=32),
        ),
        (Tile(16, 256), Tile(32, 256), Tile(16, 128)),
    ),
    # A multiprocessor needs some 26 KB under way to keep up with 4 TB/s at a latency of 0.8 µs.
    "gather_sum": (
        (
            Tile(32, 256, 4, 4), Tile(16, 256, 4, 5), Tile(32, 128, 4, 5), Tile(16, 512, 4, 4),
            Tile(32, 512, 8, 2), Tile(64, 128, 4, 4), Tile(32, 256, 4, 2),
        ),
        (Tile(32, 128, 4, 4), Tile(64, 128, 4, 4), Tile(32, 256, 4, 4)),
    ),
}  # fmt: skip
LONGEST_LIST = 1024
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
    """Median time on the device, with caches full of something else; inf of too large a tile."""
    try:
        run()
    except triton.runtime.errors.OutOfResources:
        return math.inf
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


@cache
def _bins(device: torch.device) -> torch.Tensor:
    """Zeros that `gemv` counts scores in and `thresholds` leaves zero; made like `counters`."""
    return torch.zeros(TOKENS, kernels.BINS.value, dtype=torch.int32, device=device)


def prepare(device: torch.device) -> None:
    """Makes what operators keep on a device: to be called before a graph is captured."""
    counters(device)
    _bins(device)


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


def _block_k(d: int, most: int) -> int:
    """Columns at once: a power of two, of which the last block uses a part."""
    return max(16, min(most, _power(d)))


def _pad(tokens: int) -> int:
    return 1 if tokens == 1 else MULTIPLE


@torch.library.custom_op("fallow::gemv", mutates_args=())
def gemv(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, act: str,
    counted: bool = False, weight: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """act(x wᵀ + bias), (B, n), of x (B, d) and w (n, d).

    `counted`: `thresholds`, called next with `counted` and the same weight (n,), is quicker. What
    was counted is kept by device: no other stream may do the same meanwhile.
    """
    (batch, d), n = x.shape, len(w)
    out = x.new_empty(batch, n)

    def run(tile: Tile) -> torch.Tensor:
        kernels.gemv[(triton.cdiv(n, tile.rows),)](
            x, w, bias, weight if counted else None, _bins(x.device) if counted else None, out, n,
            D=d, B=batch, PAD=_pad(batch), ACT=act, BLOCK_N=tile.rows,
            BLOCK_K=_block_k(d, tile.columns), num_warps=tile.warps, num_stages=4,
        )  # fmt: skip
        return out

    key = ("gemv", batch, n, d, x.dtype, counted)
    found = _launch(key, run)
    if _tuning and counted:  # a tile counts when it is tried
        _bins(x.device).zero_()
        found = _launch(key, run)
    return found


@gemv.register_fake
def _(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, act: str,
    counted: bool = False, weight: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(len(x), len(w))


@torch.library.custom_op("fallow::thresholds", mutates_args=())
def thresholds(
    values: torch.Tensor, weight: torch.Tensor | None, k: int, counted: bool = False
) -> torch.Tensor:
    """Bits (S, B) of thresholds that leave k scores |values| * weight of each token above them.

    values (B, width); weight (S, width), or None for S = 1. `counted`: values are what `gemv`,
    called last, counted; S is 1.
    """
    (batch, width), segments = values.shape, 1 if weight is None else len(weight)
    found = values.new_empty(segments, batch, dtype=torch.int32)
    block = _power(width)
    kernels.thresholds[(batch, segments)](
        values, weight, _bins(values.device) if counted else None, found, width, k, batch,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return found


@thresholds.register_fake
def _(
    values: torch.Tensor, weight: torch.Tensor | None, k: int, counted: bool = False
) -> torch.Tensor:
    segments = 1 if weight is None else len(weight)
    return values.new_empty(segments, len(values), dtype=torch.int32)


def _warps(block: int) -> int:
    """For a row in one program: sixteen values a thread, if that many threads are allowed."""
    return min(32, max(4, block // 512))


@torch.library.custom_op("fallow::gather_rows", mutates_args=())
def gather_rows(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, gates: torch.Tensor,
    weight: torch.Tensor | None, threshold: torch.Tensor, late_weight: torch.Tensor | None,
    late_threshold: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """gates * (x wᵀ + bias) where |gates| * weight is above the threshold, else 0, (B, width).

    x (B, d), w (width, d), weight (width,), threshold (1,), or (B,) for each token its own. Rows of
    w that no token needs are not read. What then scores |value| * late_weight at most
    late_threshold (1,), if there is one, is 0.
    """
    (batch, d), width = x.shape, gates.shape[1]
    out = torch.empty_like(gates)
    own = int(threshold.numel() > 1)
    indices = gates.new_empty(width, dtype=torch.int32)

    def run(tile: Tile) -> torch.Tensor:
        group = max(tile.rows, tile.group)
        kernels.gather_rows[(triton.cdiv(width, group),)](
            x, w, bias, gates, weight, threshold, late_weight, late_threshold, indices, out, width,
            own, D=d, B=batch, PAD=_pad(batch), GROUP=group, BLOCK_N=tile.rows,
            BLOCK_K=_block_k(d, tile.columns), num_warps=tile.warps, num_stages=4,
        )  # fmt: skip
        return out

    return _launch(("gather_rows", batch, width, d, x.dtype, late_threshold is None), run)


@gather_rows.register_fake
def _(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, gates: torch.Tensor,
    weight: torch.Tensor | None, threshold: torch.Tensor, late_weight: torch.Tensor | None,
    late_threshold: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return torch.empty_like(gates)


@torch.library.custom_op("fallow::gather_sum", mutates_args=())
def gather_sum(
    values: torch.Tensor, up: torch.Tensor | None, act: str, weight: torch.Tensor | None,
    threshold: torch.Tensor | None, w: torch.Tensor, bias: torch.Tensor | None, ends: list[int],
) -> torch.Tensor:  # fmt: skip
    """Σ_j values[:, j] w[j], (B, n), reading only rows of w (width, n) whose value is not 0.

    values (B, width), whose rows may be apart; with `up`, of the same strides, act(values) * up.
    With threshold (S, 1 or B) the values that score |value| * weight (S, width) no more are 0, for
    the columns of each of S <= 3 segments, which end at `ends`.
    """
    (batch, width), n = values.shape, w.shape[1]
    out = values.new_empty(batch, n)
    ends = [*ends[:-1], n, n][:2]
    edges = [0, *ends, n]
    per_segment = 0 if threshold is None else threshold.shape[1]

    def run(tile: Tile) -> torch.Tensor:
        columns = min(tile.columns, max(16, _power(n)))
        blocks = sum(triton.cdiv(end - begin, columns) for begin, end in pairwise(edges))
        wanted = max(1, tile.programs * _processors(values.device) // blocks)
        splits = min(kernels.MOST_SPLITS.value, wanted, triton.cdiv(width, tile.rows))
        most = min(LONGEST_LIST, _power(triton.cdiv(width, splits) + tile.rows))
        partial = values.new_empty(splits, batch, n, dtype=torch.float32)
        listed = blocks * splits * most if batch == 1 else 1
        indices = values.new_empty(listed, dtype=torch.int32)
        chosen = values.new_empty(listed, dtype=torch.float32)
        kernels.gather_sum[(blocks, splits)](
            values, up, weight, threshold, w, bias, indices, chosen, partial,
            counters(values.device), out, width, n, *ends, splits, values.stride(0), per_segment,
            int(per_segment > 1), B=batch, PAD=_pad(batch), ACT=act, LIST=most, BLOCK_R=tile.rows,
            BLOCK_C=columns, WARPS=tile.warps, num_warps=tile.warps,
        )  # fmt: skip
        return out

    return _launch(("gather_sum", batch, width, n, values.dtype, up is None), run)


@gather_sum.register_fake
def _(
    values: torch.Tensor, up: torch.Tensor | None, act: str, weight: torch.Tensor | None,
    threshold: torch.Tensor | None, w: torch.Tensor, bias: torch.Tensor | None, ends: list[int],
) -> torch.Tensor:  # fmt: skip
    return values.new_empty(len(values), w.shape[1])
