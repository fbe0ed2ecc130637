"""The search for the plan that saves most within a limit, and what of it is worth its loss."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError
from fallow.common.metrics import ppl_change_percent
from fallow.common.progress import console, log, progress
from fallow.engine.engine import Engine
from fallow.measure.evaluation import window_losses
from fallow.measure.quality import Evaluation, token_losses
from fallow.measure.speed import run_in_turn
from fallow.optimization.candidates import GRID, Candidates, shortlist_of
from fallow.plan import Plan
from fallow.reference.model import Model

# Plans that are judged at most; and one of which a search would make no more than CLOSE times as
# much, at the limit, is as good as found.
MOST_JUDGED, CLOSE = 7, 1.1
TINY = 1e-3  # percent of PPL, which nobody would miss
FURTHEST = 3.0  # times as much as a judged loss that the next may be, and as little
# A plan is judged window by window; from JUDGED_FROM on, one this many standard errors from the
# limit is not looked at further.
JUDGED_FROM, CLEAR = 4, 3.0
# Many short runs in turn rather than few long ones: a machine's other tenants come and go.
TIMED_PROMPT, TIMED_TOKENS, TIMED_RUNS = 32, 32, 9
# Of the speed without it, or with "bytes" of the bytes: what gains less is not worth a loss of
# quality. Of a speed's ratios, run by run, the lower quartile has to: of nine the third lowest,
# above which their median lies in truth with a chance of 91 %.
LEAST_GAIN, QUARTILE = 0.03, 25
CHECKS = 3  # times that a search, each for a smaller loss, may look at the check's text
Runs = Mapping[str, list[dict[str, float]]]
"""Timed runs of decode, in turn, by what they use (`selector_of`)."""


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
        self._kept: dict[bool, tuple[Plan, float, float, int]] = {}
        self._percent_per_nat = 100.0  # of PPL, of what costs say: a guess, until plans are judged

    def run(
        self, check: Callable[[Plan | None], Evaluation]
    ) -> tuple[Plan | None, float, Evaluation, Runs]:
        """The plan, None if none is worth it, its PPL change as judged, what the check says, runs.

        A plan that does not hold the limit in the check by one standard error is searched anew for
        a smaller loss: by as much as the check found more than the judge. Since the check has then
        been looked at, that is done CHECKS - 1 times at most.

        Raises:
            FallowError: the packed model run dense costs more than the limit; or no plan held it.
        """
        aim = self._limit
        for left in reversed(range(CHECKS)):
            whole, judged = self._most_within(aim)
            plan, runs = worthwhile(self._engine, whole, self._prefer)
            if plan is not whole:
                alone = plan is None or not plan.cuts
                judged = (
                    self._without_neurons(plan is not None)[1]
                    if alone
                    else self._judge.change(plan, aim)[0]
                )
            quality = check(plan)
            change, error, found = _told(quality)
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
        return plan, judged, quality, runs

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

    def _most_within(self, aim: float) -> tuple[Plan, float]:
        """The plan of the most loss that the judge finds within `aim`, and its PPL change.

        Where there is none it is the plan that does nothing.

        Raises:
            FallowError: the packed model run dense costs more than the limit.
        """
        candidates = self._candidates
        best = self._start(aim)
        if best[1] > aim:
            return best
        margin, base = best[0].head_margin, best[1]
        guess = _Guess((aim - base) / self._percent_per_nat)
        with progress("search", MOST_JUDGED) as ticker:
            for step in range(MOST_JUDGED):
                choice, loss = candidates.within(self._costs, guess.loss)
                if not guess.within < loss < guess.beyond:
                    break
                plan = candidates.plan(choice, margin)
                change, error, seen = self._judge.change(plan, aim)
                shares = ", ".join(f"{t} {GRID[choice[t]].mean():.0%}" for t in candidates.stages)
                console.print(
                    f"{shares}: PPL {change:+.2f} ± {error:.2f} % on {seen} windows",
                    highlight=False,
                )
                figures = {"ppl_change_percent": change, "ppl_change_se": error}
                log("optimize", step, figures)
                ticker.advance()
                if change + error <= aim:
                    best, self._percent_per_nat = (plan, change), (aim - base) / loss
                if guess.learn(loss, max(aim - error - base, TINY) / max(change - base, TINY)):
                    break
        return best

    def _start(self, aim: float) -> tuple[Plan, float]:
        """The plan without idle neurons, with the shortlist if that is within `aim`; its change."""
        if self._candidates.head_margin > 0:
            plan, change, error, _ = self._without_neurons(True)
            if change + error <= aim:
                return plan, change
        plan, change, error, seen = self._without_neurons(False)
        if change + error > self._limit:
            raise FallowError(
                f"the packed model itself, run dense, costs PPL {change:+.2f} ± {error:.2f} % on "
                f"{seen} windows of held-out text, more than the {self._limit:g} % allowed; "
                "raise --max-ppl-increase or give --down q8_0 (and --quant q8_0 for a Hugging "
                "Face folder)"
            )
        return plan, change

    def _without_neurons(self, shortlist: bool) -> tuple[Plan, float, float, int]:
        """The plan, its PPL change, the error of that and the windows it comes from; kept."""
        if shortlist not in self._kept:
            candidates = self._candidates
            margin = candidates.head_margin if shortlist else 0.0
            plan = candidates.plan(candidates.nothing(), margin)
            found = change, error, seen = self._judge.change(plan, self._limit)
            self._kept[shortlist] = (plan, *found)
            name = "with the head's shortlist" if shortlist else "dense"
            console.print(
                f"{name}: PPL {change:+.2f} ± {error:.2f} % on {seen} windows", highlight=False
            )
        return self._kept[shortlist]


def _told(quality: Evaluation) -> tuple[float, float, str]:
    """PPL change and error, percent, of a check; and both in words, which are printed."""
    change, error = quality.ppl_change_percent, quality.ppl_change_se or 0.0
    found = f"PPL {change:+.2f} ± {error:.2f} % on {quality.windows} windows of {quality.text}"
    console.print(f"check: {found}", highlight=False)
    return change, error, found


class _Guess:
    """Which loss, in nats as the layers' costs add up, has a plan that is just within the limit.

    PPL is taken to rise as a power of it: at first as the loss itself, then as it was seen to rise.
    """

    def __init__(self, loss: float) -> None:
        self.loss = loss  # to try next
        self.within, self.beyond = 0.0, math.inf  # of plans that were judged so
        self._power = 1.0
        self._last: tuple[float, float] | None = None  # a loss and its room

    def learn(self, loss: float, room: float) -> bool:
        """From how often a judged plan's PPL change has room in the limit; whether that is enough.

        `room` is above 0; below 1 the plan does not hold the limit.
        """
        if room >= 1:
            self.within = loss
        else:
            self.beyond = loss
        if 1 <= room < CLOSE or self.beyond < CLOSE * self.within:
            return True
        if self._last and max(loss / self._last[0], self._last[0] / loss) > CLOSE:
            power = math.log(self._last[1] / room) / math.log(loss / self._last[0])
            self._power = min(max(power, 1 / FURTHEST), FURTHEST)
        self._last = loss, room
        # To the middle of what is close enough.
        factor = min(max(room / math.sqrt(CLOSE), 1 / FURTHEST), FURTHEST)
        self.loss = loss * factor ** (1 / self._power)
        if not self.within < self.loss < self.beyond:
            self.loss = math.sqrt(self.within * self.beyond)
        return False


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
                # In float32: bfloat16 would change a window's PPL by 0.2 % (Qwen2.5-Coder).
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


def worthwhile(engine: Engine, plan: Plan, prefer: str) -> tuple[Plan | None, Runs]:
    """What of a plan is worth its loss: its thresholds, the shortlist, both, or nothing (None).

    And the runs that say so. A part is used if with it decode surely gains LEAST_GAIN over what was
    chosen before it: first nothing, then the better part alone, then both.
    """
    parts = {selector_of(part): part for part in _parts(plan)}
    runs = time_plans(engine, parts)
    for name, found in runs.items():
        ratio = median(_ratios(found, runs["dense"], "decode_tps"))
        console.print(
            f"{name}: {median(r['decode_tps'] for r in found):.1f} tok/s, {ratio:.2f} of dense, "
            f"{found[0]['bytes_per_token'] / 1e6:.0f} MB/token",
            highlight=False,
        )
    gains = {name: _gains(found, runs["dense"], prefer) for name, found in runs.items()}
    chosen = "dense"
    # The whole plan comes last; dense has no gain over itself.
    for name in sorted(parts, key=lambda name: (parts[name] is plan, -median(gains[name]))):
        if np.percentile(_gains(runs[name], runs[chosen], prefer), QUARTILE) >= LEAST_GAIN:
            chosen = name
    if chosen == "dense" and len(parts) > 1:
        best = max((name for name in parts if name != "dense"), key=lambda n: median(gains[n]))
        low, middle = np.percentile(gains[best], [QUARTILE, 50])
        more = "faster" if prefer == "speed" else "fewer bytes"
        console.print(
            f"no plan: the best, {best}, is {middle:.1%} {more} than dense (lower quartile "
            f"{low:.1%}), not surely {LEAST_GAIN:.0%}",
            highlight=False,
        )
    return parts[chosen], runs


def worth_of_taught(
    engine: Engine,
    plan: Plan,
    check: Callable[[Plan | None], Evaluation],
    limit: float,
    prefer: str,
    folder: Path,
) -> tuple[Plan, Evaluation, Runs]:
    """What of an adapted model's plan, and the shortlist, is worth it, what the check says, runs.

    Raises:
        FallowError: its neurons are not, since a model that was taught to spare them has paid for
            it; or the check finds more than the limit by one standard error. The folder stays.
    """
    margin, most = shortlist_of(engine)
    chosen, runs = worthwhile(engine, replace(plan, head_margin=margin, head_limit=most), prefer)
    if chosen is None or not chosen.cuts:
        raise FallowError(
            f"skipping what the adapted model can spare does not surely gain {LEAST_GAIN:.0%} "
            f"here; no model was packed ({folder} stays); optimize without --adapt"
        )
    quality = check(chosen)
    change, error, found = _told(quality)
    if change - error > limit:
        raise FallowError(
            f"the adapted model costs {found}, more than the {limit:g} % allowed; no model was "
            f"packed ({folder} stays); adapt with more tokens or text more like it, or raise "
            "--max-ppl-increase"
        )
    chosen.target_ppl_increase = limit
    return chosen, quality, runs


def _parts(plan: Plan) -> list[Plan | None]:
    """No plan, the plan without its shortlist and without its thresholds, and itself."""
    if selector_of(plan) == "dense":
        return [None]
    alone = [replace(plan, head_margin=0.0), replace(plan, cuts=())]
    used = {"dense", selector_of(plan)}
    return [None, *(part for part in alone if selector_of(part) not in used), plan]


def _gains(
    runs: list[dict[str, float]], others: list[dict[str, float]], prefer: str
) -> list[float]:
    """What runs gain over others in turn: of their speed, or of their bytes per token."""
    if prefer == "speed":
        return [ratio - 1 for ratio in _ratios(runs, others, "decode_tps")]
    return [1 - ratio for ratio in _ratios(runs, others, "bytes_per_token")]


def _ratios(runs: list[dict[str, float]], others: list[dict[str, float]], key: str) -> list[float]:
    return [a[key] / b[key] for a, b in zip(runs, others, strict=True)]


def decode_ratio(runs: Runs, plan: str, other: str = "dense") -> float:
    """Of the speed of decode: median over runs in turn."""
    return median(_ratios(runs[plan], runs[other], "decode_tps"))


def selector_of(plan: Plan | None) -> str:
    """What a plan uses of what there is."""
    if plan is None:
        return "dense"
    used = [plan.rule] if any(cut.leaves_out.any() for cut in plan.cuts) else []
    used += ["shortlist"] if plan.head_margin > 0 else []
    return "+".join(used) or "dense"


def time_plans(engine: Engine, plans: Mapping[str, Plan | None]) -> Runs:
    """Runs of prefill and decode with each plan in turn, by name."""
    size = min(TIMED_PROMPT + TIMED_TOKENS, engine.context)
    ids = engine.windows(load_text(None, "evaluation"), size, 1)[0]
    return run_in_turn(engine, plans, ids, size // 2, TIMED_RUNS)
