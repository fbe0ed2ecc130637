"""Laws: curves as they are read, forms against their formulas, and intervals that cover."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import DATA
from fallow.common.errors import FallowError, UsageError
from fallow.laws import fitting
from fallow.laws.curves import TOKENS, WIDTH_DEPTH, Curve, load_curve
from fallow.laws.fitting import (
    autocorrelation,
    crossing,
    fit_jointly,
    fit_law,
    profile,
    rejection,
)
from fallow.laws.forms import BOUNDS, FORMS, find_form, fit

D = np.geomspace(1, 300, 30)
TRUE = {
    "relu": {"alpha": 0.9, "c": 0.02, "b": -3.2, "A0": 0.07},
    "silu": {"alpha": 0.6, "c": 0.15, "A0": 0.39},
    "power": {"alpha": 0.5, "c": 0.04, "A0": 0.07},
    "shifted power": {"alpha": 1.2, "s": 9.0, "c": 0.5, "A0": 0.05},
    "exponential": {"tau": 40.0, "c": 0.03, "A0": 0.07},
    "logarithm": {"c": -0.005, "d": 0.1},
    "shifted logarithm": {"s": 5.0, "c": -0.006, "d": 0.1},
    "piecewise": {"x0": 114.0, "c": -0.0002, "A0": 0.1},
}


def plain(form: str, p: dict[str, float], x: np.ndarray) -> np.ndarray:
    """The formulas, one by one."""
    return {
        "relu": lambda: np.exp(-p["c"] * x ** p["alpha"] + p["b"]) + p["A0"],
        "silu": lambda: -p["c"] * x ** -p["alpha"] + p["A0"],
        "power": lambda: p["c"] * x ** -p["alpha"] + p["A0"],
        "shifted power": lambda: p["c"] * (x + p["s"]) ** -p["alpha"] + p["A0"],
        "exponential": lambda: p["c"] * np.exp(-x / p["tau"]) + p["A0"],
        "logarithm": lambda: p["c"] * np.log(x) + p["d"],
        "shifted logarithm": lambda: p["c"] * np.log(x + p["s"]) + p["d"],
        "piecewise": lambda: p["c"] * np.where(x < p["x0"], x, p["x0"]) + p["A0"],
    }[form]()


def noisy(form: str, seed: int, noise: float = 2e-4) -> Curve:
    y = plain(form, TRUE[form], D) + noise * np.random.default_rng(seed).standard_normal(len(D))
    return Curve(form, TOKENS, D, y)


def write(path: Path, **lists: Any) -> Path:
    path.write_text(json.dumps(lists))
    return path


# Curves ------------------------------------------------------------------------------------------


def test_curve_in_tokens_or_in_billions(tmp_path: Path) -> None:
    ratios = [0.3, 0.2]
    tokens = load_curve(write(tmp_path / "a.txt", token_passed=[1e9, 5e9], activation_ratio=ratios))
    np.testing.assert_allclose(tokens.x, [1, 5])
    assert (tokens.name, tokens.kind, len(tokens)) == ("a", TOKENS, 2)
    billions = write(tmp_path / "b.txt", token_passed=[1, 5], activation_ratio=ratios)
    np.testing.assert_allclose(load_curve(billions, unit=1e9).x, [1, 5])
    with pytest.raises(FallowError, match="looks like billions, not tokens; give --unit 1e9"):
        load_curve(billions)
    wide = write(tmp_path / "c.txt", width_depth=[2, 50], activation_ratio=ratios, loss=[1, 2])
    assert load_curve(wide).kind == WIDTH_DEPTH
    np.testing.assert_allclose(load_curve(wide).x, [2, 50])


@pytest.mark.parametrize(
    ("tokens", "ratios", "message"),
    [
        ([1e9, 2e9], [0.1], "token_passed has 2 values, activation_ratio 1"),
        ([1e9, -2e9], [0.1, 0.1], "not positive at point 2: -2e\\+09"),
        ([2e9, 1e9], [0.1, 0.1], "does not rise at point 2"),
        ([1e9, 1e9], [0.1, 0.1], "does not rise at point 2"),
        ([1e9, 2e9], [0.1, 1.0], "outside \\(0, 1\\) at point 2: 1; give fractions"),
        ([1e9, 2e9], [7.5, 8.1], "outside \\(0, 1\\) at point 1"),
        ([1e9, 2e9], [0.1, float("nan")], "outside \\(0, 1\\) at point 2: nan"),
        ([float("nan"), 2e9], [0.1, 0.2], "not positive at point 1: nan"),
        ([0.8, 2e9], [0.1, 0.1], "mixes tokens and billions at point 1: 0.8"),
        ([["a"], 2e9], [0.1, 0.1], "is no curve; it needs the lists token_passed"),
    ],
)
def test_bad_curves(tmp_path: Path, tokens: Any, ratios: Any, message: str) -> None:
    with pytest.raises(FallowError, match=message):
        load_curve(write(tmp_path / "c", token_passed=tokens, activation_ratio=ratios))


def test_no_curve(tmp_path: Path) -> None:
    for content in ("", "[1]", "{}", '{"token_passed": [1]}', '{"activation_ratio": [1]}'):
        (tmp_path / "c").write_text(content)
        with pytest.raises(FallowError, match="is no curve"):
            load_curve(tmp_path / "c")
    with pytest.raises(FallowError, match="cannot read curve"):
        load_curve(tmp_path / "none")
    with pytest.raises(UsageError, match="--unit -1"):
        load_curve(tmp_path / "c", unit=-1)


# Forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_fit_finds_the_truth(name: str) -> None:
    y = plain(name, TRUE[name], D)
    found = fit(FORMS[name], D, y)
    np.testing.assert_allclose(FORMS[name].values(TRUE[name], D), y)
    np.testing.assert_allclose(found(D), y, atol=2e-6)
    for parameter, value in TRUE[name].items():
        assert found.params[parameter] == pytest.approx(value, rel=0.02), parameter


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_fit_is_the_least_squares_fit(name: str, seed: int) -> None:
    """No scipy run from elsewhere finds a better one within the bounds."""
    from scipy.optimize import least_squares

    curve, form = noisy(name, seed), FORMS[name]
    found = fit(form, curve.x, curve.ratio)
    assert found.sse == pytest.approx(((found(curve.x) - curve.ratio) ** 2).sum(), rel=1e-6)
    start = np.array([TRUE[name][p] for p in form.params])
    scale = np.abs(start)

    def residuals(v: np.ndarray) -> np.ndarray:
        return plain(name, dict(zip(form.params, v * scale, strict=True)), D) - curve.ratio

    other = least_squares(residuals, start / scale, method="lm")
    inside = 0 <= other.x[-1] * scale[-1] <= 1
    if inside:
        assert found.sse <= 2 * other.cost * (1 + 1e-6)


def test_limit_stays_within_bounds() -> None:
    """A straight fall in ln D has no limit: A0 is 0, not negative."""
    y = 0.12 - 0.012 * np.log(D)
    assert fit(FORMS["power"], D, y).params["A0"] == 0
    assert fit(FORMS["power"], D, y, {"A0": 0.03}).params["A0"] == 0.03


def test_fixed_parameters() -> None:
    curve = noisy("relu", 0)
    for name in ("alpha", "c", "b", "A0"):
        value = 1.1 * TRUE["relu"][name]
        found = fit(FORMS["relu"], curve.x, curve.ratio, {name: value})
        assert found.params[name] == pytest.approx(value)
        assert found.sse >= fit(FORMS["relu"], curve.x, curve.ratio).sse


def test_unknown_form() -> None:
    with pytest.raises(UsageError, match="unknown form 'x'; known: relu, silu, power"):
        find_form("x")


# Intervals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_intervals_end_where_the_test_rejects(name: str) -> None:
    """So that what holds of the test, which costs a fiftieth, holds of the interval."""
    curve = noisy(name, 0)
    best = fit(FORMS[name], curve.x, curve.ratio)
    for parameter in TRUE[name]:
        low, high = profile(best, curve, parameter, 0.0)
        assert low < best.params[parameter] < high
        width = high - low
        for value, inside in ((low, 1), (high, -1)):
            for step, sign in ((inside * 0.02 * width, -1), (-inside * 0.02 * width, 1)):
                fixed = fit(FORMS[name], curve.x, curve.ratio, {parameter: value + step})
                assert sign * rejection(best, fixed, curve, 0.0) > 0, parameter


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_intervals_cover_the_truth(name: str) -> None:
    """Of 25 curves, by the test that intervals come of; benchmarks/laws.py has hundreds."""
    covered = dict.fromkeys(TRUE[name], 0)
    for seed in range(25):
        curve = noisy(name, seed)
        best = fit(FORMS[name], curve.x, curve.ratio)
        for parameter, value in TRUE[name].items():
            fixed = fit(FORMS[name], curve.x, curve.ratio, {parameter: value})
            covered[parameter] += rejection(best, fixed, curve, 0.0) <= 0
    assert all(count >= 21 for count in covered.values()), covered
    assert sum(covered.values()) < 25 * len(covered)  # nor do they cover everything


def correlated(rng: np.random.Generator, n: int, correlation: float) -> np.ndarray:
    """AR(1) noise of variance 1, (n,)."""
    noise = rng.standard_normal(n)
    for i in range(1, n):
        noise[i] = correlation * noise[i - 1] + np.sqrt(1 - correlation**2) * noise[i]
    return noise


def test_intervals_cover_the_truth_where_noise_hangs_together() -> None:
    """AR(1) noise: the interval of independent noise would miss the limit too often."""
    true, found = TRUE["silu"], np.zeros(2)
    estimates = []
    for seed in range(100):
        noise = 2e-4 * correlated(np.random.default_rng(seed), len(D), 0.6)
        curve = Curve("silu", TOKENS, D, plain("silu", true, D) + noise)
        best = fit(FORMS["silu"], D, curve.ratio)
        rho = autocorrelation(curve.ratio - best(D), 3)
        estimates.append(rho)
        # The test that the interval comes of: an interval itself takes fifty times as long.
        fixed = fit(FORMS["silu"], D, curve.ratio, {"A0": true["A0"]})
        found += [rejection(best, fixed, curve, each) <= 0 for each in (rho, 0.0)]
    assert np.mean(estimates) == pytest.approx(0.6, abs=0.15)
    assert found[0] >= 88
    assert found[1] < 80


def test_autocorrelation_is_not_biased() -> None:
    """Of what a straight line leaves of AR(1) noise; residuals' own r is lower by 0.1 and more."""
    x = np.arange(40.0)
    for true in (0.3, 0.6):
        found = []
        for seed in range(200):
            noise = correlated(np.random.default_rng(seed), 40, true)
            found.append(autocorrelation(noise - np.polyval(np.polyfit(x, noise, 1), x), 2))
        assert np.mean(found) == pytest.approx(true, abs=0.05)


def awkward(kind: str) -> Curve:
    """Six points that tell a law next to nothing."""
    rng = np.random.default_rng(7)
    x = np.geomspace(0.02, 90, 6)
    ratio = {
        "constant": np.full(6, 0.3),
        "step": np.where(x < 1, 0.9, 0.05),
        "noise": rng.uniform(0.01, 0.99, 6),
    }[kind]
    return Curve(kind, TOKENS, x, ratio)


@pytest.mark.parametrize("kind", ["constant", "step", "noise"])
@pytest.mark.parametrize("name", FORMS)
def test_what_a_fit_reports_stays_in_bounds(name: str, kind: str) -> None:
    """Parameters, whatever the curve; and every interval holds its own estimate."""
    curve, form = awkward(kind), FORMS[name]
    x = [float(curve.x[0]) / 10, float(curve.x[-1]) * 10]
    law = fit_law(curve, name, draws=3, at=x, tokens_for=[0.1, 0.3])
    gain, offset = form.names
    bounds = {n: BOUNDS[n] for n in form.theta} | {offset: form.offset}
    bounds[gain] = (-30.0, np.log(form.gain[1])) if form.log_gain else form.gain
    for parameter, value in law.params.items():
        least, most = bounds[parameter]
        for low, high in (law.intervals[parameter], law.bootstrap[parameter]):
            assert least <= low <= value <= high <= most, parameter
    for found in law.at:
        low, high = found.interval
        assert low is not None
        assert high is not None
        assert 0 <= low <= found.ratio <= high <= 1
    for found in law.tokens_for:
        low, high = found.interval
        assert found.x is None or (low is not None and low <= found.x <= (high or found.x))
    line = np.clip(form.values(law.params, np.array(law.band_x)), 0, 1)
    band = np.array(law.band)
    assert ((band[:, 0] <= line) & (line <= band[:, 1])).all()
    assert (band >= 0).all()
    assert (band <= 1).all()
    json.dumps(law.to_json(), allow_nan=False)


def test_both_intervals_agree() -> None:
    law = fit_law(noisy("silu", 1), draws=200)
    for name, (low, high) in law.intervals.items():
        width = high - low
        assert law.bootstrap[name][0] == pytest.approx(low, abs=0.4 * width)
        assert law.bootstrap[name][1] == pytest.approx(high, abs=0.4 * width)
    again = [fit_law(noisy("silu", 1), draws=5).to_json() for _ in range(2)]
    assert again[0] == again[1]


def test_correlated_residuals_widen() -> None:
    rng = np.random.default_rng(0)
    steps = 2e-4 * rng.standard_normal(len(D))
    walk = np.convolve(steps, 0.8 ** np.arange(10))[: len(D)]
    assert autocorrelation(walk, 3) > 0.4
    assert autocorrelation(np.zeros(4), 1) == 0
    curve = noisy("silu", 1)
    best = fit(FORMS["silu"], curve.x, curve.ratio)
    (low, high), (lower, higher) = (profile(best, curve, "A0", rho) for rho in (0.0, 0.6))
    assert lower < low < high < higher


def test_short_curve_does_not_identify_the_limit() -> None:
    curve = noisy("silu", 0)
    assert fit_law(curve, draws=20).identified
    loud = noisy("silu", 0, noise=4e-3)
    early = fit_law(Curve("early", TOKENS, loud.x[:8], loud.ratio[:8]), draws=20)
    assert not early.identified
    assert early.warning is not None
    assert "A0 is not identified" in early.warning


def test_limit_that_hangs_on_the_first_points_is_not_identified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    low, high = fit_law(noisy("silu", 0), draws=20).intervals["A0"]
    for limit, stays in ((low, True), (high, True), (low - 1e-5, False), (high + 1e-5, False)):
        later = {3: {"A0": limit}}
        monkeypatch.setattr(fitting, "_refits", lambda *_, later=later: later)
        law = fit_law(noisy("silu", 0), draws=20)
        assert law.identified == stays
        said = f"without the first 3 points it is {limit:.3g}, outside"
        assert stays or said in (law.warning or "")


def test_published_limit_that_hangs_on_the_first_points() -> None:
    """ReLU 0.1B: 0.0614, but 0.0688 without the first three points."""
    path = DATA / "laws" / "0.1b_relu.txt"
    if not path.exists():
        pytest.skip(f"{path} is missing; set FALLOW_DATA")
    law = fit_law(load_curve(path), draws=20)
    assert law.params["A0"] == pytest.approx(0.0614, abs=5e-5)
    assert law.refits[3]["A0"] == pytest.approx(0.0688, abs=5e-5)
    assert not law.identified
    assert "without the first 3 points it is 0.0688, outside" in (law.warning or "")


def test_limit_of_what_the_form_cannot_follow_is_not_identified() -> None:
    rising = fit_law(noisy("silu", 0), "relu", draws=20)
    assert rising.warning is not None
    assert "a constant fits as well as A = exp" in rising.warning
    few = np.geomspace(1, 300, 6)
    y = plain("silu", TRUE["silu"], few) + 1e-5 * np.array([1, -1, 1, -1, 1, -1])
    law = fit_law(Curve("few", TOKENS, few, y), draws=20)
    assert law.warning is not None
    assert "6 points are too few to fit again without 3 of them" in law.warning


def test_parameters_outside_their_bounds_are_refused() -> None:
    form = FORMS["relu"]
    form.check(TRUE["relu"], "c")
    with pytest.raises(FallowError, match=r"^c: b = -690 of A = exp.* outside -30 to 0; fit the"):
        form.check(TRUE["relu"] | {"b": -690.0}, "c")
    with pytest.raises(FallowError, match=r"alpha = 7 of .* lies outside 0.01 to 6"):
        form.check(TRUE["relu"] | {"alpha": 7.0}, "c")
    with pytest.raises(FallowError, match="A0 = nan"):
        form.check(TRUE["relu"] | {"A0": float("nan")}, "c")
    with pytest.raises(FallowError, match=r"given: A0 = 1\.5 .* lies outside 0 to 1"):
        fit(form, D, plain("relu", TRUE["relu"], D), {"A0": 1.5})


# A law -------------------------------------------------------------------------------------------


def test_law_by_direction() -> None:
    for name in ("relu", "silu"):
        law = fit_law(noisy(name, 0), draws=20)
        assert law.form == name
        assert law.rivals[0].form == name
        assert len({rival.form for rival in law.rivals}) == len(law.rivals)
    wide = Curve("w", WIDTH_DEPTH, D, plain("piecewise", TRUE["piecewise"], D))
    bent = fit_law(wide, draws=20)
    assert bent.form == "piecewise"
    assert bent.params["x0"] == pytest.approx(114, rel=0.01)
    assert bent.intervals["x0"][0] <= 114.5
    assert bent.intervals["x0"][1] >= 113.5


def test_rivals_are_told_apart() -> None:
    """The true form has the best AICc, and predicts the last points."""
    for name in ("relu", "exponential", "logarithm"):
        law = fit_law(noisy(name, 3, noise=2e-5), "relu", draws=20)
        best = min(law.rivals, key=lambda r: r.aicc or 0.0)
        assert best.form == name
        errors = {r.form: r.extrapolation_mae or 0.0 for r in law.rivals}
        assert errors[name] < 5e-4
        assert (name in law.better) == (name != "relu")
        for rival in law.rivals[1:]:
            closer = (rival.aicc or 0.0) < (law.rivals[0].aicc or 0.0)
            assert (rival.form in law.better) == (closer and errors[rival.form] < errors["relu"])


def test_predictions() -> None:
    curve = noisy("relu", 0)
    law = fit_law(curve, at=[600.0], tokens_for=[0.08, 0.01], draws=100)
    truth = plain("relu", TRUE["relu"], np.array([600.0]))[0]
    low, high = law.at[0].interval
    assert low is not None
    assert high is not None
    assert low <= truth <= high
    reached = law.tokens_for[0]
    exact = crossing(fit(FORMS["relu"], D, plain("relu", TRUE["relu"], D)), 0.08)
    assert exact is not None
    assert reached.x == pytest.approx(exact, rel=0.1)
    assert plain("relu", TRUE["relu"], np.array([exact]))[0] == pytest.approx(0.08, abs=1e-5)
    assert (law.tokens_for[1].x, law.tokens_for[1].interval) == (None, (None, None))
    json.dumps(law.to_json(), allow_nan=False)


def test_too_few_points() -> None:
    curve = noisy("relu", 0)
    with pytest.raises(FallowError, match="4 points are too few for the 4 parameters"):
        fit_law(Curve("c", TOKENS, curve.x[:4], curve.ratio[:4]))
    with pytest.raises(FallowError, match="0 points are too few"):
        fit_law(curve, drop_first=100)
    with pytest.raises(UsageError, match="--drop-first -1"):
        fit_law(curve, drop_first=-1)


def test_joint_limit() -> None:
    rng = np.random.default_rng(0)

    def curve(alpha: float, limit: float) -> Curve:
        y = -0.15 * D**-alpha + limit + 2e-4 * rng.standard_normal(len(D))
        return Curve(f"{alpha}", TOKENS, D, y)

    same = fit_jointly([curve(a, 0.39) for a in (0.5, 0.6, 0.8)])
    assert same.limit == pytest.approx(0.39, abs=0.001)
    assert same.interval[0] < 0.39 < same.interval[1]
    assert same.p_value > 0.01
    differ = fit_jointly([curve(0.8, 0.39), curve(0.8, 0.385)])
    assert differ.p_value < 1e-4
    with pytest.raises(UsageError, match="two curves"):
        fit_jointly([curve(0.5, 0.39)])
    with pytest.raises(FallowError, match="relu, silu; give --form"):
        fit_jointly([curve(0.5, 0.39), noisy("relu", 0)])


def test_published_curve() -> None:
    """The 0.8B ReLU curve's parameters of arXiv:2411.02335 Table 2, to their three digits."""
    path = DATA / "laws" / "0.8b_relu.txt"
    if not path.exists():
        pytest.skip(f"{path} is missing; set FALLOW_DATA")
    curve = load_curve(path)
    found = fit(FORMS["relu"], curve.x, curve.ratio).params
    for name, value in {"alpha": 1.01, "b": -3.49, "c": 7.97e-3, "A0": 0.0721}.items():
        assert found[name] == pytest.approx(value, rel=5e-3), name
