"""From a model to a packed file that leaves idle what a stated loss allows, chosen by measurement.

What may be spared: rows of up_proj of neurons whose gate is small, rows of down_proj of neurons
whose output is small (rule `two_stage`), and exact logits of unlikely tokens (the shortlist).
What each layer's thresholds cost the whole model is measured layer by layer; then every layer takes
the cheapest of its choices at one common price of divergence for bytes, and the price is searched
for which held-out text loses as much as is allowed.

Three texts, none of which shares a token with another: the plan is made on the first, the search
judges by the second, and the third, which neither has seen, checks what came of it.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fallow import _core
from fallow.bench import run_in_turn
from fallow.capture import Calibration
from fallow.engine import Engine
from fallow.errors import FallowError, UsageError
from fallow.evaluation import dense_logits, window_losses
from fallow.files import JsonLines, atomic_path, check_writable, fits
from fallow.memory import COARSE_HEAD
from fallow.metrics import ppl_change_percent
from fallow.model import Model
from fallow.packing import Packer
from fallow.plan import Plan
from fallow.progress import console, progress
from fallow.quality import Evaluation, evaluate_engine, log_softmax, token_losses
from fallow.rules._gate import gate_weights
from fallow.rules.two_stage import TwoStage
from fallow.text import Text, check_no_leakage, load_text, split_windows
from fallow.weights import StoredTensor

# Sparsities at which each layer's thresholds are measured; between them the divergence is taken as
# linear, which overestimates it a little since it is convex.
LEVELS = {
    "gate_act": (0.1, 0.25, 0.4),
    "inter": (0.3, 0.5, 0.7, 0.85),
}
# What each stage spares rows of, and the product that reads them.
ROWS = {"gate_act": ("up_proj", "gemv"), "inter": ("down_proj_t", "axpy")}
GRID = np.arange(0, 0.951, 0.05)  # sparsities that a layer may be given
PROBE_WINDOWS, PROBE_CONTEXT = 2, 256  # tokens on which the divergence is measured
SCORE_TOKENS = 256  # per layer, whose scores' quantiles are thresholds
# Scattered rows take longer than their share of a matrix: how much is timed on half of the rows of
# one too large for any cache, and never taken to be less than nothing.
TIMED_BYTES, ROW_RUNS = 1 << 26, 5
PREFERENCES = ("speed", "bytes")
# Nats below the largest coarse logit, and of the vocabulary how much at most. On WikiText-2,
# Qwen2.5-Coder: 12 nats cost 0.0008 nats of divergence and 3,300 exact rows per token, 11 0.0012
# and 1,800, 10 0.0020 and 1,000; 12 and at most 2,000 rows 0.0018 and 1,200, as much PPL as 11.
# Where many rows are near none matters much, and of a head on the disk they would take as long as
# a layer.
HEAD_MARGIN = 12.0
HEAD_SHARE, HEAD_LEAST = 1 / 64, 1024  # of rows, whichever is more
# Logarithm of the price, in nats for all of the FFN's bytes.
LOWEST_PRICE, HIGHEST_PRICE, PRICE_STEPS = -3.0, 1.5, 7
# A plan is judged window by window; from JUDGED_FROM on, one this many standard errors from the
# limit is not looked at further.
JUDGED_FROM, CLEAR = 6, 4.0
SMALLEST = 1e-30  # a threshold that only exact zeros stay below
TIMED_PROMPT, TIMED_TOKENS, TIMED_RUNS = 64, 64, 5
# Of dense's speed, or with "bytes" of its bytes: what gains less is not worth a loss of quality.
LEAST_GAIN = 0.03
CHECKS = 3  # times that a search, each for a smaller loss, may look at the check's text


@dataclass
class Optimized:
    """What a plan saves and costs. Quality is against the source model, on held-out text."""

    path: str
    selector: str
    ppl_change_percent: float  # on windows that only checked the plan, as are the next two
    ppl_change_se: float | None  # paired
    kl_to_dense: float  # nats per token, from the source model
    bytes_per_token: float  # weights and cache read per decoded token
    bytes_ratio: float  # that over the same of the packed model run dense
    decode_tps: float  # median of alternating runs
    decode_ratio_dense: float  # against the packed model run dense
    sparsity_ratio: float  # S(inter) while decoding
    validation_ppl_change_percent: float  # on the text that the search judged by
    text: str
    windows: int  # of the text
    calibration_text: str
    threads: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def optimize(
    model: str | Path | Model,
    output: str | Path,
    *,
    max_ppl_increase: float = 1.0,
    calibration_text: str | Path | Text | None = None,
    text: str | Path | Text | None = None,
    context: int = 1024,
    windows: int = 4,
    validation_windows: int = 24,
    check_windows: int = 8,
    threads: int | None = None,
    prefer: str = "speed",
    quant: str | None = None,
    down: str | None = None,
) -> Optimized:
    """Packs a model with a plan that costs at most `max_ppl_increase` percent of perplexity.

    The search keeps the limit, with one standard error to spare, on windows of the calibration text
    that nothing was fitted on. The result's figures come from `text`, which must be another one: if
    the limit is exceeded there by more than one paired standard error, the search is repeated for a
    smaller loss, twice at most. A plan that gains less than 3 % over none is left out. Measured
    costs of layers are kept beside the output until it is written, so that a stopped run continues
    there.

    Args:
        windows: of the calibration text, for thresholds; `validation_windows` more judge plans,
            `check_windows` of `text` check what was found.
        prefer: "speed": rows are priced by what they take when scattered, as timed here, and what
            does not make decode faster is left out; "bytes": rows are priced by their bytes, and
            what does not make them fewer is left out.
        quant, down: as for `pack`.

    Raises:
        UsageError: a limit that is no positive percentage, an unknown preference, or the same
            text twice.
        FallowError: as `pack`; the packed model costs more than the limit by itself; or the limit
            does not hold on `text` (nothing is written).
    """
    start = time.monotonic()
    counts = {"windows": windows, "validation-windows": validation_windows}
    _check_request(max_ppl_increase, prefer, counts | {"check-windows": check_windows})
    check_writable(output)
    check_text = load_text(text, "evaluation")
    fit_text = load_text(calibration_text, "calibration")
    check_no_leakage(fit_text.sha256, check_text, False, fit_text.sketch)
    # The packer's own check may refuse a type of down_proj_t, so it reads no check text either.
    calibration = load_text(None, "calibration")
    packer = Packer(model, quant=quant, down=down, text=calibration)
    source = packer.model
    context = min(context, packer.context_length)
    cut = source.windows(fit_text, context)
    fit, validation = split_windows(cut, [windows, validation_windows])
    source.windows(check_text, context, check_windows)  # fewer are refused before the work
    packer.add_coarse_head(fit_text, np.concatenate([fit, cut[windows + validation_windows :]]))
    with atomic_path(output) as temporary:
        packer.write(temporary)
        engine = Engine(temporary, plan=False, threads=threads, context=context)
        candidates = Candidates(source, fit, fit_text, engine, prefer)
        costs_path = Path(f"{output}.costs.jsonl")
        settings: dict[str, Any] = {"fingerprint": source.fingerprint, "text": fit_text.sha256}
        settings |= {"windows": windows, "context": context, "quant": quant, "down": down}
        costs = _measure_costs(candidates, engine, fit, costs_path, settings)

        def check(plan: Plan | None) -> Evaluation:
            return evaluate_engine(
                engine,
                plan,
                check_text,
                context=context,
                windows=check_windows,
                against=lambda window: dense_logits(source, window),
            )

        judge = _Judge(source, engine, validation)
        search = _Search(candidates, costs, engine, judge, max_ppl_increase, prefer)
        plan, judged, quality = search.run(check)
        packer.leave_out_unused(plan)
        packer.write(temporary, plan)
    costs_path.unlink(missing_ok=True)
    engine = Engine(output, threads=threads, context=context)
    runs = _time(engine, {"dense": None} | ({"plan": plan} if plan else {}))
    return _result(engine, plan, quality, runs, judged, fit_text, output, time.monotonic() - start)


def _check_request(max_ppl_increase: float, prefer: str, counts: dict[str, int]) -> None:
    if not (np.isfinite(max_ppl_increase) and max_ppl_increase > 0):
        raise UsageError(f"--max-ppl-increase {max_ppl_increase} is not a positive percentage")
    if prefer not in PREFERENCES:
        raise UsageError(f"unknown preference {prefer!r}; known: {', '.join(PREFERENCES)}")
    for option, count in counts.items():
        if count < 1:
            raise UsageError(f"--{option} {count} is too few; give at least 1")


class Candidates:
    """Plans of `two_stage` for one model, given the share of neurons that each layer's taps cut."""

    def __init__(
        self,
        model: Model,
        windows: np.ndarray,
        text: Text,
        engine: Engine,
        prefer: str = "speed",
    ) -> None:
        """Thresholds come from windows (n, context) of the text, costs from the packed model."""
        self.model, self.text = model, text
        self.n_layers = len(model.layers)
        self.stages = ("gate_act", "inter") if model.layers[0].gated else ("inter",)
        self.calibration = Calibration(model, windows)
        self.weights = gate_weights(self.calibration)
        tensors = engine.file.tensors
        coarse = tensors.get(COARSE_HEAD[0])
        self.head_margin = HEAD_MARGIN if coarse else 0.0
        self.head_limit = max(HEAD_LEAST, int(coarse.shape[0] * HEAD_SHARE)) if coarse else 0

        def sizes(matrix: str) -> np.ndarray:
            names = [f"layers.{i}.{matrix}.weight" for i in range(self.n_layers)]
            return np.array([tensors[n].data.nbytes if n in tensors else 0 for n in names])

        total = sum(sizes(name).sum() for name in ("gate_proj", "up_proj", "down_proj_t"))
        # Of all the FFN's bytes: a stage's matrix.
        self.shares = {stage: sizes(ROWS[stage][0]) / total for stage in self.stages}
        self.thresholds = {stage: self._quantiles(stage) for stage in self.stages}
        self.row_costs = dict.fromkeys(self.stages, 1.0)
        if prefer == "speed":
            for stage in self.stages:
                name, product = ROWS[stage]
                cost = _row_cost(tensors[f"layers.0.{name}.weight"], product, engine.threads)
                self.row_costs[stage] = cost
                console.print(
                    f"half of {name} takes {cost / 2:.2f} of the time of all", highlight=False
                )

    def _quantiles(self, stage: str) -> np.ndarray:
        """The score below which a share of a layer's scores lies, (L, grid) float32."""
        rule = TwoStage(0.0, self.weights)

        def scores(i: int) -> torch.Tensor:
            values = getattr(self.calibration, stage)[i]
            some = values[:: max(1, len(values) // SCORE_TOKENS)].abs().float()
            return some * rule.weight(i, self.model.layers[i], stage)

        found = np.empty((self.n_layers, len(GRID)), dtype=np.float32)
        with progress(f"thresholds of {stage}", self.n_layers) as ticker:
            for i in range(self.n_layers):
                found[i] = np.quantile(scores(i).numpy(), GRID)
                ticker.advance()
        found = np.maximum(found, SMALLEST)
        found[:, 0] = 0
        return found

    def plan(self, choice: dict[str, np.ndarray], head_margin: float) -> Plan:
        """A plan from the index into the grid of every tap and layer, (L,) each."""
        layers = np.arange(self.n_layers)
        arrays = {f"threshold.{t}": self.thresholds[t][layers, choice[t]] for t in self.stages}
        if "gate_act" not in self.stages:
            arrays["threshold.gate_act"] = np.zeros(self.n_layers, dtype=np.float32)
        arrays |= self.weights
        arrays["head_margin"] = np.array([head_margin])
        arrays["head_limit"] = np.array([self.head_limit])
        return Plan(
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            rule=TwoStage.name,
            where=TwoStage.where,
            knob=0.0,
            knob_name=TwoStage.knob_name,
            arrays=arrays,
            calibration_text=self.text.name,
            calibration_sha256=self.text.sha256,
            calibration_sketch=self.text.sketch,
            calibration_tokens=self.calibration.n_tokens,
            dtype=self.model.dtype_name,
        )

    def nothing(self) -> dict[str, np.ndarray]:
        """The choice that leaves no neuron idle."""
        return {stage: np.zeros(self.n_layers, dtype=int) for stage in self.stages}

    def probes(self) -> Iterator[tuple[str, int, int, Plan]]:
        """Every plan that cuts one layer at one tap: tap, layer, index into the grid, plan."""
        for layer in range(self.n_layers):
            for tap in self.stages:
                for level in LEVELS[tap]:
                    index = int(np.abs(GRID - level).argmin())
                    choice = self.nothing()
                    choice[tap][layer] = index
                    yield tap, layer, index, self.plan(choice, 0.0)

    def choose(self, costs: dict[str, np.ndarray], price: float) -> dict[str, np.ndarray]:
        """The choice of each layer that is cheapest at `price` nats for all of the FFN's bytes."""
        found = self.nothing()
        for layer in range(self.n_layers):
            for stage in self.stages:
                read = np.minimum(1, self.row_costs[stage] * (1 - GRID))
                loss = costs[stage][layer] + price * self.shares[stage][layer] * read
                found[stage][layer] = int(np.argmin(loss))
        return found


def _row_cost(tensor: StoredTensor, product: str, threads: int) -> float:
    """Time per row of every other row, on average, over that of all rows of a matrix."""
    width = tensor.shape[1]
    rows = max(2, TIMED_BYTES * tensor.shape[0] // tensor.data.nbytes)
    half = np.sort(np.random.default_rng(0).choice(rows, rows // 2, replace=False))
    runs = [
        _core.time_rows(tensor.type, rows, width, half.astype(np.int32), threads)
        for _ in range(ROW_RUNS)
    ]
    return max(1.0, 2 * median(r[f"{product}_rows"] / r[product] for r in runs))


def _measure_costs(
    candidates: Candidates,
    engine: Engine,
    windows: np.ndarray,
    path: Path,
    settings: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Divergence from dense, nats per token, of each tap, layer and grid point: (L, grid)."""
    probe = windows[:PROBE_WINDOWS, :PROBE_CONTEXT]
    file = JsonLines(path)
    if not file.found:
        file.add(settings)
    elif file.found[0] != settings:
        raise UsageError(f"{path} belongs to a run with another model, text or option; remove it")
    else:
        console.print(f"continuing with {len(file.found) - 1} costs of {path}", highlight=False)
    todo = list(candidates.probes())
    wanted = {(tap, layer, index) for tap, layer, index, _ in todo}
    known = {tuple(line[:3]): float(line[3]) for line in file.found[1:] if _is_cost(line, wanted)}
    dense = [_Dense(engine.logits(window)) for window in probe]
    with progress("cost of layers", len(todo)) as ticker:
        for tap, layer, index, plan in todo:
            if (tap, layer, index) not in known:
                engine.use_plan(plan)
                kl = [
                    d.divergence(engine.logits(window))
                    for d, window in zip(dense, probe, strict=True)
                ]
                known[tap, layer, index] = float(np.mean(kl))
                file.add([tap, layer, index, known[tap, layer, index]])
            ticker.advance()
    costs = {t: np.empty((candidates.n_layers, len(GRID))) for t in candidates.stages}
    for tap, table in costs.items():
        for layer in range(candidates.n_layers):
            points = {i: cost for (t, n, i), cost in known.items() if (t, n) == (tap, layer)}
            levels = sorted(points)
            table[layer] = np.interp(GRID, [0, *GRID[levels]], [0, *(points[i] for i in levels)])
            table[layer, levels[-1] + 1 :] = np.inf  # not measured
    return costs


def _is_cost(line: Any, wanted: set[tuple[str, int, int]]) -> bool:
    """Whether a line of a file is a cost; any other is measured again."""
    return (
        fits(line, list)
        and [type(part) for part in line[:3]] == [str, int, int]
        and tuple(line[:3]) in wanted
        and len(line) == 4
        and fits(line[3], float)
    )


class _Dense:
    """A window's dense logits (T, vocabulary), to which others are compared."""

    def __init__(self, logits: np.ndarray) -> None:
        log_p = log_softmax(logits)
        self._p = np.exp(log_p)
        self._entropy = -np.einsum("tv,tv->t", self._p, log_p)

    def divergence(self, logits: np.ndarray) -> float:
        """Mean KL(dense || other), nats per token."""
        cross = -np.einsum("tv,tv->t", self._p, log_softmax(logits))
        return float((cross - self._entropy).mean())


class _Search:
    """Looks for the plan that saves most within a limit, in percent of PPL."""

    def __init__(
        self,
        candidates: Candidates,
        costs: dict[str, np.ndarray],
        engine: Engine,
        judge: "_Judge",
        limit: float,
        prefer: str,
    ) -> None:
        """`costs`: divergence by tap, (L, grid) each; the judge's engine is `engine`."""
        self._candidates, self._costs, self._engine = candidates, costs, engine
        self._judge, self._limit, self._prefer = judge, limit, prefer

    def run(
        self, check: Callable[[Plan | None], Evaluation]
    ) -> tuple[Plan | None, float, Evaluation]:
        """The plan, None if none is worth it, its PPL change as judged, and what the check says.

        A plan that does not hold the limit in the check by one standard error is searched anew for
        a smaller loss: by as much as the check found more than the judge. Since the check has then
        been looked at, that is done CHECKS - 1 times at most.

        Raises:
            FallowError: the packed model run dense costs more than the limit; or no plan held it.
        """
        dense = self._dense_change()
        aim = self._limit
        for left in reversed(range(CHECKS)):
            whole, judged = self._most_within(aim, dense)
            plan = _worthwhile(self._engine, whole, self._prefer)
            if plan is not whole:
                judged = dense if plan is None else self._judge.change(plan, aim)[0]
            quality = check(plan)
            change, error = quality.ppl_change_percent, quality.ppl_change_se or 0.0
            found = (
                f"PPL {change:+.2f} ± {error:.2f} % on {quality.windows} windows of {quality.text}"
            )
            console.print(f"check: {found}", highlight=False)
            if change - error <= self._limit:
                break
            if plan is None or not left:
                raise self._does_not_hold(plan, found)
            aim = judged * self._limit / change if judged > 0 else judged + self._limit - change
            console.print(
                f"more than the {self._limit:g} % allowed: searching for {aim:+.2f} %",
                highlight=False,
            )
        if plan is not None:
            plan.target_ppl_increase, plan.achieved_ppl_increase = self._limit, judged
        return plan, judged, quality

    def _does_not_hold(self, plan: Plan | None, found: str) -> FallowError:
        what = f"after {CHECKS} searches the plan" if plan else "the packed model, run dense,"
        remedy = (
            "give a --calibration-text that is more like it, more --validation-windows, or "
            if plan
            else "give --down q8_0 (and --quant q8_0 for a Hugging Face folder), or "
        )
        return FallowError(
            f"{what} costs {found}, more than the {self._limit:g} % allowed; no model was written; "
            f"{remedy}raise --max-ppl-increase"
        )

    def _dense_change(self) -> float:
        """PPL change of the packed model run dense, as judged."""
        nothing = self._candidates.nothing()
        change, error, seen = self._judge.change(self._candidates.plan(nothing, 0.0), self._limit)
        cost = f"PPL {change:+.2f} ± {error:.2f} % on {seen} windows"
        console.print(f"dense: {cost}", highlight=False)
        if change + error > self._limit:
            raise FallowError(
                f"the packed model itself, run dense, costs {cost} of held-out text, more than the "
                f"{self._limit:g} % allowed; raise --max-ppl-increase or give --down q8_0 (and "
                "--quant q8_0 for a Hugging Face folder)"
            )
        return change

    def _most_within(self, aim: float, dense: float) -> tuple[Plan, float]:
        """The plan of the highest price that the judge finds within `aim`, and its PPL change.

        Where there is none it is the plan that does nothing.
        """
        candidates = self._candidates
        best = candidates.plan(candidates.nothing(), 0.0), dense
        if dense > aim:
            return best
        best = self._with_shortlist(aim) or best
        margin = float(best[0].arrays["head_margin"][0])
        low, high = LOWEST_PRICE, HIGHEST_PRICE
        judged: dict[bytes, tuple[float, float, int]] = {}  # near prices may choose the same
        with progress("search", PRICE_STEPS) as ticker:
            for _ in range(PRICE_STEPS):
                price = (low + high) / 2
                choice = candidates.choose(self._costs, 10**price)
                plan = candidates.plan(choice, margin)
                key = np.stack(list(choice.values())).tobytes()
                if key not in judged:
                    judged[key] = self._judge.change(plan, aim)
                change, error, seen = judged[key]
                shares = ", ".join(f"{t} {GRID[choice[t]].mean():.0%}" for t in candidates.stages)
                console.print(
                    f"price 10^{price:.2f}: {shares}: PPL {change:+.2f} ± {error:.2f} % "
                    f"on {seen} windows",
                    highlight=False,
                )
                if change + error <= aim:
                    low, best = price, (plan, change)
                else:
                    high = price
                ticker.advance()
        return best

    def _with_shortlist(self, aim: float) -> tuple[Plan, float] | None:
        """The plan that uses the head's shortlist alone, and its PPL change, if within `aim`."""
        candidates = self._candidates
        if candidates.head_margin == 0:
            return None
        plan = candidates.plan(candidates.nothing(), candidates.head_margin)
        change, error, seen = self._judge.change(plan, aim)
        console.print(
            f"with the head's shortlist: PPL {change:+.2f} ± {error:.2f} % on {seen} windows",
            highlight=False,
        )
        return (plan, change) if change + error <= aim else None


class _Judge:
    """Held-out windows (n, context), and the source's losses on those that were needed."""

    def __init__(self, source: Model, engine: Engine, windows: np.ndarray) -> None:
        self._source, self._engine, self._windows = source, engine, windows
        self._dense: list[float] = []

    def change(self, plan: Plan | None, limit: float) -> tuple[float, float, int]:
        """PPL change of a plan and its error, percent, and the windows they come from.

        All windows, unless fewer make clear on which side of the limit it is.
        """
        self._engine.use_plan(plan)
        losses: list[float] = []
        for window in self._windows:
            losses.append(_loss(self._engine, window))
            if len(self._dense) < len(losses):
                self._dense.append(float(window_losses(self._source, window[None], None)[0]))
            change, paired = ppl_change_percent(
                np.array(losses), np.array(self._dense[: len(losses)])
            )
            error = paired or 0.0
            if len(losses) >= JUDGED_FROM and abs(change - limit) > CLEAR * error:
                break
        return change, error, len(losses)


def _loss(engine: Engine, window: np.ndarray) -> float:
    return float(token_losses(engine.logits(window)[:-1], window[1:]).mean())


def _worthwhile(engine: Engine, plan: Plan, prefer: str) -> Plan | None:
    """What of a plan is worth its loss: its thresholds, the shortlist, both, or nothing (None).

    Of the parts that gain as much as any, to within LEAST_GAIN, the one of the fewest.
    """
    parts = _parts(plan)
    if len(parts) == 1:
        return None
    runs = _time(engine, {_selector(part): part for part in parts.values()})
    gains = {key: _gain(runs[_selector(p)], runs["dense"], prefer) for key, p in parts.items()}
    for name, found in runs.items():
        console.print(
            f"{name}: {median(r['decode_tps'] for r in found):.1f} tok/s, "
            f"{found[0]['bytes_per_token'] / 1e6:.0f} MB/token",
            highlight=False,
        )
    best = max(gains.values())
    enough = [key for key, gain in gains.items() if gain > best - LEAST_GAIN]
    chosen = min(enough, key=lambda key: (sum(key), -gains[key]))
    if parts[chosen] is None:
        more = "faster" if prefer == "speed" else "fewer bytes"
        console.print(
            f"no plan: the best is {max(best, 0):.1%} {more} than dense, less than "
            f"{LEAST_GAIN:.0%}; the packed model stays dense",
            highlight=False,
        )
    return parts[chosen]


def _parts(plan: Plan) -> dict[tuple[bool, bool], Plan | None]:
    """No plan, the plan without its shortlist or its thresholds, and itself.

    By whether thresholds and shortlist are there; a plan that does nothing has one part.
    """
    shortlist = bool(plan.arrays["head_margin"][0] > 0)
    idle = _selector(plan) not in ("dense", "shortlist")
    parts: dict[tuple[bool, bool], Plan | None] = {(False, False): None}
    if idle and shortlist:
        zeros = {k: 0 * v for k, v in plan.arrays.items() if k.startswith("threshold.")}
        parts[False, True] = replace(plan, arrays=plan.arrays | zeros)
        parts[True, False] = replace(plan, arrays=plan.arrays | {"head_margin": np.zeros(1)})
    if idle or shortlist:
        parts[idle, shortlist] = plan
    return parts


def _gain(runs: list[dict[str, float]], dense: list[dict[str, float]], prefer: str) -> float:
    """What runs gain over dense's in turn: of its speed, or of its bytes per token."""
    key = "decode_tps" if prefer == "speed" else "bytes_per_token"
    ratio = median(a[key] / b[key] for a, b in zip(runs, dense, strict=True))
    return ratio - 1 if prefer == "speed" else 1 - ratio


def _selector(plan: Plan | None) -> str:
    """What a plan uses of what there is."""
    if plan is None:
        return "dense"
    used = [plan.rule] if any(plan.arrays[f"threshold.{s}"].any() for s in ROWS) else []
    used += ["shortlist"] if plan.arrays["head_margin"][0] > 0 else []
    return "+".join(used) or "dense"


def _time(engine: Engine, plans: Mapping[str, Plan | None]) -> dict[str, list[dict[str, float]]]:
    """Runs of prefill and decode with each plan in turn, by name."""
    size = min(TIMED_PROMPT + TIMED_TOKENS, engine.context)
    ids = engine.windows(load_text(None, "evaluation"), size, 1)[0]
    return run_in_turn(engine, plans, ids, size // 2, TIMED_RUNS)


def _result(
    engine: Engine,
    plan: Plan | None,
    quality: Evaluation,
    runs: dict[str, list[dict[str, float]]],
    validation: float,
    fit_text: Text,
    output: str | Path,
    seconds: float,
) -> Optimized:
    dense = runs["dense"]
    sparse = runs.get("plan", dense)
    kl = quality.kl_to_dense["mean"]
    assert kl is not None
    return Optimized(
        path=str(output),
        selector=_selector(plan),
        ppl_change_percent=quality.ppl_change_percent,
        ppl_change_se=quality.ppl_change_se,
        kl_to_dense=kl,
        bytes_per_token=sparse[0]["bytes_per_token"],
        bytes_ratio=sparse[0]["bytes_per_token"] / dense[0]["bytes_per_token"],
        decode_tps=median(r["decode_tps"] for r in sparse),
        decode_ratio_dense=median(
            a["decode_tps"] / b["decode_tps"] for a, b in zip(sparse, dense, strict=True)
        ),
        sparsity_ratio=sparse[0]["sparsity"],
        validation_ppl_change_percent=validation,
        text=quality.text,
        windows=quality.windows,
        calibration_text=fit_text.name,
        threads=engine.threads,
        seconds=seconds,
    )
