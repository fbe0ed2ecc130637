"""The predictor before a ReLU's gate: what it lets the engine leave out, and what that costs."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fallow
from conftest import engine_plan, make_folder
from engines import IDS, fails
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.engine import engine as module
from fallow.engine.engine import Engine
from fallow.engine.memory import RESERVE, parts_of, residencies
from fallow.measure.quality import evaluate_engine
from fallow.measure.tasks import ScoredIds, read_engine
from fallow.models.taps import attach
from fallow.packing.coarse_gate import _least_margin
from fallow.packing.coarse_head import decode_rows
from fallow.plan import Cut

FOLDER = Path(__file__).parent / "data" / "relu"
LAYERS, D_FF = 5, 480
PROMPT = "It was a dark night and"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "plain.gguf"
    fallow.pack(FOLDER, path)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "predictor.gguf"
    fallow.pack(FOLDER, path, predictor=0.999)
    return path


def with_bias(packed: Path, path: Path, value: float) -> Path:
    """A copy in which every neuron has this bias."""
    data, file = bytearray(packed.read_bytes()), read_gguf(packed)
    for name, tensor in file.tensors.items():
        if name.endswith("gate_coarse.bias"):
            at, size = tensor.offset, tensor.data.nbytes
            data[at : at + size] = np.full(size // 4, value, dtype=np.float32).tobytes()
    path.write_bytes(data)
    return path


def decoded(engine: Engine, ids: np.ndarray) -> np.ndarray:
    engine.reset()
    engine.reset_stats()
    return np.concatenate([engine.forward(ids[i : i + 1]) for i in range(len(ids))])


def prompt(engine: Engine) -> np.ndarray:
    return engine.windows(fallow.checkpoints.text.load_text(None, "evaluation"), 64, 1)[0]


@pytest.mark.parametrize("threads", [1, 3])
def test_predicting_all_changes_nothing(
    plain: Path, packed: Path, tmp_path: Path, threads: int
) -> None:
    every = Engine(with_bias(packed, tmp_path / "all.gguf", np.inf), threads=threads)
    without = Engine(plain, threads=threads)
    ids = prompt(without)
    np.testing.assert_array_equal(decoded(every, ids), decoded(without, ids))
    np.testing.assert_array_equal(every.predicted_neurons(), 1)
    np.testing.assert_array_equal(without.predicted_neurons(), 0)
    # What it then reads more than without one: the coarse gates.
    read = [e.core_stats()["bytes_read"] / len(ids) for e in (every, without)]
    assert read[0] - read[1] == LAYERS * D_FF * (192 // 4 + 4)


def test_predicting_none_leaves_out_all(packed: Path, tmp_path: Path) -> None:
    engine = Engine(with_bias(packed, tmp_path / "none.gguf", -np.inf), threads=1)
    logits = decoded(engine, prompt(engine))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(engine.idle_neurons(), 1)


def predicted(engine: Engine, layer: int, x: torch.Tensor) -> torch.Tensor:
    """Neurons with coarse rows . x + bias > 0, (T, d_ff) bool."""
    tensors = engine.file.tensors
    bias = tensors[f"layers.{layer}.gate_coarse.bias"].data.view(np.float32)
    rows = tensors[f"layers.{layer}.gate_coarse.codes"].data.reshape(bias.size, -1)
    return x.float() @ decode_rows(rows.view(np.uint8)).T + torch.from_numpy(bias.copy()) > 0


def without_others(
    engine: Engine, model: fallow.Model, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (T, vocab) with these zeros, and the share of neurons that are predicted, (L,)."""
    shares = np.zeros(len(model.layers))
    seen: dict[int, torch.Tensor] = {}

    def leave_out(layer: int, gate: torch.Tensor) -> torch.Tensor:
        some = predicted(engine, layer, seen.pop(layer))
        shares[layer] = float(some.float().mean())
        return torch.where(some, gate, torch.zeros_like(gate))

    taps: dict[str, Any] = {"gate_proj": seen.__setitem__, "gate_pre": leave_out}
    with attach(model.layers, taps):
        logits = model.logits(model.hidden(ids[None])[0]).numpy()
    return logits, shares


def test_it_is_what_numpy_says(packed: Path) -> None:
    engine, model = Engine(packed, threads=1), fallow.load(str(FOLDER), "float32")
    ids = prompt(engine)
    logits, expected = without_others(engine, model, ids)
    found = decoded(engine, ids)
    np.testing.assert_allclose(engine.predicted_neurons(), expected, atol=0.003)
    assert 0.02 < expected.min() < expected.max() < 0.7
    assert np.abs(found - logits).mean() < 0.05 * logits.std()


def test_it_costs_little_and_saves_bytes(plain: Path, packed: Path) -> None:
    engine, without = (Engine(path, threads=1, context=128) for path in (packed, plain))
    price = evaluate_engine(engine, context=128, windows=4, decode=True)
    assert 0 < price.kl_to_dense["mean"] < 0.01
    ids = prompt(engine)
    read = []
    for each in (engine, without):
        decoded(each, ids)
        read.append(each.core_stats()["bytes_read"])
    assert read[0] < 0.95 * read[1]
    active, predicted = 1 - engine.idle_neurons(), engine.predicted_neurons()
    assert (active < predicted).all()
    # Few active neurons are missed, and those are quiet.
    assert (active > 0.9 * (1 - without.idle_neurons())).all()
    assert (predicted < 0.7).all()


def test_in_blocks_and_without_skipping_nothing_is_predicted(plain: Path, packed: Path) -> None:
    ids = prompt(Engine(plain, threads=1))
    whole = [Engine(p, threads=1).forward(ids, every=True) for p in (packed, plain)]
    np.testing.assert_array_equal(*whole)
    off = [decoded(Engine(p, threads=1, skip_zeros=False), ids) for p in (packed, plain)]
    np.testing.assert_array_equal(*off)
    engine = Engine(packed, threads=1)
    engine.reset()
    dense = np.concatenate([engine.forward(ids[i : i + 1], dense=True) for i in range(len(ids))])
    np.testing.assert_array_equal(dense, off[0])


def test_a_few_tokens_are_as_one_by_one(packed: Path) -> None:
    engine = Engine(packed)
    ids = prompt(engine)[:16]
    expected = decoded(engine, ids)
    engine.reset()
    found = [engine.forward(part, every=True) for part in np.split(ids, [8, 11])]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_plans_beside_it(packed: Path) -> None:
    """Fixed thresholds go on; what needs all values of a token needs the whole gate."""
    engine = Engine(packed, threads=1)
    ids = prompt(engine)
    decoded(engine, ids)
    idle = engine.idle_neurons().mean()
    engine.use_plan(engine_plan(engine, Cut("inter", "threshold", 0.05).of_layers(LAYERS)))
    decoded(engine, ids)
    assert engine.idle_neurons().mean() > idle
    assert engine.predicted_neurons().mean() > 0
    engine.use_plan(engine_plan(engine, Cut("inter", "topk", 0.05).of_layers(LAYERS)))
    decoded(engine, ids)
    np.testing.assert_array_equal(engine.predicted_neurons(), 0)


def test_after_a_plan_that_reads_the_whole_gate(packed: Path) -> None:
    """Which lay in tiles for it; then rows are listed again."""
    fresh, engine = (Engine(packed, threads=1) for _ in range(2))
    ids = prompt(engine)
    engine.use_plan(engine_plan(engine, Cut("inter", "topk", 0.05).of_layers(LAYERS)))
    decoded(engine, ids)
    engine.use_plan(None)
    np.testing.assert_array_equal(decoded(engine, ids), decoded(fresh, ids))
    assert engine.predicted_neurons().mean() > 0


def test_under_a_memory_budget(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which this process would take more than this model."""
    monkeypatch.setattr(module, "rss_bytes", lambda: 0)
    file = read_gguf(packed)
    least = min(r.memory for r in residencies(parts_of(file, False), None, None))
    usual = Engine(packed, threads=1, context=64)
    budget = Engine(packed, threads=1, context=64, memory=RESERVE + least)
    ids = prompt(usual)
    np.testing.assert_array_equal(decoded(budget, ids), decoded(usual, ids))
    assert budget.residency is not None
    assert budget.residency.streamed


def test_of_a_model_of_few_positions(tmp_path: Path) -> None:
    folder = make_folder("llama", tmp_path / "m", hidden_act="relu", max_position_embeddings=64)
    fallow.pack(folder, tmp_path / "m.gguf", predictor=0.9, quant="f32")
    engine = Engine(tmp_path / "m.gguf", threads=1)
    decoded(engine, IDS[:48])
    assert engine.predicted_neurons().mean() > 0


def test_tasks_compare_with_every_neuron(packed: Path) -> None:
    """Continuations are few tokens, read as in decode, in which the predictor leaves some out."""
    engine = Engine(packed, threads=1)
    ids = prompt(engine)[:16].astype(np.int32)
    pair = ScoredIds(ids, 4)
    (dense, _), (predicted, _) = (read_engine(engine, [pair], dense)[0] for dense in (True, False))
    ((whole, _),) = read_engine(Engine(packed, threads=1, skip_zeros=False), [pair], False)
    assert dense == whole != predicted


@pytest.mark.parametrize("name", ["bamboo", "sparsellama", "bitnet"])
def test_other_activations(
    name: str, folders: dict[str, Path], tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    """dReLU, FATReLU, and ReLU² with a norm before down_proj, which reads all of a token."""
    plain, predictor = tmp_path / "plain.gguf", tmp_path / "predictor.gguf"
    fallow.pack(folders[name], plain, quant="f32")
    fallow.pack(folders[name], predictor, quant="f32", predictor=0.95)
    without = Engine(plain)
    expected, active = decoded(without, IDS), 1 - without.idle_neurons()
    every = Engine(with_bias(predictor, tmp_path / "all.gguf", np.inf))
    np.testing.assert_allclose(decoded(every, IDS), expected, atol=1e-5)
    np.testing.assert_array_equal(every.predicted_neurons(), 1)
    np.testing.assert_array_equal(every.idle_neurons(), 1 - active)
    engine = Engine(predictor)
    found = decoded(engine, IDS)
    logits, shares = without_others(engine, tiny[name], IDS)
    np.testing.assert_allclose(engine.predicted_neurons(), shares, atol=0.003)
    assert shares.max() < 0.9
    assert np.abs(found - logits).mean() < 0.02 * logits.std()
    assert (1 - engine.idle_neurons() < shares).all()
    # 0.95 of the calibration text's; these are tokens at random, of which it keeps 0.898 or more.
    assert (energy_of_predicted(engine, tiny[name]) > 0.85).all()


def energy_of_predicted(engine: Engine, model: fallow.Model) -> np.ndarray:
    """Their share of all neurons' (inter ||down_proj[:, i]||)^2, (L,)."""
    shares = np.zeros(len(model.layers))
    seen: dict[int, torch.Tensor] = {}

    def add(layer: int, inter: torch.Tensor) -> None:
        energy = (inter * model.layers[layer].down_norm).square()
        some = predicted(engine, layer, seen.pop(layer))
        shares[layer] = float(energy[some].sum() / energy.sum())

    with attach(model.layers, {"gate_proj": seen.__setitem__, "inter": add}):
        model.hidden(IDS[None])
    return shares


def test_fatrelu_takes_its_threshold_off(folders: dict[str, Path], tmp_path: Path) -> None:
    """The bias of a gate whose rows have no error, and so no margin, is minus the threshold."""
    folder = Path(shutil.copytree(folders["sparsellama"], tmp_path / "model"))
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, weight in state.items():
        if name.endswith("gate_proj.weight"):
            state[name] = torch.zeros_like(weight)
    save_file(state, path, {"format": "pt"})
    fallow.pack(folder, tmp_path / "packed.gguf", quant="f32", predictor=0.99)
    bias = read_gguf(tmp_path / "packed.gguf").tensors["layers.0.gate_coarse.bias"]
    np.testing.assert_array_equal(bias.data.view(np.float32), np.float32(-0.02))


def test_margin_by_hand() -> None:
    """Energies 8, 1 and 1 at scores 3, -1 and -2: the first alone has 0.8 of them."""
    parts = [
        (torch.tensor([-2.0, 3.0]), torch.tensor([1.0, 8.0])),
        (torch.tensor([-1.0]), torch.tensor([1.0])),
    ]
    for recall, margin in ((0.5, -3.0), (0.8, -3.0), (0.85, 1.0), (0.9, 1.0), (0.95, 2.0)):
        found = _least_margin(parts, recall)
        assert found == pytest.approx(margin)
        assert found > margin  # a score must be above zero
    assert _least_margin([(torch.empty(0), torch.empty(0))], 0.9) == 0


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "refused.gguf"
    for name in ("llama", "nemotron"):  # another activation, and no gate
        source = folders[name]
        said = fails(FallowError, partial(fallow.pack, source, path, predictor=0.99))
        assert "has no gate that a ReLU follows" in said
    said = fails(UsageError, lambda: fallow.pack(FOLDER, path, predictor=1.0))
    assert said == "--predictor 1.0 is not between 0 and 1, 0.99 say"
    assert not path.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"layers.3.gate_coarse.bias", b"layers.3.gate_coarse.bics", "no tensor layers.3.gate_c"),
        (b"\x04\0\0\0\0\0\0\0relu", b"\x04\0\0\0\0\0\0\0silu", "is for a gate that a ReLU follows"),
    ],
)
def test_damage(packed: Path, tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    data, path = packed.read_bytes(), tmp_path / "damaged.gguf"
    assert old in data  # of relu there are two: the model has that name
    path.write_bytes(data.replace(old, new))
    assert message in fails(FallowError, lambda: Engine(path, threads=1))
