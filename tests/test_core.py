"""The compiled core against numpy and the gguf package."""

import contextlib
import struct
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow import _core
from fallow.common.metrics import bin_edges, histogram_quantile

RNG = np.random.default_rng(0)
SCALE_OFFSETS = {  # byte offsets of the f16 scales in a block
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(kind: str, n_blocks: int) -> np.ndarray:
    """Blocks of random bits with finite scales."""
    block_bytes = _core.FORMATS[kind][1]
    blocks = RNG.integers(0, 256, (n_blocks, block_bytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS[kind]:
        scales = RNG.normal(0, 0.1, n_blocks).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n_blocks", [1, 7, 129])
@pytest.mark.parametrize("kind", SCALE_OFFSETS)
def test_dequantize_equals_gguf(kind: str, n_blocks: int, threads: int) -> None:
    blocks = random_blocks(kind, n_blocks)
    ours = np.empty(n_blocks * _core.FORMATS[kind][0], dtype=np.float32)
    _core.dequantize(kind, blocks.reshape(-1), ours, threads)
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(-1)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


def test_f16_and_bf16_are_exact() -> None:
    half = np.arange(65536, dtype=np.uint16).view(np.float16)
    ours = np.empty(65536, dtype=np.float32)
    _core.dequantize("F16", half.view(np.uint8), ours)
    np.testing.assert_array_equal(ours, half.astype(np.float32))
    bits = np.arange(65536, dtype=np.uint32)
    _core.dequantize("BF16", bits.astype(np.uint16).view(np.uint8), ours)
    np.testing.assert_array_equal(ours, (bits << 16).astype(np.uint32).view(np.float32))


def test_dequantize_refuses_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="sizes do not match"):
        _core.dequantize("Q4_0", np.zeros(17, np.uint8), np.zeros(32, np.float32))
    with pytest.raises(ValueError, match="unsupported type IQ1_S"):
        _core.dequantize("IQ1_S", np.zeros(50, np.uint8), np.zeros(256, np.float32))


def counted(values: np.ndarray, threads: int = 1) -> tuple[np.ndarray, int, int]:
    counts = np.zeros(_core.HISTOGRAM_BINS, dtype=np.uint64)
    zeros, bad = _core.add_magnitudes(values.astype(np.float32), counts, threads)
    return counts, zeros, bad


@pytest.mark.parametrize("threads", [1, 4])
def test_histogram_counts_are_exact(threads: int) -> None:
    values = np.concatenate(
        [RNG.normal(0, 1, 100_000), RNG.normal(0, 1e-3, 99_999), np.zeros(17)]
    ).astype(np.float32)
    counts, zeros, bad = counted(values, threads)
    expected, _ = np.histogram(np.abs(values).astype(np.float64), bin_edges())
    np.testing.assert_array_equal(counts, expected)
    assert (zeros, bad) == (17, 0)


def test_histogram_extremes() -> None:
    values = np.array([1e-30, 1e30, -0.0, np.nan, np.inf, -np.inf], dtype=np.float32)
    counts, zeros, bad = counted(values)
    assert (counts[0], counts[-1], zeros, bad) == (2, 1, 1, 3)


@pytest.mark.parametrize("q", [0.01, 0.3, 0.5, 0.77, 0.99, 1.0])
def test_histogram_quantile_is_numpys_percentile(q: float) -> None:
    values = np.abs(RNG.standard_t(3, 50_001)).astype(np.float32)
    exact = np.percentile(values, 100 * q)
    assert histogram_quantile(counted(values)[0], q) == pytest.approx(exact, rel=1e-3)


def test_histogram_quantile_zero_is_zero() -> None:
    assert histogram_quantile(counted(np.ones(5))[0], 0) == 0
    assert histogram_quantile(counted(np.zeros(0))[0], 0.5) == 0


def scores_with_ties(rows: int, width: int) -> np.ndarray:
    return RNG.integers(0, max(2, width // 2), (rows, width)).astype(np.float32) / 8


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 1537])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_topk_thresholds(width: int, kept: float, threads: int) -> None:
    k = round(kept * width)
    for scores in (scores_with_ties(5, width), RNG.random((5, width), dtype=np.float32)):
        found = np.empty(5, dtype=np.float32)
        _core.topk_thresholds(scores, k, found, threads)
        expected = np.sort(scores, axis=1)[:, width - k - 1] if k < width else np.zeros(5)
        np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 1537])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 1.0])
def test_tail_thresholds(width: int, tau: float, threads: int) -> None:
    for scores in (scores_with_ties(5, width), RNG.random((5, width), dtype=np.float32)):
        found = np.empty(5, dtype=np.float32)
        _core.tail_thresholds(scores, tau, found, threads)
        for row, threshold in zip(scores.astype(np.float64), found, strict=True):
            budget = tau**2 * (row**2).sum()
            fits = [t for t in row if (row[row <= t] ** 2).sum() <= budget * (1 + 1e-12)]
            assert threshold == max(fits, default=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 1537])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_mass_thresholds(width: int, share: float, threads: int) -> None:
    for scores in (scores_with_ties(5, width), RNG.random((5, width), dtype=np.float32)):
        found = np.empty(5, dtype=np.float32)
        _core.mass_thresholds(scores, share, found, threads)
        for row, threshold in zip(scores.astype(np.float64), found, strict=True):
            fits = [t for t in row if row[row <= t].sum() <= share * row.sum() * (1 + 1e-12)]
            assert threshold == max(fits, default=0)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=12), st.floats(0, 1))
def test_tail_budget_is_never_exceeded(values: list[float], tau: float) -> None:
    row = np.array([values], dtype=np.float32)
    found = np.empty(1, dtype=np.float32)
    _core.tail_thresholds(row, tau, found)
    dropped = row[row <= found[0]].astype(np.float64)
    assert (dropped**2).sum() <= tau**2 * (row.astype(np.float64) ** 2).sum()
    _core.mass_thresholds(row, tau, found)
    assert row[row <= found[0]].sum() <= tau * row.sum()


def test_nan_scores_leave_the_row_whole() -> None:
    row = np.array([[1.0, np.nan, 2.0]], dtype=np.float32)
    found = np.zeros(1, dtype=np.float32)
    _core.topk_thresholds(row, 1, found)
    assert np.isnan(found[0])


def small_gguf() -> bytes:
    """A valid header with every kind of value, and one tensor of 4 floats."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    fields = [
        string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        string("n") + struct.pack("<II", 4, 7),
        string("f") + struct.pack("<If", 6, 0.5),
        string("b") + struct.pack("<IB", 7, 1),
        string("a") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<3i", 1, -2, 3),
        string("s") + struct.pack("<IIQ", 9, 8, 2) + string("x") + string("yz"),
        string("y") + struct.pack("<IIQ", 9, 0, 3) + b"\0\1\xff",
    ]
    tensor = string("w") + struct.pack("<IQQIQ", 2, 2, 2, 0, 0)
    head = struct.pack("<IIQQ", 0x46554747, 3, 1, len(fields)) + b"".join(fields) + tensor
    head += b"\0" * (-len(head) % 32)
    return head + np.arange(4, dtype=np.float32).tobytes()


def parse(data: bytes) -> _core.GgufHeader:
    return _core.GgufHeader(np.frombuffer(data, dtype=np.uint8))


def fields(header: _core.GgufHeader) -> dict[str, Any]:
    names = [header.field_name(i) for i in range(header.n_fields)]
    found = {name: header.value(name) for name in names}
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}


def tensor_names(header: _core.GgufHeader) -> list[str]:
    return [header.tensor_name(i) for i in range(header.n_tensors)]


def test_gguf_header() -> None:
    header = parse(small_gguf())
    assert fields(header) == {
        "general.architecture": "llama",
        "n": 7,
        "f": 0.5,
        "b": True,
        "a": [1, -2, 3],
        "s": ["x", "yz"],
        "y": [0, 1, 255],
    }
    assert tensor_names(header) == ["w"]
    shape, kind, offset, n_bytes = header.tensor("w")
    assert (shape, kind, n_bytes) == ((2, 2), "F32", 16)
    assert offset == len(small_gguf()) - 16


@pytest.mark.parametrize("offset", [0, 32, 96])
def test_gguf_tensors_that_overlap(offset: int) -> None:
    """Of one file's two tensors of 64 bytes: neither may have a byte of the other."""
    names = [struct.pack("<Q", 1) + name for name in (b"v", b"w")]
    shape = struct.pack("<IQQI", 2, 4, 4, 0)
    head = struct.pack("<IIQQ", 0x46554747, 3, 2, 0)
    head += names[0] + shape + struct.pack("<Q", 64) + names[1] + shape + struct.pack("<Q", offset)
    data = head + b"\0" * (-len(head) % 32) + b"\0" * 160
    if offset == 0:
        assert tensor_names(parse(data)) == ["v", "w"]
        return
    with pytest.raises(_core.GgufError, match=r"tensors [vw] and [vw] overlap"):
        parse(data)


@pytest.mark.parametrize(
    ("type_", "dtype", "values"),
    [
        (0, "<u1", [0, 255]),
        (1, "<i1", [-128, 127]),
        (2, "<u2", [0, 2**16 - 1]),
        (3, "<i2", [-(2**15), 2**15 - 1]),
        (4, "<u4", [0, 2**32 - 1]),
        (5, "<i4", [-(2**31), 2**31 - 1]),
        (6, "<f4", [-0.5, float("inf")]),
        (7, "?", [True, False]),
        (10, "<u8", [0, 2**64 - 1]),
        (11, "<i8", [-(2**63), 2**63 - 1]),
        (12, "<f8", [1e-300, -0.1]),
    ],
)
def test_gguf_numbers_of_every_type(type_: int, dtype: str, values: list[float]) -> None:
    """One and several, at an odd place of the file."""
    content = np.array(values, dtype)
    fields = [
        struct.pack("<Q", 3) + b"one" + struct.pack("<I", type_) + content[:1].tobytes(),
        struct.pack("<Q", 4) + b"some" + struct.pack("<IIQ", 9, type_, 2) + content.tobytes(),
    ]
    header = parse(struct.pack("<IIQQ", 0x46554747, 3, 0, 2) + b"".join(fields))
    one, some = header.value("one"), header.value("some")
    assert (one, type(one)) == (content[0].item(), type(content[0].item()))
    assert some.dtype == content.dtype
    assert some.tolist() == content.tolist()


@given(st.binary(max_size=8) | st.text(max_size=4).map(str.encode))
def test_gguf_text_is_utf8(text: bytes) -> None:
    """As Python decodes it, in a key, a value and an array."""
    string = struct.pack("<Q", len(text)) + text
    head = struct.pack("<IIQQ", 0x46554747, 3, 0, 1)
    for data in (
        string + struct.pack("<IB", 0, 1),
        struct.pack("<Q", 1) + b"k" + struct.pack("<I", 8) + string,
        struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 1) + string,
    ):
        try:
            text.decode()
        except UnicodeDecodeError:
            with pytest.raises(_core.GgufError, match="is not UTF-8"):
                parse(head + data)
        else:
            (name,) = fields(parse(head + data))
            assert name in (text.decode(), "k")


def test_gguf_truth_values_are_0_or_1() -> None:
    """A file with another one, says the format, is invalid."""
    data = small_gguf().replace(b"b" + struct.pack("<IB", 7, 1), b"b" + struct.pack("<IB", 7, 2))
    with pytest.raises(
        _core.GgufError, match="metadata b has a truth value that is neither 0 nor 1"
    ):
        parse(data)


def test_gguf_arrays_of_arrays() -> None:
    data = small_gguf().replace(struct.pack("<IIQ", 9, 5, 3), struct.pack("<IIQ", 9, 9, 3))
    with pytest.raises(_core.GgufError, match="metadata a is an array of arrays"):
        parse(data)


def test_gguf_names_that_are_not_there() -> None:
    header = parse(small_gguf())
    for find in (header.value, header.tensor):
        for name in ("", "a ", "zz", "general.architectur"):
            with pytest.raises(KeyError):
                find(name)


def test_gguf_key_that_appears_twice() -> None:
    """llama.cpp does not open such a file; the first and the last value are equally right."""
    data = small_gguf()
    key = struct.pack("<Q", 1) + b"n"
    with pytest.raises(_core.GgufError, match="metadata n appears twice"):
        parse(data.replace(struct.pack("<Q", 1) + b"f", key))


def test_gguf_of_the_other_byte_order() -> None:
    """The magic is the same in both, as the gguf package writes it."""
    data = small_gguf()
    swapped = data[:4] + struct.pack(">IQQ", *struct.unpack("<IQQ", data[4:24])) + data[24:]
    with pytest.raises(_core.GgufError, match="big-endian"):
        parse(swapped)


def test_gguf_key_with_a_null() -> None:
    data = small_gguf().replace(
        struct.pack("<Q", 20) + b"general.architecture",
        struct.pack("<Q", 20) + b"general.arc\0itecture",
    )
    assert "general.arc\0itecture" in fields(parse(data))


def test_gguf_truncated_at_every_byte() -> None:
    data = small_gguf()
    for length in range(len(data)):
        with pytest.raises(_core.GgufError, match=r"truncated|wrong magic"):
            parse(data[:length])


def test_gguf_mutations_never_crash() -> None:
    data = bytearray(small_gguf())
    read = 0
    for _ in range(20_000):
        mutated = bytearray(data)
        for _ in range(RNG.integers(1, 4)):
            mutated[RNG.integers(len(mutated))] = RNG.integers(256)
        with contextlib.suppress(_core.GgufError):
            fields(parse(bytes(mutated)))
            read += 1
    assert 1000 < read < 19_000  # changes of both kinds
