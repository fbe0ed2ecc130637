"""Triton kernels of sparse decoding: at most 8 tokens at once, weights read row by row.

B tokens, d columns of the input, n rows of a weight. Products accumulate in float32, and results
are rounded where transformers rounds them: after each projection, activation and product. No float
is added atomically, so that a result is the same every time. A score is a non-negative float32, and
is compared by its bits as an integer: their order is the same, and NaN is above everything.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # as bits; a threshold is never above, so that NaN is active
# A top-k threshold is looked for in one bin of the scores' upper bits: an exponent's sixteenth,
# where some hundredths of all scores are.
SHIFT = tl.constexpr(19)
BINS = tl.constexpr(1 << (31 - 19))
MOST_SPLITS = tl.constexpr(32)  # which are added up at once


@triton.jit
def _activated(x, ACT: tl.constexpr):
    """act(x) in float32; NaN stays NaN."""
    if ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z), and exp(80) is finite
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(tl.minimum(-2.0 * z, 80.0)))
    elif ACT == "relu":
        x = tl.where(x <= 0.0, 0.0, x)
    elif ACT == "relu2":
        x = tl.where(x <= 0.0, 0.0, x)
        x = x * x
    return x


@triton.jit
def score(value, weight, cols, inside):
    """Bits of |value| * weight; -1, below everything, where not `inside`."""
    found = tl.abs(value.to(tl.float32))
    if weight is not None:
        found = found * tl.load(weight + cols, mask=inside, other=0.0)
    return tl.where(inside, found.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)


@triton.jit
def topk_threshold(bits, k, low, high):
    """A threshold that leaves k scores above it; with ties the smallest that leaves fewer.

    It is in (low, high]: more than k are above `low`, at most k above `high`. Each step counts at
    three places and keeps a quarter of the interval, until there is a gap between neighbours, where
    any threshold does.
    """
    while high - low > 1:
        step = (high - low + 3) >> 2
        first = tl.minimum(low + step, high)
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        # Three counts of at most 2^20 in one reduction.
        above = (bits > first).to(tl.int64)
        above += (bits > second).to(tl.int64) << 20
        above += (bits > third).to(tl.int64) << 40
        counts = tl.sum(above, 0)
        at_first = (counts & 0xFFFFF).to(tl.int32)
        at_second = ((counts >> 20) & 0xFFFFF).to(tl.int32)
        at_third = (counts >> 40).to(tl.int32)
        before = low
        low = tl.where(at_third > k, third, low)
        low = tl.where((at_third <= k) & (at_second > k), second, low)
        low = tl.where((at_second <= k) & (at_first > k), first, low)
        high = tl.where(at_third <= k, third, high)
        high = tl.where(at_second <= k, second, high)
        high = tl.where(at_first <= k, first, high)
        exact = tl.where(at_first == k, first, tl.where(at_second == k, second, third))
        found = (at_first == k) | (at_second == k) | (at_third == k)
        high = tl.where(found, exact, high)
        # `third` may be `high` already, whose count says nothing new.
        low = tl.where(found | (low >= high), high - 1, tl.maximum(low, before))
    return high


@triton.jit
def _dots(
    x, w, rows, inside,
    D: tl.constexpr, B: tl.constexpr, PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x (B, D) times rows of w (n, D): (BLOCK_N,) of one token, or (BLOCK_N, PAD)."""
    if B == 1:
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for k in tl.static_range(0, D, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            values = tl.load(x + cols, mask=cols < D, other=0.0).to(tl.float32)
            weights = tl.load(
                w + rows[:, None] * D + cols[None, :],
                mask=inside[:, None] & (cols < D)[None, :],
                other=0.0,
            )
            sums += values[None, :] * weights.to(tl.float32)
        return tl.sum(sums, 1)
    else:
        tokens = tl.arange(0, PAD)
        dots = tl.zeros((BLOCK_N, PAD), tl.float32)
        for k in range(0, D, BLOCK_K):
            cols = k + tl.arange(0, BLOCK_K)
            values = tl.load(
                x + tokens[None, :] * D + cols[:, None],
                mask=(tokens < B)[None, :] & (cols < D)[:, None],
                other=0.0,
            )
            weights = tl.load(
                w + rows[:, None] * D + cols[None, :],
                mask=inside[:, None] & (cols < D)[None, :],
                other=0.0,
            )
            dots = tl.dot(weights, values, dots, input_precision="ieee")
        return dots


@triton.jit
def gemv(
    x, w, bias, weight, bins, out, n,
    D: tl.constexpr, B: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, n) = act(x (B, D) wᵀ + bias).

    With bins (B, BINS), zeros before, scores of out are counted by their upper bits: the sums are
    of integers, so that the order in which programs add does not show.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    dots = _dots(x, w, rows.to(tl.int64), inside, D, B, PAD, BLOCK_N, BLOCK_K)
    kind = out.dtype.element_ty
    if B == 1:
        if bias is not None:
            dots += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        value = _activated(dots.to(kind).to(tl.float32), ACT).to(kind)
        tl.store(out + rows, value, mask=inside)
        if bins is not None:
            bits = score(value, weight, rows, inside)
            tl.atomic_add(bins + (bits >> SHIFT), 1, mask=inside, sem="relaxed")
    else:
        if bias is not None:
            dots += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
        value = _activated(dots.to(kind).to(tl.float32), ACT).to(kind)
        tokens = tl.arange(0, PAD)
        where = tokens[None, :] * n + rows[:, None]
        real = inside[:, None] & (tokens < B)[None, :]
        tl.store(out + where, value, mask=real)
        if bins is not None:
            bits = score(value, weight, rows[:, None] + 0 * tokens[None, :], real)
            place = tokens[None, :] * BINS + (bits >> SHIFT)
            tl.atomic_add(bins + place, 1, mask=real, sem="relaxed")


@triton.jit
def thresholds(
    values, weight, bins, found, width, k, batch,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """found (S, B): the top-k threshold of each token's scores, as bits; weight (S, width).

    With bins, as `gemv` counted, S is 1, and the search begins in one bin; they are zeroed.
    """
    token, segment = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    value = tl.load(values + token * width + cols, mask=inside, other=0.0)
    if weight is not None:
        weight += segment * width
    bits = score(value, weight, cols, inside)
    low = tl.full((), -2, tl.int32)
    high = tl.full((), INFINITY, tl.int32)
    if bins is not None:
        places = bins + token * BINS + tl.arange(0, BINS)
        at_least = tl.cumsum(tl.load(places), 0, reverse=True)
        tl.store(places, tl.zeros((BINS,), tl.int32))
        bin = tl.sum((at_least > k).to(tl.int32), 0) - 1  # the last that more than k reach
        high = tl.minimum(((bin + 1) << SHIFT) - 1, high)
        low = tl.minimum(tl.where(bin < 0, -2, (bin << SHIFT) - 1), high - 1)
    tl.store(found + segment * batch + token, topk_threshold(bits, k, low, high))


@triton.jit
def _put_inter(
    x, w, bias, gate, late_weight, late_threshold, out, rows, active,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token's gate * (x w[rows] + bias), of active rows."""
    kind = out.dtype.element_ty
    up = _dots(x, w, rows.to(tl.int64), active, D, 1, 1, BLOCK_N, BLOCK_K)
    if bias is not None:
        up += tl.load(bias + rows, mask=active, other=0.0).to(tl.float32)
    inter = (gate.to(tl.float32) * up.to(kind).to(tl.float32)).to(kind)
    if late_threshold is not None:
        bits = score(inter, late_weight, rows, active)
        inter = tl.where(bits > tl.load(late_threshold), inter, 0.0)
    tl.store(out + rows, inter, mask=active)


@triton.jit
def gather_rows(
    x, w, bias, gates, weight, threshold, late_weight, late_threshold, indices, out, n,
    threshold_stride,
    D: tl.constexpr, B: tl.constexpr, PAD: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, n) = gates * (x (B, D) wᵀ + bias) where gates score above the threshold, else 0.

    Rows that no token needs are not read. What then scores at most late_threshold (1,), if there is
    one, becomes 0. A program has GROUP rows; of one token, it lists in `indices` which to read,
    if it reads BLOCK_N < GROUP at once.
    """
    first = tl.program_id(0) * GROUP
    rows = first + tl.arange(0, GROUP)
    inside = rows < n
    kind = out.dtype.element_ty
    if B == 1:
        gate = tl.load(gates + rows, mask=inside, other=0.0)
        active = score(gate, weight, rows, inside) > tl.load(threshold)
        active = active & inside
        count = tl.sum(active.to(tl.int32), 0)
        tl.store(out + rows, tl.zeros((GROUP,), kind), mask=inside & (active == 0))
        if GROUP > BLOCK_N:
            place = tl.cumsum(active.to(tl.int32), 0) - 1
            tl.store(indices + first + place, rows, mask=active)
            tl.debug_barrier()
            for start in range(0, count, BLOCK_N):
                at = start + tl.arange(0, BLOCK_N)
                some = at < count
                listed = tl.load(indices + first + at, mask=some, other=0)
                its_gate = tl.load(gates + listed, mask=some, other=0.0)
                _put_inter(
                    x, w, bias, its_gate, late_weight, late_threshold, out, listed, some, D,
                    BLOCK_N, BLOCK_K,
                )  # fmt: skip
        elif count > 0:
            _put_inter(
                x, w, bias, gate, late_weight, late_threshold, out, rows, active, D, BLOCK_N,
                BLOCK_K,
            )  # fmt: skip
    else:
        tokens = tl.arange(0, PAD)
        real = inside[:, None] & (tokens < B)[None, :]
        where = tokens[None, :] * n + rows[:, None]
        columns = rows[:, None] + 0 * tokens[None, :]
        gate = tl.load(gates + where, mask=real, other=0.0)
        limit = tl.load(threshold + tokens * threshold_stride, mask=tokens < B, other=0)
        active = (score(gate, weight, columns, real) > limit[None, :]) & real
        used = tl.max(active.to(tl.int32), 1) > 0
        up = _dots(x, w, rows.to(tl.int64), used, D, B, PAD, BLOCK_N, BLOCK_K)
        if bias is not None:
            up += tl.load(bias + rows, mask=used, other=0.0).to(tl.float32)[:, None]
        inter = (gate.to(tl.float32) * up.to(kind).to(tl.float32)).to(kind)
        if late_threshold is not None:
            bits = score(inter, late_weight, columns, real)
            active = active & (bits > tl.load(late_threshold))
        tl.store(out + where, tl.where(active, inter, 0.0), mask=real)


@triton.jit
def _inputs(
    values, up, weight, threshold, at, column, inside, ACT: tl.constexpr,
):  # fmt: skip
    """Values, or act(values) * up; 0 where they score at most the threshold, if there is one."""
    value = tl.load(values + at, mask=inside, other=0.0)
    if up is not None:
        kind = value.dtype
        gate = _activated(value.to(tl.float32), ACT).to(kind).to(tl.float32)
        value = (gate * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
    if threshold is not None:
        bits = score(value, weight, column, inside)
        value = tl.where(bits > threshold, value, 0.0)
    return value


@triton.jit
def gather_sum(
    values, up, weight, threshold, w, bias, indices, chosen, partial, arrived, out,
    width, n, end_1, end_2, splits, value_stride, segment_stride, token_stride,
    B: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr, LIST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """out (B, n) = Σ_j values[:, j] w[j], of rows that some token's value is not 0 for.

    values (B, width), of which w (width, n) has a row each. With `up` they are act(values) * up.
    Columns up to end_1, end_2 and n are segments with thresholds of their own. Programs (columns,
    splits): each sums some rows, and the last of its columns to arrive adds the `splits` sums up in
    their order. `arrived` is 0 before and after. Of one token, a program first lists LIST rows at a
    time in `indices` and `chosen` (columns, splits, LIST), so that it has only such under way as it
    needs: half of the rows, or a tenth, took as long as all without (26 and 24 µs of 14336 rows of
    8 KB on an H200).
    """
    block, split = tl.program_id(0), tl.program_id(1)
    blocks_1 = tl.cdiv(end_1, BLOCK_C)
    blocks_2 = blocks_1 + tl.cdiv(end_2 - end_1, BLOCK_C)
    segment = (block >= blocks_1).to(tl.int32) + (block >= blocks_2).to(tl.int32)
    first = tl.where(segment == 0, 0, tl.where(segment == 1, end_1, end_2))
    end = tl.where(segment == 0, end_1, tl.where(segment == 1, end_2, n))
    skipped = tl.where(segment == 0, 0, tl.where(segment == 1, blocks_1, blocks_2))
    cols = first + (block - skipped) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = cols < end
    if threshold is not None:
        threshold += segment * segment_stride
    if weight is not None:
        weight += segment * width
    # A split's rows lie together: neighbours are the same pages of memory.
    rows_each = tl.cdiv(tl.cdiv(width, splits), BLOCK_R) * BLOCK_R
    begin = split * rows_each
    stop = tl.minimum(begin + rows_each, width)
    if B == 1:
        limit = None
        if threshold is not None:
            limit = tl.load(threshold)
        # A warp has every WARPS-th row, and adds up its own in registers.
        sums = tl.zeros((WARPS, BLOCK_C), tl.float32)
        own = (block * splits + split) * LIST
        indices += own
        chosen += own
        each = tl.arange(0, BLOCK_R)
        for start in range(begin, stop, LIST):
            at = start + tl.arange(0, LIST)
            value = _inputs(values, up, weight, limit, at, at, at < stop, ACT).to(tl.float32)
            active = value != 0.0
            place = tl.cumsum(active.to(tl.int32), 0) - 1
            count = tl.sum(active.to(tl.int32), 0)
            tl.debug_barrier()  # what was listed before was read
            tl.store(indices + place, at, mask=active)
            tl.store(chosen + place, value, mask=active)
            tl.debug_barrier()
            rows = tl.load(indices + each, mask=each < count, other=0)
            value = tl.load(chosen + each, mask=each < count, other=0.0)
            for first_row in range(0, count, BLOCK_R):
                read = (first_row + each < count)[:, None] & valid[None, :]
                where = rows.to(tl.int64)[:, None] * n + cols[None, :]
                weights = tl.load(w + where, mask=read, other=0.0)
                # What is next is asked for before this is waited for.
                after = first_row + BLOCK_R + each
                rows = tl.load(indices + after, mask=after < count, other=0)
                factor = value
                value = tl.load(chosen + after, mask=after < count, other=0.0)
                products = factor[:, None] * weights.to(tl.float32)
                sums += tl.sum(tl.reshape(products, (BLOCK_R // WARPS, WARPS, BLOCK_C)), 0)
        tl.store(partial + split * n + cols, tl.sum(sums, 0), mask=valid)
    else:
        tokens = tl.arange(0, PAD)
        limit = None
        if threshold is not None:
            limit = tl.load(threshold + tokens * token_stride, mask=tokens < B, other=0)[:, None]
        dots = tl.zeros((PAD, BLOCK_C), tl.float32)
        for start in range(begin, stop, BLOCK_R):
            at = start + tl.arange(0, BLOCK_R)
            inside = (tokens < B)[:, None] & (at < stop)[None, :]
            place = tokens[:, None] * value_stride + at[None, :]
            column = at[None, :] + 0 * tokens[:, None]
            value = _inputs(values, up, weight, limit, place, column, inside, ACT)
            used = tl.max((value != 0.0).to(tl.int32), 0) > 0
            where = at.to(tl.int64)[:, None] * n + cols[None, :]
            weights = tl.load(w + where, mask=used[:, None] & valid[None, :], other=0.0)
            dots = tl.dot(value.to(w.dtype.element_ty), weights, dots, input_precision="ieee")
        place = (split * B + tokens[:, None]) * n + cols[None, :]
        tl.store(partial + place, dots, mask=(tokens < B)[:, None] & valid[None, :])
    # Every thread's sums are stored before one of them says so.
    tl.debug_barrier()
    if tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.debug_barrier()
        each_split = tl.arange(0, MOST_SPLITS)
        for token in tl.static_range(B):
            of_token = (each_split[:, None] * B + token) * n + cols[None, :]
            some = (each_split < splits)[:, None] & valid[None, :]
            parts = tl.load(partial + of_token, mask=some, other=0.0, cache_modifier=".cg")
            added = tl.sum(parts, 0)
            if bias is not None:
                added += tl.load(bias + cols, mask=valid, other=0.0).to(tl.float32)
            tl.store(out + token * n + cols, added.to(out.dtype.element_ty), mask=valid)
        tl.store(arrived + block, 0)
