"""From a model and a text to a plan: thresholds for a sparsity, a parameter, or a stated loss."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fallow.checkpoints.text import Text, load_text, split_windows
from fallow.common.errors import UsageError
from fallow.common.metrics import ppl_change_percent
from fallow.common.progress import console, log, progress
from fallow.measure.evaluation import run_window, window_losses
from fallow.models.capture import Calibration
from fallow.models.devices import enough_memory
from fallow.plan import Plan
from fallow.reference.model import Model
from fallow.rules import Choice, Rule
from fallow.rules._base import check_sparsity
from fallow.selectors import Selector, find

# arXiv:2411.02335 Algorithm 1 stops at 1e-3 in its cluster code.
SEARCH_TOLERANCE = 1e-3


def check_request(
    rule: str, sparsity: float | None, knob: float | None, max_ppl_increase: float | None
) -> None:
    """Raises UsageError for what needs no model to be seen wrong: rule, targets, sparsity."""
    if issubclass(find(rule), Selector):
        raise UsageError(
            f"{rule} is a selector: it chooses by code of its own, which no plan can hold; "
            f"judge it with: fallow select compare MODEL --selectors {rule}"
        )
    check_targets(sparsity, knob, max_ppl_increase)


def check_targets(
    sparsity: float | None, knob: float | None, max_ppl_increase: float | None
) -> None:
    """Raises UsageError for not exactly one target, or one out of range."""
    if sum(target is not None for target in (sparsity, knob, max_ppl_increase)) != 1:
        raise UsageError("give exactly one of --sparsity, --knob and --max-ppl-increase")
    if sparsity is not None:
        check_sparsity(sparsity)
    if max_ppl_increase is not None:
        check_increase(max_ppl_increase)


def origin(model: Model, text: Text, calibration: Calibration) -> dict[str, Any]:
    """What a file says of the model that it is for and of the text that it was fitted on."""
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "calibration_text": text.name,
        "calibration_sha256": text.sha256,
        "calibration_sketch": text.sketch,
        "calibration_tokens": calibration.n_tokens,
        "dtype": model.dtype_name,
    }


def check_increase(percent: float) -> float:
    """Raises UsageError for a largest PPL increase that no search can end at."""
    if not (math.isfinite(percent) and percent > 0):
        raise UsageError(f"--max-ppl-increase {percent} is not a positive percentage")
    return percent


class Calibrator:
    """Calibration text cut in windows to fit thresholds on, and held-out ones that judge them.

    As many again follow if a search judges by those: they check what it found. Statistics are
    collected once and serve any number of plans.
    """

    def __init__(
        self,
        model: Model,
        text: str | Path | Text | None = None,
        *,
        context: int = 1024,
        windows: int = 8,
        validation_windows: int = 4,
    ) -> None:
        for option, value in (("windows", windows), ("validation-windows", validation_windows)):
            if value < 1:
                raise UsageError(f"--{option} {value} is too few; give at least 1")
        self.model = model
        self.text = load_text(text, "calibration")
        self._windows = model.windows(self.text, context)
        self._sizes = [windows, validation_windows]
        fit_windows, self.validation = split_windows(self._windows, self._sizes)
        self.calibration = Calibration(model, fit_windows)
        self._dense_losses: np.ndarray | None = None

    def plan(
        self,
        rule: str,
        *,
        sparsity: float | None = None,
        knob: float | None = None,
        max_ppl_increase: float | None = None,
        measure: bool = True,
    ) -> Plan:
        """The plan of a rule fitted as `fit` does.

        `measure` records the sparsity and the PPL increase on held-out calibration text; of a
        search, on text that it has not seen either.

        Raises:
            FallowError: the text has no windows for that.
            UsageError: as `fit`, or a selector.
        """
        check_request(rule, sparsity, knob, max_ppl_increase)
        searches = max_ppl_increase is not None
        check = self._beyond_validation() if searches and measure else self.validation
        fitted = self.fit(rule, sparsity=sparsity, knob=knob, max_ppl_increase=max_ppl_increase)
        assert isinstance(fitted, Rule)
        plan = self.plan_of(fitted)
        plan.target_sparsity, plan.target_ppl_increase = sparsity, max_ppl_increase
        if measure:
            found = self.measure(plan, check)
            plan.achieved_sparsity, plan.achieved_ppl_increase = found[:2]
            plan.achieved_ppl_increase_se = found[2]
        return plan

    def _beyond_validation(self) -> np.ndarray:
        """As many windows as judge a search, which it does not read."""
        return split_windows(self._windows, [*self._sizes, self._sizes[1]])[-1]

    def fit(
        self,
        name: str,
        *,
        sparsity: float | None = None,
        knob: float | None = None,
        max_ppl_increase: float | None = None,
    ) -> Choice:
        """Fits a rule or a selector. Exactly one target is given; `max_ppl_increase` in percent.

        Raises:
            UsageError: unknown rule, no or several targets, a target out of range, or a single
                window to judge a search by, which has no error.
        """
        found = find(name)
        check_targets(sparsity, knob, max_ppl_increase)
        if max_ppl_increase is not None and len(self.validation) < 2:
            raise UsageError(
                "--validation-windows 1 gives a PPL increase without its error, which "
                "--max-ppl-increase has to allow for; give at least 2"
            )
        with enough_memory():
            if max_ppl_increase is not None:
                return search_jointly([self], found, max_ppl_increase, to_spare=1)[0]
            return found.fit(self.calibration, sparsity=sparsity, knob=knob)

    def ppl_increase(self, plan: Plan | Selector, enough: float) -> tuple[float, float]:
        """PPL increase on the held-out windows and its standard error, percent.

        Stops at the window from which on it exceeds `enough` (percent) twice over even if the
        rest cost nothing: a search asks only on which side of its target a plan lies.
        """
        if self._dense_losses is None:
            self._dense_losses = window_losses(self.model, self.validation, None)
        losses = self._dense_losses.copy()
        for i in range(len(losses)):
            losses[i] = window_losses(self.model, self.validation[i : i + 1], plan)[0]
            increase, error = ppl_change_percent(losses, self._dense_losses)
            if increase > 2 * enough:
                break
        return increase, error or 0.0

    def applied(self, fitted: Choice) -> Plan | Selector:
        """What runs on a model: a rule's plan, or the selector itself."""
        if isinstance(fitted, Selector):
            return fitted
        assert isinstance(fitted, Rule)
        return self.plan_of(fitted)

    def plan_of(self, rule: Rule) -> Plan:
        """The plan of a rule that was fitted here."""
        return Plan(
            rule=rule.name,
            knob=rule.knob,
            knob_name=rule.knob_name,
            cuts=rule.cuts,
            **origin(self.model, self.text, self.calibration),
        )

    def measure(
        self, plan: Plan | Selector, windows: np.ndarray | None = None
    ) -> tuple[float, float, float | None]:
        """Sparsity, PPL increase in percent and its standard error, by default on `validation`."""
        dense, sparse = [], []
        windows = self.validation if windows is None else windows
        with progress("held-out check", len(windows)) as ticker:
            for window in windows:
                d, s = run_window(self.model, window, [plan])
                dense.append(d.loss)
                sparse.append(s[0])
                ticker.advance()
        sparsity = float(np.mean([r.achieved_sparsity for r in sparse]))
        losses = np.array([r.loss for r in sparse])
        return sparsity, *ppl_change_percent(losses, np.array(dense))


def search_jointly(
    calibrators: Sequence[Calibrator], rule_class: type[Choice], increase: float, to_spare: float
) -> list[Choice]:
    """The rule fitted to each model at one level, where PPL rises by `increase` percent on average.

    Bisection over held-out calibration windows (arXiv:2411.02335, Algorithm 1). Ends at the largest
    level found whose increase stays below the target by `to_spare` paired standard errors: of the
    paper 0, by which an estimate on a few windows is too high as often as too low.

    Raises:
        UsageError: the rule has no parameter to search.
    """
    searched = rule_class.search
    if searched is None:
        raise UsageError(f"rule {rule_class.name} has no parameter to search; give --knob 0")

    def fit_all(level: float) -> list[Choice]:
        return [rule_class.fit(c.calibration, **{searched: level}) for c in calibrators]

    low, high = 0.0, rule_class.search_limit
    best = fit_all(0.0)
    # What one of several models may lose before the mean is twice the target.
    enough = increase * len(calibrators)
    steps = math.ceil(math.log2(high / SEARCH_TOLERANCE))
    with progress(f"search {rule_class.name}", steps) as ticker:
        for step in range(steps):
            middle = (low + high) / 2
            fitted = fit_all(middle)
            pairs = zip(calibrators, fitted, strict=True)
            # Models that read the same windows err alike, so that the mean's error is no smaller.
            change, error = np.mean([c.ppl_increase(c.applied(f), enough) for c, f in pairs], 0)
            console.print(
                f"{rule_class.name} at {searched} {middle:.4f}: PPL {change:+.2f} ± {error:.2f} %",
                highlight=False,
            )
            figures = {searched: middle, "ppl_change_percent": change, "ppl_change_se": error}
            log(f"calibrate {rule_class.name}", step, figures)
            if change + to_spare * error < increase:
                low, best = middle, fitted
            else:
                high = middle
            ticker.advance()
    return best


def calibrate(
    model: Model,
    rule: str,
    *,
    sparsity: float | None = None,
    knob: float | None = None,
    max_ppl_increase: float | None = None,
    text: str | Path | Text | None = None,
    context: int = 1024,
    windows: int = 8,
    validation_windows: int = 4,
    measure: bool = True,
) -> Plan:
    """A plan for `model` by `rule` at a sparsity, a value of `knob`, or a largest PPL increase (%).

    Thresholds are fitted on the first `windows` windows of the text. For a largest PPL increase the
    next `validation_windows` judge them, and hold it with one standard error to spare. What is
    recorded of the plan (`measure`) comes of as many windows that nothing was fitted on, nor
    searched by. None as text is the calibration half of the default text.

    Raises:
        FallowError: the text is too short, or the model computes NaN.
        UsageError: unknown rule, no or several targets, a target out of range.
    """
    check_request(rule, sparsity, knob, max_ppl_increase)
    calibrator = Calibrator(
        model, text, context=context, windows=windows, validation_windows=validation_windows
    )
    return calibrator.plan(
        rule, sparsity=sparsity, knob=knob, max_ppl_increase=max_ppl_increase, measure=measure
    )
