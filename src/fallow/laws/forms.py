"""Forms of a curve, and their fit by least squares.

Every form is A(x) = A0 + k g(x; θ): for given θ the best A0 and k follow from two equations, so
that only one or two positive numbers are searched for: on a grid, then by scipy from its best.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fallow.common.errors import FallowError, UsageError

Basis = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""x (n,) and θ (p, m, 1) to g (m, n)."""

# Bounds of k and A0 where a form sets none: what a curve does not tell at all ends here.
UNBOUNDED = (-1e15, 1e15)
# Bounds of θ, within which scipy and profiles stay.
BOUNDS = {
    "alpha": (0.01, 6.0), "c": (1e-14, 1e4), "s": (1e-6, 1e5), "tau": (1e-6, 1e6), "x0": (1e-6, 1e6)
}  # fmt: skip
LEAST_LOG_GAIN = -30.0  # ln k of a curve without any fall: k is 0 then, to a part in 1e13
POINTS = 40  # of the grid, per θ
STARTS = 3  # of the grid's best, which scipy goes on from, but for neighbours of a better one


@dataclass(frozen=True)
class Form:
    """A law, or a rival of it.

    Attributes:
        theta: names of θ.
        grid: candidates of θ (p, m) for points x.
        offset, gain: bounds of A0 and of k.
        names: what k and A0 are called in the formula.
        log_gain: the formula has ln k.
        smooth: g has a derivative in θ everywhere.
    """

    name: str
    formula: str
    basis: Basis
    theta: tuple[str, ...]
    grid: Callable[[np.ndarray], np.ndarray]
    offset: tuple[float, float] = (0.0, 1.0)
    gain: tuple[float, float] = UNBOUNDED
    names: tuple[str, str] = ("c", "A0")
    log_gain: bool = False
    smooth: bool = True

    @property
    def params(self) -> tuple[str, ...]:
        """Names of all parameters, θ first."""
        return (*self.theta, *self.names)

    def bounds(self, name: str) -> tuple[float, float]:
        """What a parameter of the formula may be."""
        if name in self.theta:
            return BOUNDS[name]
        if name == self.names[1]:
            return self.offset
        if self.log_gain:
            return LEAST_LOG_GAIN, float(np.log(self.gain[1]))
        return self.gain

    def check(self, params: Mapping[str, float], of: str) -> None:
        """Raises FallowError for a parameter outside its bounds, naming what it is `of`."""
        for name, value in params.items():
            low, high = self.bounds(name)
            if not low <= value <= high:
                raise FallowError(
                    f"{of}: {name} = {value:g} of {self.formula} lies outside {low:g} to {high:g}; "
                    "fit the curve again, or another form to it"
                )

    def values(self, params: Mapping[str, float], x: np.ndarray | float) -> np.ndarray:
        """A at x, (n,), with parameters of the formula."""
        points = np.atleast_1d(np.asarray(x, dtype=np.float64))
        theta = np.array([params[name] for name in self.theta])
        gain, offset = (params[name] for name in self.names)
        g = self.basis(points, theta[:, None, None]).reshape(len(points))
        return offset + (np.exp(gain) if self.log_gain else gain) * g


@dataclass(frozen=True)
class Fit:
    """A form with its parameters, and the sum of squared residuals."""

    form: Form
    theta: np.ndarray  # (p,)
    gain: float
    offset: float
    sse: float

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        """A at x, (n,)."""
        return self.form.values(self.params, x)

    @property
    def params(self) -> dict[str, float]:
        """By the names of the formula."""
        gain = self.gain
        if self.form.log_gain:
            gain = float(
                np.clip(np.log(max(gain, 1e-300)), LEAST_LOG_GAIN, np.log(self.form.gain[1]))
            )
        values = (*self.theta.tolist(), gain, self.offset)
        return dict(zip(self.form.params, map(float, values), strict=True))


def fit(
    form: Form,
    x: np.ndarray,
    y: np.ndarray,
    fixed: Mapping[str, float] | None = None,
    near: Fit | None = None,
) -> Fit:
    """The least-squares fit to points x, y (n,), by several starts.

    Args:
        fixed: parameters that are given, by the names of the formula.
        near: a fit to start from in place of the grid.

    Raises:
        FallowError: fewer points than parameters, or one that is given outside its bounds.
    """
    from scipy.optimize import least_squares

    fixed = dict(fixed or {})
    form.check(fixed, "given")
    if len(x) < len(form.params) - len(fixed):
        raise FallowError(
            f"{len(x)} points are fewer than the {len(form.params)} parameters of {form.formula}"
        )
    gain, offset = _bounds(form, fixed)

    def inner(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _linear(form.basis(x, theta[:, :, None]), y, gain, offset)

    free = [i for i, name in enumerate(form.theta) if name not in fixed]
    grid = form.grid(x) if near is None else near.theta[:, None]
    grid = np.array(grid, dtype=np.float64)  # (p, m), ours to change
    for i, name in enumerate(form.theta):
        if name in fixed:
            grid[i] = fixed[name]
    values = inner(grid)[2]
    best = np.argsort(values)[: STARTS if free else 1].tolist()
    if form.smooth and free:
        best = _apart(best, grid.shape)
    found: Fit | None = None
    for candidate in grid[:, best].T:
        theta = candidate.copy()
        if free:

            def residuals(logs: np.ndarray, theta: np.ndarray = theta) -> np.ndarray:
                theta[free] = np.exp(logs)
                k, a, _ = inner(theta[:, None])
                return y - a[0] - k[0] * form.basis(x, theta[:, None, None]).reshape(len(x))

            limits = np.array([BOUNDS[form.theta[i]] for i in free]).T
            bounds = np.log(limits)
            start = np.clip(np.log(theta[free]), bounds[0] + 1e-6, bounds[1] - 1e-6)
            with np.errstate(over="ignore"):  # in scipy's steps, where the curve says nothing of θ
                solved = least_squares(
                    residuals, start, bounds=bounds, xtol=1e-10, ftol=1e-12, gtol=1e-15
                )
            theta[free] = np.clip(np.exp(solved.x), *limits)
        k, a, sse = (v.item() for v in inner(theta[:, None]))
        if found is None or sse < found.sse:
            found = Fit(form, theta, k, a, sse)
    assert found is not None
    return found


def _apart(best: list[int], shape: tuple[int, ...]) -> list[int]:
    """Of indices of a grid's points (p, m), the best first, those that no better one is next to.

    From neighbours scipy goes to one minimum of a smooth function.
    """
    p, m = shape
    places = np.stack(np.unravel_index(best, (round(m ** (1 / p)),) * p), axis=1)
    near = np.abs(places[:, None] - places[None]).max(axis=2) <= 1
    return [index for n, index in enumerate(best) if not near[n, :n].any()]


def _bounds(form: Form, fixed: Mapping[str, float]) -> tuple[tuple[float, float], ...]:
    """The bounds of gain and offset; lower and upper are equal where one is fixed."""
    bounds = []
    for name, free, log in zip(
        form.names, (form.gain, form.offset), (form.log_gain, False), strict=True
    ):
        value = fixed.get(name)
        if value is None:
            bounds.append(free)
        else:
            bounds.append((np.exp(value),) * 2 if log else (value, value))
    return tuple(bounds)


def _linear(
    g: np.ndarray, y: np.ndarray, gain: tuple[float, float], offset: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best k and A0 within bounds for each of g (m, n), and the squared error, (m,) each.

    Two variables in a box: the minimum lies inside, or on one of the four edges.
    """
    centre, mean = g.mean(axis=1), y.mean()
    from_centre = g - centre[:, None]
    spread = (from_centre**2).sum(axis=1)
    k = (from_centre * (y - mean)).sum(axis=1) / np.maximum(spread, 1e-300)
    a = mean - k * centre
    with np.errstate(over="ignore", invalid="ignore"):  # of what lies outside
        errors = ((y - a[:, None] - k[:, None] * g) ** 2).sum(axis=1)
    inside = (k >= gain[0]) & (k <= gain[1]) & (a >= offset[0]) & (a <= offset[1])
    inside &= np.isfinite(errors)
    if not inside.all():
        rest = ~inside
        k[rest], a[rest], errors[rest] = _on_an_edge(g[rest], centre[rest], y, gain, offset)
    return k, a, errors


def _on_an_edge(
    g: np.ndarray,
    centre: np.ndarray,
    y: np.ndarray,
    gain: tuple[float, float],
    offset: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_linear`, of the box's edges alone; `centre` (m,) is the mean of g."""
    mean, n = y.mean(), len(y)
    squares, products = np.maximum((g**2).sum(axis=1), 1e-300), (g * y).sum(axis=1)
    sides = [(np.full(len(g), edge), np.clip(mean - edge * centre, *offset)) for edge in gain]
    sides += [
        (np.clip((products - edge * n * centre) / squares, *gain), np.full(len(g), edge))
        for edge in offset
    ]
    k, a = (np.stack(values) for values in zip(*sides, strict=True))
    with np.errstate(over="ignore", invalid="ignore"):
        errors = ((y - a[:, :, None] - k[:, :, None] * g) ** 2).sum(axis=2)
    errors = np.where(np.isfinite(errors), errors, np.inf)
    best = errors.argmin(axis=0), np.arange(len(g))
    return k[best], a[best], errors[best]


# The forms ---------------------------------------------------------------------------------------


def _alphas(x: np.ndarray) -> np.ndarray:
    return np.geomspace(0.02, 5, POINTS)[None]


def _alphas_and_rates(x: np.ndarray) -> np.ndarray:
    """c such that c D^alpha at the last point is anything from hardly begun to long over."""
    alpha, rate = np.meshgrid(np.geomspace(0.02, 5, POINTS), np.geomspace(0.01, 60, POINTS))
    return np.stack([alpha.ravel(), (rate / x[-1] ** alpha).ravel()])


def _alphas_and_shifts(x: np.ndarray) -> np.ndarray:
    alpha, shift = np.meshgrid(np.geomspace(0.02, 5, POINTS), np.geomspace(1e-3, 10, POINTS))
    return np.stack([alpha.ravel(), (shift * x[-1]).ravel()])


def _scales(x: np.ndarray) -> np.ndarray:
    return np.geomspace(1e-3, 20, 2 * POINTS)[None] * x[-1]


FORMS = {
    form.name: form
    for form in (
        # arXiv:2411.02335 Eq. 4, as e^b exp(-c D^alpha) + A0, which is no more than 1 at D = 0.
        Form(
            "relu",
            "A = exp(-c D^alpha + b) + A0",
            lambda x, theta: np.exp(-theta[1] * x ** theta[0]),
            ("alpha", "c"),
            _alphas_and_rates,
            gain=(0.0, 1.0),
            names=("b", "A0"),
            log_gain=True,
        ),
        Form(
            "silu",  # arXiv:2411.02335 Eq. 5
            "A = -c D^-alpha + A0",
            lambda x, theta: -(x ** -theta[0]),
            ("alpha",),
            _alphas,
            gain=(0.0, UNBOUNDED[1]),
        ),
        Form(
            "power",
            "A = c D^-alpha + A0",
            lambda x, theta: x ** -theta[0],
            ("alpha",),
            _alphas,
        ),
        Form(
            "shifted power",
            "A = c (D + s)^-alpha + A0",
            lambda x, theta: (x + theta[1]) ** -theta[0],
            ("alpha", "s"),
            _alphas_and_shifts,
        ),
        Form(
            "exponential",
            "A = c exp(-D / tau) + A0",
            lambda x, theta: np.exp(-x / theta[0]),
            ("tau",),
            _scales,
        ),
        Form(
            "logarithm",
            "A = c ln D + d",
            lambda x, theta: np.log(x)[None],
            (),
            lambda x: np.empty((0, 1)),
            offset=UNBOUNDED,
            names=("c", "d"),
        ),
        # The four parameters of c ln(a D + b) + d are three: c ln a joins d.
        Form(
            "shifted logarithm",
            "A = c ln(D + s) + d",
            lambda x, theta: np.log(x + theta[0]),
            ("s",),
            _scales,
            offset=UNBOUNDED,
            names=("c", "d"),
        ),
        Form(
            "piecewise",  # arXiv:2411.02335 Fig. 5: linear up to a bottleneck
            "A = c min(x, x0) + A0",
            lambda x, theta: np.minimum(x, theta[0]),
            ("x0",),
            lambda x: np.linspace(x[1], x[-1], 4 * POINTS)[None],
            smooth=False,
        ),
    )
}


def find_form(name: str) -> Form:
    """Raises UsageError for an unknown name, naming the known ones."""
    if name not in FORMS:
        raise UsageError(f"unknown form {name!r}; known: {', '.join(FORMS)}")
    return FORMS[name]
