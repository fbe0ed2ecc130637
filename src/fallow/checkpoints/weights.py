"""Checkpoint files: GGUF and safetensors, read without torch."""

import hashlib
import itertools
import math
import operator
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fallow import _core
from fallow.checkpoints.json_members import FLAT, STRING, check_utf8, members
from fallow.common.errors import FallowError, in_one_line
from fallow.common.files import DuplicateKeyError, parse_json, read_json
from fallow.common.procfs import processors

N_THREADS = processors()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, still in its stored bytes. `shape` is outermost first: (out, in)."""

    name: str
    shape: tuple[int, ...]
    type: str  # "F32", "BF16", "Q4_K", ...
    data: np.ndarray = field(repr=False)  # uint8, memory-mapped
    offset: int = 0  # of `data`, from its file's start

    def dequantize(self) -> np.ndarray:
        """The tensor's values, float32 of `shape`."""
        if self.type not in _core.FORMATS:
            return self._dequantize_rare()
        values = np.empty(int(np.prod(self.shape)), dtype=np.float32)
        _core.dequantize(self.type, self.data, values, N_THREADS)
        return values.reshape(self.shape)

    def _dequantize_rare(self) -> np.ndarray:
        import gguf

        try:
            kind = gguf.GGMLQuantizationType[self.type]
            return gguf.dequantize(self.data, kind).reshape(self.shape).astype(np.float32)
        except (KeyError, NotImplementedError) as error:
            raise FallowError(
                f"tensor {self.name} has type {self.type}, which cannot be decoded; "
                "use a file quantised with Q4_0 to Q8_0, Q2_K to Q6_K, F16 or BF16"
            ) from error


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's metadata and tensors. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Both are made of the file's bytes when they are asked for, so that a file which announces
    millions of them takes no more memory than it is long. Arrays of numbers are NumPy's.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    mappings: tuple[_core.Mapping, ...] = ()  # in which the tensors' bytes lie, one for each part
    _asked: set[str] = field(default_factory=set, repr=False)  # keys, of `get`

    @property
    def architecture(self) -> str:
        return self.get("general.architecture")

    def get(self, key: str, default: Any = ...) -> Any:
        """A metadata value; `{arch}` in the key stands for the architecture's name.

        Raises:
            FallowError: the key is missing and there is no default.
        """
        if "{arch}" in key:
            key = key.format(arch=self.architecture)
        self._asked.add(key)
        if key in self.metadata:
            return self.metadata[key]
        if default is ...:
            raise FallowError(f"GGUF {self.path} has no {key}; is it a language model?")
        return default

    def numbers(self, key: str, default: Any = ...) -> list[Any]:
        """The same of an array of numbers, as a list of Python's."""
        return np.asarray(self.get(key, default)).tolist()

    def unasked(self) -> Iterator[str]:
        """The metadata's keys that `get` was never asked for."""
        return (key for key in self.metadata if key not in self._asked)

    @property
    def header_bytes(self) -> int:
        """Up to the first tensor."""
        return min((tensor.offset for tensor in self.tensors.values()), default=0)

    def forget_pages(self) -> None:
        """Lets go of what was read of the mapped file; it is read again when it is used."""
        for mapping in self.mappings:
            mapping.forget()

    def check_unchanged(self) -> None:
        """Raises FallowError if a part was cut or written to since, or could not be read."""
        try:
            for mapping in self.mappings:
                mapping.check()
        except _core.DiskError as error:
            raise FallowError(str(error)) from error


def read_gguf(path: str | Path) -> GgufFile:
    """Opens a GGUF file (v2, v3), a split one by its first part; tensors are read when used.

    Raises:
        FallowError: missing, not GGUF, truncated, inconsistent, or a part without the others.
    """
    first = _read_part(Path(path))
    count = first.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return first
    return _join_parts(first, count)


def _join_parts(first: GgufFile, count: int) -> GgufFile:
    """The file of which `first` is one of `count` parts, which llama-gguf-split named.

    https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
    """
    number, where = first.get("split.no", 0), f"GGUF {first.path} is part"
    if not isinstance(number, int):
        raise FallowError(f"{where} {number!r} of {count}; download it again")
    ending = f"-{number + 1:05}-of-{count:05}.gguf"
    if not first.path.name.endswith(ending):
        raise FallowError(
            f"{where} {number + 1} of {count}, but its name does not end in {ending}, by which the "
            "others are found; rename it"
        )
    stem = first.path.name.removesuffix(ending)
    names = [f"{stem}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    if number != 0:
        raise FallowError(f"{where} {number + 1} of {count}; give part 1, {names[0]}")
    if "fallow.version" in first.metadata:
        raise FallowError(f"{where} 1 of {count} of a packed model; pack it again, in one piece")
    tensors, mappings = dict(first.tensors), list(first.mappings)
    for i, name in enumerate(names[1:], 1):
        path = first.path.with_name(name)
        if not path.exists():
            raise FallowError(f"{where} 1 of {count}; part {i + 1}, {path}, is missing; add it")
        part = _read_part(path)
        if (part.get("split.no", None), part.get("split.count", None)) != (i, count):
            raise FallowError(f"GGUF {path} is not part {i + 1} of {count}; download it again")
        if again := sorted(tensors.keys() & part.tensors):
            raise FallowError(f"GGUF {path} has the tensor {again[0]}, as a part before it does")
        tensors |= part.tensors
        mappings += part.mappings
    expected = first.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise FallowError(
            f"{where} 1 of {count}, which have {len(tensors)} tensors, expected {expected}; "
            "download them again"
        )
    return GgufFile(first.path, first.metadata, tensors, mappings=tuple(mappings))


def _read_part(path: Path) -> GgufFile:
    mapping = _map_file(path, "GGUF")
    data = mapping.data
    try:
        header = _core.GgufHeader(data)
    except _core.GgufError as error:
        raise FallowError(
            f"GGUF {path} is not usable: {in_one_line(error)}; download or convert it again"
        ) from error
    return GgufFile(path, _Metadata(header), _Tensors(header, data), (mapping,))


class _Metadata(Mapping[str, Any]):
    def __init__(self, header: _core.GgufHeader) -> None:
        self._header = header

    def __getitem__(self, key: str) -> Any:
        return self._header.value(key)

    def __iter__(self) -> Iterator[str]:
        return map(self._header.field_name, range(len(self)))

    def __len__(self) -> int:
        return self._header.n_fields


class _Tensors(Mapping[str, StoredTensor]):
    def __init__(self, header: _core.GgufHeader, data: np.ndarray) -> None:
        self._header, self._data = header, data

    def __getitem__(self, name: str) -> StoredTensor:
        shape, kind, offset, n_bytes = self._header.tensor(name)
        return StoredTensor(name, shape, kind, self._data[offset : offset + n_bytes], offset)

    def __iter__(self) -> Iterator[str]:
        return map(self._header.tensor_name, range(len(self)))

    def __len__(self) -> int:
        return self._header.n_tensors


def _map_file(path: Path, what: str) -> _core.Mapping:
    """Raises FallowError if there is no such file, or nothing in it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise FallowError(f"{what} {path} is empty (0 bytes); download or convert it again")
        return _core.Mapping(os.fsencode(path))
    except _core.DiskError as error:
        raise FallowError(str(error)) from error
    except OSError as error:
        raise FallowError(f"cannot read {what} {path}: {error.strerror}") from error


# https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs
_LONGEST_SAFETENSORS_HEADER = 100_000_000
_LONGEST_SAFETENSORS_ENTRY = 4096  # bytes; those of models have some 100
_SAFETENSORS_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def read_safetensors(folder: str | Path) -> Iterator[StoredTensor]:
    """The tensors of a Hugging Face folder: model.safetensors, else the shards its index lists.

    Raises:
        FallowError: a file is missing, truncated or inconsistent.
    """
    for path in _safetensors_files(Path(folder)):
        yield from read_safetensors_file(path)


def read_safetensors_file(path: Path) -> Iterator[StoredTensor]:
    """The tensors of one file. Raises FallowError likewise, before the first."""
    data = _map_file(path, "safetensors file").data
    header = _safetensors_header(path, data)
    # Of each tensor only its bytes' place is kept, so that a long header takes little memory.
    places = array("q")
    for tensor in _safetensors_tensors(path, data, header):
        places.extend((tensor.offset, tensor.data.nbytes))
    _check_places(path, data, header, np.asarray(places, np.int64).reshape(-1, 2))
    yield from _safetensors_tensors(path, data, header)


def _check_places(path: Path, data: np.ndarray, header: memoryview, places: np.ndarray) -> None:
    """Raises FallowError unless tensors, (n, 2) offsets and bytes, fill what follows the header."""
    order = np.lexsort((places[:, 1], places[:, 0]))
    begins = places[order, 0]
    ends = np.append(8 + len(header), begins + places[order, 1])
    wrong = np.flatnonzero(begins != ends[:-1])
    if len(wrong):
        first = int(wrong[0])
        tensors = _safetensors_tensors(path, data, header)
        name = next(itertools.islice(tensors, int(order[first]), None)).name
        raise FallowError(
            f"safetensors file {path}: tensor {name} begins at byte {begins[first]}, "
            f"but the one before it ends at {ends[first]}; download it again"
        )
    if ends[-1] != len(data):
        raise FallowError(
            f"safetensors file {path} has {len(data) - ends[-1]} bytes after its tensors; "
            "download it again"
        )


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():  # as transformers does: an index beside it may be stale
        return [single]
    if not index.exists():
        raise FallowError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json; "
            "fallow reads safetensors and GGUF weights"
        )
    places = read_json(index, "download it again").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FallowError(f"{index} is not a safetensors index; download it again")
    names, there = sorted(set(places.values())), {path.name for path in folder.iterdir()}
    for name in names:
        if name not in there:
            raise FallowError(f"shard {folder / name} listed in {index.name} is missing")
    return [folder / name for name in names]


def _safetensors_header(path: Path, data: np.ndarray) -> memoryview:
    """Its bytes, of JSON, which begin at the ninth of the file."""
    remedy = "download it again"
    if len(data) < 8:
        raise FallowError(f"safetensors file {path} is truncated ({len(data)} bytes); {remedy}")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > len(data) - 8:
        raise FallowError(
            f"safetensors file {path} is truncated or no safetensors file: its header needs "
            f"{length} bytes, {len(data) - 8} are there; {remedy}"
        )
    if length > _LONGEST_SAFETENSORS_HEADER:
        raise FallowError(
            f"safetensors file {path} is not usable: its header has {length} bytes, of at "
            f"most {_LONGEST_SAFETENSORS_HEADER}; {remedy}"
        )
    return data[8 : 8 + length].data


def _safetensors_tensors(
    path: Path, data: np.ndarray, header: memoryview
) -> Iterator[StoredTensor]:
    """What the header says. Raises FallowError where it is damaged."""
    remedy, start = "download it again", 8 + len(header)
    try:
        check_utf8(header)
        for name, value in members(header, FLAT):
            if name != "__metadata__":
                yield _safetensors_tensor(path, data, start, name, value)
            elif value != b"null":
                for _ in members(value, STRING):
                    pass
    except DuplicateKeyError as error:  # which the format forbids
        reason = in_one_line(error)
        raise FallowError(f"the header of safetensors file {path}: {reason}; {remedy}") from error
    except (ValueError, TypeError) as error:
        raise FallowError(f"safetensors file {path} has a broken header; {remedy}") from error


def _safetensors_tensor(
    path: Path, data: np.ndarray, start: int, name: str, value: memoryview
) -> StoredTensor:
    if len(value) > _LONGEST_SAFETENSORS_ENTRY:
        raise FallowError(
            f"safetensors file {path}: tensor {name} has an unsupported entry of {len(value)} bytes"
        )
    entry = parse_json(value.tobytes())
    try:
        kind, shape = entry["dtype"], tuple(operator.index(n) for n in entry["shape"])
        begin, end = (operator.index(offset) for offset in entry["data_offsets"])
        bits = _SAFETENSORS_BITS[kind]
    except (KeyError, TypeError, ValueError) as error:
        raise FallowError(
            f"safetensors file {path}: tensor {name} has an unsupported entry {entry}"
        ) from error
    if not 0 <= begin <= end <= len(data) - start:
        raise FallowError(
            f"safetensors file {path} is truncated: tensor {name} ends at byte {start + end}, "
            f"the file has {len(data)}; download it again"
        )
    if min(shape, default=0) < 0 or (end - begin) * 8 != bits * math.prod(shape):
        raise FallowError(
            f"safetensors file {path}: tensor {name} of shape {shape} does not fill its bytes"
        )
    begin, end = start + begin, start + end
    return StoredTensor(name, shape, kind, data[begin:end], begin)


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """Identifies a model by its weights: 16 hex digits.

    SHA-256 over every tensor's name, shape, type and a sample of its bytes (4 KiB at the start and
    one cache line per MiB), so that a fine-tuned copy differs and 1 GB takes milliseconds.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.shape} {tensor.type}\n".encode())
        digest.update(tensor.data[:4096].tobytes())
        for start in range(1 << 20, len(tensor.data), 1 << 20):
            digest.update(tensor.data[start : start + 64].tobytes())
    return digest.hexdigest()[:16]
