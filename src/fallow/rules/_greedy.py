"""What the rules share that cut inputs of projections, and allocate sparsity greedily by block."""

from typing import Any, ClassVar

import numpy as np
import torch

from fallow.common.progress import progress
from fallow.models.capture import Calibration
from fallow.models.cuts import cut_taps
from fallow.models.taps import Layer, Tap, attach
from fallow.plan import Cut
from fallow.rules._base import Rule

HIGHEST = 0.95


class Greedy(Rule):
    """Inputs of every projection, with the same sparsity of each block, weighted by parameters.

    arXiv:2408.14690 4.3, Algorithm 1, as its code runs it: from no sparsity, the projection whose
    step costs the block's output least takes it, until the block reaches the target. A step is
    `step` percent of o_proj's inputs and as many weights of any other projection.
    """

    where = "input"
    knob_name = "input sparsity of every block, weighted by parameters"
    knob_range = (0.0, HIGHEST)
    known = "before each projection: saves its columns"
    search_limit = HIGHEST
    options: ClassVar[dict[str, int]] = {"step": 5}
    option_ranges: ClassVar[dict[str, range]] = {"step": range(1, 101)}

    kind: ClassVar[str]  # of its cuts
    highest: ClassVar[float] = 1.0  # sparsity of a projection

    @classmethod
    def value(cls, calibration: Calibration, index: int, projection: str, sparsity: float) -> float:
        """What its cut of a projection of layer `index` says at a sparsity above 0."""
        raise NotImplementedError

    @classmethod
    def weight(cls, layer: Layer, projection: str) -> str | None:
        """That of its cut of a projection."""
        return None

    @classmethod
    def first_cut_token(cls, length: int) -> int:
        """Where in a window the search begins to cut: the code leaves the tokens before dense."""
        raise NotImplementedError

    @classmethod
    def steps(cls, sizes: np.ndarray, o_proj: int) -> np.ndarray:
        """By how much a step raises each projection's sparsity, (P,), from their weights."""
        return cls.options["step"] / 100 * o_proj / sizes

    @classmethod
    def error(cls, output: torch.Tensor, dense: torch.Tensor) -> float:
        """What cuts cost a block, from its outputs (n, T, d_model).

        Each channel's norm over a window's last quarter, and the mean of these, as in the code.
        """
        first = int(0.75 * dense.shape[1])
        return float((output - dense)[:, first:].norm(dim=1).mean())

    @classmethod
    def price(cls, error: float, before: float, weights: float) -> float:
        """By what steps are compared: the error after one; those before and weights are not asked.

        `weights`: share of the block's that the step saves.
        """
        return error

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> list[Cut]:
        layers = calibration.layers
        if cls.name not in calibration.cache:
            calibration.cache[cls.name] = [
                GreedyPath(cls, calibration, i) for i in range(len(layers))
            ]
        paths: list[GreedyPath] = calibration.cache[cls.name]
        found = []
        with progress(f"{cls.name} allocation", len(paths)) as ticker:
            for path in paths:
                found.append(path.at(knob))
                ticker.advance()
        names = tuple(layers[0].projections)
        return [
            Cut(
                name,
                cls.kind,
                [
                    cls.value(calibration, i, name, s) if s > 0 else _NOTHING[cls.kind]
                    for i, s in enumerate(sparsity)
                ],
                cls.weight(layers[0], name),
            )
            for name, sparsity in zip(names, np.transpose(found).tolist(), strict=True)
        ]


_NOTHING = {"threshold": -1.0, "topk": 1.0}  # values of cuts that leave out nothing


class GreedyPath:
    """The greedy allocation of one block, extended as far as it was asked for."""

    def __init__(self, rule: type[Greedy], calibration: Calibration, index: int) -> None:
        self.rule, self.calibration, self.index = rule, calibration, index
        self.layer = calibration.layers[index]
        self.names = tuple(self.layer.projections)
        sizes = np.array([self.layer.projections[n].weight.numel() for n in self.names])
        self.share = sizes / sizes.sum()  # (P,) of the block's weights
        if "o_proj" in self.names:
            o_proj = int(sizes[self.names.index("o_proj")])
        else:  # Qwen3.5's layers have no projection of attention in common: its usual size
            o_proj = self.layer.down_proj.out_features**2
        self.step = rule.steps(sizes, o_proj)
        self.steps = [np.zeros(len(self.names))]
        self.args, self.kwargs = calibration.block_inputs[index]
        self.dense = self.run(self.steps[0])
        self.last_error = 0.0

    def at(self, target: float) -> np.ndarray:
        """Sparsity of each projection, (P,), when the block's is `target`; linear between steps."""
        while self._level(self.steps[-1]) < target and self._extend():
            pass
        levels = [self._level(step) for step in self.steps]
        return np.array(
            [np.interp(target, levels, [s[p] for s in self.steps]) for p in range(len(self.names))]
        )

    def run(self, sparsity: np.ndarray) -> torch.Tensor:
        """The block's output, (n, T, d_model) float32, at the sparsity (P,) of its projections."""
        cuts = [
            Cut(name, self.rule.kind, [self._value(name, s)], self.rule.weight(self.layer, name))
            for name, s in zip(self.names, sparsity.tolist(), strict=True)
            if s > 0
        ]
        taps = cut_taps(cuts, [self.layer], self.calibration.model.name)
        with (
            torch.inference_mode(),
            attach([self.layer], {name: self._spare(tap) for name, tap in taps.items()}),
        ):
            output = self.layer.block(*self.args, **self.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        return output.float()

    def _value(self, name: str, sparsity: float) -> float:
        return self.rule.value(self.calibration, self.index, name, sparsity)

    def _spare(self, tap: Tap) -> Tap:
        """The tap, which leaves the first tokens of each window as they are."""
        n, length = self.dense.shape[:2]
        first = self.rule.first_cut_token(length)

        def apply(index: int, value: torch.Tensor) -> torch.Tensor:
            found: Any = tap(index, value)
            whole, cut = (v.reshape(n, length, -1) for v in (value, found))
            return torch.cat([whole[:, :first], cut[:, first:]], dim=1).reshape(value.shape)

        return apply

    def _level(self, sparsity: np.ndarray) -> float:
        return float(sparsity @ self.share)

    def _extend(self) -> bool:
        best = None
        for p, step in enumerate(self.step):
            step = min(step, self.rule.highest - self.steps[-1][p])
            if step <= 1e-9:
                continue
            trial = self.steps[-1].copy()
            trial[p] += step
            error = self.rule.error(self.run(trial), self.dense)
            price = self.rule.price(error, self.last_error, step * self.share[p])
            if best is None or price < best[0]:
                best = (price, error, trial)
        if best is None:
            return False
        self.last_error = best[1]
        self.steps.append(best[2])
        return True
