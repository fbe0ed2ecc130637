"""A law fitted to a curve: parameters with two kinds of interval, rivals, and what follows.

Residuals of a training curve may hang together from point to point. Where they do, n points count
for n (1 - ρ) / (1 + ρ), ρ their lag-1 autocorrelation (never below 0), and are resampled in blocks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fallow.common.errors import FallowError, UsageError
from fallow.laws.curves import TOKENS, Curve
from fallow.laws.forms import BOUNDS, FORMS, Fit, Form, find_form, fit

LEVEL = 0.95
DRAWS = 400  # of the bootstrap
TRAIN_SHARE = 0.6  # of a curve's points, from which the rest is predicted
MORE_DROPPED = 3  # points that an identified limit must not depend on
REFITS = (0, MORE_DROPPED, 6)  # points dropped at the beginning
RIVALS = ("power", "shifted power", "exponential", "logarithm", "shifted logarithm")
BAND_POINTS, BAND_AHEAD = 100, 3.0  # up to three times the last x
Interval = tuple[float, float]


@dataclass
class Rival:
    """How a form does on the same curve. Errors are of activation ratios."""

    form: str
    formula: str
    n_params: int
    params: dict[str, float]
    mae: float
    aicc: float | None  # None of too few points
    extrapolation_mae: float | None  # of the last points, from the first TRAIN_SHARE


@dataclass
class Prediction:
    """A law's ratio at x, or the x at which it reaches a ratio: 95 % intervals of the latter two.

    `x` is None where the law never reaches the ratio; ends of an interval are None where some draws
    of the bootstrap do not. A ratio that the law would put outside [0, 1] is 0 or 1.
    """

    x: float | None  # 1e9 tokens, or d_model / L
    ratio: float
    interval: tuple[float | None, float | None]


@dataclass
class LawFit:
    """A fitted law. `params` are those of the formula, D in 1e9 tokens.

    Every interval holds its own estimate, and none reaches beyond what the parameter may be.
    """

    curve: str
    form: str
    formula: str
    unit: str  # of x
    n_points: int
    dropped: int
    params: dict[str, float]
    intervals: dict[str, Interval]  # 95 %, by profile likelihood
    bootstrap: dict[str, Interval]  # 95 %, of refits to resampled residuals
    mae: float
    rmse: float
    autocorrelation: float
    identified: bool
    warning: str | None
    refits: dict[int, dict[str, float]]  # by points dropped besides
    rivals: list[Rival]  # the form itself first
    better: list[str]  # rivals that are closer both by AICc and on the last points
    at: list[Prediction]  # of the ratio
    tokens_for: list[Prediction]  # of x
    band_x: list[float]
    band: list[Interval]  # of the law at band_x

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit_law(
    curve: Curve,
    form: str = "auto",
    *,
    drop_first: int = 0,
    at: Sequence[float] = (),
    tokens_for: Sequence[float] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> LawFit:
    """Fits a law to a curve (arXiv:2411.02335 5.1; docs/methods.md, "Laws").

    Args:
        form: one of FORMS, or "auto": relu of a falling curve, silu of a rising one, and piecewise
            for width-depth ratios.
        drop_first: points of the warm-up to leave out.
        at: x (1e9 tokens) to predict A at.
        tokens_for: A to find x for.

    Raises:
        UsageError: an unknown form, or a negative `drop_first`.
        FallowError: fewer points than parameters are left, or the fit is outside its bounds.
    """
    if drop_first < 0:
        raise UsageError(f"--drop-first {drop_first} is negative")
    used = curve.without_first(drop_first)
    wanted = _form_for(used, form)
    best = fit(wanted, used.x, used.ratio)
    wanted.check(best.params, curve.name)
    residuals = used.ratio - best(used.x)
    rho = autocorrelation(residuals, len(wanted.params))
    refitted = resample(best, used, rho, draws, seed)
    intervals = {name: profile(best, used, name, rho) for name in wanted.params}
    bootstrap = {
        name: _interval([draw.params[name] for draw in refitted], best.params[name])
        for name in wanted.params
    }
    refits = _refits(wanted, used)
    warning = _not_identified(best, used, intervals, refits)
    rivals = [_rival(FORMS[n], used) for n in _rivals_of(wanted, used)]
    band_x, band = _band(best, refitted, used)
    return LawFit(
        curve=curve.name,
        form=wanted.name,
        formula=wanted.formula,
        unit="1e9 tokens" if curve.kind == TOKENS else "d_model / L",
        n_points=len(used),
        dropped=drop_first,
        params=best.params,
        intervals=intervals,
        bootstrap=bootstrap,
        mae=float(np.abs(residuals).mean()),
        rmse=float(np.sqrt((residuals**2).mean())),
        autocorrelation=rho,
        identified=warning is None,
        warning=warning,
        refits=refits,
        rivals=rivals,
        better=_better(rivals),
        at=[_ratio_at(best, refitted, x) for x in at],
        tokens_for=[_tokens_for(best, refitted, ratio) for ratio in tokens_for],
        band_x=band_x,
        band=band,
    )


def _form_for(curve: Curve, name: str) -> Form:
    """The form of a name, or for "auto" the curve's; FallowError if its points are too few."""
    form = _auto(curve) if name == "auto" else find_form(name)
    if len(curve) <= len(form.params):
        raise FallowError(
            f"{curve.name}: {len(curve)} points are too few for the {len(form.params)} parameters "
            f"of {form.formula}; it takes one more"
        )
    return form


def _auto(curve: Curve) -> Form:
    if curve.kind != TOKENS:
        return FORMS["piecewise"]
    half = len(curve) // 2
    falls = curve.ratio[half:].mean() < curve.ratio[:half].mean() if half else True
    return FORMS["relu" if falls else "silu"]


def _rivals_of(form: Form, curve: Curve) -> list[str]:
    """The form itself first."""
    if curve.kind != TOKENS:
        return [form.name, "logarithm", "exponential"]
    same = (form.name, "power") if form.name == "silu" else (form.name,)
    return [form.name, *(name for name in RIVALS if name not in same)]


# Intervals ---------------------------------------------------------------------------------------


def autocorrelation(residuals: np.ndarray, n_params: int) -> float:
    """Lag-1 of the noise behind a fit's residuals (n,), never below 0; at most 0.9.

    Residuals hang together less than the noise, which a fit follows: of a mean alone their r is too
    low by (1 + 4 ρ) / n (Kendall, Biometrika 41, 1954), and by 1 / n more with every parameter.
    """
    power, n = float((residuals**2).sum()), len(residuals)
    if power == 0:
        return 0.0
    r = float((residuals[1:] * residuals[:-1]).sum()) / power
    return float(np.clip(r + (n_params + 4 * r) / n, 0, 0.9))


def effective_points(n: int, rho: float) -> float:
    """For how many independent points n with that autocorrelation count."""
    return n * (1 - rho) / (1 + rho)


def rejection(best: Fit, fixed: Fit, curve: Curve, rho: float) -> float:
    """By how much an F test at 95 % rejects a fit with one parameter given; below 0 it does not.

    ln of the squared errors' ratio over the largest that is accepted.
    """
    from scipy.stats import f

    freedom = max(effective_points(len(curve), rho) - len(best.form.params), 1.0)
    # A perfect fit has no interval to speak of; rounding is not a residual.
    ratio = max(fixed.sse, 1e-24) / max(best.sse, 1e-24)
    return float(np.log(ratio) - np.log1p(f.ppf(LEVEL, 1, freedom) / freedom))


def profile(best: Fit, curve: Curve, name: str, rho: float) -> Interval:
    """Where a parameter may lie so that the rest still fits, by an F test at 95 %.

    An end that no value excludes is the parameter's bound.
    """
    from scipy.optimize import brentq

    value = best.params[name]
    positive = name in best.form.theta

    def excess(at: float, near: Fit | None = None) -> tuple[float, Fit]:
        # The exponential of a bound's logarithm may lie just outside.
        fixed = {name: float(np.clip(np.exp(at), *BOUNDS[name])) if positive else at}
        found = fit(best.form, curve.x, curve.ratio, fixed, near)
        above = rejection(best, found, curve, rho)
        if near is not None and above > 0:  # another valley may fit better
            grid = fit(best.form, curve.x, curve.ratio, fixed)
            found = min(found, grid, key=lambda each: each.sse)
            above = rejection(best, found, curve, rho)
        return above, found

    centre = float(np.log(value)) if positive else value
    ends = []
    for sign, bound in zip((-1, 1), _limits(best.form, name), strict=True):
        step, inside, near = sign * (0.02 if positive else 0.01 * abs(centre) + 1e-6), centre, best
        while True:
            outside = inside + step
            if (outside - bound) * sign >= 0:
                outside = bound
            above, near = excess(outside, near)
            if above > 0 or outside == bound:
                break
            inside, step = outside, 1.7 * step
        if above > 0:
            if excess(inside, near)[0] < 0:
                outside = brentq(
                    lambda v, n=near: excess(v, n)[0], inside, outside, rtol=1e-4, maxiter=1000
                )
            else:  # a curve almost without noise: the fit is no closer than rounding
                outside = inside
        ends.append(float(np.exp(outside)) if positive else float(outside))
    if positive:  # the exponential of a bound's logarithm may lie just outside
        ends = np.clip(ends, *BOUNDS[name]).tolist()
    return min(ends[0], value), max(ends[1], value)


def _limits(form: Form, name: str) -> Interval:
    """Where to stop looking; logarithms for θ."""
    low, high = form.bounds(name)
    return (float(np.log(low)), float(np.log(high))) if name in form.theta else (low, high)


def resample(best: Fit, curve: Curve, rho: float, draws: int, seed: int) -> list[Fit]:
    """Refits to the fit plus its own residuals, drawn with replacement in blocks."""
    rng = np.random.default_rng(seed)
    n, fitted = len(curve), best(curve.x)
    residuals = (curve.ratio - fitted) * np.sqrt(n / (n - len(best.form.params)))
    residuals -= residuals.mean()
    block = min(max(1, round((1 + rho) / (1 - rho))), max(1, n // 2))
    found = []
    for _ in range(draws):
        starts = rng.integers(0, n - block + 1, -(-n // block))
        drawn = (starts[:, None] + np.arange(block)).ravel()[:n]
        y = fitted + residuals[drawn]
        # From the fit, and from the grid: a draw may lie in another valley.
        both = [fit(best.form, curve.x, y, near=best), fit(best.form, curve.x, y)]
        found.append(min(both, key=lambda each: each.sse))
    return found


def _interval(values: Sequence[float] | np.ndarray, estimate: float) -> Interval:
    """What LEVEL of the draws lie in, and the estimate itself, which draws may all lie beside."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.asarray(values), [tail, 1 - tail])
    return min(float(low), float(estimate)), max(float(high), float(estimate))


def _not_identified(
    best: Fit,
    curve: Curve,
    intervals: dict[str, Interval],
    refits: dict[int, dict[str, float]],
) -> str | None:
    """Why the limit A0 cannot be told from this curve; None if it can."""
    if best.form.names[1] != "A0" or curve.kind != TOKENS:
        return None
    low, high = intervals["A0"]
    spread = float(curve.ratio.max() - curve.ratio.min())
    later = refits.get(MORE_DROPPED)
    if best.gain == 0:
        why = f"a constant fits as well as {best.form.formula} does"
    elif not (low > 0 and high < 1 and high - low < spread):
        why = (
            f"anything from {low:.3g} to {high:.3g} fits, while the curve itself spans {spread:.3g}"
        )
    elif later is None:
        why = f"{len(curve)} points are too few to fit again without {MORE_DROPPED} of them"
    elif not low <= later["A0"] <= high:
        why = (
            f"without the first {MORE_DROPPED} points it is {later['A0']:.3g}, outside the "
            f"{low:.3g} to {high:.3g} of all"
        )
    else:
        return None
    return f"A0 is not identified: {why}; train longer, or do not rely on the limit"


# What follows ------------------------------------------------------------------------------------


def _band(best: Fit, draws: list[Fit], curve: Curve) -> tuple[list[float], list[Interval]]:
    """Places from the curve's first x to beyond its last, and the law's interval at each."""
    x = np.geomspace(curve.x[0], BAND_AHEAD * curve.x[-1], BAND_POINTS)
    line, *drawn = (np.clip(law(x), 0, 1) for law in (best, *draws))
    band = [
        _interval(values, value) for values, value in zip(np.stack(drawn, 1), line, strict=True)
    ]
    return x.tolist(), band


def _refits(form: Form, curve: Curve) -> dict[int, dict[str, float]]:
    """Parameters without more of the first points, as far as enough are left."""
    return {
        n: fit(form, curve.x[n:], curve.ratio[n:]).params
        for n in REFITS
        if len(curve) - n > len(form.params)
    }


def _rival(form: Form, curve: Curve) -> Rival:
    whole = fit(form, curve.x, curve.ratio)
    n, p = len(curve), len(form.params) + 1  # the noise's variance is one more
    aicc = None
    if n - p - 1 > 0:
        aicc = n * float(np.log(max(whole.sse, 1e-24) / n)) + 2 * p * n / (n - p - 1)
    return Rival(
        form=form.name,
        formula=form.formula,
        n_params=len(form.params),
        params=whole.params,
        mae=float(np.abs(curve.ratio - whole(curve.x)).mean()),
        aicc=aicc,
        extrapolation_mae=extrapolation_error(form, curve),
    )


def _better(rivals: list[Rival]) -> list[str]:
    """Those that beat the first, the law, by AICc and on points that neither was fitted to."""
    law, *others = rivals
    if law.aicc is None or law.extrapolation_mae is None:
        return []
    return [
        rival.form
        for rival in others
        if rival.aicc is not None
        and rival.extrapolation_mae is not None
        and rival.aicc < law.aicc
        and rival.extrapolation_mae < law.extrapolation_mae
    ]


def extrapolation_error(form: Form, curve: Curve) -> float | None:
    """Mean absolute error on the last points of a fit to the first ones; None if those are few."""
    n = round(TRAIN_SHARE * len(curve))
    if n <= len(form.params) or n == len(curve):
        return None
    early = fit(form, curve.x[:n], curve.ratio[:n])
    return float(np.abs(curve.ratio[n:] - early(curve.x[n:])).mean())


def _ratio_at(best: Fit, draws: list[Fit], x: float) -> Prediction:
    ratio, *drawn = (float(np.clip(law(x)[0], 0, 1)) for law in (best, *draws))
    return Prediction(x, ratio, _interval(drawn, ratio))


def _tokens_for(best: Fit, draws: list[Fit], ratio: float) -> Prediction:
    """Draws that never reach the ratio count as infinite."""
    found = crossing(best, ratio)
    if found is None:
        return Prediction(None, ratio, (None, None))
    reached = [crossing(draw, ratio) for draw in draws]
    values = np.sort([np.inf if x is None else x for x in reached])
    tail = (1 - LEVEL) / 2
    low, high = (float(values[round(q * (len(values) - 1))]) for q in (tail, 1 - tail))
    high = max(high, found)
    return Prediction(found, ratio, (min(low, found), high if np.isfinite(high) else None))


def crossing(law: Fit, ratio: float) -> float | None:
    """The x in 1e-6 to 1e9 (1e9 tokens) at which a law has that value."""
    from scipy.optimize import brentq

    def gap(log_x: float) -> float:
        return float(law(np.exp(log_x))[0] - ratio)

    ends = float(np.log(1e-6)), float(np.log(1e9))
    if gap(ends[0]) * gap(ends[1]) > 0:
        return None
    return float(np.exp(brentq(gap, *ends)))


# Several sizes -----------------------------------------------------------------------------------


@dataclass
class JointFit:
    """One limit A0 for several curves, everything else each curve's own."""

    curves: list[str]
    form: str
    limit: float
    interval: Interval
    p_value: float  # of all limits being the same, by a likelihood-ratio test
    own_limits: dict[str, float]


def fit_jointly(curves: Sequence[Curve], form: str = "auto", *, drop_first: int = 0) -> JointFit:
    """Curves of one form with a limit in common; does it depend on the model's size?

    The likelihood of a limit is the product of each curve's, with its own noise.

    Raises:
        UsageError: fewer than two curves.
        FallowError: curves that differ in form, or too few points.
    """
    from scipy.optimize import brentq, minimize_scalar
    from scipy.stats import chi2

    if len(curves) < 2:
        raise UsageError("a joint fit takes two curves at least")
    used = [curve.without_first(drop_first) for curve in curves]
    forms = {(_auto(c) if form == "auto" else find_form(form)).name for c in used}
    if len(forms) > 1:
        raise FallowError(f"the curves are of forms {', '.join(sorted(forms))}; give --form")
    law = FORMS[forms.pop()]
    own = [fit(law, c.x, c.ratio) for c in used]
    points = [
        effective_points(len(c), autocorrelation(c.ratio - best(c.x), len(law.params)))
        for c, best in zip(used, own, strict=True)
    ]

    def cost(limit: float) -> float:
        """-2 ln likelihood over that of each curve's own limit."""
        total = 0.0
        for curve, best, n in zip(used, own, points, strict=True):
            fixed = fit(law, curve.x, curve.ratio, {law.names[1]: limit})
            total += n * np.log(max(fixed.sse, 1e-24) / max(best.sse, 1e-24))
        return total

    low, high = law.offset if law.names[1] == "A0" else (-1.0, 1.0)
    grid = np.linspace(low, high, 201)
    start = int(np.argmin([cost(v) for v in grid]))
    near = grid[max(start - 1, 0)], grid[min(start + 1, 200)]
    limit = float(minimize_scalar(cost, bounds=near, method="bounded", options={"xatol": 1e-6}).x)
    least, allowed = cost(limit), float(chi2.ppf(LEVEL, 1))
    ends = []
    for sign, bound in ((-1, low), (1, high)):
        step, inside = 1e-4, limit
        while (inside - bound) * sign < 0 and cost(inside) - least <= allowed:
            outside, step = inside, 1.7 * step
            inside = min(max(inside + sign * step, low), high)
        if cost(inside) - least > allowed:
            inside = brentq(lambda v: cost(v) - least - allowed, outside, inside)
        ends.append(float(inside))
    return JointFit(
        curves=[c.name for c in used],
        form=law.name,
        limit=limit,
        interval=(ends[0], ends[1]),
        p_value=float(chi2.sf(max(least, 0.0), len(used) - 1)),
        own_limits={c.name: f.offset for c, f in zip(used, own, strict=True)},
    )
