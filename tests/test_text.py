"""Texts and windows."""

from pathlib import Path

import numpy as np
import pytest

from conftest import whole_default_text
from fallow.checkpoints.text import (
    RUN,
    SKETCH,
    Text,
    check_no_leakage,
    cut_windows,
    load_text,
    overlap,
    sketch_of,
    split_windows,
)
from fallow.common.errors import FallowError, UsageError


class Letters:
    """One token per character."""

    bos_id: int | None = 7
    add_bos = False

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) for c in text], dtype=np.int64)


def test_default_halves_share_no_paragraph() -> None:
    halves = [whole_default_text(half).content for half in ("calibration", "evaluation")]
    paragraphs = [{" ".join(p.split()) for p in h.split("\n\n")} for h in halves]
    assert len(halves[0]) > 100_000
    assert len(halves[1]) > 100_000
    assert not paragraphs[0] & paragraphs[1]


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    windows = cut_windows(Text("t", "abcdefgh"), Letters(), 3)
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]


def test_windows_begin_with_bos_where_the_tokenizer_adds_it() -> None:
    tokenizer = Letters()
    tokenizer.add_bos = True
    windows = cut_windows(Text("t", "abcdefgh"), tokenizer, 3, limit=2)
    assert windows.tolist() == [[7, 97, 98], [7, 99, 100]]


def test_errors(tmp_path: Path) -> None:
    def message(content: bytes) -> str:
        path = tmp_path / "t.txt"
        path.write_bytes(content)
        with pytest.raises(FallowError) as error:
            load_text(path, "evaluation")
        return str(error.value).replace(str(path), "T")

    assert message(b" \n") == "text T is empty; give a file with text"
    assert message(b"ab\xff") == (
        "text T is not UTF-8 (byte 2); convert it, for example with iconv"
    )
    with pytest.raises(FallowError, match=r"cannot read text .*: No such file or directory"):
        load_text(tmp_path / "missing", "evaluation")
    with pytest.raises(FallowError) as error:
        cut_windows(Text("T", "abc"), Letters(), 4)
    assert str(error.value) == (
        "text T has 3 tokens, less than one window of 4; "
        "give a longer --text or a smaller --context"
    )
    with pytest.raises(UsageError, match="--windows 0 is too few"):
        cut_windows(Text("T", "abc"), Letters(), 2, limit=0)
    with pytest.raises(UsageError, match="--context 1 is too short"):
        cut_windows(Text("T", "abc"), Letters(), 1)
    with pytest.raises(FallowError, match="gives 2 windows, 3 are needed"):
        split_windows(np.zeros((2, 4)), [1, 2])


def test_as_many_windows_as_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = Text("T", "abcdef")
    assert len(cut_windows(text, Letters(), 2, limit=3)) == 3
    assert len(cut_windows(text, Letters(), 2, at_most=2)) == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(FallowError, match="text T gives 3 windows of 2 tokens, 4 are asked for"):
        cut_windows(text, Letters(), 2, limit=4)
    assert len(cut_windows(text, Letters(), 2, at_most=4)) == 3
    assert capsys.readouterr().err == "note: text T gives 3 windows of 2 tokens, not 4\n"


def test_leakage_is_refused_unless_allowed() -> None:
    text = Text("T", "abc")
    check_no_leakage("other", text, allow_leakage=False)
    check_no_leakage(text.sha256, text, allow_leakage=True)
    with pytest.raises(UsageError, match="is the text the plan was calibrated on"):
        check_no_leakage(text.sha256, text, allow_leakage=False)


def prose(words: int, seed: int) -> str:
    numbers = np.random.default_rng(seed).integers(0, 5000, words)
    return " ".join(f"word{n}" for n in numbers)


def message(calibration: Text, evaluation: Text) -> str:
    """What is said to an evaluation, "" if nothing."""
    try:
        check_no_leakage(calibration.sha256, evaluation, False, calibration.sketch)
    except UsageError as error:
        return str(error)
    return ""


def test_a_changed_copy_is_leakage() -> None:
    """More white space, other letters, a part of it, or it and more: the share is said."""
    mine, other = prose(20_000, 0), prose(20_000, 1)
    text = Text("C", mine)
    copies = ("\n" + mine, mine.replace(" ", " \r\n"), mine.upper(), mine + "!", mine[5000:30_000])
    for copy in (*copies, mine + other):
        assert message(text, Text("T", copy)) == (
            "evaluation text T has 100% in common with the text the plan was calibrated on; "
            "give another --text, or --allow-leakage to do it all the same"
        )
    check_no_leakage(text.sha256, Text("T", "\n" + mine), True, text.sketch)
    check_no_leakage(text.sha256, Text("T", "\n" + mine), False)  # a plan of old: its hash alone
    half = mine[: len(mine) // 2] + other[: len(other) // 2]
    assert 40 <= int(message(text, Text("T", half)).split("has ")[1].split("%")[0]) <= 60
    assert message(text, Text("T", other)) == ""
    assert "100%" in message(Text("C", "a short one"), Text("T", " A short\none\n"))
    assert message(Text("C", "a short one"), Text("T", "another")) == ""


def test_halves_of_the_default_text_are_no_leakage() -> None:
    calibration, evaluation = (whole_default_text(half) for half in ("calibration", "evaluation"))
    assert overlap(calibration.sketch, evaluation.codes) < 0.01
    assert message(calibration, evaluation) == message(evaluation, calibration) == ""


def test_overlap_estimates_the_share_of_runs() -> None:
    """Against all runs of both texts, each in full; the larger of both shares."""

    def runs(codes: np.ndarray) -> set[bytes]:
        return {codes[i : i + RUN].tobytes() for i in range(len(codes) - RUN + 1)}

    rng = np.random.default_rng(0)
    both, mine, theirs = (rng.integers(0, 500, n).astype(np.uint32) for n in (9000, 5000, 21_000))
    a, b = np.concatenate([both, mine]), np.concatenate([theirs, both])
    shared = len(runs(a) & runs(b))
    exact = shared / min(len(runs(a)), len(runs(b)))
    assert len(sketch_of(a)) == SKETCH
    for x, y in ((a, b), (b, a)):
        assert overlap(sketch_of(x), y) == pytest.approx(exact, abs=0.05)
    assert overlap(sketch_of(a), a) == 1
    assert overlap(np.empty(0, dtype=np.uint64), a) == 0
    pieces = np.concatenate([a, rng.integers(0, 500, 200_000).astype(np.uint32)])  # more than one
    np.testing.assert_array_equal(np.isin(sketch_of(pieces), sketch_of(pieces[::-1])), False)
    assert overlap(sketch_of(pieces), pieces[100_000:]) == pytest.approx(1, abs=0.05)
