"""Curves that laws are fitted to: the activation ratio against tokens seen, or against d_model / L.

A file is one JSON object of lists of equal length, as the published ones are: `token_passed`, in
tokens, or `width_depth`, and `activation_ratio`; other lists (what `fallow law train` adds) are
left alone. docs/laws.md.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fallow.common.errors import FallowError, UsageError
from fallow.common.files import parse_json

TOKENS, WIDTH_DEPTH, RATIO = "token_passed", "width_depth", "activation_ratio"
BILLION = 1e9
# A number of tokens below it is taken for one of billions: no one looks at a model that early.
FEWEST_TOKENS = 10_000


@dataclass(frozen=True)
class Curve:
    """Points of one model, or of one per width-depth ratio."""

    name: str
    kind: str  # TOKENS or WIDTH_DEPTH
    x: np.ndarray  # (n,) in 1e9 tokens, or a ratio; ascending
    ratio: np.ndarray  # (n,) in (0, 1)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def unit(self) -> float:
        """What 1 in `x` stands for."""
        return BILLION if self.kind == TOKENS else 1.0

    def without_first(self, count: int) -> "Curve":
        return Curve(self.name, self.kind, self.x[count:], self.ratio[count:])


def load_curve(path: str | Path, unit: float | None = None) -> Curve:
    """Reads a curve.

    Args:
        unit: tokens that 1 in `token_passed` stands for; default 1.

    Raises:
        UsageError: a unit that is not positive.
        FallowError: the file is missing or no curve; lists of different lengths; tokens that are
            negative, do not rise, or are billions (or in part); ratios outside (0, 1).
    """
    path = Path(path)
    if unit is not None and not unit > 0:
        raise UsageError(f"--unit {unit:g} must be positive; 1e9 if tokens are given in billions")
    try:
        content = parse_json(path.read_bytes())
        kind = WIDTH_DEPTH if WIDTH_DEPTH in content else TOKENS
        lists = content[kind], content[RATIO]
        x, ratio = (np.array(values, dtype=np.float64) for values in lists)
    except OSError as error:
        raise FallowError(f"cannot read curve {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise FallowError(
            f"{path} is no curve; it needs the lists {TOKENS} (or {WIDTH_DEPTH}) and {RATIO}"
        ) from error
    if x.ndim != 1 or x.shape != ratio.shape:
        raise FallowError(
            f"{path}: {kind} has {x.size} values, {RATIO} {ratio.size}; they must be as many"
        )
    _check(path, kind, x, ratio, unit)
    if kind == TOKENS:
        x = x * ((unit or 1.0) / BILLION)
    return Curve(path.stem, kind, x, ratio)


def _check(path: Path, kind: str, x: np.ndarray, ratio: np.ndarray, unit: float | None) -> None:
    def refuse(what: str, at: np.ndarray, values: np.ndarray, remedy: str) -> None:
        if at.any():
            i = int(np.flatnonzero(at)[0])
            raise FallowError(f"{path}: {what} at point {i + 1}: {values[i]:g}; {remedy}")

    refuse(f"{kind} is not positive", ~(x > 0) | ~np.isfinite(x), x, "take that point out")
    if kind == TOKENS and unit is None:
        small = x < FEWEST_TOKENS
        if small.all() and len(x):
            raise FallowError(
                f"{path}: {kind} goes from {x.min():g} to {x.max():g}, which looks like billions, "
                "not tokens; give --unit 1e9"
            )
        refuse(f"{kind} mixes tokens and billions", small, x, "give all of them in tokens")
    refuse(f"{kind} does not rise", np.diff(x, prepend=-np.inf) <= 0, x, "sort the points")
    refuse(f"{RATIO} is outside (0, 1)", ~((ratio > 0) & (ratio < 1)), ratio, "give fractions")
