"""Calibration and evaluation text, cut into windows of tokens."""

import hashlib
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from fallow.common.errors import FallowError, UsageError, in_one_line
from fallow.common.progress import note

Half = Literal["calibration", "evaluation"]

RUN = 64  # characters, about thirteen English words; a power of two
SKETCH = 1024  # of a text's runs, what is kept of them
# The halves of the default text share about a thousandth, WikiText-2's validation and test texts
# none.
LARGEST_OVERLAP = 0.1
_CODES_AT_ONCE = 1 << 16


class Encoder(Protocol):
    """What cutting text into windows needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    def encode(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Text:
    """A text and where it comes from; `sha256` identifies it in plans and results.

    `sketch` stands for the text where another is compared with it, see `sketch_of`.
    """

    name: str
    content: str = field(repr=False)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()

    @cached_property
    def sketch(self) -> np.ndarray:
        return sketch_of(self.codes)

    @property
    def codes(self) -> np.ndarray:
        """Code points (n,) uint32 of its characters, in lower case and without white space."""
        characters = "".join(self.content.casefold().split())
        return np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def load_text(source: str | Path | Text | None, half: Half) -> Text:
    """The text of `source`: a file's path (.xz too), a Text as it is, or None for the default text.

    A str is a path, never the text itself: that is `Text("a name for it", text)`.

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
        named = in_one_line(path)
        if len(named.split()) > 4:  # more words than a file's name is likely to have
            raise UsageError(
                f"there is no file {named}; a text itself is given as fallow.Text(NAME, TEXT)"
            ) from error
        raise FallowError(f"cannot read text {named}: {error.strerror}; check --text") from error
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


def sketch_of(codes: np.ndarray, run: int = RUN) -> np.ndarray:
    """The SKETCH smallest hashes (n,) uint64, ascending, of all runs of `run` numbers in a row.

    Bottom-k sketch (Cohen, Kaplan, PODC 2007): as good as drawn from the different runs at random,
    and of two texts the same runs are drawn. `run` is a power of two.
    """
    found = np.empty(0, dtype=np.uint64)
    for hashes in _runs(codes, run):
        if len(found) == SKETCH:
            hashes = hashes[hashes < found[-1]]
        found = np.union1d(found, hashes)[:SKETCH]
    return found


def overlap(sketch: np.ndarray, codes: np.ndarray, run: int = RUN) -> float:
    """The share of runs that `codes` and the text of a sketch have in common.

    An estimate from 0 to 1, and the larger one of both texts' shares: part of a text is a leak, and
    so is a text of which the other is part.
    """
    if len(sketch) == 0:
        return 0.0
    largest = sketch.max()
    drawn = np.unique(np.concatenate([h[h <= largest] for h in _runs(codes, run)]))
    both = np.isin(sketch, drawn).sum()
    return float(both / max(1, min(len(sketch), len(drawn))))


def _runs(codes: np.ndarray, run: int) -> Iterator[np.ndarray]:
    """Hashes (n,) uint64 of every run, in parts; of fewer numbers than a run one hash."""
    codes = np.pad(codes, (0, max(0, run - len(codes))))
    for start in range(0, len(codes) - run + 1, _CODES_AT_ONCE):
        hashes = codes[start : start + _CODES_AT_ONCE + run - 1].astype(np.uint64)
        length = 1
        while length < run:  # of a run's two halves
            hashes = hashes[:-length] * np.uint64(0x9E3779B97F4A7C15) + hashes[length:]
            hashes ^= hashes >> np.uint64(32)
            length *= 2
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64
            hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
        yield hashes ^ (hashes >> np.uint64(31))


def check_no_leakage(
    calibration_sha256: str,
    evaluation: Text,
    allow_leakage: bool,
    calibration_sketch: np.ndarray | None = None,
) -> None:
    """Raises UsageError if the evaluation text is the calibration text, or much of it.

    Without a sketch of the calibration text, as in plans of old, only the very same is found.
    """
    if allow_leakage:
        return
    common = "is"
    if calibration_sha256 != evaluation.sha256:
        if calibration_sketch is None:
            return
        share = overlap(calibration_sketch, evaluation.codes)
        if share <= LARGEST_OVERLAP:
            return
        common = f"has {share:.0%} in common with"
    raise UsageError(
        f"evaluation text {evaluation.name} {common} the text the plan was calibrated on; "
        "give another --text, or --allow-leakage to do it all the same"
    )


def check_context(context: int) -> None:
    """Raises UsageError if windows of so many tokens predict nothing."""
    if context < 2:
        raise UsageError(f"--context {context} is too short; a window needs at least 2 tokens")


def window_bos(tokenizer: Encoder) -> int | None:
    """What every window begins with, if the tokenizer adds BOS."""
    return tokenizer.bos_id if tokenizer.add_bos else None


def cut_windows(
    text: Text,
    tokenizer: Encoder,
    context: int,
    limit: int | None = None,
    at_most: int | None = None,
) -> np.ndarray:
    """Tokenises the text once and cuts it into windows, (n, context) int64.

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
    bos = window_bos(tokenizer)
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
