"""A folder of patterns: which neurons were active, for every token, tap and layer of a text.

docs/patterns.md specifies it. Rows of bits lie in one file per tap and layer, at a place that the
token's number gives, so that runs that were stopped, or several workers, fill the same folder, and
any part of it is read through a memory map.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np

from fallow import _core
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import (
    JsonLines,
    atomic_path,
    fits,
    parse_json,
    read_array,
    sync,
    write_json,
)

FORMAT = 1
MAGNITUDES = "magnitudes"  # a file beside the bits of `inter`
_HEADER, _TOKENS, _DONE = "store.json", "tokens.npy", "done.jsonl"
_LINE = 64 * _core.LINE_WORDS  # bits
_REMEDY = "collect the store again"


def n_words(width: int) -> int:
    """Words of 64 bits in a row of that many neurons: whole lines of 64 bytes."""
    return -(-width // _LINE) * _core.LINE_WORDS


def pack_bits(active: np.ndarray) -> np.ndarray:
    """Rows (n, words) uint64 of active sets (n, width) bool; zero behind the last neuron."""
    n, width = active.shape
    rows = np.zeros((n, n_words(width) * 8), dtype=np.uint8)
    packed = np.packbits(active, axis=1, bitorder="little")
    rows[:, : packed.shape[1]] = packed
    return rows.view("<u8")


def unpack_bits(rows: np.ndarray, width: int) -> np.ndarray:
    """Active sets (n, width) bool of rows (n, words)."""
    data = np.ascontiguousarray(rows, dtype="<u8").view(np.uint8)
    return np.unpackbits(data, axis=1, count=width, bitorder="little").view(bool)


def row_sizes(rows: np.ndarray) -> np.ndarray:
    """How many neurons are active in each row, (n,) int64."""
    return np.bitwise_count(rows).sum(axis=1, dtype=np.int64)


@dataclass(frozen=True)
class MappedRows:
    """Rows of a file: what a worker needs to read them itself."""

    path: Path
    first: int
    n: int
    words: int

    def open(self) -> np.ndarray:
        """Bits (n, words) uint64, mapped."""
        shape, offset = (self.n, self.words), self.first * self.words * 8
        return np.memmap(self.path, dtype="<u8", mode="r", shape=shape, offset=offset)

    def split(self, count: int) -> "list[MappedRows]":
        """As that many parts, of about equal size; fewer of fewer rows."""
        edges = np.unique(np.linspace(0, self.n, count + 1).round().astype(int))
        return [
            MappedRows(self.path, self.first + int(a), int(b - a), self.words)
            for a, b in pairwise(edges)
        ]


@dataclass(frozen=True)
class Header:
    """What a store holds, and of what."""

    model: str
    fingerprint: str
    rule: str
    knob: float
    knob_name: str
    text: str
    text_sha256: str
    n_layers: int
    context: int  # tokens of a window; a document of its own to the model
    n_windows: int
    widths: dict[str, int]  # neurons (or outputs) by tap
    magnitudes: bool = False


class PatternStore:
    """The patterns of a text. Row t of a tap and layer is token t % context of window t // context.

    Args:
        folder: a store that was collected to the end.

    Raises:
        FallowError: no store, one of another format, unfinished, or with a file cut short.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = _read_header(self.folder)
        missing = self.header.n_windows - len(_done(self.folder, self.header))
        if missing:
            raise FallowError(
                f"pattern store {folder} lacks {missing} of {self.header.n_windows} windows; "
                "run fallow patterns collect again to finish it"
            )
        for path, size in _files(self.folder, self.header):
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise FallowError(f"{path} has {found} bytes, not {size}: it was cut; {_REMEDY}")

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(self.header.widths)

    @property
    def n_rows(self) -> int:
        """Tokens, hence rows per tap and layer."""
        return self.header.n_windows * self.header.context

    @property
    def tokens(self) -> np.ndarray:
        """Token ids, (n_windows, context) int32."""
        path = self.folder / _TOKENS
        tokens, shape = read_array(path, _REMEDY), (self.header.n_windows, self.header.context)
        if tokens.shape != shape or tokens.dtype != np.int32:
            raise FallowError(f"{path} has {tokens.dtype} of shape {tokens.shape}; {_REMEDY}")
        return tokens

    def rows(self, layer: int, tap: str = "inter") -> np.ndarray:
        """Bits of a tap and layer, (n_rows, words) uint64, mapped.

        Raises:
            UsageError: a tap or a layer that the store lacks.
        """
        return self.mapped(layer, tap).open()

    def mapped(
        self, layer: int, tap: str = "inter", first: int = 0, end: int | None = None
    ) -> MappedRows:
        """The same rows, or those of some windows, not yet open. Raises as `rows`."""
        words, context = n_words(self._width(layer, tap)), self.header.context
        count = (self.header.n_windows if end is None else end) - first
        path = _bits_file(self.folder, tap, layer)
        return MappedRows(path, first * context, count * context, words)

    def magnitudes(self, layer: int) -> np.ndarray:
        """Each token's out_norm over its norm, (n_rows, width) float16, mapped; 0 where inactive.

        Raises:
            UsageError: the store has none.
        """
        width = self._width(layer, "inter")
        if not self.header.magnitudes:
            raise UsageError(f"{self.folder} has no magnitudes; collect it with --magnitudes")
        path = _bits_file(self.folder, MAGNITUDES, layer)
        return np.memmap(path, dtype="<f2", mode="r", shape=(self.n_rows, width))

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raises FallowError if the patterns are of another model."""
        if self.header.fingerprint != fingerprint:
            raise FallowError(
                f"pattern store {self.folder} is of {self.header.model} (fingerprint "
                f"{self.header.fingerprint}), not of {name} (fingerprint {fingerprint})"
            )

    def _width(self, layer: int, tap: str) -> int:
        if tap not in self.header.widths:
            raise UsageError(f"{self.folder} has no {tap!r}; it has {', '.join(self.taps)}")
        if not 0 <= layer < self.header.n_layers:
            last = self.header.n_layers - 1
            raise UsageError(f"layer {layer} is outside 0 to {last}, those of {self.folder}")
        return self.header.widths[tap]


class StoreWriter:
    """Fills a store window by window, in any order; what an earlier run finished stays.

    Raises:
        FallowError: the folder holds a store of something else, or cannot be written.
    """

    def __init__(self, folder: str | Path, header: Header, tokens: np.ndarray) -> None:
        self.folder, self.header = Path(folder), header
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FallowError(f"cannot write {folder}: {error.strerror}") from error
        if (self.folder / _HEADER).exists():
            found = _read_header(self.folder)
            if found != header:
                raise FallowError(
                    f"{folder} holds patterns of {_difference(found, header)}; "
                    "choose another folder, or delete it"
                )
        else:
            with atomic_path(self.folder / _TOKENS) as path:
                np.save(path, tokens.astype(np.int32))
            write_json(self.folder / _HEADER, {"format": FORMAT} | asdict(header))
        self.done = _done(self.folder, header)
        self._log = JsonLines(self.folder / _DONE)
        self._header = header

    def finish(self, windows: Iterable[int]) -> None:
        """Windows whose rows are written count from now on. Raises FallowError: disk full, say."""
        for path, _ in _files(self.folder, self._header):
            sync(path)  # or the log might survive what it tells of
        self._log.add(*windows)
        self.done.update(windows)


def write_window(
    folder: Path,
    window: int,
    active: Mapping[str, list[np.ndarray]],
    magnitudes: Iterable[np.ndarray] = (),
) -> None:
    """Writes a window's rows to their place: bool (context, width) by tap and layer.

    Raises:
        FallowError: the disk is full, say.
    """
    for tap, layers in active.items():
        for layer, of_layer in enumerate(layers):
            _write(_bits_file(folder, tap, layer), window, pack_bits(of_layer))
    for layer, of_layer in enumerate(magnitudes):
        _write(_bits_file(folder, MAGNITUDES, layer), window, of_layer.astype("<f2"))


def _write(path: Path, window: int, rows: np.ndarray) -> None:
    data = rows.tobytes()
    try:
        file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(file, data[written:], window * len(data) + written)
        finally:
            os.close(file)
    except OSError as error:
        raise FallowError(
            f"cannot write {path}: {error.strerror}; make room and run the same command again"
        ) from error


def _bits_file(folder: Path, what: str, layer: int) -> Path:
    return folder / f"{what}.{layer:03d}"


def _files(folder: Path, header: Header) -> Iterator[tuple[Path, int]]:
    """Every file of rows and its bytes."""
    rows = header.n_windows * header.context
    sizes = {tap: rows * n_words(width) * 8 for tap, width in header.widths.items()}
    if header.magnitudes:
        sizes[MAGNITUDES] = rows * header.widths["inter"] * 2
    for layer in range(header.n_layers):
        yield from ((_bits_file(folder, what, layer), size) for what, size in sizes.items())


def _read_header(folder: Path) -> Header:
    path = folder / _HEADER
    try:
        found = parse_json(path.read_bytes())
        if found.pop("format") != FORMAT:
            raise FallowError(f"pattern store {folder} has another format; collect it again")
        header = Header(**found)
        _check_header(header)
        return header
    except OSError as error:
        raise FallowError(
            f"{folder} is no pattern store: cannot read {path.name} ({error.strerror}); "
            "make one with fallow patterns collect"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FallowError(f"{path} is damaged; {_REMEDY}") from error


def _check_header(header: Header) -> None:
    """Raises ValueError for fields that no store has."""
    whole = all(fits(getattr(header, field.name), field.type) for field in fields(header))
    if not whole or min(header.n_layers, header.context, header.n_windows) < 1:
        raise ValueError
    for tap, width in header.widths.items():
        if not tap.isidentifier() or len(tap) > 64 or not fits(width, int) or width < 1:
            raise ValueError
    if header.magnitudes and "inter" not in header.widths:
        raise ValueError


def _done(folder: Path, header: Header) -> set[int]:
    """Windows that are finished."""
    path = folder / _DONE
    found = JsonLines(path).found if path.exists() else []
    return {window for window in found if fits(window, int) and 0 <= window < header.n_windows}


def _difference(found: Header, wanted: Header) -> str:
    """The first thing in which a store differs, in words."""
    for name, value in asdict(wanted).items():
        other = getattr(found, name)
        if other != value:
            return f"{name.replace('_', ' ')} {other}, not {value}"
    return "the same"


def chunks(n_rows: int, rows: int) -> Iterable[slice]:
    """[0, n_rows) in pieces of at most `rows`."""
    return (slice(start, min(start + rows, n_rows)) for start in range(0, n_rows, rows))
