"""What to expect of a model that is yet to be trained, from published laws and own curves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fallow.common.errors import FallowError, UsageError
from fallow.common.files import fits, parse_json
from fallow.laws.curves import BILLION, TOKENS, load_curve
from fallow.laws.fitting import Interval
from fallow.laws.forms import FORMS, fit


@dataclass(frozen=True)
class Basis:
    """A law of one model: parameters of the formula, and where it was measured."""

    name: str
    activation: str
    parameters: float  # besides embeddings
    tokens: Interval  # 1e9, first and last point
    params: dict[str, float]

    def ratio(self, tokens: float) -> float:
        """A after so many 1e9 tokens."""
        return float(FORMS[self.activation].values(self.params, tokens)[0])


def _relu(size: str, n: float, tokens: Interval, *params: float) -> Basis:
    names = ("alpha", "b", "c", "A0")
    return Basis(f"ReLU {size}", "relu", n, tokens, dict(zip(names, params, strict=True)))


def _silu(size: str, n: float, tokens: Interval, *params: float) -> Basis:
    names = ("alpha", "c", "A0")
    return Basis(f"SiLU {size}", "silu", n, tokens, dict(zip(names, params, strict=True)))


# arXiv:2411.02335, Tables 2 and 3; activation ratios at CETT-PPL-1 %. Tokens are those of the
# published curves.
PUBLISHED = (
    _relu("0.1B", 1.08e8, (0.80, 41.6), 0.101, -0.0151, 3.20, 0.0614),
    _relu("0.2B", 2.41e8, (2.84, 85.1), 0.449, -3.05, 0.286, 0.0674),
    _relu("0.4B", 4.52e8, (3.63, 145.3), 0.683, -3.46, 0.0790, 0.0690),
    _relu("0.8B", 7.60e8, (11.4, 272.4), 1.01, -3.49, 7.97e-3, 0.0721),
    _relu("1.2B", 1.18e9, (7.57, 317.8), 1.33, -3.89, 9.03e-4, 0.0782),
    _relu("2.4B", 2.44e9, (9.71, 291.3), 1.53, -3.46, 1.56e-4, 0.0648),
    _silu("0.1B", 1.08e8, (0.77, 41.6), 0.479, 0.102, 0.409),
    _silu("0.2B", 2.41e8, (2.84, 92.8), 0.844, 0.208, 0.390),
    _silu("0.4B", 4.52e8, (3.63, 145.3), 1.03, 0.420, 0.385),
    _silu("0.8B", 7.60e8, (5.68, 193.0), 0.995, 0.562, 0.383),
    _silu("1.2B", 1.18e9, (3.03, 227.0), 0.967, 0.538, 0.382),
)


# Of d_model / layers: where 0.1B ReLU models have their best training loss (Fig. 6). The activation
# ratio rises with it (Fig. 5), so that the paper takes the smallest.
BEST_LOSS_WIDTH_DEPTH = (74.0, 282.0)


@dataclass
class Advice:
    """An expected ratio, with the range of the laws it rests on, and what it could be worth.

    `known_ceiling` is how much faster an FFN could be at most if the active neurons were known at
    no cost, `gate_ceiling` if gate_proj had to be computed for all: 1 / A and 3 / (1 + 2 A).
    `best_loss_width_depth` is the interval of d_model / layers with the best training loss, which
    is known of 0.1B ReLU models alone.
    """

    activation: str
    parameters: float
    tokens: float
    ratio: float
    interval: Interval
    known_ceiling: float
    known_interval: Interval
    gate_ceiling: float
    gate_interval: Interval
    best_loss_width_depth: Interval
    rests_on: list[str]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def own_basis(path: str | Path) -> Basis:
    """The law of a curve of `fallow law train`.

    Raises:
        FallowError: no such curve, or one that does not say its activation and parameters, or that
            is of another metric than the published ones.
    """
    curve = load_curve(path)
    content = parse_json(Path(path).read_bytes())
    activation, parameters = content.get("activation"), content.get("parameters")
    known = fits(parameters, float) and parameters > 0
    if curve.kind != TOKENS or activation not in ("relu", "silu") or not known:
        raise FallowError(
            f"{path} does not say of what model it is; add activation (relu, silu) and parameters"
        )
    if fits(content.get("cett"), list):
        raise FallowError(
            f"{path} has a CETT per checkpoint, as older versions measured, which is not "
            "CETT-PPL-1 %; train it again"
        )
    law = fit(FORMS[activation], curve.x, curve.ratio)
    name = f"own {Path(path).resolve().parent.name}/{curve.name}"
    ends = float(curve.x[0]), float(curve.x[-1])
    return Basis(name, activation, float(parameters), ends, law.params)


def advise(parameters: float, tokens: float, activation: str, own: Sequence[Basis] = ()) -> Advice:
    """What activation ratio at CETT-PPL-1 % to expect of a model.

    Every law is asked at as many tokens per parameter as the model will see, since smaller models
    converge sooner in tokens but alike in that (arXiv:2411.02335 Fig. 8); between sizes the answer
    is interpolated, and the range over all of them is the interval: what sizes, data and fits
    differ by, which is more than each fit's own error.

    Args:
        parameters: besides embeddings.

    Raises:
        UsageError: an unknown activation, or numbers that are not positive.
    """
    if activation not in ("relu", "silu"):
        raise UsageError(f"no law of activation {activation!r} is known; known: relu, silu")
    for option, value in (("params", parameters), ("tokens", tokens)):
        if not 0 < value < float("inf"):
            raise UsageError(f"--{option} {value:g} must be a positive number")
    laws = [b for b in (*PUBLISHED, *own) if b.activation == activation]
    laws.sort(key=lambda law: law.parameters)
    per_parameter = tokens / parameters
    ratios = [law.ratio(per_parameter * law.parameters / BILLION) for law in laws]
    ratios = [min(max(ratio, 0.0), 1.0) for ratio in ratios]
    sizes = np.log([law.parameters for law in laws])
    ratio = float(np.interp(np.log(parameters), sizes, ratios))
    low, high = min(ratios), max(ratios)
    return Advice(
        activation=activation,
        parameters=parameters,
        tokens=tokens,
        ratio=ratio,
        interval=(low, high),
        known_ceiling=1 / max(ratio, 1e-9),
        known_interval=(1 / max(high, 1e-9), 1 / max(low, 1e-9)),
        gate_ceiling=3 / (1 + 2 * ratio),
        gate_interval=(3 / (1 + 2 * high), 3 / (1 + 2 * low)),
        best_loss_width_depth=BEST_LOSS_WIDTH_DEPTH,
        rests_on=[law.name for law in laws],
        warnings=_warnings(laws, parameters, per_parameter),
    )


def _warnings(laws: list[Basis], parameters: float, per_parameter: float) -> list[str]:
    found = []
    smallest, largest = laws[0].parameters, laws[-1].parameters
    if not smallest <= parameters <= largest:
        found.append(
            f"{parameters:.3g} parameters are outside {smallest:.3g} to {largest:.3g}: extrapolated"
        )
    first = min(law.tokens[0] * BILLION / law.parameters for law in laws)
    last = max(law.tokens[1] * BILLION / law.parameters for law in laws)
    if not first <= per_parameter <= last:
        found.append(
            f"{per_parameter:.3g} tokens per parameter are outside {first:.3g} to {last:.3g}: "
            "extrapolated"
        )
    return found
