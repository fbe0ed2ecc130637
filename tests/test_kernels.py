"""Every kernel table against numpy and the portable twin, every quantisation type."""

from functools import cache

import gguf
import numpy as np
import pytest

from fallow import _core, _kernel_tests
from fallow.packing.quantize import dequantize, quantize

FLOAT_TYPES = ("F32", "F16", "BF16")
BLOCK_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_TYPES = ("Q4_K", "Q5_K", "Q6_K")
# Read, and never written: nothing here quantises to them.
LOOKED_UP = ("IQ4_NL", "IQ4_XS", "MXFP4")
TYPES = FLOAT_TYPES + BLOCK_TYPES + K_TYPES + LOOKED_UP
ROWS = (1, 7, 8, 31, 32, 33)
TABLES = _core.KERNELS


def widths(kind: str) -> tuple[int, ...]:
    if kind in (*K_TYPES, "IQ4_XS"):
        return (256, 1536)
    return (1, 7, 31, 33, 576) if kind in FLOAT_TYPES else (32, 96, 576, 1536)


CASES = [(t, kind, width) for t in TABLES for kind in TYPES for width in widths(kind)]


@cache
def make(kind: str, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored bytes (flat), and the values they stand for, (rows, width); not to be changed."""
    rng = np.random.default_rng([rows, width])
    if kind in LOOKED_UP:
        return make_looked_up(kind, rows, width, rng)
    values = rng.standard_normal((rows, width)).astype(np.float32)
    if kind == "F32":
        return values.view(np.uint8).reshape(-1), values
    matrix = quantize(values, kind)
    return np.ascontiguousarray(matrix.data).reshape(-1), dequantize(matrix)


def make_looked_up(
    kind: str, rows: int, width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of any bits, with scales of some size."""
    size, n_bytes = _core.FORMATS[kind]
    blocks = rng.integers(0, 256, (rows * width // size, n_bytes)).astype(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(120, 130, len(blocks))
    else:
        halves = rng.uniform(0.5, 2, len(blocks)).astype("<f2")
        blocks[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    data = blocks.reshape(rows, -1)
    return data.reshape(-1), gguf.dequantize(data, gguf.GGMLQuantizationType[kind])


def choose(rows: int, sparsity: float) -> np.ndarray:
    """Ascending rows, `sparsity` of them left out."""
    order = np.random.default_rng(rows).permutation(rows)
    return np.sort(order[: round(rows * (1 - sparsity))]).astype(np.int32)


def close(found: np.ndarray, expected: np.ndarray, error: float, scale: float) -> None:
    assert np.abs(found - expected).max(initial=0) <= error * scale


@pytest.mark.parametrize(("table", "kind", "width"), CASES)
def test_gemv_rows(table: str, kind: str, width: int) -> None:
    x = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    for rows in ROWS:
        data, values = make(kind, rows, width)
        expected = values.astype(np.float64) @ x
        # 16-bit activations: at most 2^-16 of the largest of 32 values each.
        scale = np.abs(values).sum(axis=1).max() * np.abs(x).max()
        y = np.empty(rows, dtype=np.float32)
        _kernel_tests.gemv_rows(table, kind, data, x, None, y)
        close(y, expected, 3e-5, scale)
        for sparsity in (0, 0.5, 1):
            chosen = choose(rows, sparsity)
            some = np.empty(len(chosen), dtype=np.float32)
            _kernel_tests.gemv_rows(table, kind, data, x, chosen, some)
            np.testing.assert_array_equal(some, y[chosen])  # a row does not depend on the others


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("width", [4, 64, 100, 576, 640, 1536])
def test_rows_in_two_bits(table: str, width: int) -> None:
    for rows in ROWS:
        rng = np.random.default_rng([rows, width])
        codes = rng.integers(0, 4, (rows, width), dtype=np.uint8)
        scale = rng.standard_normal((rows, 1)).astype(np.float32)
        values = (codes - 1.5) * scale
        first, second, third, fourth = np.split(codes, 4, axis=1)
        packed = first | second << 2 | third << 4 | fourth << 6
        data = np.concatenate([packed, scale.view(np.uint8)], axis=1).reshape(-1)
        x = rng.standard_normal(width).astype(np.float32)
        y = np.empty(rows, dtype=np.float32)
        _kernel_tests.gemv_rows(table, "two_bits", data, x, None, y)
        close(y, values @ x, 3e-5, np.abs(values).sum(axis=1).max() * np.abs(x).max())
        chosen = choose(rows, 0.5)
        some = np.empty(len(chosen), dtype=np.float32)
        _kernel_tests.gemv_rows(table, "two_bits", data, x, chosen, some)
        np.testing.assert_array_equal(some, y[chosen])
        decoded = np.empty(width, dtype=np.float32)
        _kernel_tests.decode(table, "two_bits", data[: width // 4 + 4], decoded)
        np.testing.assert_allclose(decoded, values[0], rtol=1e-6)


@pytest.mark.parametrize(("table", "kind", "width"), CASES)
def test_axpy_rows(table: str, kind: str, width: int) -> None:
    for rows in ROWS:
        data, values = make(kind, rows, width)
        coefficient = np.random.default_rng(2).standard_normal(rows).astype(np.float32)
        for sparsity in (0, 0.5, 1):
            chosen = choose(rows, sparsity)
            y = np.ones(width, dtype=np.float32)
            _kernel_tests.axpy_rows(table, kind, data, coefficient[chosen], chosen, y)
            expected = 1 + coefficient[chosen].astype(np.float64) @ values[chosen]
            # 8-bit coefficients, one scale for four rows: 1/254 of the largest of four products.
            error = 1e-5 if kind in FLOAT_TYPES or table == "portable" else 1 / 254
            close(y, expected, error, max(1, 4 * np.abs(coefficient).max() * np.abs(values).max()))
        whole = np.zeros(width, dtype=np.float32)
        _kernel_tests.axpy_rows(table, kind, data, coefficient, None, whole)
        listed = np.zeros(width, dtype=np.float32)
        every = np.arange(rows, dtype=np.int32)
        _kernel_tests.axpy_rows(table, kind, data, coefficient, every, listed)
        np.testing.assert_array_equal(whole, listed)


SEVERAL_ROWS, SEVERAL = 48, 7
PRODUCTS = [(*case, what) for case in CASES for what in _kernel_tests.products(*case)]


def of_several(what: str) -> list[tuple[str, str, int, bool]]:
    return [(*case, "tiles" in found) for *case, found in PRODUCTS if found.startswith(what)]


@pytest.mark.parametrize(("table", "kind", "width", "tiled"), of_several("gemv"))
def test_gemv_of_several_tokens_is_that_of_each(
    table: str, kind: str, width: int, tiled: bool
) -> None:
    x = np.random.default_rng(5).standard_normal((SEVERAL, width)).astype(np.float32)
    data, _ = make(kind, SEVERAL_ROWS, width)
    found = np.empty((SEVERAL, SEVERAL_ROWS), dtype=np.float32)
    _kernel_tests.gemv_tokens(table, kind, data, x, tiled, found)
    for token, values in zip(found, x, strict=True):
        y = np.empty(SEVERAL_ROWS, dtype=np.float32)
        _kernel_tests.gemv_rows(table, kind, data, values, None, y)
        np.testing.assert_array_equal(token, y)


def in_one_digit(width: int) -> np.ndarray:
    """Tokens (SEVERAL, width), of which every third has a value for which one digit is too few."""
    x = np.random.default_rng(8).uniform(-1, 1, (SEVERAL, width)).astype(np.float32)
    x[::3, ::32] *= 50
    return x


@pytest.mark.parametrize("table", TABLES)
def test_one_digit_is_enough_unless_values_are_far_apart(table: str) -> None:
    found = [_kernel_tests.has_one_digit(table, x) for x in in_one_digit(64)]
    assert found == [i % 3 > 0 for i in range(SEVERAL)]
    assert not _kernel_tests.has_one_digit(table, np.full(64, np.nan, dtype=np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("table", "kind", "width"), [c for c in CASES if c[1] not in FLOAT_TYPES])
def test_what_has_no_digits_is_not_lost(table: str, kind: str, width: int, bad: float) -> None:
    """NaN in the middle of a group, where the largest value of those around it would hide it."""
    data, _ = make(kind, SEVERAL_ROWS, width)
    x = in_one_digit(width)[1]
    x[5] = bad
    y = np.zeros(SEVERAL_ROWS, dtype=np.float32)
    _kernel_tests.gemv_rows(table, kind, data, x, None, y, True)
    assert np.isnan(y).all()


@pytest.mark.parametrize(("table", "kind", "width"), [c for c in CASES if c[1] not in FLOAT_TYPES])
def test_one_digit_alone_is_that_with_a_lower_one_of_0(table: str, kind: str, width: int) -> None:
    data, values = make(kind, SEVERAL_ROWS, width)
    for x in in_one_digit(width):
        y = np.empty((2, SEVERAL_ROWS), dtype=np.float32)
        for told, row in enumerate(y):
            _kernel_tests.gemv_rows(table, kind, data, x, None, row, True, bool(told))
        np.testing.assert_array_equal(y[0], y[1])
        scale = np.abs(values).sum(axis=1).max() * np.abs(x).max()
        close(y[0], values.astype(np.float64) @ x, 1 / 254 + 3e-5, scale)


@pytest.mark.parametrize(("table", "kind", "width", "tiled"), of_several("gemv"))
def test_several_tokens_may_have_different_digits(
    table: str, kind: str, width: int, tiled: bool
) -> None:
    if kind in FLOAT_TYPES:
        pytest.skip("floats have no digits")
    x, (data, _) = in_one_digit(width), make(kind, SEVERAL_ROWS, width)
    found = np.empty((SEVERAL, SEVERAL_ROWS), dtype=np.float32)
    for tokens in (slice(0, SEVERAL), slice(1, 3)):  # some in one digit, and all
        some = found[tokens]
        _kernel_tests.gemv_tokens(table, kind, data, x[tokens], tiled, some, True)
        for token, values in zip(some, x[tokens], strict=True):
            y = np.empty(SEVERAL_ROWS, dtype=np.float32)
            _kernel_tests.gemv_rows(table, kind, data, values, None, y, True)
            np.testing.assert_array_equal(token, y)


@pytest.mark.parametrize(("table", "kind", "width", "tiled"), of_several("axpy"))
def test_axpy_of_several_tokens_is_that_of_each(
    table: str, kind: str, width: int, tiled: bool
) -> None:
    shape = (SEVERAL, SEVERAL_ROWS)
    coefficient = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    coefficient[:, ::5] = 0
    data, _ = make(kind, SEVERAL_ROWS, width)
    found = np.zeros((SEVERAL, width), dtype=np.float32)
    _kernel_tests.axpy_tokens(table, kind, data, coefficient, tiled, found)
    for token, values in zip(found, coefficient, strict=True):
        y = np.zeros(width, dtype=np.float32)
        _kernel_tests.axpy_rows(table, kind, data, values, None, y)
        np.testing.assert_array_equal(token, y)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("table", TABLES)
def test_a_coefficient_that_is_no_number_is_told(table: str, kind: str) -> None:
    data, _ = make(kind, 16, 256)
    coefficient = np.ones(16, dtype=np.float32)
    coefficient[3] = np.nan
    y = np.zeros(256, dtype=np.float32)
    _kernel_tests.axpy_rows(table, kind, data, coefficient, None, y)
    assert np.isnan(y).all()


@pytest.mark.parametrize(("table", "kind", "width"), CASES)
def test_decode(table: str, kind: str, width: int) -> None:
    data, values = make(kind, 1, width)
    y = np.empty(width, dtype=np.float32)
    _kernel_tests.decode(table, kind, data, y)
    np.testing.assert_allclose(y, values[0], rtol=1e-6, atol=1e-6)


HALF = [case for case in CASES if case[0] == "avx512_bf16" and case[2] % 2 == 0]
WITH_BYTES = [table for table in TABLES if table.startswith("avx512")]
BYTES = [c for c in CASES if c[0] in WITH_BYTES and c[1] in (*BLOCK_TYPES, "Q4_K", "Q5_K")]
TOKENS = (1, 5, 13)


@pytest.mark.parametrize(
    ("table", "kind", "width", "half"),
    [(*case, False) for case in CASES] + [(*case, True) for case in HALF],
)
def test_gemm(table: str, kind: str, width: int, half: bool) -> None:
    for rows in ROWS:
        for tokens in TOKENS:
            data, values = make(kind, rows, width)
            x = np.random.default_rng(tokens).standard_normal((tokens, width)).astype(np.float32)
            y = np.empty((tokens, rows), dtype=np.float32)
            _kernel_tests.gemm(table, kind, data, x, y, "bfloat16" if half else "floats")
            expected = x.astype(np.float64) @ values.T
            close(y, expected, 2**-7 if half else 1e-5, np.abs(values).max() * np.sqrt(width) * 4)


def rounded(x: np.ndarray) -> np.ndarray:
    """Groups of 32 along the last axis, as bytes with a scale each."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.where(largest > 0, np.rint(groups * (np.float32(127) / largest)), 0)
    return (whole * (largest / 127).astype(np.float64)).reshape(x.shape)


@pytest.mark.parametrize(("table", "kind", "width"), BYTES)
def test_gemm_in_bytes(table: str, kind: str, width: int) -> None:
    for rows in ROWS:
        for tokens in TOKENS:
            data, values = make(kind, rows, width)
            x = np.random.default_rng(tokens).standard_normal((tokens, width)).astype(np.float32)
            x[0, :32] = 0
            y = np.empty((tokens, rows), dtype=np.float32)
            _kernel_tests.gemm(table, kind, data, x, y, "bytes")
            expected = rounded(x) @ values.T.astype(np.float64)
            close(y, expected, 1e-5, np.abs(values).max() * np.sqrt(width) * 4)
            one = np.empty((1, rows), dtype=np.float32)  # a token does not depend on the others
            _kernel_tests.gemm(table, kind, data, x[-1:], one, "bytes")
            np.testing.assert_array_equal(one[0], y[-1])
            if rows % 16 == 0 and "gemv of tiles" in _kernel_tests.products(table, kind, width):
                tiles = np.empty_like(y)
                _kernel_tests.gemm(table, kind, data, x, tiles, "bytes of tiles")
                np.testing.assert_array_equal(tiles, y)


@pytest.mark.parametrize("table", WITH_BYTES)
def test_bytes_tell_of_what_is_no_number(table: str) -> None:
    data, _ = make("Q4_0", 32, 64)
    x = np.ones((2, 64), dtype=np.float32)
    x[1, 3] = np.nan
    y = np.empty((2, 32), dtype=np.float32)
    _kernel_tests.gemm(table, "Q4_0", data, x, y, "bytes")
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    weights = np.ones((32, 16), dtype=np.float32)
    weights[5, 7] = np.nan
    sums = np.zeros((1, 16), dtype=np.float32)
    _kernel_tests.sum_rows_bytes(table, weights, np.ones((1, 32), dtype=np.float32), sums)
    assert np.flatnonzero(np.isnan(sums[0])).tolist() == [7]


@pytest.mark.parametrize("table", WITH_BYTES)
@pytest.mark.parametrize("rows", [32, 96, 1536])
@pytest.mark.parametrize("columns", [1, 15, 16, 33, 64])
def test_sums_of_rows_in_bytes(table: str, rows: int, columns: int) -> None:
    rng = np.random.default_rng([rows, columns])
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    w[:32, 0] = 0
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, rows)).astype(np.float32)
        y = np.ones((tokens, columns), dtype=np.float32)
        _kernel_tests.sum_rows_bytes(table, w, x, y)
        expected = 1 + rounded(x) @ rounded(np.ascontiguousarray(w.T)).T
        close(y, expected, 1e-5, np.abs(w).max() * np.sqrt(rows) * 4)


@pytest.mark.parametrize("table", [table for table in TABLES if table.startswith("avx")])
def test_gemm_of_halves_is_that_of_floats_to_the_bit(table: str) -> None:
    rng = np.random.default_rng(6)
    for rows, width in ((32, 64), (45, 100)):
        data = rng.standard_normal((rows, width)).astype(np.float16).view(np.uint8).reshape(-1)
        for tokens in TOKENS:
            x = rng.standard_normal((tokens, width)).astype(np.float32)
            halves, floats = np.empty((2, tokens, rows), dtype=np.float32)
            _kernel_tests.gemm(table, "F16", data, x, halves, "halves")
            _kernel_tests.gemm(table, "F16", data, x, floats, "floats")
            np.testing.assert_array_equal(halves, floats)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K"])
def test_types_without_a_quantiser_decode_as_gguf_does(kind: str) -> None:
    block, n_bytes = _core.FORMATS[kind]
    data = np.random.default_rng(4).integers(0, 60, (3, 2 * n_bytes)).astype(np.uint8)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    x = np.random.default_rng(5).standard_normal(2 * block).astype(np.float32)
    for table in TABLES:
        y = np.empty(3, dtype=np.float32)
        _kernel_tests.gemv_rows(table, kind, data.reshape(-1), x, None, y)
        scale = np.abs(expected).sum(axis=1).max() * np.abs(x).max()
        close(y, expected.astype(np.float64) @ x, 3e-5, scale)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("size", [1, 7, 8, 31, 32, 33, 576])
def test_activation_functions(table: str, size: int) -> None:
    x = (8 * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    wide = x.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    exponentials = np.exp(wide - wide.max())
    expected = {
        "silu": wide / (1 + np.exp(-wide)),
        "gelu_tanh": 0.5 * wide * (1 + np.tanh(inner)),
        "softmax": exponentials / exponentials.sum(),
    }
    for name, values in expected.items():
        y = x.copy()
        _kernel_tests.activation(table, name, y)
        np.testing.assert_allclose(y, values, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", K_TYPES)
def test_our_quantisers_are_close(kind: str) -> None:
    values = np.random.default_rng(3).standard_normal((16, 512)).astype(np.float32)
    values[3] = 0
    matrix = quantize(values, kind)
    stored = gguf.dequantize(matrix.data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(stored, dequantize(matrix))  # gguf reads what we write
    assert (stored[3] == 0).all()
    # Of normal values with 4, 5 and 6 bits; a uniform grid over +-2.5 sigma would do no better.
    limit = {"Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.022}[kind]
    rest = np.delete(np.arange(16), 3)
    error = np.sqrt(np.mean((stored[rest] - values[rest]) ** 2))
    assert error < limit


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("width", [1, 7, 8, 33, 100, 8960, 40_001])
def test_what_is_kept(kernels: str, width: int) -> None:
    random = np.random.default_rng(width)
    normal = np.abs(random.standard_normal(width)).astype(np.float32)
    steps = random.integers(0, max(2, width // 3), width).astype(np.float32)  # with zeros and ties
    for values in (normal, steps, np.full(width, 0.5, np.float32)):
        for k in {0, width // 10, width // 2, width - 1}:
            expected = np.sort(values)[width - k - 1]
            assert _kernel_tests.topk_threshold(kernels, values, k) == expected
        assert _kernel_tests.topk_threshold(kernels, values, width) == 0
        above = np.where(values > np.median(values), values, np.float32(-0.0))
        for begin in {0, width // 3}:
            kept = begin + np.flatnonzero(above[begin:])
            assert _kernel_tests.list_nonzero(kernels, above, begin) == kept.tolist()


def test_topk_thresholds_leave_k() -> None:
    scores = np.abs(np.random.default_rng(6).standard_normal((5, 101))).astype(np.float32)
    for k in (0, 1, 50, 100, 101):
        found = np.empty(5, dtype=np.float32)
        _core.topk_thresholds(scores, k, found)
        assert ((scores > found[:, None]).sum(axis=1) == k).all()
