"""What all rules share. A rule says which values may be set to zero; nothing else.

One convention for ties, everywhere: a value is inactive iff its score is <= the threshold.
"""

from collections.abc import Callable
from typing import ClassVar, Self

import numpy as np
import torch

from fallow import _core
from fallow.common.errors import UsageError
from fallow.models.capture import Calibration, as_floats, n_threads
from fallow.models.taps import Layer, Tap

Arrays = dict[str, np.ndarray]


class Rule:
    """A way to make neurons (or inputs) inactive, fitted to one model.

    The class attributes document the rule; `fit` learns its arrays from calibration statistics;
    `taps` applies it. `knob` is the rule's one parameter, as its paper has it.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    where: ClassVar[str]  # "inter": neurons; "input": inputs of projections
    knob_name: ClassVar[str]
    knob_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    known: ClassVar[str]  # when the choice is known, hence which weights it saves
    search: ClassVar[str | None] = "sparsity"  # what a search for a loss turns; None: nothing
    search_limit: ClassVar[float] = 1.0  # from 0 up to this
    # Whole numbers behind the name, "rule:option=2": their defaults, and what they may be.
    options: ClassVar[dict[str, int]] = {}
    option_ranges: ClassVar[dict[str, range]] = {}

    def __init__(self, knob: float, arrays: Arrays) -> None:
        self.knob = knob
        self.arrays = arrays

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
        """Fits the rule to a target sparsity of the tensors it cuts, or to a knob.

        Raises:
            UsageError: not exactly one of the two, or out of range.
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
        return cls(knob, cls.learn(calibration, knob))

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        """The knob that gives a sparsity of the tensors the rule cuts; by default that sparsity."""
        return sparsity

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        """The arrays that apply the rule at this knob."""
        raise NotImplementedError

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        """The taps whose values the rule sets to zero."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, layers: list[Layer]) -> dict[str, tuple[int, ...]]:
        """The arrays that a plan must have, by default a threshold per cut tap and layer."""
        return {f"threshold.{tap}": (len(layers),) for tap in cls.cuts(layers[0])}

    def weight(self, index: int, layer: Layer, tap: str) -> torch.Tensor | None:
        """Factor of layer `index`'s score per column, (width,) float32; None: plain magnitude."""
        return None

    def threshold(self, layer: int, tap: str, score: torch.Tensor) -> float | torch.Tensor:
        """Scores (T, width) <= this are inactive: one number, or one per token (T, 1)."""
        return float(self.arrays[f"threshold.{tap}"][layer])

    def taps(self, layers: list[Layer]) -> dict[str, Tap]:
        """The taps that apply the rule to a model with these layers."""

        def make(tap: str) -> Tap:
            weights = [self.weight(i, layer, tap) for i, layer in enumerate(layers)]

            def cut(layer: int, value: torch.Tensor) -> torch.Tensor:
                score = value.abs().float()
                weight = weights[layer]
                if weight is not None:
                    score *= weight
                return zero_where(score <= self.threshold(layer, tap, score), value)

            return cut

        return {tap: make(tap) for tap in self.cuts(layers[0])}


def _in_words(allowed: range) -> str:
    if allowed.step > 1:
        return "|".join(map(str, allowed))
    return f"{allowed.start}..{allowed.stop - 1}"


def zero_where(inactive: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value with its inactive entries set to zero; NaN stays NaN.

    A product, because torch's masked_fill branches on every entry (17 against 4 ms for 1024 tokens
    of 8960 neurons).
    """
    return value * ~inactive


def check_sparsity(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity {sparsity:g} is outside [0, 1); give a fraction such as 0.5")
    return sparsity


def layer_quantiles(calibration: Calibration, tap: str, q: float) -> np.ndarray:
    """The q-th magnitude quantile of every layer, (L,) float32."""
    histogram = calibration.histograms[tap]
    values = [histogram.quantile(i, q) for i in range(len(calibration.layers))]
    return np.array(values, dtype=np.float32)


def per_token_topk(score: torch.Tensor, kept: float) -> torch.Tensor:
    """Thresholds (T, 1) that leave round(kept * width) scores of each token above them."""
    scores = as_floats(score)
    found = np.empty(len(scores), dtype=np.float32)
    _core.topk_thresholds(scores, round(kept * scores.shape[1]), found, n_threads())
    return torch.from_numpy(found)[:, None]


def per_token_tail(score: torch.Tensor, tau: float) -> torch.Tensor:
    """Thresholds (T, 1): the largest with sum of score² below it <= tau² of the token's sum."""
    scores = as_floats(score)
    found = np.empty(len(scores), dtype=np.float32)
    _core.tail_thresholds(scores, tau, found, n_threads())
    return torch.from_numpy(found)[:, None]


def scalar(name: str, value: float) -> Arrays:
    return {name: np.array([value], dtype=np.float64)}


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
