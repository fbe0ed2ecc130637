"""A plan in the core's terms: what becomes zero, layer by layer."""

from typing import TYPE_CHECKING

import numpy as np

from fallow import _core
from fallow.common.errors import FallowError
from fallow.plan import Plan

if TYPE_CHECKING:
    from fallow.engine.engine import Engine

# How the core finds a cut's threshold: csrc/engine/cuts.h, Cut::By.
_THRESHOLD, _TOPK, _TAIL = 1, 2, 3
_RULES = (
    "cats", "cett", "fat", "gate_tail", "gate_topk", "percentile", "relu", "tail", "teal", "topk",
    "two_stage", "wina",
)  # fmt: skip
Cut = tuple[int, int, int, float, np.ndarray | None]
"""Layer, tap (its index in `_core.TAPS`), how, value, weights (width,)."""
# Rules that rank by the norm of a neuron's output.
_BY_OUTPUT_NORM = ("topk", "tail", "cett", "two_stage")
# The engine's projections that a fused one of the checkpoint stands for.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def check_runs(plan: Plan) -> None:
    """Raises FallowError for a plan that the engine cannot run, whatever model it is for."""
    if plan.rule.partition(":")[0] not in _RULES:
        raise FallowError(
            f"the engine cannot run plans of {plan.rule!r}; it runs {', '.join(_RULES)}"
        )
    for name in plan.arrays:
        if name.startswith("threshold."):
            tap = name.removeprefix("threshold.")
            for part in _FUSED.get(tap, (tap,)):
                _tap(part)


def _tap(name: str) -> int:
    if name not in _core.TAPS:
        raise FallowError(f"this plan cuts {name!r}, which the engine cannot; calibrate again")
    return _core.TAPS.index(name)


class PlanCuts:
    """The cuts of a plan for an engine's model."""

    def __init__(self, engine: "Engine", plan: Plan) -> None:
        self.engine, self.plan = engine, plan

    def all(self) -> list[Cut]:
        """All of them.

        Raises:
            FallowError: the plan is for another model, its arrays do not fit, or the engine cannot
                run it.
        """
        self.plan.check_model(self.engine.fingerprint, self.engine.name)
        check_runs(self.plan)
        n_layers = self.engine._core.n_layers
        cuts: list[Cut] = []
        for name, array in sorted(self.plan.arrays.items()):
            if not name.startswith("threshold."):
                continue
            tap = name.removeprefix("threshold.")
            self.check_array(name, array, (n_layers,))
            for part in _FUSED.get(tap, (tap,)):
                for layer, value in enumerate(array):
                    if value > 0 or self.plan.rule == "relu":  # 0 would skip only what is 0 anyway
                        weight = self._weight(layer, part)
                        cuts.append((layer, _tap(part), _THRESHOLD, float(value), weight))
        per_token = {"kept": (_TOPK, lambda v: v < 1), "tau": (_TAIL, lambda v: v > 0)}
        for name, (how, cuts_something) in per_token.items():
            if name not in self.plan.arrays:
                continue
            self.check_array(name, self.plan.arrays[name], (1,))
            value = float(self.plan.arrays[name][0])
            if cuts_something(value):
                for layer in range(n_layers):
                    for tap in self._taps():
                        weight = self._weight(layer, tap)
                        cuts.append((layer, _tap(tap), how, value, weight))
        return cuts

    def check_array(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise FallowError(
                f"this plan's array {name} has the shape {array.shape}, {self.engine.name} needs "
                f"{shape}; calibrate again"
            )

    def _taps(self) -> tuple[str, ...]:
        if self.plan.where == "input":
            gate = ("gate_proj",) if self.engine.file.get("fallow.gated") else ()
            return ("q_proj", "k_proj", "v_proj", "o_proj", *gate, "up_proj", "down_proj")
        return ("gate_act",) if "weight.gate_act" in self.plan.arrays else ("inter",)

    def _weight(self, layer: int, tap: str) -> np.ndarray | None:
        """What multiplies magnitudes before they are compared; None: nothing."""
        if tap == "gate_act" and "weight.gate_act" in self.plan.arrays:
            return self._per_neuron("weight.gate_act", layer)
        if tap == "inter" and self.plan.rule.partition(":")[0] in _BY_OUTPUT_NORM:
            return self._down_norm(layer)
        if self.plan.rule == "wina":
            if not tap.endswith("_proj"):
                raise FallowError(f"this plan of wina cuts {tap!r}, no input; calibrate again")
            return self._column_norms(layer, tap)
        return None

    def _per_neuron(self, name: str, layer: int) -> np.ndarray:
        if name not in self.plan.arrays:
            raise FallowError(f"this plan has no array {name}; calibrate again")
        array = self.plan.arrays[name]
        self.check_array(
            name, array, (self.engine._core.n_layers, self.engine._core.intermediate_size)
        )
        return np.ascontiguousarray(array[layer], dtype=np.float32)

    def _down_norm(self, layer: int) -> np.ndarray:
        """||W_down[:, i]|| as the file holds it, (d_ff,)."""
        return np.asarray(self.engine._core.down_norm(layer), dtype=np.float32)

    def _column_norms(self, layer: int, tap: str) -> np.ndarray:
        """||W[:, j]|| of a projection, or of the fused one that it is a part of, (in,)."""
        if tap == "down_proj":
            return self._down_norm(layer)
        fused = self.engine.file.get("fallow.fused", False)
        parts = next((p for p in _FUSED.values() if fused and tap in p), (tap,))
        squares = 0.0
        for part in parts:
            values = self.engine.matrix(f"layers.{layer}.{part}").dequantize()
            squares = squares + np.square(values).sum(axis=0, dtype=np.float64)
        return np.sqrt(squares).astype(np.float32)

    def shortlist(self) -> tuple[float, int]:
        """Which logits are exact: nats below the coarse head's largest, 0: all; and how many."""
        arrays = [self.plan.arrays.get(name, np.zeros(1)) for name in ("head_margin", "head_limit")]
        for name, array in zip(("head_margin", "head_limit"), arrays, strict=True):
            self.check_array(name, array, (1,))
        return float(arrays[0][0]), int(min(arrays[1][0], 2**31 - 1))
