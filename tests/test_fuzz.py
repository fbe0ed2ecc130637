"""Damaged files, a few hundred of every format; `make fuzz` runs a hundred thousand."""

from pathlib import Path
from typing import Any

import numpy as np

from fallow import _core
from fallow.checkpoints.weights import read_gguf
from fallow.packing.packer import pack
from harness.fuzzing import Fuzzer, shares

CASES = 1000


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    results = Fuzzer(1, tmp_path / "seeds", tmp_path / "keep").run(shares(CASES))
    assert {r.target: r.kinds for r in results if r.defects} == {}
    assert sum(r.cases for r in results) >= CASES
    # The changes are not for nothing, and some files are of use after them.
    assert min(sum(r.refused for r in results), sum(r.read for r in results)) > CASES / 20


def test_no_defect_is_overlooked(tmp_path: Path) -> None:
    fuzzer = Fuzzer(0, tmp_path / "seeds", tmp_path / "keep", longest=20)
    (found,) = fuzzer.run({"harness": range(10)})
    assert (found.read, found.refused, found.defects) == (2, 1, 7)
    assert found.kinds == {
        "a refusal that names no file: something is wrong": [2],
        "a refusal of several lines": [3],
        "KeyError": [4],
        "too much memory": [5],
        "MemoryError": [6],
        "the process died: -11": [7],
        "it hangs": [8],
    }
    kept = {path.name: (path / "defect.txt").read_text() for path in fuzzer.keep.iterdir()}
    assert sorted(kept) == [f"harness-0-{number}" for number in range(2, 9)]
    assert "it is refused" in kept["harness-0-3"]
    assert (fuzzer.keep / "harness-0-7" / "harness" / "a.txt").read_bytes() != b"neurons at rest"


def test_mutated_headers_never_crash(folders: dict[str, Path], tmp_path: Path) -> None:
    """6,000 files with random changes in their headers load or raise, and nothing else."""
    rng = np.random.default_rng(0)
    outcomes = {"loaded": 0, "refused": 0}
    for name in ("llama", "opt"):
        path = tmp_path / f"{name}.gguf"
        pack(folders[name], path, quant="f32")
        original = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        base = read_gguf(path)  # one mapping: another may lie elsewhere in memory
        start = min(t.data.__array_interface__["data"][0] for t in base.tensors.values())
        header = start - _map_start(base)
        # The tokenizer's text is most of the header, and of no interest here.
        tail = bytes(original[:header]).rindex(b"tokenizer.huggingface.json")
        interesting = np.r_[0:tail, tail + 27 : tail + 47, _tensor_table(original, header)]
        for _ in range(3_000):
            data = original.copy()
            at = rng.choice(interesting, rng.integers(1, 4))
            data[at] = rng.choice([0, 1, 127, 128, 255, *rng.integers(0, 256, 3)], len(at))
            try:
                path.write_bytes(data)
                _core.Engine(_core.Mapping(bytes(path)), "", 1, 4, 1, False)
            except ValueError:
                outcomes["refused"] += 1
            else:
                outcomes["loaded"] += 1
    assert outcomes["refused"] > 1500
    assert outcomes["loaded"] > 300  # most changes hit names that nobody reads


def _map_start(file: Any) -> int:
    tensor = next(iter(file.tensors.values()))
    return tensor.data.base.__array_interface__["data"][0]


def _tensor_table(original: np.ndarray, header: int) -> np.ndarray:
    first = bytes(original[:header]).index(b"norm.weight")
    return np.arange(first - 8, header)
