"""The naturally sparse model that fallow trained, from its weights to the engine."""

from pathlib import Path

import numpy as np
import pytest

import fallow
from fallow.calibration.calibrator import calibrate
from fallow.engine.engine import Engine
from fallow.measure.quality import evaluate_engine
from fallow.plan import Plan
from fallow.reference.model import Model

FOLDER = Path(__file__).parent / "data" / "relu"  # benchmarks/laws.py keep
WINDOWS = {"context": 256, "windows": 2}


@pytest.fixture(scope="module")
def model() -> Model:
    return fallow.load(str(FOLDER))


@pytest.fixture(scope="module")
def plan(model: Model) -> Plan:
    return calibrate(model, "relu", knob=0.0, measure=False, **WINDOWS)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("natural") / "relu.gguf"
    fallow.pack(str(FOLDER), path)
    return path


def test_most_of_its_neurons_are_zero(model: Model) -> None:
    """On text of another kind than it was trained on, too."""
    found = fallow.profile(model, context=256, windows=2).summary
    zeros = [layer["zeros"]["inter"] for layer in found["layers"]]
    assert min(zeros) > 0.5
    assert found["natural_sparsity"] == pytest.approx(np.mean(zeros))
    assert found["natural_sparsity"] > 0.75


def test_leaving_zeros_out_costs_nothing(model: Model, plan: Plan, packed: Path) -> None:
    found = fallow.evaluate(model, plan, **WINDOWS)
    assert found.ppl_change_percent == pytest.approx(0, abs=1e-3)
    assert found.achieved_sparsity > 0.7
    engine = Engine(packed, threads=1)
    on_engine = evaluate_engine(engine, plan, None, **WINDOWS, decode=True)
    # Sums in another order; AVX2 rounds coefficients of 16 rows together, then of other ones.
    most = 0.3 if engine.kernels == "avx2" else 0.05
    assert on_engine.ppl_change_percent == pytest.approx(0, abs=most)
    assert on_engine.ppl == pytest.approx(found.ppl, rel=0.01)
    assert on_engine.achieved_sparsity == pytest.approx(found.achieved_sparsity, abs=0.01)


def test_zeros_are_not_read(plan: Plan, packed: Path) -> None:
    """With no plan, with one that names them, and never with `skip_zeros` off."""
    text, read, sparsity = [], [], []
    for skip, each in ((False, None), (True, None), (False, plan)):
        engine = Engine(packed, each if each else False, threads=1, skip_zeros=skip)
        text.append("".join(engine.generate("It was a dark night and", 40)))
        read.append(engine.stats.bytes_per_token)
        sparsity.append(engine.stats.sparsity)
    assert text[0] == text[1] == text[2]
    assert sparsity[0] == 0
    assert sparsity[1] == pytest.approx(sparsity[2], abs=1e-3)
    assert sparsity[1] > 0.7
    # Of a neuron that is zero neither up_proj nor down_proj is read, two thirds of the FFN.
    assert read[1] == pytest.approx(read[2], rel=1e-3)
    assert read[1] < 0.8 * read[0]
