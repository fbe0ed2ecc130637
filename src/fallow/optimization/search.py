"""The search for the plan that saves most within a limit, and what of it is worth its loss."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import numpy as np

from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError
from fallow.common.metrics import ppl_change_percent
from fallow.common.progress import console, progress
from fallow.engine.engine import Engine
from fallow.measure.evaluation import window_losses
from fallow.measure.quality import Evaluation, token_losses
from fallow.measure.speed import run_in_turn
from fallow.optimization.candidates import GRID, Candidates
from fallow.plan import Plan
from fallow.reference.model import Model

# Logarithm of the price, in nats for all of the FFN's bytes.
LOWEST_PRICE, HIGHEST_PRICE, PRICE_STEPS = -3.0, 1.5, 7
# A plan is judged window by window; from JUDGED_FROM on, one this many standard errors from the
# limit is not looked at further.
JUDGED_FROM, CLEAR = 6, 4.0
TIMED_PROMPT, TIMED_TOKENS, TIMED_RUNS = 64, 64, 5
# Of dense's speed, or with "bytes" of its bytes: what gains less is not worth a loss of quality.
LEAST_GAIN = 0.03
CHECKS = 3  # times that a search, each for a smaller loss, may look at the check's text


class Search:
    """Looks for the plan that saves most within a limit, in percent of PPL."""

    def __init__(
        self,
        candidates: Candidates,
        costs: dict[str, np.ndarray],
        engine: Engine,
        judge: "Judge",
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
            plan = worthwhile(self._engine, whole, self._prefer)
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
        margin = best[0].head_margin
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


class Judge:
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
            losses.append(loss_of(self._engine, window))
            if len(self._dense) < len(losses):
                self._dense.append(float(window_losses(self._source, window[None], None)[0]))
            change, paired = ppl_change_percent(
                np.array(losses), np.array(self._dense[: len(losses)])
            )
            error = paired or 0.0
            if len(losses) >= JUDGED_FROM and abs(change - limit) > CLEAR * error:
                break
        return change, error, len(losses)


def loss_of(engine: Engine, window: np.ndarray) -> float:
    return float(token_losses(engine.logits(window)[:-1], window[1:]).mean())


def worthwhile(engine: Engine, plan: Plan, prefer: str) -> Plan | None:
    """What of a plan is worth its loss: its thresholds, the shortlist, both, or nothing (None).

    Of the parts that gain as much as any, to within LEAST_GAIN, the one of the fewest.
    """
    parts = _parts(plan)
    if len(parts) == 1:
        return None
    runs = time_plans(engine, {selector_of(part): part for part in parts.values()})
    gains = {key: _gain(runs[selector_of(p)], runs["dense"], prefer) for key, p in parts.items()}
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
    shortlist = plan.head_margin > 0
    skips = selector_of(plan) not in ("dense", "shortlist")
    parts: dict[tuple[bool, bool], Plan | None] = {(False, False): None}
    if skips and shortlist:
        parts[False, True] = replace(plan, cuts=())
        parts[True, False] = replace(plan, head_margin=0.0)
    if skips or shortlist:
        parts[skips, shortlist] = plan
    return parts


def _gain(runs: list[dict[str, float]], dense: list[dict[str, float]], prefer: str) -> float:
    """What runs gain over dense's in turn: of its speed, or of its bytes per token."""
    key = "decode_tps" if prefer == "speed" else "bytes_per_token"
    ratio = median(a[key] / b[key] for a, b in zip(runs, dense, strict=True))
    return ratio - 1 if prefer == "speed" else 1 - ratio


def selector_of(plan: Plan | None) -> str:
    """What a plan uses of what there is."""
    if plan is None:
        return "dense"
    used = [plan.rule] if any(cut.leaves_out.any() for cut in plan.cuts) else []
    used += ["shortlist"] if plan.head_margin > 0 else []
    return "+".join(used) or "dense"


def time_plans(
    engine: Engine, plans: Mapping[str, Plan | None]
) -> dict[str, list[dict[str, float]]]:
    """Runs of prefill and decode with each plan in turn, by name."""
    size = min(TIMED_PROMPT + TIMED_TOKENS, engine.context)
    ids = engine.windows(load_text(None, "evaluation"), size, 1)[0]
    return run_in_turn(engine, plans, ids, size // 2, TIMED_RUNS)
