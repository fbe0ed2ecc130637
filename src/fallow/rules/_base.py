"""What all rules share. A rule says which values may be set to zero; nothing else."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch

from fallow.common.errors import FallowError, UsageError
from fallow.models.capture import Calibration
from fallow.models.cuts import check_fits
from fallow.plan import Cut


class Choice:
    """A way to make values inactive, with one parameter, fitted to one model.

    The class attributes document it; `knob` is the parameter, as its paper has it.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    where: ClassVar[str]  # "inter": neurons; "input": inputs of projections; "experts"
    knob_name: ClassVar[str]
    knob_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    known: ClassVar[str]  # when the choice is known, hence which weights it saves
    search: ClassVar[str | None] = "sparsity"  # what a search for a loss turns; None: nothing
    search_limit: ClassVar[float] = 1.0  # from 0 up to this
    # Whole numbers behind the name, "rule:option=2": their defaults, and what they may be.
    options: ClassVar[dict[str, int]] = {}
    option_ranges: ClassVar[dict[str, range]] = {}

    knob: float

    @classmethod
    def with_options(cls, text: str) -> type[Self]:
        """This rule with options such as "gate=4:up=2".

        Raises:
            UsageError: an option that the rule lacks, or no whole number in range.
        """
        options = dict(cls.options)
        for part in text.split(":"):
            key, _, value = part.partition("=")
            if key not in options or not (
                value.isdecimal() and int(value) in cls.option_ranges[key]
            ):
                known = [f"{k}={_in_words(r)}" for k, r in cls.option_ranges.items()]
                raise UsageError(
                    f"rule {cls.name} has no option {part!r}; it has: {', '.join(known) or 'none'}"
                )
            options[key] = int(value)
        changed = ":".join(f"{k}={v}" for k, v in options.items() if v != cls.options[k])
        name = f"{cls.name}:{changed}" if changed else cls.name
        return type(cls.__name__, (cls,), {"options": options, "name": name})

    @classmethod
    def fit(
        cls, calibration: Calibration, *, sparsity: float | None = None, knob: float | None = None
    ) -> Self:
        """Fits it to a target sparsity of the tensors it cuts, or to a knob.

        Raises:
            UsageError: not exactly one of the two, out of range, or cuts that cannot be made.
        """
        if knob is None:
            if sparsity is None:
                raise UsageError("give a target sparsity, or a value for knob")
            knob = cls.knob_for(calibration, check_sparsity(sparsity))
        low, high = cls.knob_range
        if not (low <= knob <= high and np.isfinite(knob)):
            raise UsageError(
                f"--knob {knob:g} of rule {cls.name} is outside [{low:g}, {high:g}]: "
                f"{cls.knob_name}"
            )
        return cls.fit_knob(calibration, knob)

    @classmethod
    def fit_knob(cls, calibration: Calibration, knob: float) -> Self:
        """Fits it to a knob in range."""
        raise NotImplementedError

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        """The knob that gives a sparsity of the tensors it cuts; by default that sparsity."""
        return sparsity


class Rule(Choice):
    """A choice that a plan can hold: `learn` emits the cuts that make it."""

    def __init__(self, knob: float, cuts: tuple[Cut, ...]) -> None:
        self.knob = knob
        self.cuts = cuts

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut | Sequence[Cut]:
        """The cuts at this knob."""
        raise NotImplementedError

    @classmethod
    def fit_knob(cls, calibration: Calibration, knob: float) -> Self:
        made: Any = cls.learn(calibration, knob)
        cuts = (made,) if isinstance(made, Cut) else made
        if not (isinstance(cuts, list | tuple) and all(isinstance(cut, Cut) for cut in cuts)):
            raise UsageError(
                f"rule {cls.name}: learn gave {type(made).__name__}, no cuts, so that no plan can "
                "hold what it chooses; a choice that needs code of its own is a selector"
            )
        layers = calibration.layers
        try:
            cuts = tuple(cut.of_layers(len(layers)) for cut in cuts)
            for cut in cuts:
                check_fits(cut, layers, calibration.model.name)
        except (ValueError, FallowError) as error:
            raise UsageError(f"rule {cls.name}: {error}") from error
        return cls(knob, cuts)


def _in_words(allowed: range) -> str:
    if allowed.step > 1:
        return "|".join(map(str, allowed))
    return f"{allowed.start}..{allowed.stop - 1}"


def check_sparsity(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity:g} is outside [0, 1); give a fraction such as 0.5")
    return sparsity


def mean_zeros(
    values: Sequence[torch.Tensor], drops: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Share of values that `drops` says are dropped, mean of layers."""
    return float(np.mean([float(drops(value).float().mean()) for value in values]))


def layer_quantiles(calibration: Calibration, tap: str, q: float) -> np.ndarray:
    """The q-th magnitude quantile of every layer, (L,) float32; below 0, to cut nothing, at 0."""
    if q <= 0:
        return np.full(len(calibration.layers), -1, dtype=np.float32)
    histogram = calibration.histograms[tap]
    values = [histogram.quantile(i, q) for i in range(len(calibration.layers))]
    return np.array(values, dtype=np.float32)


def bisect(function: Callable[[float], float], target: float, tolerance: float = 1e-3) -> float:
    """The largest v in [0, 1] with function(v) <= target, function rising, to `tolerance`."""
    low, high = 0.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        if function(middle) <= target:
            low = middle
        else:
            high = middle
    return low
