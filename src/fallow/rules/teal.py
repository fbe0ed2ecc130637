"""TEAL: magnitude thresholds on the inputs of all projections, allocated greedily per block."""

from typing import Any

import numpy as np
import torch

from fallow.common.progress import progress
from fallow.models.capture import Calibration, input_histogram
from fallow.models.cuts import zero_where
from fallow.models.taps import attach
from fallow.plan import Cut
from fallow.rules._base import Rule

# One step saves ALPHA of the block's weights, but adds at most LARGEST_STEP to one projection's
# sparsity: under grouped-query attention k_proj is 1/120 of a block and could take no equal step.
ALPHA = 0.02
LARGEST_STEP = 0.1
HIGHEST = 0.95


class Teal(Rule):
    """|x_j| of every projection's input against a threshold per layer and projection.

    Block-wise greedy allocation (paper 4.3, Algorithm 1): from no sparsity, repeatedly raise the
    projection whose step costs the least error of the block's output per weight saved, until
    the block reaches the target. Every block gets the same sparsity, weighted by parameters.
    Two departures from the paper, which steps every projection by an equal share of the block and
    compares plain errors: steps are capped, so errors are divided by what a step saves; and each
    token's error is relative to its output, so that attention sinks do not decide alone.
    """

    name = "teal"
    paper = "arXiv:2408.14690"
    where = "input"
    knob_name = "input sparsity of every block, weighted by parameters"
    knob_range = (0.0, HIGHEST)
    known = "before each projection: saves its columns"
    search_limit = HIGHEST

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> list[Cut]:
        allocation = _allocate(calibration, knob)  # (L, P)
        return [
            Cut(name, "threshold", _input_thresholds(calibration, name, allocation[:, p]))
            for p, name in enumerate(calibration.layers[0].projections)
        ]


def _input_thresholds(calibration: Calibration, name: str, sparsity: np.ndarray) -> np.ndarray:
    histogram = calibration.histograms[input_histogram(calibration.layers[0], name)]
    values = [histogram.quantile(i, float(s)) if s > 0 else -1 for i, s in enumerate(sparsity)]
    return np.array(values, dtype=np.float32)


class GreedyPath:
    """The greedy allocation of one block, extended as far as it was asked for."""

    def __init__(self, calibration: Calibration, index: int) -> None:
        self.calibration, self.index = calibration, index
        self.layer = calibration.layers[index]
        self.names = tuple(self.layer.projections)
        sizes = np.array([self.layer.projections[n].weight.numel() for n in self.names])
        self.share = sizes / sizes.sum()  # (P,) of the block's weights
        self.steps = [np.zeros(len(self.names))]
        self.args, self.kwargs = calibration.block_inputs[index]
        self.dense = self._run(self.steps[0])
        self.last_error = 0.0

    def at(self, target: float) -> np.ndarray:
        """Sparsity of each projection, (P,), when the block's is `target`; linear between steps."""
        while self._level(self.steps[-1]) < target and self._extend():
            pass
        levels = [self._level(step) for step in self.steps]
        return np.array(
            [np.interp(target, levels, [s[p] for s in self.steps]) for p in range(len(self.names))]
        )

    def error(self, sparsity: np.ndarray) -> float:
        """Mean over tokens of ||block output - dense|| / ||dense||."""
        change = (self._run(sparsity) - self.dense).norm(dim=-1)
        return float((change / self.dense.norm(dim=-1).clamp_min(1e-12)).mean())

    def _level(self, step: np.ndarray) -> float:
        return float(step @ self.share)

    def _extend(self) -> bool:
        best = None
        for p in range(len(self.names)):
            step = min(ALPHA / self.share[p], LARGEST_STEP, HIGHEST - self.steps[-1][p])
            if step <= 1e-9:
                continue
            trial = self.steps[-1].copy()
            trial[p] += step
            error = self.error(trial)
            price = (error - self.last_error) / (step * self.share[p])
            if best is None or price < best[0]:
                best = (price, error, trial)
        if best is None:
            return False
        self.last_error = best[1]
        self.steps.append(best[2])
        return True

    def _run(self, sparsity: np.ndarray) -> torch.Tensor:
        """The block's output, (T, d_model) float32, at the given input sparsity."""
        histograms = self.calibration.histograms
        taps: dict[str, Any] = {}
        for name, s in zip(self.names, sparsity, strict=True):
            cut = histograms[input_histogram(self.layer, name)].quantile(self.index, float(s))
            if s > 0:
                taps[name] = lambda _, value, cut=cut: zero_where(value.abs().float() <= cut, value)
        with torch.inference_mode(), attach([self.layer], taps):
            output = self.layer.block(*self.args, **self.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return output.float().flatten(0, -2)


def _allocate(calibration: Calibration, target: float) -> np.ndarray:
    if "teal" not in calibration.cache:
        calibration.cache["teal"] = [
            GreedyPath(calibration, i) for i in range(len(calibration.layers))
        ]
    paths: list[GreedyPath] = calibration.cache["teal"]
    found = []
    with progress("teal allocation", len(paths)) as ticker:
        for path in paths:
            found.append(path.at(target))
            ticker.advance()
    return np.stack(found)


RULE = Teal
