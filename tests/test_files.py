"""Files that are written whole or not at all, and what is read back of damaged ones."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fallow.errors import FallowError
from fallow.files import (
    JsonLines,
    atomic_folder,
    atomic_path,
    check_writable,
    fits,
    parse_json,
    read_array,
    read_json,
    to_json,
    write_json,
)


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with suppress(KeyError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        raise KeyError
    with suppress(KeyError), atomic_folder(tmp_path / "folder") as made:
        (made / "b.txt").write_text("new")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_folders_come_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "folder") as made:
        (made / "b.txt").write_text("new")
        assert made.name.startswith(".folder.")
    assert (tmp_path / "deep" / "folder" / "b.txt").read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["folder"]
    with (
        pytest.raises(FallowError, match="is there already; choose another name"),
        atomic_folder(tmp_path / "deep" / "folder"),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("8 requested and 4 written"), "the disk is full, or fails"),
        (RuntimeError("[enforce fail at inline_container.cc:672] ."), "the disk is full, or fails"),
    ],
)
def test_writers_that_fail(error: Exception, reason: str, tmp_path: Path) -> None:
    with (
        pytest.raises(FallowError, match=f"cannot write .*a.bin: {reason}; choose a folder"),
        atomic_path(tmp_path / "a.bin"),
    ):
        raise error
    with pytest.raises(RuntimeError, match="another"), atomic_path(tmp_path / "a.bin"):
        raise RuntimeError("another")


def test_what_is_no_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(FallowError, match="it is there and no file; choose another name"):
            check_writable(path)
        with pytest.raises(FallowError, match="it is there and no file"), atomic_path(path):
            pass
    with pytest.raises(FallowError, match="File name too long"):
        check_writable(tmp_path / ("x" * 300))
    with atomic_path(tmp_path / ("ö" * 120)) as temporary:  # whose temporary name is short enough
        temporary.write_text("a")


def test_lines_that_were_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    JsonLines(path).add(11, 12)
    path.write_bytes(path.read_bytes()[:-2])  # "1" is no line, though it is JSON
    lines = JsonLines(path)
    assert lines.found == [11]
    assert path.read_bytes() == b"11\n1"  # reading does not write
    lines.add(13)
    lines.add(14)
    assert path.read_bytes() == b"11\n13\n14\n"
    path.write_bytes(b"11\n\0\0\0\n{\n" + b"[" * 100_000 + b"\n\xff\xfe\n12\n")
    assert JsonLines(path).found == [11, 12]
    with pytest.raises(FallowError, match="cannot read"):
        JsonLines(tmp_path)


def test_damaged_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(FallowError, match=r"a\.json is damaged; delete it"):
            read_json(path, "delete it")
    path.write_bytes(b'{"a": 1}')
    assert read_json(path, "") == {"a": 1}
    with pytest.raises(FallowError, match="cannot read"):
        read_json(tmp_path / "none", "")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_numbers_without_a_word_in_json(tmp_path: Path) -> None:
    value = {"a": [1.5, float("nan")], "b": (float("inf"), {"c": -float("inf")}), "d": None}
    expected = '{"a": [1.5, null], "b": [null, {"c": null}], "d": null}'
    assert to_json(value) == expected
    write_json(tmp_path / "x.json", value)
    JsonLines(tmp_path / "x.jsonl").add(value)
    for path in ("x.json", "x.jsonl"):
        assert json.loads((tmp_path / path).read_text()) == json.loads(expected)


def test_damaged_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(5))
    np.testing.assert_array_equal(read_array(path, ""), np.arange(5))
    data = path.read_bytes()
    for damaged in (b"", data[:20], data[:-1], data.replace(b"(5,)", b"(5, "), b"PK\x03\x04"):
        path.write_bytes(damaged)
        with pytest.raises(FallowError, match=r"cannot read .*a\.npy; make it again"):
            read_array(path, "make it again")
    np.save(path, np.array(["a"]))
    with pytest.raises(FallowError, match="holds no array of numbers"):
        read_array(path, "")


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, int, True),
        (1, float, True),
        (1.5, int, False),
        (True, int, False),
        (True, bool, True),
        (None, float | None, True),
        (None, float, False),
        (float("nan"), float, False),
        (float("-inf"), float | None, False),
        (10**400, int, False),
        ("1", float, False),
        ("a", str, True),
        ([], list, True),
        ({}, dict[str, int], True),
    ],
)
def test_fits(value: Any, kind: Any, expected: bool) -> None:
    assert fits(value, kind) == expected
