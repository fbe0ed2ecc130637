"""What tests of the engine share: token ids, runs, plans, and how far it may be off."""

from typing import Any

import numpy as np
import pytest

import fallow
from conftest import VOCABULARY, engine_plan
from fallow import _core
from fallow.calibration.calibrator import Calibrator
from fallow.engine.engine import Engine
from fallow.plan import Cut, Plan

IDS = np.random.default_rng(1).integers(2, VOCABULARY, 100)
# The cache is f16, so keys and values are rounded to 2^-11; of logits up to 8 that leaves this.
ERROR = 0.03


def reference(model: fallow.Model, plan: Plan | None = None) -> np.ndarray:
    with model.sparse(plan):
        return model.logits(model.hidden(IDS[None])[0]).numpy()


def one_by_one(engine: Engine) -> np.ndarray:
    engine.reset()
    return np.concatenate([engine.forward(IDS[i : i + 1]) for i in range(len(IDS))])


def check_a_few(engine: Engine) -> None:
    expected = one_by_one(engine)
    assert _core.FEW == 8
    for sizes in ([8, 2, 3, 4, 5, 6, 7, 1], [9, 8, 8]):
        ends = np.cumsum(sizes)
        engine.reset()
        for part, end in zip(np.split(IDS[: ends[-1]], ends[:-1]), ends, strict=True):
            found = engine.forward(part, every=True)
            if len(part) <= _core.FEW:
                np.testing.assert_array_equal(found, expected[end - len(part) : end])
            else:  # of the same tokens one by one, so that the cache is the same
                engine.reset()
                for token in IDS[:end]:
                    engine.forward([token])


def cutting_plan(engine: Engine) -> Plan:
    if engine.n_experts:
        return engine_plan(engine, Cut("router", "topk", 1 / engine.n_experts))
    width = engine.file.get("fallow.intermediate_size")
    weights = np.ones((engine._core.n_layers, width), dtype=np.float32)
    return engine_plan(engine, Cut("gate_act", "threshold", 0.1, weights))


def make_plan(calibrator: Calibrator, rule: str, sparsity: float) -> Plan:
    if rule == "relu":
        return calibrator.plan(rule, knob=0.0, measure=False)
    return calibrator.plan(rule, sparsity=sparsity, measure=False)


def fails(kind: type[Exception], call: Any) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)
