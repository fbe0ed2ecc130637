"""What a plan costs: perplexity, KL to dense, and the sparsity really reached, in the loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow.capture import non_finite_error
from fallow.engine import Engine
from fallow.errors import FallowError
from fallow.metrics import perplexity, ppl_change_percent, standard_error
from fallow.model import Model
from fallow.plan import Plan
from fallow.progress import progress
from fallow.taps import attach
from fallow.text import Text, check_no_leakage, load_text

# Logits of a whole window of Gemma-3 would take 1 GB; they are made for as many tokens at a time.
LOGITS_AT_ONCE = 1 << 26
SPARSITY_TAPS = ("x", "gate_act", "up", "inter")


@dataclass
class WindowResult:
    """One window under one plan."""

    loss: float  # mean next-token loss, nats
    kl: np.ndarray = field(repr=False)  # (T - 1,) nats, KL(dense || sparse) of each prediction
    top1: float = 1.0  # share of predictions whose most likely token is the dense model's
    # Zero fractions per tap, (L, T); taps that the model lacks are absent.
    sparsity: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    achieved_sparsity: float = 0.0  # of neurons, or of inputs weighted by parameters


class SparsityMeter:
    """Zero fraction of tapped values per layer and token."""

    def __init__(self, n_layers: int) -> None:
        self._zeros: dict[str, list[list[np.ndarray]]] = {}
        self._n_layers = n_layers

    def tap(self, name: str) -> Any:
        parts: list[list[np.ndarray]] = [[] for _ in range(self._n_layers)]
        self._zeros[name] = parts

        def count(layer: int, value: torch.Tensor) -> None:
            parts[layer].append((value == 0).float().mean(dim=-1).numpy())

        return count

    def fractions(self, name: str) -> np.ndarray:
        """(L, T); a tap that is passed several times (x) gives the mean of its passes."""
        return np.stack([np.mean(layer, axis=0) for layer in self._zeros[name]])


@contextmanager
def _metered(model: Model, plan: Plan | None, meter: SparsityMeter) -> Iterator[None]:
    """Applies the plan and counts zeros behind it."""
    layer = model.layers[0]
    taps = [t for t in SPARSITY_TAPS if t != "up" or layer.gated]
    cuts = model.rule(plan).cuts(layer) if plan is not None and plan.where == "input" else ()
    with model.sparse(plan), attach(model.layers, {t: meter.tap(t) for t in (*taps, *cuts)}):
        yield


def run_window(
    model: Model, window: np.ndarray, plans: Sequence[Plan | None]
) -> tuple[WindowResult, list[WindowResult]]:
    """One window (T,) through the dense model and through each plan.

    Raises:
        FallowError: NaN or infinity, naming tensor and layer.
    """
    dense, dense_meter = _run_metered(model, window, None)
    runs = [(dense, dense_meter) if p is None else _run_metered(model, window, p) for p in plans]
    dense_result, results = compare_logits(
        window,
        logits_of(model, dense),
        [logits_of(model, hidden) for hidden, _ in runs],
        model.vocabulary_size,
    )
    for result, plan, (_, meter) in zip(results, plans, runs, strict=True):
        _add_sparsity(model, result, plan, meter)
    return dense_result, results


def _run_metered(
    model: Model, window: np.ndarray, plan: Plan | None
) -> tuple[torch.Tensor, SparsityMeter]:
    meter = SparsityMeter(len(model.layers))
    with _metered(model, plan, meter):
        return final_hidden(model, window), meter


def final_hidden(model: Model, window: np.ndarray) -> torch.Tensor:
    """Final hidden states (T, d_model) of a window (T,), with whatever is attached to the model.

    Raises:
        FallowError: NaN or infinity, naming the first tensor and layer that has it.
    """
    hidden = model.hidden(window[None])[0]
    if not torch.isfinite(hidden).all():
        raise _locate_non_finite(model, window)
    return hidden


def _locate_non_finite(model: Model, window: np.ndarray) -> FallowError:
    def check(tap: str) -> Any:
        def look(layer: int, value: torch.Tensor) -> None:
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise non_finite_error(tap, layer, bad)

        return look

    names = ["x", *model.layers[0].ffn_taps]
    try:
        with attach(model.layers, {name: check(name) for name in names}):
            model.hidden(window[None])
    except FallowError as error:
        return error
    return FallowError("NaN or infinite values in the final hidden state; try --dtype float32")


Logits = Callable[[slice], torch.Tensor]
"""Logits (n, vocabulary) of some of a window's tokens."""


def logits_of(model: Model, hidden: torch.Tensor) -> Logits:
    return lambda part: model.logits(hidden[part])


def compare_logits(
    window: np.ndarray, dense: Logits, sparse: list[Logits], vocabulary: int
) -> tuple[WindowResult, list[WindowResult]]:
    """Loss of dense and sparse logits on a window (T,), KL and agreement of each sparse one."""
    targets = torch.from_numpy(window[1:])
    n = len(targets)
    loss = np.zeros((1 + len(sparse), n))
    kl = np.zeros((1 + len(sparse), n))
    same = np.ones((1 + len(sparse), n))
    for start in range(0, n, step := _tokens_at_once(vocabulary)):
        part = slice(start, min(start + step, n))
        log_p = dense(part).log_softmax(-1)
        p, best = log_p.exp(), log_p.argmax(-1)
        loss[0, part] = _loss(log_p, targets[part])
        for i, logits in enumerate(sparse, start=1):
            log_q = logits(part).log_softmax(-1)
            loss[i, part] = _loss(log_q, targets[part])
            same[i, part] = (log_q.argmax(-1) == best).numpy()
            kl[i, part] = torch.linalg.vecdot(p, log_p - log_q).numpy()
    results = [
        WindowResult(loss=float(loss[i].mean()), kl=kl[i], top1=float(same[i].mean()))
        for i in range(1 + len(sparse))
    ]
    return results[0], results[1:]


def _tokens_at_once(vocabulary: int) -> int:
    return max(1, LOGITS_AT_ONCE // vocabulary)


def _loss(log_q: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    return -log_q.gather(-1, targets[:, None])[:, 0].numpy()


def _add_sparsity(
    model: Model, result: WindowResult, plan: Plan | None, meter: SparsityMeter
) -> None:
    layer = model.layers[0]
    for tap in SPARSITY_TAPS:
        if tap != "up" or layer.gated:
            result.sparsity[tap] = meter.fractions(tap)
    if plan is None or plan.where == "inter":
        result.achieved_sparsity = float(result.sparsity["inter"].mean())
    else:
        cuts = model.rule(plan).cuts(layer)
        sizes = [layer.projections[name].weight.numel() for name in cuts]
        means = [float(meter.fractions(name).mean()) for name in cuts]
        result.achieved_sparsity = float(np.average(means, weights=sizes))


def window_losses(model: Model, windows: np.ndarray, plan: Plan | None) -> np.ndarray:
    """Mean next-token loss of each window, (n,) nats; nothing else is measured."""
    losses = []
    with model.sparse(plan):
        for window in windows:
            hidden = final_hidden(model, window)
            targets = torch.from_numpy(window[1:])
            step = _tokens_at_once(model.vocabulary_size)
            parts = [
                _loss(model.logits(h).log_softmax(-1), t)
                for h, t in zip(hidden[:-1].split(step), targets.split(step), strict=True)
            ]
            losses.append(np.concatenate(parts).mean())
    return np.array(losses)


@dataclass
class Evaluation:
    """Quality and sparsity on a text. Errors are standard errors over windows, None for one."""

    ppl: float
    ppl_se: float | None
    ppl_change_percent: float  # against dense on the same windows
    ppl_change_se: float | None  # paired
    kl_to_dense: dict[str, float | None]  # nats per token: mean, se, p99
    top1_agreement: float
    sparsity_ratio: dict[str, float | None]  # x, gate_act, up, inter; None if the FFN has none
    tokens: int
    # Per tap and layer: mean over tokens, and the 5th and 95th percentile over tokens.
    sparsity_per_layer: dict[str, list[dict[str, float]]]
    target_sparsity: float | None
    achieved_sparsity: float  # of neurons, or for input rules of inputs, weighted by parameters
    rule: str | None
    knob: float | None
    model: str
    fingerprint: str
    dtype: str
    text: str
    text_sha256: str
    context: int
    windows: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def evaluate(
    model: Model,
    plan: Plan | None = None,
    text: str | Path | Text | None = None,
    *,
    context: int = 1024,
    windows: int | None = None,
    allow_leakage: bool = False,
) -> Evaluation:
    """Measures a plan (None: the dense model) on a text; protocol of METHODS 1.

    Args:
        text: a file, or None for the evaluation half of the default text.
        context: tokens per window.
        windows: how many of the text's windows, from the first; None: all.

    Raises:
        FallowError: text shorter than one window, plan for another model, NaN.
        UsageError: the text is the plan's calibration text, and not `allow_leakage`.
    """
    source = load_text(text, "evaluation")
    if plan is not None:
        plan.check_model(model.fingerprint, model.name)
        check_no_leakage(plan.calibration_sha256, source, allow_leakage)
    cut = model.windows(source, context, windows)
    dense, sparse = [], []
    with progress("evaluate", len(cut)) as ticker:
        for window in cut:
            d, s = run_window(model, window, [plan])
            dense.append(d)
            sparse.append(s[0])
            ticker.advance()
    return _summarise(model, plan, source, cut, dense, sparse)


def evaluate_engine(
    engine: Engine,
    plan: Plan | None = None,
    text: str | Path | Text | None = None,
    *,
    context: int = 1024,
    windows: int | None = None,
    against: Engine | Model | None = None,
    decode: bool = False,
    allow_leakage: bool = False,
) -> Evaluation:
    """As `evaluate`, on a packed model and the engine that runs it.

    Args:
        against: what changes and KL are relative to, run dense; default: the engine itself.
        decode: read token by token, as generation does, instead of in blocks: slower, and the
            very arithmetic that decoding is timed with.

    Raises:
        FallowError, UsageError: as `evaluate`; also if `against` has another vocabulary.
    """
    source = load_text(text, "evaluation")
    if plan is not None:
        check_no_leakage(plan.calibration_sha256, source, allow_leakage)
    cut = engine.windows(source, context, windows)
    dense, sparse = [], []
    with progress("evaluate", len(cut)) as ticker:
        for window in cut:
            baseline = _baseline_logits(against or engine, window, decode)
            engine.use_plan(plan)
            engine.reset_stats()
            logits = _engine_logits(engine, window, decode)
            if not np.isfinite(logits).all():
                raise FallowError(f"{engine.path}: NaN or infinite logits; pack the model again")
            d, results = compare_logits(
                window, baseline, [torch.from_numpy(logits).__getitem__], logits.shape[1]
            )
            results[0].sparsity = {"inter": engine.idle_neurons()[:, None]}
            results[0].achieved_sparsity = float(results[0].sparsity["inter"].mean())
            dense.append(d)
            sparse.append(results[0])
            ticker.advance()
    return _summarise(engine, plan, source, cut, dense, sparse)


def _engine_logits(engine: Engine, window: np.ndarray, decode: bool) -> np.ndarray:
    if not decode:
        return engine.logits(window)
    engine.reset()
    return np.concatenate([engine.forward(window[i : i + 1]) for i in range(len(window))])


def _baseline_logits(against: Engine | Model, window: np.ndarray, decode: bool) -> Logits:
    if isinstance(against, Model):
        return logits_of(against, final_hidden(against, window))
    against.use_plan(None)
    return torch.from_numpy(_engine_logits(against, window, decode)).__getitem__


def _summarise(
    model: Model | Engine,
    plan: Plan | None,
    text: Text,
    windows: np.ndarray,
    dense: list[WindowResult],
    sparse: list[WindowResult],
) -> Evaluation:
    loss = np.array([r.loss for r in sparse])
    ppl, ppl_se = perplexity(loss)
    change, change_se = ppl_change_percent(loss, np.array([r.loss for r in dense]))
    kl = np.stack([r.kl for r in sparse])  # (windows, T - 1)
    fractions = {
        tap: np.concatenate([r.sparsity[tap] for r in sparse], axis=1) for tap in sparse[0].sparsity
    }
    return Evaluation(
        ppl=ppl,
        ppl_se=ppl_se,
        ppl_change_percent=change,
        ppl_change_se=change_se,
        kl_to_dense={
            "mean": float(kl.mean()),
            "se": standard_error(kl.mean(axis=1)),
            "p99": float(np.percentile(kl, 99)),
        },
        top1_agreement=float(np.mean([r.top1 for r in sparse])),
        sparsity_ratio={
            tap: float(fractions[tap].mean()) if tap in fractions else None for tap in SPARSITY_TAPS
        },
        tokens=int(windows.size),
        sparsity_per_layer={tap: _spread(f) for tap, f in fractions.items()},
        target_sparsity=None if plan is None else plan.target_sparsity,
        achieved_sparsity=float(np.mean([r.achieved_sparsity for r in sparse])),
        rule=None if plan is None else plan.rule,
        knob=None if plan is None else plan.knob,
        model=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype_name,
        text=text.name,
        text_sha256=text.sha256,
        context=windows.shape[1],
        windows=len(windows),
    )


def _spread(fractions: np.ndarray) -> list[dict[str, float]]:
    """Mean, 5th and 95th percentile over tokens of each layer, from (L, T)."""
    low, high = np.percentile(fractions, [5, 95], axis=1)
    return [
        {"mean": float(row.mean()), "p5": float(a), "p95": float(b)}
        for row, a, b in zip(fractions, low, high, strict=True)
    ]
