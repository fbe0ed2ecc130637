"""Headers of GGUF and safetensors: what reading hostile ones takes, and what others say of damaged
ones: the gguf package's GGUFReader, and safetensors'."""

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from fallow.checkpoints.weights import read_gguf, read_safetensors_file
from harness.damage import damage_gguf, damage_safetensors
from harness.headers import HOSTILE, measure

CASES = 400  # of each format


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    return measure(6_000_000)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_header_takes_eight_times_its_bytes_at_most(
    measured: dict[str, dict[str, float]], kind: str
) -> None:
    """The process's resident memory, with the file's own pages, while every value is asked for."""
    assert measured[kind]["growth"] < 8


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_header_takes_time_by_its_length(
    measured: dict[str, dict[str, float]], kind: str
) -> None:
    """4 were linear, 16 the square."""
    assert measured[kind]["times"] < 10


# What others say ---------------------------------------------------------------------------------

# Why we refuse a file (by our message) that another reader takes, or take one that it refuses (by
# its message).
Reasons = dict[str, str]


def whole_gguf(path: Path) -> bytes:
    """A file with every type of value and tensors of a few types, by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGUFValueType
    for type_ in kind:
        if type_ not in (kind.ARRAY, kind.STRING):
            writer.add_key_value(f"one.{type_.name}", 1, type_)
            writer.add_key_value(f"some.{type_.name}", [1, 0], kind.ARRAY, type_)
    writer.add_string("text", "größer")
    writer.add_array("texts", ["a", "", "中"])
    writer.add_custom_alignment(32)
    rng = np.random.default_rng(0)
    for name, shape in (("a", (4, 32)), ("b", (3, 2, 8)), ("c", (5,))):
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.add_tensor("q", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def whole_safetensors(path: Path) -> bytes:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((4, 8)).astype(np.float32),
        "b.weight": np.arange(6, dtype=np.int64).reshape(2, 3),
        "half": np.ones((3, 1, 2), np.float16),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.0),
    }
    return save(arrays, metadata={"format": "pt", "note": '{"a": [1, "b"]}'})


def gguf_package(path: Path) -> None:
    for tensor in gguf.GGUFReader(path).tensors:
        _ = tensor.data


def safetensors_package(path: Path) -> None:
    with safetensors.safe_open(path, "np") as file:
        for name in file.keys():  # noqa: SIM118
            _ = file.get_slice(name).get_shape()


def our_gguf(path: Path) -> None:
    file = read_gguf(path)
    for values in (file.metadata, file.tensors):
        for name in values:
            _ = values[name]


def our_safetensors(path: Path) -> None:
    for _ in read_safetensors_file(path):
        pass


def refusals(read: Callable[[Path], None], paths: list[Path]) -> list[str | None]:
    """Why each is refused; None: it is read."""
    found: list[str | None] = []
    while len(found) < len(paths):
        found += _read_in_a_child(read, paths[len(found) :])
    return found


def _read_in_a_child(read: Callable[[Path], None], paths: list[Path]) -> list[str | None]:
    """Up to the first that takes 0.3 seconds of work, whose alarm ends the process.

    GGUFReader goes through arrays of 2**60 items that are not there.
    """
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        for path in paths:
            signal.setitimer(signal.ITIMER_PROF, 0.3)
            os.write(begin, json.dumps(_said(read, path)).encode() + b"\n")
        os._exit(0)
    os.close(begin)
    with open(end) as pipe:
        found: list[str | None] = [json.loads(line) for line in pipe]
    os.waitpid(child, 0)
    return found if len(found) == len(paths) else [*found, "it takes too long"]


def _said(read: Callable[[Path], None], path: Path) -> str | None:
    try:
        read(path)
    except Exception as error:  # whatever the packages raise
        return f"{type(error).__name__}: {error}"
    return None


GGUF_STRICTER: Reasons = {
    "tensors . and . overlap": "two tensors cannot both be right about a byte",
    "is an array of arrays": "the format allows them, no model has one, and llama.cpp refuses them",
    "is not aligned to": "the format demands it, and GGUFReader does not look",
    "a truth value that is neither 0 nor 1": "the format calls the file invalid",
    "dimensions, expected 1 to 4": "ggml has four; none at all is no tensor of a model",
    "has unknown ggml type": "types whose blocks nothing here can decode",
    "is not UTF-8": "the format demands it; GGUFReader decodes values only when they are shown",
}
GGUF_LOOSER: Reasons = {}
SAFETENSORS_STRICTER: Reasons = {}
SAFETENSORS_LOOSER: Reasons = {
    "lone leading surrogate": "half a pair, which no name has that is asked for",
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of odd numbers
@pytest.mark.parametrize(
    ("whole", "damage", "ours", "theirs", "stricter", "looser"),
    [
        (whole_gguf, damage_gguf, our_gguf, gguf_package, GGUF_STRICTER, GGUF_LOOSER),
        (
            whole_safetensors,
            damage_safetensors,
            our_safetensors,
            safetensors_package,
            SAFETENSORS_STRICTER,
            SAFETENSORS_LOOSER,
        ),
    ],
    ids=["gguf", "safetensors"],
)
def test_damaged_headers_are_refused_as_by_others(
    whole: Callable[[Path], bytes],
    damage: Callable[[np.random.Generator, bytes], bytes],
    ours: Callable[[Path], None],
    theirs: Callable[[Path], None],
    stricter: Reasons,
    looser: Reasons,
    tmp_path: Path,
) -> None:
    """Where one reader refuses a file and the other takes it, there is a reason."""
    original = whole(tmp_path / "whole")
    rng = np.random.default_rng(1)
    outcomes: Counter[str] = Counter()
    used, unexplained = set(), []
    paths = [tmp_path / f"{number}.damaged" for number in range(CASES)]
    for path in paths:
        path.write_bytes(original if path == paths[0] else damage(rng, original))
    found_by_both = zip(refusals(ours, paths), refusals(theirs, paths), strict=True)
    for number, (we, they) in enumerate(found_by_both):
        outcomes[f"{we is None}, {they is None}"] += 1
        if (we is None) == (they is None):
            continue
        reasons, message = (stricter, we) if we else (looser, they)
        found = next((text for text in reasons if re.search(text, message or "")), None)
        if found is None:
            unexplained.append((number, we, they))
        used.add(found)
    assert unexplained == []
    assert used == {*stricter, *looser}, "a reason that nothing needs"
    assert min(outcomes["True, True"], outcomes["False, False"]) > CASES / 10
