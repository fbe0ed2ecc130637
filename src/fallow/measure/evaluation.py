"""What a plan costs: perplexity, KL to dense, and the sparsity really reached, in the loop."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow.checkpoints.text import Text, check_no_leakage, load_text
from fallow.common.errors import FallowError
from fallow.common.metrics import energy_shares
from fallow.common.progress import progress
from fallow.measure.quality import (
    SPARSITY_TAPS,
    Evaluation,
    Logits,
    WindowResult,
    compare_logits,
    log_window,
    parts_of_window,
    summarise,
    token_losses,
    window_results,
)
from fallow.models import devices
from fallow.models.capture import non_finite_error
from fallow.models.cuts import per_token_topk
from fallow.models.devices import as_array, as_floats, in_halves
from fallow.models.taps import Layer, attach, tap_names
from fallow.plan import NEURON_TAPS, ROUTER, Plan
from fallow.reference.model import Model
from fallow.selectors import Selector


class SparsityMeter:
    """Zero fraction of tapped values per layer and token; of neurons per token and its expert."""

    def __init__(self, layers: list[Layer]) -> None:
        self._zeros: dict[str, list[list[np.ndarray]]] = {}
        self._layers = layers

    def tap(self, name: str) -> Any:
        parts: list[list[np.ndarray]] = [[] for _ in self._layers]
        self._zeros[name] = parts

        def count(layer: int, value: torch.Tensor) -> None:
            parts[layer].append(as_array((value == 0).float().mean(dim=-1)))

        return count

    def fractions(self, name: str) -> np.ndarray:
        """(L, T); a tap that is passed several times (x) gives the mean of its passes.

        Of a mixture's neurons (L, T * n_used).
        """
        if self._layers[0].experts is not None and name in NEURON_TAPS:
            return np.stack([np.concatenate(layer) for layer in self._zeros[name]])
        return np.stack([np.mean(layer, axis=0) for layer in self._zeros[name]])


class SelectionMeter:
    """How many of each token's k loudest neurons a plan keeps, and how much of their energy.

    Layers in which no neuron of any token puts out anything are left out.
    """

    def __init__(self, model: Model, kept: np.ndarray) -> None:
        """`kept` (L,): the share of neurons that each layer keeps."""
        self._layers, self._kept = model.layers, kept
        self._truth = torch.empty(0)
        self._shares: list[tuple[float, float]] = []

    def before(self, index: int, inter: torch.Tensor) -> None:
        layer = self._layers[index]
        self._truth = inter.abs().float() * layer.of_tapped(layer.down_norm)

    def after(self, index: int, inter: torch.Tensor) -> None:
        best = self._truth > per_token_topk(self._truth, float(self._kept[index]))
        both = best & (inter != 0)
        energy = self._truth.square()
        whole, found = (
            as_array((energy * some).sum(dim=1, dtype=torch.float64)) for some in (best, both)
        )
        energies = energy_shares(found, whole)
        if len(energies):
            self._shares.append((int(both.sum()) / int(best.sum()), energies.mean()))

    def means(self) -> tuple[float, float] | tuple[None, None]:
        """Recall and energy recall, mean over layers; None if nothing was to be found."""
        if not self._shares:
            return None, None
        recall, energy = np.mean(self._shares, axis=0)
        return float(recall), float(energy)


@dataclass
class _Meters:
    sparsity: SparsityMeter
    selection: SelectionMeter | None = None


def _sparsity_taps(layer: Layer, plan: Plan | Selector | None) -> tuple[str, ...]:
    """Where zeros are counted; of a mixture of experts, experts, and neurons if some are cut."""
    if layer.experts is None:
        return tuple(tap for tap in SPARSITY_TAPS if tap != "up" or layer.gated)
    neurons = tuple(tap for tap in SPARSITY_TAPS if tap in NEURON_TAPS)
    return (ROUTER, *neurons) if isinstance(plan, Plan) and plan.cuts_neurons else (ROUTER,)


@contextmanager
def _metered(model: Model, plan: Plan | Selector | None) -> Iterator[_Meters]:
    """Applies the plan and counts zeros behind it."""
    layer = model.layers[0]
    meters = _Meters(SparsityMeter(model.layers))
    taps = _sparsity_taps(layer, plan)
    inputs = plan.inputs if isinstance(plan, Plan) else ()
    counted = {t: meters.sparsity.tap(t) for t in (*taps, *inputs)}
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    kept = _kept(plan, len(model.layers))
    if kept is not None:
        meters.selection = SelectionMeter(model, kept)
        before, after = {"inter": meters.selection.before}, {"inter": meters.selection.after}
    with (
        attach(model.layers, before),
        model.sparse(plan),
        attach(model.layers, counted),
        attach(model.layers, after),
    ):
        yield meters


def _kept(plan: Plan | Selector | None, n_layers: int) -> np.ndarray | None:
    """The share of neurons kept of every token, (L,); None: it differs between tokens."""
    if isinstance(plan, Selector):
        return None if plan.kept is None else np.full(n_layers, plan.kept)
    cut = None if plan is None else plan.cut("inter")
    return cut.value if cut is not None and cut.kind == "topk" else None


def run_window(
    model: Model, window: np.ndarray, plans: Sequence[Plan | Selector | None]
) -> tuple[WindowResult, list[WindowResult]]:
    """One window (T,) through the dense model and through each plan.

    Raises:
        FallowError: NaN or infinity, naming tensor and layer.
    """
    dense, dense_meters = _run_metered(model, window, None)
    runs = [(dense, dense_meters) if p is None else _run_metered(model, window, p) for p in plans]
    dense_result, results = _compare(model, window, dense, [hidden for hidden, _ in runs])
    for result, plan, (_, meters) in zip(results, plans, runs, strict=True):
        _add_sparsity(model, result, plan, meters.sparsity)
        if meters.selection:
            result.recall, result.energy_recall = meters.selection.means()
    return dense_result, results


def _compare(
    model: Model, window: np.ndarray, dense: torch.Tensor, sparse: list[torch.Tensor]
) -> tuple[WindowResult, list[WindowResult]]:
    """As `compare_logits`, of final hidden states (T, d_model), where they are."""
    if devices.on_cpu(dense):
        parts = [logits_of(model, hidden) for hidden in sparse]
        return compare_logits(window, logits_of(model, dense), parts, model.vocabulary_size)
    targets = devices.tensor(window[1:], dense.device)
    compared = np.zeros((3, 1 + len(sparse), len(targets)))

    def compare(part: slice) -> np.ndarray:
        return _compare_in_torch(model, [h[part] for h in (dense, *sparse)], targets[part])

    for part in parts_of_window(len(targets), model.vocabulary_size):
        for piece, found in in_halves(compare, part):
            compared[:, :, piece] = found
    return window_results(*compared)


@torch.inference_mode()
def _compare_in_torch(
    model: Model, hidden: list[torch.Tensor], targets: torch.Tensor
) -> np.ndarray:
    """Loss, KL and agreement of some tokens (n, d_model) by the dense model and others: (3, S, n).

    The dense model comes first. In float32, as on the CPU.
    """
    log_p = model.logits(hidden[0]).log_softmax(dim=-1)
    p, best = log_p.exp(), log_p.argmax(dim=-1)
    rows = [torch.stack([_losses(log_p, targets), p.new_zeros(len(p)), p.new_ones(len(p))])]
    for of_plan in hidden[1:]:
        log_q = model.logits(of_plan).log_softmax(dim=-1)
        same = (log_q.argmax(dim=-1) == best).float()
        rows.append(torch.stack([_losses(log_q, targets), (p * (log_p - log_q)).sum(dim=-1), same]))
    return as_array(torch.stack(rows, dim=1))


def _losses(log_q: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -log_q.gather(1, targets[:, None].long())[:, 0]


def _run_metered(
    model: Model, window: np.ndarray, plan: Plan | Selector | None
) -> tuple[torch.Tensor, _Meters]:
    with _metered(model, plan) as meters:
        return final_hidden(model, window), meters


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

    layer = model.layers[0]
    names = [name for name in tap_names(layer) if name not in layer.projections]
    try:
        with attach(model.layers, {name: check(name) for name in names}):
            model.hidden(window[None])
    except FallowError as error:
        return error
    return FallowError("NaN or infinite values in the final hidden state; try --dtype float32")


def logits_of(model: Model, hidden: torch.Tensor) -> Logits:
    """Logits of final hidden states (T, d_model), brought from their device."""

    def logits(part: slice) -> np.ndarray:
        pieces = [
            found for _, found in in_halves(lambda p: as_floats(model.logits(hidden[p])), part)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return logits


def dense_logits(model: Model, window: np.ndarray) -> Logits:
    """Logits of a window (T,) by the model without a plan."""
    return logits_of(model, final_hidden(model, window))


def _add_sparsity(
    model: Model, result: WindowResult, plan: Plan | Selector | None, meter: SparsityMeter
) -> None:
    layer = model.layers[0]
    for tap in _sparsity_taps(layer, plan):
        result.sparsity[tap] = meter.fractions(tap)
    if not (isinstance(plan, Plan) and plan.inputs):
        kind = "inter" if "inter" in result.sparsity else ROUTER
        result.achieved_sparsity = float(result.sparsity[kind].mean())
    else:
        sizes = [
            [layer.projections[name].weight.numel() for layer in model.layers]
            for name in plan.inputs
        ]
        fractions = [meter.fractions(name).mean(axis=1) for name in plan.inputs]
        result.achieved_sparsity = float(np.average(fractions, weights=sizes))


def window_losses(model: Model, windows: np.ndarray, plan: Plan | Selector | None) -> np.ndarray:
    """Mean next-token loss of each window, (n,) nats; nothing else is measured."""
    losses = []
    with model.sparse(plan):
        for window in windows:
            losses.append(_window_loss(model, window, final_hidden(model, window)))
    return np.array(losses)


def _window_loss(model: Model, window: np.ndarray, hidden: torch.Tensor) -> float:
    """Mean next-token loss of a window (T,), nats, from its final hidden states (T, d_model)."""
    if not devices.on_cpu(hidden):
        return _compare(model, window, hidden, [])[0].loss
    logits, targets = logits_of(model, hidden), window[1:]
    pieces = parts_of_window(len(targets), model.vocabulary_size)
    parts = [token_losses(logits(piece), targets[piece]) for piece in pieces]
    return np.concatenate(parts).mean()


def evaluate(
    model: Model,
    plan: Plan | None = None,
    text: str | Path | Text | None = None,
    *,
    context: int = 1024,
    windows: int | None = None,
    allow_leakage: bool = False,
) -> Evaluation:
    """Measures a plan (None: the dense model) on a text; docs/methods.md, "Perplexity".

    Args:
        text: a file, or None for the evaluation half of the default text.
        context: tokens per window.
        windows: how many of the text's windows, from the first; None: all.

    Raises:
        FallowError: the text has fewer windows, plan for another model, NaN.
        UsageError: the text is the plan's calibration text, and not `allow_leakage`.
    """
    source = load_text(text, "evaluation")
    if plan is not None:
        plan.check_model(model.fingerprint, model.name)
        check_no_leakage(plan.calibration_sha256, source, allow_leakage, plan.calibration_sketch)
    cut = model.windows(source, context, windows)
    dense, sparse = [], []
    with progress("evaluate", len(cut)) as ticker:
        for step, window in enumerate(cut):
            d, s = run_window(model, window, [plan])
            dense.append(d)
            sparse.append(s[0])
            log_window(step, d, s[0])
            ticker.advance()
    return summarise(model, plan, source, cut, dense, sparse)
