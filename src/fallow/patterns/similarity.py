"""How much active sets change when a text is edited (docs/methods.md, "Similarity").

`edit_test` is the test that the question needs: tokens are replaced one for one at random
places, and positions before the first edit, behind it, and edited ones are told apart.
`published_test` is the published one on texts whose tails alone were replaced: as attention is
causal, what lies in a shared prefix is the same by construction.
"""

import ast
import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fallow.checkpoints.text import Text, load_text
from fallow.common.errors import FallowError, UsageError, in_one_line
from fallow.common.progress import progress
from fallow.models.taps import attach
from fallow.patterns.collect import Recorder, check_taps, tap_width
from fallow.patterns.store import pack_bits, row_sizes, unpack_bits
from fallow.plan import Plan
from fallow.reference.model import Model

EDITED = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30)  # shares of a document's tokens
DOCUMENTS = 12  # where none are asked for
STRATA = ("before", "after", "edited")
KINDS = ("substitute", "insert", "delete")
UNRELATED_PAIRS = 2000  # per layer
INTERVAL = 1.96  # standard errors over documents
_MAIN = "Main"


def agreement(x: np.ndarray, y: np.ndarray, width: int) -> np.ndarray:
    """Share of the neurons that are active in both rows or in neither, (n,)."""
    return 1 - row_sizes(x ^ y) / width


def jaccard(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x and y| / |x or y| of each pair of rows, (n,); 1 for two empty sets."""
    union = row_sizes(x | y)
    return np.where(union == 0, 1.0, row_sizes(x & y) / np.maximum(union, 1))


@contextmanager
def recording(model: Model, plan: Plan, tap: str) -> Iterator[Any]:
    """Yields a function from ids (T,) to rows of bits by layer, with the plan applied."""
    plan.check_model(model.fingerprint, model.name)
    check_taps(model, (tap,))
    recorder = Recorder(model, (tap,))
    with model.sparse(plan), attach(model.layers, {tap: recorder.tap(tap)}):

        def patterns(ids: np.ndarray) -> list[np.ndarray]:
            model.hidden(ids[None])
            return [pack_bits(active) for active in recorder.active[tap]]

        yield patterns


@dataclass
class Similarity:
    """A stratum at one share of edits; arrays by layer (L,), means over documents."""

    edited: float
    stratum: str
    agreement: list[float]
    # INTERVAL standard errors over documents; None of a single one.
    agreement_interval: list[float] | None
    jaccard: list[float]
    jaccard_interval: list[float] | None
    kappa_unrelated: list[float]  # (agreement - baseline) / (1 - baseline)
    kappa_frequency: list[float]


@dataclass
class EditReport:
    """What edits change, and what two tokens that have nothing to do with each other share."""

    model: str
    rule: str
    tap: str
    text: str
    kind: str
    documents: int
    context: int
    unrelated_agreement: list[float]
    unrelated_jaccard: list[float]
    frequency_agreement: list[float]  # mean of f² + (1 - f)²
    static_agreement: list[float]  # with the most frequent neurons, as many as are active
    rows: list[Similarity]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def edit_test(
    model: Model,
    plan: Plan,
    text: str | Path | Text | None = None,
    *,
    tap: str = "inter",
    documents: int | None = None,
    context: int = 512,
    shares: tuple[float, ...] = EDITED,
    kind: str = "substitute",
    seed: int = 0,
) -> EditReport:
    """Edits each document and compares active sets of the tokens that both texts have.

    A document is a window of the text; `documents` are the first so many, None: 12, or all of
    fewer. `kind` is one of KINDS; see `edit`. "before" the first edit all must agree, which checks
    the test itself.

    Raises:
        FallowError: the text has fewer windows, or the plan is for another model.
        UsageError: fewer than two documents, a share outside (0, 1), or an unknown kind.
    """
    if documents is not None and documents < 2:
        raise UsageError(f"--documents {documents} is too few; give at least 2")
    if kind not in KINDS:
        raise UsageError(f"unknown edit {kind!r}; known: {', '.join(KINDS)}")
    for share in shares:
        if not 0 < share < 1:
            raise UsageError(f"share {share:g} of edits is outside (0, 1)")
    source = load_text(text, "evaluation")
    windows = model.windows(source, context, documents, at_most=DOCUMENTS)
    if len(windows) < 2:
        raise FallowError(f"text {source.name} has one window of {context}; give a longer --text")
    rng = np.random.default_rng(seed)
    unigrams = windows[:, 1:].ravel()
    found: dict[tuple[float, str], list[np.ndarray]] = {}
    originals: list[list[np.ndarray]] = []
    with (
        recording(model, plan, tap) as patterns,
        progress("similarity", len(windows) * (1 + len(shares))) as ticker,
    ):
        for window in windows:
            original = patterns(window)
            originals.append(original)
            ticker.advance()
            for share in shares:
                edited = edit(window, share, kind, unigrams, rng)
                other = patterns(edited.ids)
                for stratum, pairs in edited.pairs.items():
                    if len(pairs):
                        values = _compare(original, other, pairs, tap_width(model, tap))
                        found.setdefault((share, stratum), []).append(values)
                ticker.advance()
    return _edit_report(model, plan, tap, source, kind, windows, originals, found, rng)


@dataclass(frozen=True)
class Edited:
    """A text after edits, and the tokens that both have: (original, edited) positions (n, 2)."""

    ids: np.ndarray
    pairs: dict[str, np.ndarray]  # by stratum


def edit(
    ids: np.ndarray, share: float, kind: str, unigrams: np.ndarray, rng: np.random.Generator
) -> Edited:
    """Edits a share of the tokens (T,), never the first; the result is no longer than T.

    New tokens are drawn from `unigrams`; one that replaces another differs from it. Inserted ones
    come before the tokens at the places drawn. Only replaced tokens are a pair of the stratum
    "edited".
    """
    count = min(max(1, round(share * len(ids))), len(ids) - 1)
    places = np.sort(rng.choice(np.arange(1, len(ids)), count, replace=False))
    at = np.arange(len(ids))
    kept = np.setdiff1d(at, places)
    none = np.empty((0, 2), dtype=np.int64)
    if kind == "substitute":
        changed = ids.copy()
        for place in places:
            others = unigrams[unigrams != ids[place]]
            if len(others) == 0:
                raise FallowError("the text has one token only; give another --text")
            changed[place] = rng.choice(others)
        pairs, edited = np.stack([kept, kept], axis=1), np.stack([places, places], axis=1)
    elif kind == "delete":
        changed, edited = ids[kept], none
        pairs = np.stack([kept, np.arange(len(kept))], axis=1)
    else:
        changed, edited = np.insert(ids, places, rng.choice(unigrams, count))[: len(ids)], none
        pairs = np.stack([at, at + np.searchsorted(places, at, side="right")], axis=1)
        pairs = pairs[pairs[:, 1] < len(ids)]
    before = pairs[:, 0] < places[0]
    return Edited(changed, {"before": pairs[before], "after": pairs[~before], "edited": edited})


def _compare(x: list[np.ndarray], y: list[np.ndarray], pairs: np.ndarray, width: int) -> np.ndarray:
    """Mean agreement and Jaccard of these pairs of positions, (2, L)."""
    rows = [(a[pairs[:, 0]], b[pairs[:, 1]]) for a, b in zip(x, y, strict=True)]
    return np.array(
        [
            [agreement(a, b, width).mean() for a, b in rows],
            [jaccard(a, b).mean() for a, b in rows],
        ]
    )


def _edit_report(
    model: Model,
    plan: Plan,
    tap: str,
    source: Text,
    kind: str,
    windows: np.ndarray,
    originals: list[list[np.ndarray]],
    found: dict[tuple[float, str], list[np.ndarray]],
    rng: np.random.Generator,
) -> EditReport:
    baselines = _baselines(originals, tap_width(model, tap), rng)
    unrelated, unrelated_jaccard, frequency, static_agreement = baselines
    rows_of_report = []
    for (share, stratum), values in sorted(found.items(), key=_by_share):
        mean = np.mean(values, axis=0)
        half = None
        if len(values) > 1:
            half = INTERVAL * np.std(values, axis=0, ddof=1) / len(values) ** 0.5
        rows_of_report.append(
            Similarity(
                edited=share,
                stratum=stratum,
                agreement=mean[0].tolist(),
                agreement_interval=None if half is None else half[0].tolist(),
                jaccard=mean[1].tolist(),
                jaccard_interval=None if half is None else half[1].tolist(),
                kappa_unrelated=_kappa(mean[0], unrelated),
                kappa_frequency=_kappa(mean[0], frequency),
            )
        )
    return EditReport(
        model=model.name,
        rule=plan.rule,
        tap=tap,
        text=source.name,
        kind=kind,
        documents=len(windows),
        context=windows.shape[1],
        unrelated_agreement=unrelated.tolist(),
        unrelated_jaccard=unrelated_jaccard.tolist(),
        frequency_agreement=frequency.tolist(),
        static_agreement=static_agreement.tolist(),
        rows=rows_of_report,
    )


def _baselines(
    originals: list[list[np.ndarray]], width: int, rng: np.random.Generator
) -> np.ndarray:
    """By layer, (4, L): agreement and Jaccard of unrelated tokens, and agreement by frequency.

    The latter of two tokens that have nothing but the neurons' rates in common, and of each token
    with the most frequent neurons.
    """
    documents, context = len(originals), len(originals[0][0])
    found = []
    for layer in range(len(originals[0])):
        rows = np.concatenate([original[layer] for original in originals])
        first = rng.integers(0, len(rows), UNRELATED_PAIRS)
        # A token of another document.
        step = rng.integers(1, documents, UNRELATED_PAIRS) * context
        second = (first // context * context + step) % len(rows)
        second += rng.integers(0, context, UNRELATED_PAIRS)
        x, y = rows[first], rows[second]
        rate = unpack_bits(rows, width).mean(axis=0)
        static = rate >= np.sort(rate)[::-1][max(round(rate.sum()), 1) - 1]
        found.append(
            (
                agreement(x, y, width).mean(),
                jaccard(x, y).mean(),
                (rate**2 + (1 - rate) ** 2).mean(),
                np.where(static, rate, 1 - rate).mean(),
            )
        )
    return np.array(found).T


def _by_share(item: tuple[tuple[float, str], Any]) -> tuple[float, int]:
    (share, stratum), _ = item
    return share, STRATA.index(stratum)


def _kappa(value: np.ndarray, baseline: np.ndarray) -> list[float]:
    return ((value - baseline) / np.maximum(1 - baseline, 1e-12)).tolist()


# As published ------------------------------------------------------------------------------------


@dataclass
class Variant:
    """A published variant of a sample against its original; agreements are by layer, (L,)."""

    sample: str
    variant: str
    tokens: int
    prefix_tokens: int  # shared with the original, hence the same by construction
    unedited_share: float  # of the tokens, by the best alignment
    row_by_row: list[float]  # position t against position t, over the shorter of the two
    prefix: list[float] | None
    behind: list[float] | None  # row by row, behind the prefix
    aligned: list[float] | None  # behind the prefix, tokens that the alignment pairs
    best_shift: int  # rows by which the variant is moved for the most agreement in the middle layer
    shifted: list[float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def published_test(
    model: Model, plan: Plan, folder: str | Path, *, tap: str = "gate_pre", context: int = 2048
) -> list[Variant]:
    """Every variant of the texts in a folder against its original, position by position.

    Raises:
        FallowError: the folder holds no such texts.
    """
    samples = read_samples(folder)
    width, found = tap_width(model, tap), []
    with (
        recording(model, plan, tap) as patterns,
        progress("published test", sum(map(len, samples.values()))) as ticker,
    ):
        for sample, texts in samples.items():
            ids = {name: _ids(model, text, context) for name, text in texts.items()}
            original = patterns(ids[_MAIN])
            ticker.advance()
            for name in sorted(set(ids) - {_MAIN}, reverse=True):
                rows = patterns(ids[name])
                found.append(_variant(sample, name, ids[_MAIN], ids[name], original, rows, width))
                ticker.advance()
    return found


def read_samples(folder: str | Path) -> dict[str, dict[str, str]]:
    """Texts by sample and variant: "Main", "95", ..., as the published scripts assign them.

    The last assignment of a variant counts, as in a script.
    """
    samples = {}
    for path in sorted(Path(folder).glob("paragraph*.txt"), key=lambda p: (len(p.name), p.name)):
        try:
            content = path.read_text(encoding="utf-8")
            pairs = re.findall(r'paragraph(\w+)\s*=\s*("""(?s:.*?)""")', content)
            texts = {name: ast.literal_eval(text) for name, text in pairs}
        except (OSError, ValueError, SyntaxError) as error:
            raise FallowError(f"{path} is damaged ({in_one_line(error)})") from error
        if _MAIN in texts:
            samples[path.stem.removeprefix("paragraph")] = texts
    if not samples:
        raise FallowError(f"{folder} has no texts paragraph1.txt, ... with a paragraphMain")
    return samples


def _ids(model: Model, text: str, context: int) -> np.ndarray:
    return np.asarray(model.tokenizer.with_bos(model.tokenizer.encode(text)))[:context]


def _variant(
    sample: str,
    name: str,
    main: np.ndarray,
    other: np.ndarray,
    original: list[np.ndarray],
    rows: list[np.ndarray],
    width: int,
) -> Variant:
    n = min(len(main), len(other))
    differs = np.flatnonzero(main[:n] != other[:n])
    prefix = int(differs[0]) if len(differs) else n
    matcher = difflib.SequenceMatcher(a=main.tolist(), b=other.tolist(), autojunk=False)
    pairs = np.array(
        [(b.a + i, b.b + i) for b in matcher.get_matching_blocks() for i in range(b.size)],
        dtype=np.int64,
    ).reshape(-1, 2)
    later = pairs[pairs[:, 0] >= prefix]

    def mean(a: np.ndarray, b: np.ndarray) -> list[float] | None:
        if len(a) == 0:
            return None
        return [
            float(agreement(x[a], y[b], width).mean()) for x, y in zip(original, rows, strict=True)
        ]

    every, middle = np.arange(n), len(original) // 2
    by_shift = {s: _shifted(original, rows, s, n, width) for s in range(-3, 4)}
    shift = max(by_shift, key=lambda s: (by_shift[s][middle], -abs(s)))
    return Variant(
        sample=sample,
        variant=name,
        tokens=len(other),
        prefix_tokens=prefix,
        unedited_share=len(pairs) / len(main),
        row_by_row=mean(every, every) or [],
        prefix=mean(every[:prefix], every[:prefix]),
        behind=mean(every[prefix:], every[prefix:]),
        aligned=mean(later[:, 0], later[:, 1]),
        best_shift=shift,
        shifted=by_shift[shift],
    )


def _shifted(
    original: list[np.ndarray], rows: list[np.ndarray], shift: int, n: int, width: int
) -> list[float]:
    """Agreement of position t with position t + shift."""
    first = np.arange(max(0, -shift), n - max(0, shift))
    return [
        float(agreement(x[first], y[first + shift], width).mean())
        for x, y in zip(original, rows, strict=True)
    ]


def draw(report: EditReport, path: str | Path) -> None:
    """Heat maps of the unedited tokens behind the first edit: layer against share of edits."""
    rows = [row for row in report.rows if row.stratum == "after"]
    if not rows:
        raise FallowError("no token behind an edit is unedited; there is nothing to draw")
    names = ("agreement", "jaccard", "kappa_frequency")
    maps = {n.replace("_", " over "): [getattr(row, n) for row in rows] for n in names}
    title = f"{report.model}, {report.rule}, {report.tap}: unedited tokens behind an edit"
    _draw_maps(maps, [f"{row.edited:.0%}" for row in rows], "tokens replaced", title, path)


def draw_variants(variants: list[Variant], path: str | Path) -> None:
    """Heat maps of the published test: layer against variant, mean of the samples."""
    names = sorted({v.variant for v in variants}, reverse=True)
    maps = {}
    for what in ("row_by_row", "prefix", "behind", "aligned", "shifted"):
        by_variant = [[getattr(v, what) for v in variants if v.variant == name] for name in names]
        there = [[values for values in some if values is not None] for some in by_variant]
        if all(there):
            maps[what.replace("_", " ")] = [np.mean(values, axis=0) for values in there]
    _draw_maps(maps, names, "variant", "agreement with the original, as published", path)


def _draw_maps(maps: dict[str, Any], columns: list[str], what: str, title: str, path: Any) -> None:
    """Side by side, of values (columns, layers)."""
    import matplotlib.pyplot as plt

    from fallow.common.files import atomic_path

    figure, axes = plt.subplots(
        1, len(maps), figsize=(4 * len(maps), 5), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (name, rows) in zip(axes[0], maps.items(), strict=True):
        values = np.array(rows).T
        image = axis.imshow(values, aspect="auto", vmin=min(0.0, values.min()), vmax=1)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_xlabel(what)
        axis.set_title(name)
        figure.colorbar(image, ax=axis)
    axes[0][0].set_ylabel("layer")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
