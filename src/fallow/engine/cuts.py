"""A plan in the core's terms: what becomes zero, layer by layer."""

from typing import TYPE_CHECKING

import numpy as np

from fallow import _core
from fallow.common.errors import FallowError
from fallow.plan import COLUMN_NORM, FFN_TAPS, ROUTER, Plan
from fallow.plan import Cut as PlanCut

if TYPE_CHECKING:
    from fallow.engine.engine import Engine

# How the core finds a cut's threshold: csrc/engine/cuts.h, Cut::By.
BY = {"threshold": 1, "topk": 2, "tail": 3, "mass": 4}
# The engine's projections that a fused one of the checkpoint stands for.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Cut = tuple[int, int, int, float, np.ndarray | None]
"""Layer, tap (its index in `_core.TAPS`), how, value, weights (width,)."""


def core_cuts(engine: "Engine", plan: Plan) -> list[Cut]:
    """The cuts of a plan for an engine's model, one per layer and tap of the engine.

    Raises:
        FallowError: the plan is for another model, or does not fit it.
    """
    plan.check_model(engine.fingerprint, engine.name)
    found: list[Cut] = []
    for cut in plan.cuts:
        parts = _FUSED.get(cut.tap, (cut.tap,))
        _check_fits(engine, cut, parts)
        for layer in np.flatnonzero(cut.leaves_out).tolist():
            weight = _weight(engine, cut, layer, parts)
            found += [
                (layer, _core.TAPS.index(part), BY[cut.kind], float(cut.value[layer]), weight)
                for part in parts
            ]
    return found


def _check_fits(engine: "Engine", cut: PlanCut, parts: tuple[str, ...]) -> None:
    of_ffn = parts[0] in ("ffn_out", "gate_proj", "up_proj", "down_proj")
    if of_ffn if engine.n_experts else cut.tap == ROUTER:
        kind = "a mixture of experts" if engine.n_experts else "no mixture of experts"
        raise FallowError(f"the plan cuts {cut.tap}, but {engine.name} is {kind}; calibrate again")
    gated = bool(engine.file.get("fallow.gated"))
    if not gated and {"up", "gate_proj"} & {*parts}:
        raise FallowError(
            f"the plan cuts {cut.tap}, which {engine.name} does not have; calibrate again"
        )
    layers = range(engine._core.n_layers)
    names = [f"layers.{layer}.{cut.tap}.weight" for layer in layers]
    if cut.tap in ("k_proj", "v_proj") and not engine.file.tensors.keys() >= {*names}:
        raise FallowError(
            f"the plan cuts {cut.tap}, which some layers of {engine.name} do not have; "
            "calibrate again"
        )
    cut.check_layers([_width(engine, layer, parts[0]) for layer in layers], engine.name)


def _width(engine: "Engine", layer: int, tap: str) -> int:
    """How many values of a token a tap has; of a mixture's neurons those of all experts."""
    return engine._core.width_of(layer, _core.TAPS.index(tap))


def _weight(
    engine: "Engine", cut: PlanCut, layer: int, parts: tuple[str, ...]
) -> np.ndarray | None:
    """What multiplies magnitudes before they are compared, (width,); None: nothing."""
    if isinstance(cut.weight, np.ndarray):
        return np.ascontiguousarray(cut.weight[layer, : _width(engine, layer, parts[0])])
    if cut.weight != COLUMN_NORM:
        return None
    if cut.tap in FFN_TAPS or cut.tap == "down_proj":
        # ||W_down[:, i]|| as the file holds it.
        if f"layers.{layer}.down_norm" not in engine.file.tensors:
            raise FallowError(
                f"the plan weighs {cut.tap} by norms of down_proj, which {engine.path} does not "
                "have of its experts: an earlier fallow packed it; pack it again"
            )
        return np.asarray(engine._core.down_norm(layer), dtype=np.float32)
    squares = np.zeros(_width(engine, layer, parts[0]))
    for part in parts:
        values = engine.matrix(f"layers.{layer}.{part}").dequantize()
        squares += np.square(values).sum(axis=0, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)
