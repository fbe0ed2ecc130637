"""Zero-shot tasks: multiple choice and word prediction, dense against sparse on the same items."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fallow.checkpoints.tokenizer import TextTokenizer
from fallow.common.errors import FallowError
from fallow.common.files import parse_json
from fallow.common.metrics import standard_error
from fallow.common.progress import progress
from fallow.engine.engine import Engine
from fallow.measure.quality import log_softmax
from fallow.plan import Plan

if TYPE_CHECKING:
    from fallow.reference.model import Model

TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Item:
    """One question: (context, continuation) pairs, of which `gold` is right.

    A single pair is a word to predict: right if every token of it is the most likely one.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0


def load_task(path: str | Path, limit: int | None = None) -> list[Item]:
    """Reads a task, one JSON object a line, in one of three forms:

    - `query`, `choices`, `gold`: which choice continues the query (ARC, PIQA, BoolQ)
    - `context_options`, `continuation`, `gold`: which context it continues (WinoGrande)
    - `context`, `continuation`: the words to predict (LAMBADA)

    Raises:
        FallowError: missing, empty, shorter than `limit`, or a line that has none of the forms.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise FallowError(f"cannot read task {path}: {error.strerror}; check --task") from error
    except UnicodeDecodeError as error:
        raise FallowError(f"task {path} is not UTF-8 (byte {error.start})") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise FallowError(f"task {path} is empty; give a file with one JSON object a line")
    if limit is not None and len(lines) < limit:
        raise FallowError(f"task {path} has {len(lines)} items, {limit} are asked for")
    lines = lines[:limit]
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: str) -> Item:
    try:
        entry = parse_json(line)
        if "query" in entry:
            context = _as_question(entry["query"])
            pairs = [(context, choice) for choice in entry["choices"]]
        elif "context_options" in entry:
            pairs = [(context, entry["continuation"]) for context in entry["context_options"]]
        else:
            pairs, entry["gold"] = [(entry["context"], entry["continuation"])], 0
        if not all(isinstance(text, str) for pair in pairs for text in pair):
            raise TypeError
        gold = int(entry["gold"])
        if not 0 <= gold < len(pairs) or not all(text for _, text in pairs):
            raise ValueError
        return Item(tuple((context, " " + text) for context, text in pairs), gold)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise FallowError(
            f"task {path}, line {number} is none of query/choices/gold, "
            "context_options/continuation/gold and context/continuation"
        ) from error


def _as_question(query: str) -> str:
    query = query.rstrip()
    return f"{query}\nAnswer:" if "Question:" in query else query


def evaluate_task(
    model: "Model | Engine", plan: Plan | None, path: str | Path, limit: int | None = None
) -> dict[str, Any]:
    """Accuracy of the dense model and under a plan on the same items, in [0, 1].

    A choice's score is its log-likelihood divided by its length in bytes, its leading space left
    out. `change_se` is the standard error of the paired difference. With an engine, dense is the
    packed model without a plan; torch is not needed.
    """
    items = load_task(path, limit)
    dense = _score(model, None, items, path, "dense")
    sparse = dense if plan is None else _score(model, plan, items, path, "sparse")
    return {
        "task": Path(path).stem,
        "items": len(items),
        "accuracy": float(sparse.mean()),
        "accuracy_se": standard_error(sparse),
        "dense_accuracy": float(dense.mean()),
        "change": float((sparse - dense).mean()),
        "change_se": standard_error(sparse - dense),
    }


@dataclass(frozen=True)
class ScoredIds:
    """A text's token ids, the last `n_scored` of which are the continuation's."""

    ids: np.ndarray
    n_scored: int

    @property
    def first(self) -> int:
        """The position whose logits predict the continuation's first token."""
        return len(self.ids) - self.n_scored - 1


Result = tuple[float, bool]
"""A continuation's log-likelihood in nats, and whether greedy decoding gives it."""


def _score(
    model: "Model | Engine", plan: Plan | None, items: list[Item], path: str | Path, how: str
) -> np.ndarray:
    """1.0 for each item answered right, (items,)."""
    read: Callable[[list[ScoredIds]], list[Result]]
    at_work: AbstractContextManager[None]
    if isinstance(model, Engine):
        model.use_plan(plan)
        read, room, at_work = (
            partial(read_engine, model, dense=plan is None),
            model.context,
            nullcontext(),
        )
    else:
        read, at_work = partial(read_model, model), model.sparse(plan)
        room = model.module.config.max_position_embeddings
    right = np.zeros(len(items))
    with at_work, progress(f"{Path(path).stem} {how}", len(items)) as ticker:
        for i, item in enumerate(items):
            try:
                pairs = [_encode(model.tokenizer, room, *pair) for pair in item.pairs]
            except FallowError as error:
                raise FallowError(f"task {path}, item {i + 1}: {error}") from error
            scored = read(pairs)
            if len(scored) == 1:
                right[i] = scored[0][1]
            else:
                lengths = [len(text.encode()) - 1 for _, text in item.pairs]
                score = [s[0] / n for s, n in zip(scored, lengths, strict=True)]
                right[i] = float(np.argmax(score)) == item.gold
            ticker.advance()
    return right


def _encode(tokenizer: TextTokenizer, room: int, context: str, text: str) -> ScoredIds:
    """The ids of a pair; the last `room` of a longer one."""
    whole = tokenizer.encode(context + text)
    n_scored = len(whole) - min(len(tokenizer.encode(context)), len(whole) - 1)
    whole = tokenizer.with_bos(whole)[-room:]
    if len(whole) < n_scored:
        raise FallowError(f"an answer of {n_scored} tokens exceeds the context of {room}")
    if len(whole) == n_scored:
        raise FallowError("its context is empty and the model has no BOS token")
    return ScoredIds(whole, n_scored)


def read_model(model: "Model", pairs: list[ScoredIds]) -> list[Result]:
    """Scores continuations with whatever plan the model runs under."""
    limit = max(1, TOKENS_AT_ONCE // max(len(p.ids) for p in pairs))
    found: list[Result] = []
    for start in range(0, len(pairs), limit):
        found += _read_batch(model, pairs[start : start + limit])
    return found


def _read_batch(model: "Model", pairs: list[ScoredIds]) -> list[Result]:
    longest = max(len(p.ids) for p in pairs)
    # Padded on the right, where causal attention never looks back from the text.
    hidden = model.hidden(np.stack([np.pad(p.ids, (0, longest - len(p.ids))) for p in pairs]))
    return [
        _result(model.logits(row[p.first : len(p.ids) - 1]).cpu().numpy(), p)
        for row, p in zip(hidden, pairs, strict=True)
    ]


def read_engine(engine: Engine, pairs: list[ScoredIds], dense: bool) -> list[Result]:
    """Scores continuations, by the plan or `dense`; what all begin with is read once."""
    shared = min(p.first for p in pairs)
    differ = (np.stack([p.ids[:shared] for p in pairs]) != pairs[0].ids[:shared]).any(axis=0)
    shared = int(differ.argmax()) if differ.any() else shared
    engine.reset()
    if shared:
        engine.forward(pairs[0].ids[:shared], dense=dense, exact=True)
    found = []
    for pair in pairs:
        engine.reset(shared)
        if pair.first > shared:
            engine.forward(pair.ids[shared : pair.first], dense=dense, exact=True)
        rest = engine.forward(pair.ids[pair.first : -1], every=True, dense=dense, exact=True)
        found.append(_result(rest, pair))
    return found


def _result(logits: np.ndarray, pair: ScoredIds) -> Result:
    """From the logits (n_scored, vocabulary) of the continuation's tokens."""
    if not np.isfinite(logits).all():
        raise FallowError("NaN or infinite logits; try --dtype float32, or pack the model again")
    log_p, targets = log_softmax(logits), pair.ids[-pair.n_scored :]
    likelihood = float(log_p[np.arange(len(targets)), targets].sum(dtype=np.float64))
    return likelihood, bool((log_p.argmax(axis=-1) == targets).all())
