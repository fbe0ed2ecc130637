"""Zero-shot tasks: multiple choice and word prediction, dense against sparse on the same items."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow.errors import FallowError
from fallow.metrics import standard_error
from fallow.model import Model
from fallow.plan import Plan
from fallow.progress import progress

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
        FallowError: missing, empty, or a line that has none of the forms.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise FallowError(f"cannot read task {path}: {error.strerror}; check --task") from error
    except UnicodeDecodeError as error:
        raise FallowError(f"task {path} is not UTF-8 (byte {error.start})") from error
    lines = [line for line in lines if line.strip()][:limit]
    if not lines:
        raise FallowError(f"task {path} is empty; give a file with one JSON object a line")
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: str) -> Item:
    try:
        entry = json.loads(line)
        if "query" in entry:
            context = _as_question(entry["query"])
            pairs = [(context, " " + choice) for choice in entry["choices"]]
        elif "context_options" in entry:
            pairs = [(c, " " + entry["continuation"]) for c in entry["context_options"]]
        else:
            return Item(((entry["context"], " " + entry["continuation"]),))
        gold = int(entry["gold"])
        if not 0 <= gold < len(pairs):
            raise ValueError
        return Item(tuple(pairs), gold)
    except (ValueError, KeyError, TypeError) as error:
        raise FallowError(
            f"task {path}, line {number} is none of query/choices/gold, "
            "context_options/continuation/gold and context/continuation"
        ) from error


def _as_question(query: str) -> str:
    query = query.rstrip()
    return f"{query}\nAnswer:" if "Question:" in query else query


def evaluate_task(
    model: Model, plan: Plan | None, path: str | Path, limit: int | None = None
) -> dict[str, Any]:
    """Accuracy of the dense model and under a plan on the same items, in [0, 1].

    A choice's score is its log-likelihood divided by its length in bytes, its leading space left
    out. `change_se` is the standard error of the paired difference.
    """
    items = load_task(path, limit)
    dense = _score(model, None, items, f"{Path(path).stem} dense")
    sparse = dense if plan is None else _score(model, plan, items, f"{Path(path).stem} sparse")
    return {
        "task": Path(path).stem,
        "items": len(items),
        "accuracy": float(sparse.mean()),
        "accuracy_se": standard_error(sparse),
        "dense_accuracy": float(dense.mean()),
        "change": float((sparse - dense).mean()),
        "change_se": standard_error(sparse - dense),
    }


def _score(model: Model, plan: Plan | None, items: list[Item], label: str) -> np.ndarray:
    """1.0 for each item answered right, (items,)."""
    right = np.zeros(len(items))
    with model.sparse(plan), progress(label, len(items)) as ticker:
        for i, item in enumerate(items):
            scored = _continuations(model, item)
            if len(scored) == 1:
                right[i] = scored[0][1]
            else:
                lengths = [len(text.encode()) - 1 for _, text in item.pairs]
                score = [s[0] / n for s, n in zip(scored, lengths, strict=True)]
                right[i] = float(np.argmax(score)) == item.gold
            ticker.advance()
    return right


def _continuations(model: Model, item: Item) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding gives it) of every pair."""
    encoded = [_encode(model, context, text) for context, text in item.pairs]
    limit = max(1, TOKENS_AT_ONCE // max(len(ids) for ids, _ in encoded))
    found: list[tuple[float, bool]] = []
    for start in range(0, len(encoded), limit):
        found += _batch(model, encoded[start : start + limit])
    return found


def _encode(model: Model, context: str, text: str) -> tuple[np.ndarray, int]:
    """Ids of context and continuation, and how many are the continuation's."""
    tokenizer = model.tokenizer
    whole = tokenizer.encode(context + text)
    n_context = min(len(tokenizer.encode(context)), len(whole) - 1)
    n_context -= len(whole)
    whole = tokenizer.with_bos(whole)
    n_context += len(whole)
    if n_context < 1:
        raise FallowError("a task item has an empty context and the model has no BOS token")
    room = model.module.config.max_position_embeddings
    drop = max(0, len(whole) - room)
    return whole[drop:], len(whole) - n_context


def _batch(model: Model, encoded: list[tuple[np.ndarray, int]]) -> list[tuple[float, bool]]:
    longest = max(len(ids) for ids, _ in encoded)
    # Padded on the right, where causal attention never looks back from the text.
    ids = np.stack([np.pad(ids, (0, longest - len(ids))) for ids, _ in encoded])
    hidden = model.hidden(ids)
    if not torch.isfinite(hidden).all():
        raise FallowError("NaN or infinite values in the final hidden state; try --dtype float32")
    found = []
    for row, (own, n) in zip(hidden, encoded, strict=True):
        log_p = model.logits(row[len(own) - n - 1 : len(own) - 1]).log_softmax(-1)
        targets = torch.from_numpy(own[-n:])
        likelihood = float(log_p.gather(-1, targets[:, None]).sum())
        found.append((likelihood, bool((log_p.argmax(-1) == targets).all())))
    return found
