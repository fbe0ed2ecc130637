"""What logits say of a model's quality: loss, KL to dense, agreement; and that of a packed model.

No torch: the base install measures what it runs.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np

from fallow.checkpoints.text import Text, check_no_leakage, load_text
from fallow.common.errors import FallowError
from fallow.common.metrics import perplexity, ppl_change_percent, window_error
from fallow.common.progress import log, progress
from fallow.common.tables import Result, Table, flat, plus_minus
from fallow.engine.engine import Engine
from fallow.plan import ROUTER, Plan

# Logits of a whole window of Gemma-3 would take 1 GB; they are made for as many tokens at a time
# (fewer under a memory budget), and compared for as many as the processor's cache holds (five times
# faster than all at once).
LOGITS_AT_ONCE, LOGITS_AT_ONCE_IN_BUDGET, LOGITS_COMPARED = 1 << 26, 1 << 22, 1 << 19
# What evaluating takes beyond what an engine takes itself: both sides' logits and their comparison.
BUDGET_RESERVE = 60_000_000  # bytes
SPARSITY_TAPS = ("x", "gate_act", "up", "inter")

Logits = Callable[[slice], np.ndarray]
"""Logits (n, vocabulary), float32, of some of a window's tokens."""


@dataclass
class WindowResult:
    """One window under one plan."""

    loss: float  # mean next-token loss, nats
    kl: np.ndarray = field(repr=False)  # (T - 1,) nats, KL(dense || sparse) of each prediction
    top1: float = 1.0  # share of predictions whose most likely token is the dense model's
    # Zero fractions per tap, (L, T), or of an engine, which counts no single tokens, (L, 1); taps
    # that the model lacks are absent.
    sparsity: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    achieved_sparsity: float = 0.0  # of neurons, or of inputs weighted by parameters
    # For rules that keep k neurons per token, mean over tokens: the share of the k with the largest
    # out_norm that were kept, and `fallow.common.metrics.energy_recall`. None for other rules, and
    # where no neuron puts out anything.
    recall: float | None = None
    energy_recall: float | None = None


def compare_logits(
    window: np.ndarray,
    dense: Logits,
    sparse: list[Logits],
    vocabulary: int,
    at_once: int = LOGITS_AT_ONCE,
) -> tuple[WindowResult, list[WindowResult]]:
    """Loss of dense and sparse logits on a window (T,), KL and agreement of each sparse one.

    Each is asked for the window's tokens in turn, for about `at_once` logits at a time.
    """
    targets = window[1:]
    n = len(targets)
    loss, kl, same = np.zeros((3, 1 + len(sparse), n))
    for part in parts_of_window(n, vocabulary, at_once):
        loss[:, part], kl[:, part], same[:, part] = _compare(
            dense(part), [logits(part) for logits in sparse], targets[part]
        )
    return window_results(loss, kl, same)


def window_results(
    loss: np.ndarray, kl: np.ndarray, same: np.ndarray
) -> tuple[WindowResult, list[WindowResult]]:
    """From each prediction's loss, KL and agreement, (1 + S, T - 1) each, dense first."""
    dense, *sparse = (
        WindowResult(loss=float(own_loss.mean()), kl=own_kl, top1=float(own_same.mean()))
        for own_loss, own_kl, own_same in zip(loss, kl, same, strict=True)
    )
    return dense, sparse


def _compare(
    dense: np.ndarray, sparse: list[np.ndarray], targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, KL and agreement, (1 + S, n) each, dense first, of some tokens' (n, vocabulary)."""
    loss, kl, same = np.zeros((3, 1 + len(sparse), len(targets)))
    for here in parts_of_window(len(targets), dense.shape[1], LOGITS_COMPARED):
        log_p = log_softmax(dense[here])
        p, best = np.exp(log_p), log_p.argmax(axis=-1)
        loss[0, here], same[0, here] = _losses(log_p, targets[here]), 1
        for i, logits in enumerate(sparse, start=1):
            log_q = log_softmax(logits[here])
            loss[i, here] = _losses(log_q, targets[here])
            same[i, here] = log_q.argmax(axis=-1) == best
            kl[i, here] = np.einsum("tv,tv->t", p, log_p - log_q)
    return loss, kl, same


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Next-token loss (n,) nats, of logits (n, vocabulary) and the tokens (n,) that came."""
    parts = parts_of_window(len(targets), logits.shape[1], LOGITS_COMPARED)
    return np.concatenate([_losses(log_softmax(logits[part]), targets[part]) for part in parts])


def parts_of_window(n: int, vocabulary: int, at_once: int = LOGITS_AT_ONCE) -> Iterator[slice]:
    """n tokens in parts of about `at_once` logits."""
    step = max(1, at_once // vocabulary)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (n, vocabulary)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _losses(log_q: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -log_q[np.arange(len(targets)), targets]


@dataclass(repr=False)
class Evaluation(Result):
    """Quality and sparsity on a text. Errors are standard errors over windows, None for one."""

    ppl: float
    ppl_se: float | None
    ppl_change_percent: float  # against dense on the same windows
    ppl_change_se: float | None  # paired
    kl_to_dense: dict[str, float | None]  # nats per token: mean, se, p99
    top1_agreement: float
    # x, gate_act, up, inter, None if the FFN has none; of a mixture of experts router: experts, and
    # where a plan cuts neurons those of the experts that are used.
    sparsity_ratio: dict[str, float | None]
    tokens: int
    # Per tap and layer: mean, and the 5th and 95th percentile over what `spread_over` says: tokens,
    # or windows where an engine ran the model.
    sparsity_per_layer: dict[str, list[dict[str, float]]]
    spread_over: Literal["tokens", "windows"]
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

    @property
    def layers(self) -> Table:
        """Sparsity of every layer, a row each: "inter.mean" and the like."""
        by_layer = zip(*self.sparsity_per_layer.values(), strict=True)
        rows = (dict(zip(self.sparsity_per_layer, layer, strict=True)) for layer in by_layer)
        return Table({"layer": i} | flat(row) for i, row in enumerate(rows))

    def __repr__(self) -> str:
        what = "dense" if self.rule is None else f"under {self.rule} at {self.knob:.3g}"
        change = plus_minus(self.ppl_change_percent, self.ppl_change_se, sign="+")
        return (
            f"<Evaluation of {self.model} ({self.dtype}) {what}: PPL "
            f"{plus_minus(self.ppl, self.ppl_se)}, {change} % against dense, KL "
            f"{self.kl_to_dense['mean']:.4f} nats, sparsity {self.achieved_sparsity:.3f}; "
            f"{self.windows} windows of {self.context} tokens of {self.text}>"
        )


class Measured(Protocol):
    """What an evaluation says of the model: a reference model or an engine."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dtype_name(self) -> str: ...


def evaluate_engine(
    engine: Engine,
    plan: Plan | None = None,
    text: str | Path | Text | None = None,
    *,
    context: int = 1024,
    windows: int | np.ndarray | None = None,
    against: Engine | Callable[[np.ndarray], Logits] | None = None,
    decode: bool = False,
    allow_leakage: bool = False,
) -> Evaluation:
    """As `fallow.evaluate`, on a packed model and the engine that runs it; needs no torch.

    Args:
        windows: how many of the text's windows, or the text's windows themselves, cut already
            (`fallow.engine.packed.packed_windows`).
        against: what changes and KL are relative to: an engine, run dense, or a function that
            gives another model's logits of a window (T,); default: this engine.
        decode: read token by token, as generation does, instead of in blocks: slower, and the
            very arithmetic that decoding is timed with.

    Raises:
        FallowError, UsageError: as `evaluate`; also if `against` has another vocabulary.
    """
    source = load_text(text, "evaluation")
    if plan is not None:
        check_no_leakage(plan.calibration_sha256, source, allow_leakage, plan.calibration_sketch)
    cut = windows if isinstance(windows, np.ndarray) else engine.windows(source, context, windows)
    at_once = LOGITS_AT_ONCE if engine.memory is None else LOGITS_AT_ONCE_IN_BUDGET
    dense, sparse = [], []
    with (
        progress("evaluate", len(cut)) as ticker,
        tempfile.SpooledTemporaryFile(max_size=1) as kept,  # no file before it is written to
    ):
        for step, window in enumerate(cut):
            baseline = _baseline(against or engine, window, decode, at_once, kept)
            engine.use_plan(plan)
            engine.reset_stats()
            logits, vocabulary = _read(engine, window, decode), engine.vocabulary_size
            d, results = compare_logits(window, baseline, [logits], vocabulary, at_once)
            results[0].sparsity = _sparsity(engine, plan)
            results[0].achieved_sparsity = float([*results[0].sparsity.values()][-1].mean())
            dense.append(d)
            sparse.append(results[0])
            log_window(step, d, results[0])
            ticker.advance()
    return summarise(engine, plan, source, cut, dense, sparse, "windows")


def log_window(step: int, dense: WindowResult, sparse: WindowResult) -> None:
    """Tells whoever watches of a window."""
    figures = {
        "loss": sparse.loss,
        "dense_loss": dense.loss,
        "kl_to_dense": float(sparse.kl.mean()),
    }
    log("evaluate", step, figures | {"sparsity": sparse.achieved_sparsity})


def _sparsity(engine: Engine, plan: Plan | None) -> dict[str, np.ndarray]:
    """What was zero since `reset_stats`, per layer (L, 1); last what the plan is about."""
    if engine.n_experts and plan is not None and plan.cuts_neurons:
        experts, neurons = engine.idle_in_experts()
        return {ROUTER: experts[:, None], "inter": neurons[:, None]}
    return {ROUTER if engine.n_experts else "inter": engine.idle_neurons()[:, None]}


def _read(engine: Engine, window: np.ndarray, decode: bool, dense: bool = False) -> Logits:
    """An engine's logits, made as they are asked for, in the tokens' order."""
    engine.reset()

    def logits(part: slice) -> np.ndarray:
        ids, step = window[part], 1 if decode else part.stop - part.start
        parts = (ids[i : i + step] for i in range(0, len(ids), step))
        found = [engine.forward(some, every=True, dense=dense, exact=True) for some in parts]
        if not all(np.isfinite(values).all() for values in found):
            raise FallowError(f"{engine.path}: NaN or infinite logits; pack the model again")
        return found[0] if len(found) == 1 else np.concatenate(found)

    return logits


def _baseline(
    against: Engine | Callable[[np.ndarray], Logits],
    window: np.ndarray,
    decode: bool,
    at_once: int,
    kept: IO[bytes],
) -> Logits:
    """Logits to compare with; an engine's are all made now, under a budget into the file `kept`."""
    if not isinstance(against, Engine):
        return against(window)
    logits, vocabulary = _read(against, window, decode, dense=True), against.vocabulary_size
    parts = parts_of_window(len(window) - 1, vocabulary, at_once)
    if against.memory is None:
        return np.concatenate([logits(part) for part in parts]).__getitem__
    kept.seek(0)
    try:
        for part in parts:
            kept.write(logits(part).data)
    except OSError as error:
        raise FallowError(
            f"cannot keep a window's logits in {tempfile.gettempdir()}: {error.strerror}; set "
            "TMPDIR to a folder with space"
        ) from error

    def stored(part: slice) -> np.ndarray:
        kept.seek(4 * part.start * vocabulary)
        data = kept.read(4 * (part.stop - part.start) * vocabulary)
        return np.frombuffer(data, dtype=np.float32).reshape(-1, vocabulary)

    return stored


def summarise(
    model: Measured,
    plan: Plan | None,
    text: Text,
    windows: np.ndarray,
    dense: list[WindowResult],
    sparse: list[WindowResult],
    spread_over: Literal["tokens", "windows"] = "tokens",
) -> Evaluation:
    """One evaluation from each window's dense and sparse result."""
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
            "se": window_error(kl.mean(axis=1)),
            "p99": float(np.percentile(kl, 99)),
        },
        top1_agreement=float(np.mean([r.top1 for r in sparse])),
        sparsity_ratio={
            tap: float(fractions[tap].mean()) if tap in fractions else None
            for tap in dict.fromkeys([*SPARSITY_TAPS, *fractions])
        },
        tokens=int(windows.size),
        sparsity_per_layer={tap: _spread(f) for tap, f in fractions.items()},
        spread_over=spread_over,
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
    """Mean, 5th and 95th percentile of each layer, from (L, tokens or windows)."""
    low, high = np.percentile(fractions, [5, 95], axis=1)
    return [
        {"mean": float(row.mean()), "p5": float(a), "p95": float(b)}
        for row, a, b in zip(fractions, low, high, strict=True)
    ]
