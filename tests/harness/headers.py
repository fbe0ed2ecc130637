"""Headers of GGUF and safetensors that are large and hostile, and what reading one takes.

    PYTHONPATH=tests python -m harness.headers    # a line per kind

Each is of the shortest entries there can be, so that whatever is kept per entry shows.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fallow.checkpoints.weights import read_gguf, read_safetensors_file
from fallow.common.errors import FallowError
from fallow.engine.process import peak_rss_mb, return_freed_memory, rss_bytes
from harness.damage import write_gguf_entries

_VERSION = struct.pack("<I", 3)
_ALIGNED_TO_1 = (b"general.alignment", struct.pack("<II", 4, 1))
# Of GGUF's scalar types; 8 is a string, 9 an array.
NUMBERS = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32",
    7: "bool", 10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip


def _one_array(item: int, count: int, content: bytes) -> bytes:
    field = struct.pack("<IIQ", 9, item, count) + content
    return write_gguf_entries(_VERSION, [(b"x", field)], [], b"")


def _numbers(type_: int) -> Callable[[int], bytes]:
    width = np.dtype(NUMBERS[type_]).itemsize
    return lambda size: _one_array(type_, size // width, bytes(size // width * width))


def _strings(letters: int) -> Callable[[int], bytes]:
    def made(size: int) -> bytes:
        entries = np.zeros(size // (8 + letters), [("length", "<u8"), ("text", "u1", letters)])
        entries["length"] = letters
        entries["text"] = np.random.default_rng(0).integers(97, 123, entries["text"].shape)
        return _one_array(8, len(entries), entries.tobytes())

    return made


def _names(count: int) -> np.ndarray:
    """Names of three letters that differ, (count, 3)."""
    return np.arange(count)[:, None] // [1, 128, 128**2] % 128


def _keys(value: bytes) -> Callable[[int], bytes]:
    def made(size: int) -> bytes:
        count = size // (11 + len(value))
        entries = np.zeros(
            count, [("length", "<u8"), ("name", "u1", 3), ("value", "u1", len(value))]
        )
        entries["length"], entries["name"] = 3, _names(count)
        entries["value"] = np.frombuffer(value, np.uint8)
        return b"GGUF" + _VERSION + struct.pack("<QQ", 0, count) + entries.tobytes()

    return made


def _tensors(n_dims: int) -> Callable[[int], bytes]:
    """Of one byte each."""
    entry = np.dtype(
        [("length", "<u8"), ("name", "u1", 3), ("n_dims", "<u4"), ("dims", "<u8", n_dims),
         ("type", "<u4"), ("offset", "<u8")]
    )  # fmt: skip

    def made(size: int) -> bytes:
        count = size // (entry.itemsize + 1)
        entries = np.zeros(count, entry)
        entries["length"], entries["name"] = 3, _names(count)
        entries["n_dims"], entries["dims"], entries["type"] = n_dims, 1, 24
        entries["offset"] = np.arange(count)
        whole = write_gguf_entries(_VERSION, [_ALIGNED_TO_1], [], b"")
        head = whole[:8] + struct.pack("<Q", count) + whole[16:]
        return head + entries.tobytes() + bytes(count)

    return made


def _promises(n_fields: int, n_tensors: int) -> Callable[[int], bytes]:
    """Counts as large as the file could hold, and nothing behind them."""

    def made(size: int) -> bytes:
        counts = struct.pack("<QQ", n_tensors and size // n_tensors, n_fields and size // n_fields)
        return b"GGUF" + _VERSION + counts + b"\xff" * size

    return made


def _safetensors(member: Callable[[int], str], n_bytes: int, around: str) -> Callable[[int], bytes]:
    """A header of members by their number, with so many bytes of data for each.

    Of a quarter of the size, as reading it is Python's work."""

    def made(size: int) -> bytes:
        count = size // 4 // (len(member(size // 50)) + 1 + n_bytes)
        header = (around % ",".join(map(member, range(count)))).encode()
        return struct.pack("<Q", len(header)) + header + bytes(count * n_bytes)

    return made


HOSTILE: dict[str, Callable[[int], bytes]] = {
    **{f"an array of {name}": _numbers(type_) for type_, name in NUMBERS.items()},
    **{f"strings of {n} letters": _strings(n) for n in range(4)},
    "an array of arrays": lambda size: _one_array(9, size // 12, bytes(size)),
    "a long string": lambda size: _one_array(8, 1, struct.pack("<Q", size) + b"a" * size),
    "short keys": _keys(struct.pack("<IB", 0, 1)),
    "short keys of nothing": _keys(struct.pack("<IIQ", 9, 4, 0)),
    "tensors of one dimension": _tensors(1),
    "tensors of four dimensions": _tensors(4),
    "promised keys": _promises(13, 0),
    "promised tensors": _promises(0, 32),
    "safetensors without bytes": _safetensors(
        lambda i: f'"{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0, "{%s}"
    ),
    "safetensors of one byte": _safetensors(
        lambda i: f'"{i:x}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{i + 1}]}}', 1, "{%s}"
    ),
    "safetensors' metadata": _safetensors(lambda i: f'"{i:x}":""', 0, '{"__metadata__":{%s}}'),
    "safetensors' long text": _safetensors(
        lambda i: "\\n", 0, '{"__metadata__":{"a":"\U0001f600%s"}}'
    ),
    "safetensors' long name": _safetensors(
        lambda i: "\\u0101", 0, '{"\U0001f600%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    ),
    "safetensors' long shape": _safetensors(
        lambda i: "1", 0, '{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}'
    ),
    "safetensors' lists": _safetensors(lambda i: "[]", 0, '{"a":[%s]}'),
}


def measure(size: int) -> dict[str, dict[str, float]]:
    """By kind, of a header of so many bytes and one of a quarter: "growth", which is the process's
    peak of resident memory over what it had before, in the file's bytes, and "times", which is the
    processor's time in that of the quarter."""
    with tempfile.TemporaryDirectory() as root:
        found = subprocess.run(
            [sys.executable, "-m", "harness.headers", root, str(size)],
            stdout=subprocess.PIPE, check=True, text=True, cwd=Path(__file__).parents[1],
        )  # fmt: skip
    return json.loads(found.stdout.splitlines()[-1])


def _read(path: Path) -> float:
    """Opens a file and takes every value and tensor; seconds of the processor."""
    with path.open("rb") as opened:
        is_gguf = opened.read(4) == b"GGUF"
    start = time.process_time()
    try:
        if not is_gguf:
            for _ in read_safetensors_file(path):
                pass
            return time.process_time() - start
        file = read_gguf(path)
        for values in (file.metadata, file.tensors):
            for name in values:
                _ = values[name]
    except FallowError:
        pass
    return time.process_time() - start


def _measure_one(large: Path, small: Path) -> dict[str, float]:
    before = rss_bytes()
    _read(large)
    growth = (peak_rss_mb() * 1e6 - before) / large.stat().st_size
    times = min(_read(large) for _ in range(2)) / max(min(_read(small) for _ in range(3)), 2e-3)
    return {"growth": growth, "times": times}


def _in_a_child(kind: str, size: int, root: Path) -> dict[str, float]:
    """A child's peak begins with what it has, whatever its parent had at its own."""
    large, small = root / "large", root / "small"
    large.write_bytes(HOSTILE[kind](size))
    small.write_bytes(HOSTILE[kind](size // 4))
    return_freed_memory()  # what the files were made in: a child's peak would begin with it
    into, out = os.pipe()
    if os.fork() == 0:
        os.write(out, json.dumps(_measure_one(large, small)).encode())
        os._exit(0)
    os.close(out)
    with os.fdopen(into) as pipe:
        found = json.loads(pipe.read())
    os.wait()
    return found


def main() -> None:
    if len(sys.argv) > 1:
        root, size = Path(sys.argv[1]), int(sys.argv[2])
        print(json.dumps({kind: _in_a_child(kind, size, root) for kind in HOSTILE}))
        return
    for kind, found in measure(8_000_000).items():
        print(
            f"{kind:30} {found['growth']:6.1f} times its bytes {found['times']:5.1f} times as long"
        )


if __name__ == "__main__":
    main()
