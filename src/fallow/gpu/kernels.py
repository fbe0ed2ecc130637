"""Triton kernels of sparse decoding: at most 8 tokens at once, weights read row by row.

B tokens, d columns of the input, n rows of a weight. Products accumulate in float32, and results
are rounded where transformers rounds them: after each projection, activation and product. Nothing
is added atomically, so that a result is the same every time. A score is a non-negative float32, and
is compared by its bits as an integer: their order is the same, and NaN is above everything.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # as bits; a threshold is never above, so that NaN is active


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
def _score(value, weight, cols, inside):
    """Bits of |value| * weight; -1, below everything, where not `inside`."""
    score = tl.abs(value.to(tl.float32))
    if weight is not None:
        score = score * tl.load(weight + cols, mask=inside, other=0.0)
    return tl.where(inside, score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)


@triton.jit
def _topk_threshold(bits, k):
    """A threshold that leaves k scores above it; with ties the smallest that leaves fewer.

    Each step counts at three places and keeps a quarter of the interval (low, high]; some ten
    steps find a gap between neighbours, where any threshold does.
    """
    low = tl.full((), -2, tl.int32)
    high = tl.full((), INFINITY, tl.int32)
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
    x, w, bias, out, n,
    D: tl.constexpr, B: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, n) = act(x (B, D) wᵀ + bias)."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    dots = _dots(x, w, rows.to(tl.int64), inside, D, B, PAD, BLOCK_N, BLOCK_K)
    kind = out.dtype.element_ty
    if B == 1:
        if bias is not None:
            dots += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        value = _activated(dots.to(kind).to(tl.float32), ACT)
        tl.store(out + rows, value.to(kind), mask=inside)
    else:
        if bias is not None:
            dots += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
        value = _activated(dots.to(kind).to(tl.float32), ACT)
        tokens = tl.arange(0, PAD)
        where = tokens[None, :] * n + rows[:, None]
        tl.store(out + where, value.to(kind), mask=inside[:, None] & (tokens < B)[None, :])


@triton.jit
def thresholds(
    values, weight, found, width, k, batch,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """found (S, B): the top-k threshold of each token's scores, as bits; weight (S, width)."""
    token, segment = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    value = tl.load(values + token * width + cols, mask=inside, other=0.0)
    if weight is not None:
        weight += segment * width
    bits = _score(value, weight, cols, inside)
    tl.store(found + segment * batch + token, _topk_threshold(bits, k))


@triton.jit
def select(
    values, weight, threshold, indices, count, chosen, width, k, threshold_stride,
    B: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Active neurons of values (B, width), ascending: the union over tokens.

    indices (width,), count (1,), chosen (B, width): at position p the value of neuron indices[p],
    or 0 where it is inactive in that token. Past `count` nothing is written. One program.
    """
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    active = cols < 0
    for token in tl.static_range(B):
        value = tl.load(values + token * width + cols, mask=inside, other=0.0)
        bits = _score(value, weight, cols, inside)
        if TOPK:  # noqa: SIM108 - Triton compiles one branch alone
            limit = _topk_threshold(bits, k)
        else:
            limit = tl.load(threshold + token * threshold_stride)
        if B == 1:
            active = bits > limit
            at = tl.cumsum(active.to(tl.int32), 0) - 1
            tl.store(chosen + at, value, mask=active)
        else:
            active = active | (bits > limit)
    at = tl.cumsum(active.to(tl.int32), 0) - 1
    tl.store(indices + at, cols, mask=active)
    tl.store(count, tl.sum(active.to(tl.int32), 0))
    if B > 1:
        for token in tl.static_range(B):
            value = tl.load(values + token * width + cols, mask=inside, other=0.0)
            bits = _score(value, weight, cols, inside)
            limit = tl.load(threshold + token * threshold_stride)
            kept = tl.where(bits > limit, value, 0.0)
            tl.store(chosen + token * width + at, kept, mask=active)


@triton.jit
def gather_rows(
    x, w, bias, indices, count, gates, weight, threshold, out, width,
    D: tl.constexpr, B: tl.constexpr, PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, width): at the first `count` positions p gates[:, p] * (x w[i] + bias[i]).

    i = indices[p]. What scores at most `threshold` (1,), if there is one, becomes 0.
    """
    n = tl.load(count)
    kind = out.dtype.element_ty
    for start in range(tl.program_id(0) * BLOCK_N, n, tl.num_programs(0) * BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        inside = at < n
        rows = tl.load(indices + at, mask=inside, other=0)
        up = _dots(x, w, rows.to(tl.int64), inside, D, B, PAD, BLOCK_N, BLOCK_K)
        if bias is not None:
            added = tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
            up += added if B == 1 else added[:, None]
        up = up.to(kind).to(tl.float32)
        if B == 1:
            gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
            inter = (gate * up).to(kind)
            if threshold is not None:
                bits = _score(inter, weight, rows, inside)
                inter = tl.where(bits > tl.load(threshold), inter, 0.0)
            tl.store(out + at, inter, mask=inside)
        else:
            tokens = tl.arange(0, PAD)
            where = tokens[None, :] * width + at[:, None]
            mask = inside[:, None] & (tokens < B)[None, :]
            gate = tl.load(gates + where, mask=mask, other=0.0).to(tl.float32)
            inter = (gate * up).to(kind)
            if threshold is not None:
                bits = _score(inter, weight, rows[:, None] + 0 * tokens[None, :], mask)
                inter = tl.where(bits > tl.load(threshold), inter, 0.0)
            tl.store(out + where, inter, mask=mask)


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
        bits = _score(value, weight, column, inside)
        value = tl.where(bits > threshold, value, 0.0)
    return value


@triton.jit
def gather_sum(
    values, up, weight, threshold, w, indices, count, bias, partial, arrived, out,
    width, n, end_1, end_2, value_stride, segment_stride, token_stride,
    B: tl.constexpr, PAD: tl.constexpr, ACT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (B, n) = Σ_j values[:, j] w[j], of rows that some token's value is not 0 for.

    values (B, width), of which w (width, n) has a row each; with indices value p belongs to row
    indices[p], of the first `count`. With `up` they are act(values) * up. Columns up to end_1,
    end_2 and n are segments with thresholds of their own. Programs (columns, splits): each sums
    some rows, and the last of its columns to arrive adds the SPLITS sums up in their order.
    `arrived` is 0 before and after.
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
    total = width
    if indices is not None:
        total = tl.load(count)
    if B == 1:
        limit = None
        if threshold is not None:
            limit = tl.load(threshold)
        sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(split * BLOCK_R, total, SPLITS * BLOCK_R):
            at = start + tl.arange(0, BLOCK_R)
            inside = at < total
            value = _inputs(values, up, weight, limit, at, at, inside, ACT).to(tl.float32)
            rows = at
            if indices is not None:
                rows = tl.load(indices + at, mask=inside, other=0)
            read = (value != 0.0)[:, None] & valid[None, :]
            where = rows.to(tl.int64)[:, None] * n + cols[None, :]
            sums += value[:, None] * tl.load(w + where, mask=read, other=0.0).to(tl.float32)
        tl.store(partial + split * n + cols, tl.sum(sums, 0), mask=valid)
    else:
        tokens = tl.arange(0, PAD)
        limit = None
        if threshold is not None:
            limit = tl.load(threshold + tokens * token_stride, mask=tokens < B, other=0)[:, None]
        dots = tl.zeros((PAD, BLOCK_C), tl.float32)
        for start in range(split * BLOCK_R, total, SPLITS * BLOCK_R):
            at = start + tl.arange(0, BLOCK_R)
            inside = (tokens < B)[:, None] & (at < total)[None, :]
            place = tokens[:, None] * value_stride + at[None, :]
            column = at[None, :] + 0 * tokens[:, None]
            value = _inputs(values, up, weight, limit, place, column, inside, ACT)
            rows = at
            if indices is not None:
                rows = tl.load(indices + at, mask=at < total, other=0)
            used = tl.max((value != 0.0).to(tl.int32), 0) > 0
            where = rows.to(tl.int64)[:, None] * n + cols[None, :]
            weights = tl.load(w + where, mask=used[:, None] & valid[None, :], other=0.0)
            dots = tl.dot(value.to(w.dtype.element_ty), weights, dots, input_precision="ieee")
        place = (split * B + tokens[:, None]) * n + cols[None, :]
        tl.store(partial + place, dots, mask=(tokens < B)[:, None] & valid[None, :])
    # Every thread's sums are stored before one of them says so.
    tl.debug_barrier()
    if tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.debug_barrier()
        splits = tl.arange(0, SPLITS)
        for token in tl.static_range(B):
            each = (splits[:, None] * B + token) * n + cols[None, :]
            parts = tl.load(partial + each, mask=valid[None, :], other=0.0, cache_modifier=".cg")
            added = tl.sum(parts, 0)
            if bias is not None:
                added += tl.load(bias + cols, mask=valid, other=0.0).to(tl.float32)
            tl.store(out + token * n + cols, added.to(out.dtype.element_ty), mask=valid)
        tl.store(arrived + block, 0)
