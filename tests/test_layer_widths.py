"""Layers with different numbers of neurons, as Gemma 4 E2B has them: 37 and 74 here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import NEURON_RULES, engine_plan, make_folder
from engines import IDS, check_a_few, fails, one_by_one, reference
from fallow.adaptation.adapter import AdaptSettings, adapt
from fallow.calibration.calibrator import Calibrator
from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError, UsageError
from fallow.engine.engine import Engine
from fallow.engine.stats import Activity
from fallow.models.taps import attach
from fallow.packing.ffn_file import pack_ffns
from fallow.patterns.collect import collect
from fallow.plan import Cut, Plan
from fallow.reporting.neurons import check_place
from test_models import message, write_gguf

WIDTHS = [37, 37, 74, 74]  # the last two layers have the keys and values of others
Texts = tuple[Path, Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("gemma4", tmp_path_factory.mktemp("widths"), use_double_wide_mlp=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> fallow.Model:
    return fallow.load(folder)


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    path = folder / "packed.gguf"
    fallow.pack(folder, path, quant="f32")
    return path


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() < 0.01 * np.ptp(expected)


def test_what_the_model_is(model: fallow.Model, packed: Path) -> None:
    assert [block.mlp.gate_proj.out_features for block in model.module.model.layers] == WIDTHS
    assert model.intermediate_sizes == WIDTHS
    assert "4 layers of 37 or 74 neurons" in repr(model)
    engine = Engine(packed)
    assert engine.file.get("fallow.intermediate_size") == 74
    assert engine.file.numbers("fallow.layer_intermediate_size") == WIDTHS
    assert engine.neurons == WIDTHS


def test_the_engine_equals_transformers(model: fallow.Model, packed: Path) -> None:
    engine, expected = Engine(packed, plan=False), reference(model)
    assert_close(engine.logits(IDS), expected)
    engine.reset()
    assert_close(np.concatenate([engine.forward([i]) for i in IDS]), expected)
    check_a_few(engine)


def test_gguf(model: fallow.Model, tmp_path: Path) -> None:
    path = write_gguf("gemma4", model, tmp_path / "m.gguf")
    assert torch.equal(fallow.load(path).hidden(IDS[None]), model.hidden(IDS[None]))
    fallow.pack(path, tmp_path / "packed.gguf")
    assert_close(Engine(tmp_path / "packed.gguf").logits(IDS), reference(model))
    said = fails(FallowError, lambda: pack_ffns(path, tmp_path / "f.gguf"))
    assert "has FFNs of several sizes, which the plugin runs dense" in said


@pytest.mark.parametrize("wrong", [[37, 74, 37, 74], [37, 37, 111, 111], [37, 74, 74]])
def test_gguf_with_other_widths(wrong: list[int], model: fallow.Model, tmp_path: Path) -> None:
    path = write_gguf("gemma4", model, tmp_path / "m.gguf", widths=wrong)
    assert f"gemma4.feed_forward_length is {wrong}; the layers that have" in message(path)


def test_rounded_with_outlier_neurons(tmp_path: Path) -> None:
    """The engine computes what transformers does with the weights that are in the file."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "use_double_wide_mlp": True}
    folder = make_folder("gemma4", tmp_path / "m", **sizes)
    fallow.pack(folder, tmp_path / "packed.gguf", quant="f32", down="q8_0")
    engine, model = Engine(tmp_path / "packed.gguf", plan=False), fallow.load(folder)
    outliers = np.reshape(engine.file.get("fallow.outliers"), (4, 8))
    assert (outliers < np.array([96, 96, 192, 192])[:, None]).all()
    for i, layer in enumerate(model.layers):
        stored = engine.matrix(f"layers.{i}.down_proj_t").dequantize().copy()
        assert not stored[outliers[i]].any()
        stored[outliers[i]] = engine.matrix(f"layers.{i}.outliers").dequantize()
        layer.down_proj.weight.copy_(torch.from_numpy(stored.T.copy()))
    expected = reference(model)
    assert_close(engine.logits(IDS), expected)
    assert_close(one_by_one(engine), expected)
    content, key = (tmp_path / "packed.gguf").read_bytes(), b"fallow.outliers"
    at = content.index(key) + len(key) + 16  # behind the array's types and length
    (tmp_path / "m.gguf").write_bytes(content[:at] + bytes([150, 0, 0, 0]) + content[at + 4 :])
    said = fails(FallowError, lambda: Engine(tmp_path / "m.gguf"))
    assert "fallow.outliers names neurons that layer 0 does not have" in said


def test_a_plan_by_gates(model: fallow.Model, packed: Path, texts: Texts) -> None:
    """Weights are of each layer's own neurons, and as many of each are left out as were asked."""
    calibrator = Calibrator(model, texts[0], context=32, windows=4)
    plan = calibrator.plan("gate_topk", sparsity=0.4, measure=False)
    (cut,) = plan.cuts
    assert cut.weight.shape == (4, 74)
    up: list[list[np.ndarray]] = [[] for _ in WIDTHS]
    windows = calibrator.calibration.windows
    with attach(model.layers, {"up": lambda i, v: up[i].append(v.abs().numpy())}):
        model.hidden(windows)
    for i, width in enumerate(WIDTHS):
        expected = np.concatenate(up[i]).mean(axis=0) * model.layers[i].down_norm.numpy()
        np.testing.assert_allclose(cut.weight[i, :width], expected, rtol=1e-4)
        assert (cut.weight[i, width:] == 0).all()
    engine = Engine(packed)
    engine.use_plan(plan)
    errors = np.abs(one_by_one(engine) - (expected := reference(model, plan))).max(axis=1)
    # But for tokens with a near-tie, which the engine's cache of float16 may break otherwise.
    assert (errors < 0.01 * np.ptp(expected)).mean() > 0.9
    left = np.array([round(0.6 * width) for width in WIDTHS])
    engine.reset()
    engine.reset_stats()
    for token in IDS[:5]:
        engine.forward([token], record=True)
        neurons = engine.active_neurons()
        assert neurons.shape == (1, 4, 74)
        np.testing.assert_array_equal(neurons[0].sum(axis=1), left)
        assert not neurons[0, :2, 37:].any()
    np.testing.assert_allclose(engine.idle_neurons(), 1 - left / WIDTHS, atol=1e-6)
    seen = fallow.evaluate(model, plan, texts[1], context=24, windows=2)
    assert seen.achieved_sparsity == pytest.approx((1 - left / WIDTHS).mean(), abs=1e-3)
    assert Plan.from_bytes(plan.to_bytes(), "p").cuts[0].weight.tolist() == cut.weight.tolist()


@pytest.mark.parametrize("kind", ["threshold", "topk", "tail", "mass"])
def test_plans_in_the_engine(kind: str, model: fallow.Model, packed: Path) -> None:
    engine = Engine(packed, plan=False)
    dense = one_by_one(engine)
    for tap, weight in (("inter", "column_norm"), ("down_proj", None), ("gate_act", None)):
        value = 0.2 if kind == "threshold" else 0.4
        plan = engine_plan(engine, Cut(tap, kind, value, weight))
        engine.use_plan(plan)
        own = Plan(model.name, model.fingerprint, "by hand", 0.0, "", plan.cuts)
        found, expected = one_by_one(engine), reference(model, own)
        assert np.median(np.abs(found - expected)) < 0.001 * np.ptp(expected)
        assert np.abs(found - dense).max() > 0.01 * np.ptp(expected)


def test_what_is_recorded_of_a_token(packed: Path) -> None:
    """A narrow layer's ranges are of its own neurons."""
    engine = Engine(packed, plan=False)
    engine.forward(IDS[:3], record=True)
    for neurons in engine.active_neurons():
        found = Activity.of(neurons, engine.neurons, None)
        assert (found.active == 1).all()
        assert found.bins.shape == (4, 37)
        assert (found.bins == 1).all()


@pytest.mark.parametrize("rule", NEURON_RULES)
def test_every_rule(rule: str, model: fallow.Model, packed: Path, texts: Texts) -> None:
    given: dict[str, Any] = {"knob": 0.0} if rule == "relu" else {"sparsity": 0.4}
    plan = fallow.calibrate(
        model, rule, text=texts[0], context=32, windows=2, validation_windows=2, **given
    )
    engine = Engine(packed)
    engine.use_plan(plan)
    found, expected = one_by_one(engine), reference(model, plan)
    assert np.median(np.abs(found - expected)) < 0.001 * np.ptp(expected)


def test_profile(model: fallow.Model, texts: Texts) -> None:
    found = fallow.profile(model, texts[1], context=32, windows=2)
    windows = model.windows(load_text(texts[1], "evaluation"), 32, 2)
    small: list[list[float]] = [[] for _ in WIDTHS]
    with attach(
        model.layers,
        {"inter": lambda i, v: small[i].append(float((v.abs() <= 0.01).float().mean()))},
    ):
        model.hidden(windows)
    assert "in 4 layers of 37 or 74 neurons" in repr(found)
    fired = found.arrays["firing_frequency"]
    for row, frequency, (share,), width in zip(
        found.summary["layers"], fired, small, WIDTHS, strict=True
    ):
        assert row["neurons"] == width
        assert row["dead_neurons"] == 0
        assert (frequency[:width] > 0.9).all()
        assert np.isnan(frequency[width:]).all()
        assert row["inter_at_most"]["0.01"] == pytest.approx(share, abs=1e-6)


def test_neurons_of_a_wide_layer(model: fallow.Model) -> None:
    check_place(model, 2, 73)
    for layer, neuron in ((2, 74), (0, 37)):
        said = fails(UsageError, lambda at=(layer, neuron): check_place(model, *at))
        assert f"--neuron {neuron} is outside 0..{neuron - 1}" in said


def test_what_is_refused(model: fallow.Model, packed: Path, texts: Texts, tmp_path: Path) -> None:
    """Weights of other widths, and what is for layers with as many neurons alone."""
    engine = Engine(packed, plan=False)
    narrow = Cut("inter", "topk", 0.5, np.ones((4, 37), dtype=np.float32))
    said = fails(FallowError, lambda: engine.use_plan(engine_plan(engine, narrow)))
    assert "inter has the shape (4, 37), " in said
    assert "needs (4, 74)" in said
    plan = fallow.calibrate(model, "topk", sparsity=0.4, text=texts[0], context=32, windows=2)
    calls: list[Callable[[], Any]] = [
        lambda: collect(model, plan, tmp_path / "p", texts[1], context=24, windows=2),
        lambda: Calibrator(model, texts[0], context=32, windows=2).fit("gate", sparsity=0.5),
    ]
    for call in calls:
        assert "layers have 37 and 74 neurons, and patterns and" in fails(FallowError, call)


@pytest.mark.parametrize("act", ["relu", "drelu"])
def test_adaptation(
    act: str, folder: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another activation, of the inputs of layers too, from the config alone; and zeros skipped."""
    monkeypatch.setattr("fallow.adaptation.texts.HELD_OUT", 4)
    settings = AdaptSettings(
        tokens=4096, context=32, batch=8, learning_rate=3e-4, budgets="even",
        rule="relu", sparsity=0.0, activation=act,
    )  # fmt: skip
    adapt(folder, tmp_path / "taught", settings, text=[texts[0]])
    model = fallow.load(tmp_path / "taught", "float32")
    assert model.module.config.hidden_activation == act
    values = torch.linspace(-2, 2, 9)
    for block in model.module.model.layers:
        for module in (block.act_fn, block.mlp.act_fn):
            assert torch.equal(module(values), values.relu())
    fallow.pack(tmp_path / "taught", tmp_path / "packed.gguf", quant="f32")
    engine = Engine(tmp_path / "packed.gguf")
    expected = reference(model)
    assert_close(engine.logits(IDS), expected)
    engine.reset_stats()
    assert_close(one_by_one(engine), expected)
    zeros: list[list[float]] = [[] for _ in WIDTHS]
    with attach(
        model.layers, {"inter": lambda i, v: zeros[i].append(float((v == 0).float().mean()))}
    ):
        model.hidden(IDS[None])
    np.testing.assert_allclose(engine.idle_neurons(), np.mean(zeros, axis=1), atol=0.01)


def test_rules_that_weigh_inputs(
    folder: Path, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of o_proj's and down_proj's columns, of which layers have different numbers."""
    monkeypatch.setattr("fallow.adaptation.texts.HELD_OUT", 4)
    settings = AdaptSettings(
        tokens=4096, context=32, batch=8, learning_rate=3e-4, rule="wina_uniform"
    )
    report = adapt(folder, tmp_path / "taught", settings, text=[texts[0]])
    assert report.best.kl < report.checks[0].kl


def test_damaged_files(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    key = b"fallow.layer_intermediate_size"
    at = content.index(key) + len(key) + 16  # behind the kinds of the array and its values, and n

    def said(width: int, index: int) -> str:
        place = at + 4 * index
        assert int.from_bytes(content[place : place + 4], "little") == WIDTHS[index]
        changed = content[:place] + width.to_bytes(4, "little") + content[place + 4 :]
        (tmp_path / "m.gguf").write_bytes(changed)
        return fails(FallowError, lambda: Engine(tmp_path / "m.gguf"))

    assert "fallow.layer_intermediate_size must not be 0" in said(0, 1)
    assert "must be an unsigned integer from 0 to 74" in said(75, 3)
    assert "gate_proj.weight has the shape (37, 24), expected (36, 24)" in said(36, 0)
