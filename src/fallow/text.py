"""Calibration and evaluation text, cut into windows of tokens."""

import hashlib
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from fallow.errors import FallowError, UsageError
from fallow.progress import note

Half = Literal["calibration", "evaluation"]


class Encoder(Protocol):
    """What cutting text into windows needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    def encode(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Text:
    """A text and where it comes from; `sha256` identifies it in plans and results."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


def load_text(source: str | Path | Text | None, half: Half) -> Text:
    """The text of `source`: a file's path (.xz too), a Text as it is, or None for the default text.

    The default is the Python language reference which every CPython carries
    (`pydoc_data.topics`); its topics, in alphabetical order, go to the two halves in turn, so that
    calibration and evaluation share a style but not a sentence.

    Raises:
        FallowError: the file is missing, empty or not UTF-8.
    """
    if isinstance(source, Text):
        return source
    if source is None:
        return _default_text(half)
    path = Path(source)
    try:
        raw = path.read_bytes()
        content = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except lzma.LZMAError as error:
        raise FallowError(f"text {path} is no whole xz file ({error}); fetch it again") from error
    except OSError as error:
        raise FallowError(f"cannot read text {path}: {error.strerror}; check --text") from error
    except UnicodeDecodeError as error:
        raise FallowError(
            f"text {path} is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from error
    if not content.strip():
        raise FallowError(f"text {path} is empty; give a file with text")
    return Text(str(path), content)


def _default_text(half: Half) -> Text:
    from pydoc_data.topics import topics

    parity = 0 if half == "calibration" else 1
    seen: set[str] = set()
    chosen: list[str] = []
    for index, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            # Topics quote each other: a paragraph counts only where it comes first.
            key = " ".join(paragraph.split())
            if key not in seen and index % 2 == parity:
                chosen.append(paragraph)
            seen.add(key)
    return Text(f"python-reference/{half}", "\n\n".join(chosen))


def check_no_leakage(calibration_sha256: str, evaluation: Text, allow_leakage: bool) -> None:
    """Raises UsageError if the evaluation text is the calibration text."""
    if calibration_sha256 == evaluation.sha256 and not allow_leakage:
        raise UsageError(
            f"evaluation text {evaluation.name} is the text the plan was calibrated on; "
            "give another --text, or --allow-leakage to do it all the same"
        )


def check_context(context: int) -> None:
    """Raises UsageError if windows of so many tokens predict nothing."""
    if context < 2:
        raise UsageError(f"--context {context} is too short; a window needs at least 2 tokens")


def cut_windows(
    text: Text,
    tokenizer: Encoder,
    context: int,
    limit: int | None = None,
    at_most: int | None = None,
) -> np.ndarray:
    """Tokenises the text once and cuts it into windows, (n, context) int64 (METHODS 1).

    Windows do not overlap; the rest that does not fill one is dropped. For a model whose tokenizer
    adds BOS each window is BOS and context - 1 tokens of text.

    Args:
        limit: the first so many, which the text has to give; None: all.
        at_most: the first so many where `limit` is None, or those that there are.

    Raises:
        FallowError: the text is shorter than one window, or has fewer than `limit`.
        UsageError: context < 2 or limit < 1.
    """
    check_context(context)
    if limit is not None and limit < 1:
        raise UsageError(f"--windows {limit} is too few; give at least 1")
    ids = tokenizer.encode(text.content)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    step = context - (bos is not None)
    count = len(ids) // step
    if count == 0:
        raise FallowError(
            f"text {text.name} has {len(ids)} tokens, less than one window of {step}; "
            "give a longer --text or a smaller --context"
        )
    if limit is not None and count < limit:
        raise FallowError(
            f"text {text.name} gives {count} windows of {context} tokens, {limit} are asked for; "
            "give a longer text, fewer windows or a smaller --context"
        )
    if limit is None and at_most is not None and count < at_most:
        note(f"text {text.name} gives {count} windows of {context} tokens, not {at_most}")
    count = min(count, limit or at_most or count)
    windows = np.asarray(ids[: count * step], dtype=np.int64).reshape(count, step)
    if bos is not None:
        windows = np.concatenate([np.full((count, 1), bos, dtype=np.int64), windows], axis=1)
    return windows


def split_windows(windows: np.ndarray, parts: Sequence[int]) -> list[np.ndarray]:
    """Consecutive groups of windows of the given sizes. Raises FallowError if there are too few."""
    if len(windows) < sum(parts):
        raise FallowError(
            f"the calibration text gives {len(windows)} windows, {sum(parts)} are needed; "
            "give a longer --text, fewer windows or a smaller --context"
        )
    return [windows[sum(parts[:i]) : sum(parts[: i + 1])] for i in range(len(parts))]
