"""The reference path off the CPU: torch's own operations against the core's.

Every path runs twice: with CPU tensors that take the way of another device's, which needs no GPU,
and on a GPU if there is one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import NEURON_RULES, OTHER_TEXT, TEXT, WITH_RELU
from fallow import _core, cli
from fallow.calibration.calibrator import Calibrator
from fallow.calibration.tradeoff import make_rows, tradeoff
from fallow.checkpoints.text import Text
from fallow.common.errors import FallowError, UsageError
from fallow.measure.evaluation import run_window, window_losses
from fallow.models import cuts, devices
from fallow.models.capture import Histograms
from fallow.patterns.collect import collect
from fallow.patterns.store import unpack_bits
from fallow.reporting.neurons import examine
from fallow.selectors import SELECTORS

RNG = np.random.default_rng(11)
CONTEXT, WINDOWS = 32, 3
FIT, JUDGE = Text("fit", TEXT), Text("judge", OTHER_TEXT)
SIZES: dict[str, Any] = {"context": CONTEXT, "windows": WINDOWS}
LOSERS = (
    "fallow.research.ahead:Ahead", "fallow.research.blend:Blend:rank=8",
    "fallow.research.compensation:Gate:compensation=4", "fallow.research.gate_bucket:GateBucket",
    "fallow.research.lowrank:LowRank:rank=8", "fallow.research.previous:Previous",
)  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

Take = Callable[[str], fallow.Model]
"""A tiny model of an architecture, to be run away from the core."""


@pytest.fixture
def off_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of those on another device."""
    monkeypatch.setattr(devices, "on_cpu", lambda _: False)


@pytest.fixture(params=["torch", pytest.param("cuda", marks=needs_gpu)])
def take(
    request: pytest.FixtureRequest, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Take:
    """To be called when the core has done its part: from then on CPU tensors go torch's way."""

    def take(name: str) -> fallow.Model:
        if request.param == "torch":
            monkeypatch.setattr(devices, "on_cpu", lambda _: False)
            return fallow.load(folders[name])
        return fallow.load(folders[name], device="cuda")

    return take


def scores(rows: int, width: int) -> list[torch.Tensor]:
    """Distinct scores, many ties, some rows of zeros."""
    ties = RNG.integers(0, max(2, width // 2), (rows, width)).astype(np.float32) / 8
    ties[0] = 0
    plain = np.abs(RNG.standard_normal((rows, width))).astype(np.float32)
    return [torch.from_numpy(plain), torch.from_numpy(ties), torch.from_numpy(plain * (ties > 1))]


@pytest.mark.parametrize("width", [1, 7, 8, 9, 333, 1537])
@pytest.mark.parametrize("kept", [0.0, 0.003, 0.5, 0.99, 1.0])
def test_topk_in_torch_is_the_cores(width: int, kept: float) -> None:
    for score in scores(6, width):
        expected = cuts.per_token_topk(score, kept)
        assert torch.equal(cuts._topk_in_torch(score, round(kept * width)), expected)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 333, 1537])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_tail_in_torch_is_the_cores(width: int, tau: float) -> None:
    for score in scores(6, width):
        assert torch.equal(cuts._tail_in_torch(score, tau**2, 2), cuts.per_token_tail(score, tau))
        assert torch.equal(cuts._tail_in_torch(score, tau, 1), cuts.per_token_mass(score, tau))


def test_tiny_scores_have_a_tail_of_their_own() -> None:
    score = torch.tensor([[1e-45, 1e-45, 3e-45], [1e-30, 1e38, 0.0], [0.0, 0.0, 0.0]])
    for tau in (0.0, 0.5, 0.8, 1.0):
        assert torch.equal(cuts._tail_in_torch(score, tau**2, 2), cuts.per_token_tail(score, tau))
        assert torch.equal(cuts._tail_in_torch(score, tau, 1), cuts.per_token_mass(score, tau))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_stay_whole(off_cpu: None, bad: float) -> None:
    score = torch.tensor([[1.0, bad, 2.0], [1.0, 3.0, 2.0]])
    for kept in (0.0, 1 / 3, 1.0):
        assert cuts.per_token_topk(score, kept).isnan().flatten().tolist() == [True, False]
    for threshold_of in (cuts.per_token_tail, cuts.per_token_mass):
        assert threshold_of(score, 0.5).isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("way", ["core", "torch"])
def test_what_is_cut_is_a_constant_for_a_gradient(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "on_cpu", lambda _: way == "core")
    value = torch.randn(5, 31, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.rand(31, requires_grad=True)
    for threshold_of in (cuts.per_token_topk, cuts.per_token_tail, cuts.per_token_mass):
        score = value.abs() * weight
        threshold = threshold_of(score, 0.4)
        assert not threshold.requires_grad
        kept = cuts.zero_where(score <= threshold, value)
        (found,) = torch.autograd.grad(kept.sum(), value)
        assert torch.equal(found, (kept != 0).float())
        assert 0 < float(found.sum()) < 5 * 31


def test_histograms_in_torch_are_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.from_numpy(RNG.standard_t(2, (40, 333)).astype(np.float32))
    value[0, :8] = torch.tensor([0.0, -0.0, 1e-45, 1e-30, -1e30, 2.0**32, 2.0**-64, 1.0])
    expected, found = Histograms("x", 2), Histograms("x", 2)
    for part in (value, value.bfloat16()):
        expected.add(1, part)
    monkeypatch.setattr(devices, "on_cpu", lambda _: False)
    for part in (value, value.bfloat16()):
        found.add(1, part)
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.zeros, expected.zeros)
    assert found.counts.sum() == 2 * value.numel()
    found.add(0, value)  # after they were read
    np.testing.assert_array_equal(found.counts[1], expected.counts[1])
    assert found.counts[0].sum() == value.numel()
    assert found.counts.shape == (2, _core.HISTOGRAM_BINS)
    with pytest.raises(FallowError, match="2 NaN or infinite values in x of layer 1"):
        found.add(1, torch.tensor([[torch.nan, 1.0, -torch.inf]]))


@pytest.mark.parametrize("rule", NEURON_RULES)
@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_calibrate_and_evaluate(
    name: str, rule: str, tiny: dict[str, fallow.Model], take: Take
) -> None:
    target = {"knob": 0.0} if rule == "relu" else {"sparsity": 0.5}
    plans, found = [], []
    for model in (tiny[name], None):
        model = take(name) if model is None else model
        plans.append(fallow.calibrate(model, rule, text=FIT, **SIZES, **target))
        found.append(fallow.evaluate(model, plans[-1], JUDGE, **SIZES))
    for one, other in zip(*(plan.cuts for plan in plans), strict=True):
        assert (one.tap, one.kind) == (other.tap, other.kind)
        np.testing.assert_allclose(one.value, other.value, rtol=2e-3, atol=1e-5)
    expected, result = found
    assert result.ppl == pytest.approx(expected.ppl, rel=2e-3)
    assert result.kl_to_dense["mean"] == pytest.approx(
        expected.kl_to_dense["mean"], rel=2e-2, abs=1e-5
    )
    assert result.top1_agreement == pytest.approx(expected.top1_agreement, abs=0.02)
    assert result.achieved_sparsity == pytest.approx(expected.achieved_sparsity, abs=5e-3)
    if name in WITH_RELU or rule != "relu":
        assert result.achieved_sparsity > 0.3


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_profile(name: str, tiny: dict[str, fallow.Model], take: Take) -> None:
    expected = fallow.profile(tiny[name], JUDGE, **SIZES)
    found = fallow.profile(take(name), JUDGE, **SIZES)
    for key, array in expected.arrays.items():
        if key.startswith("magnitude."):  # a value at a bin's edge may lie on its other side
            assert found.arrays[key].sum() == array.sum()
        elif key.startswith("weight."):
            np.testing.assert_array_equal(found.arrays[key], array)
        else:
            np.testing.assert_allclose(found.arrays[key], array, atol=0.011, err_msg=key)
    assert found.summary["natural_sparsity"] == pytest.approx(expected.summary["natural_sparsity"])


@pytest.mark.parametrize("selector", [*SELECTORS, "lowbit:rank=4", *LOSERS])
def test_selectors(selector: str, tiny: dict[str, fallow.Model], take: Take) -> None:
    if selector == "cluster":
        selector = "cluster:k=4"
    found = []
    for model in (tiny["llama"], None):
        model = take("llama") if model is None else model
        calibrator = Calibrator(model, FIT, **SIZES, validation_windows=1)
        fitted = calibrator.applied(calibrator.fit(selector, sparsity=0.5))
        _, (result,) = run_window(model, calibrator.validation[0], [fitted])
        found.append(result)
    assert found[1].loss == pytest.approx(found[0].loss, rel=1e-2)
    assert found[1].recall == pytest.approx(found[0].recall, abs=0.02)
    assert found[1].energy_recall == pytest.approx(found[0].energy_recall, abs=0.02)
    assert found[1].achieved_sparsity == pytest.approx(found[0].achieved_sparsity, abs=1e-2)


def test_tradeoff(tiny: dict[str, fallow.Model], take: Take, tmp_path: Path) -> None:
    rows = make_rows(["topk", "cett"], [0.3, 0.6], [2.0])
    sizes = SIZES | {"calibration_windows": 3, "validation_windows": 2}
    tables = [
        tradeoff(model or take("llama"), rows, tmp_path / str(i), text=JUDGE,
                 calibration_text=FIT, **sizes)
        for i, model in enumerate((tiny["llama"], None))
    ]  # fmt: skip
    for expected, found in zip(*tables, strict=True):
        assert found["ppl"] == pytest.approx(expected["ppl"], rel=5e-3)
        if "kl_to_dense" in expected:  # not in the dense row
            assert found["kl_to_dense"] == pytest.approx(
                expected["kl_to_dense"], rel=5e-2, abs=1e-5
            )


def test_patterns_and_neurons(tiny: dict[str, fallow.Model], take: Take, tmp_path: Path) -> None:
    plan = fallow.calibrate(tiny["llama"], "topk", sparsity=0.5, text=FIT, **SIZES)
    expected = collect(tiny["llama"], plan, tmp_path / "core", JUDGE, magnitudes=True, **SIZES)
    neuron = examine(tiny["llama"], [(1, 3)], [JUDGE], **SIZES)[0]
    model = take("llama")
    found = collect(model, plan, tmp_path / "other", JUDGE, magnitudes=True, **SIZES)
    for layer in range(2):
        one, other = (unpack_bits(store.rows(layer), 37) for store in (expected, found))
        assert (one != other).mean() < 0.01
        np.testing.assert_allclose(found.magnitudes(layer), expected.magnitudes(layer), atol=2e-3)
    again = examine(model, [(1, 3)], [JUDGE], **SIZES)[0]
    assert again.rates[0].top_half == pytest.approx(neuron.rates[0].top_half, abs=0.02)
    assert again.snippets[0].peak == neuron.snippets[0].peak
    assert again.raised[0].token == neuron.raised[0].token


def test_losses_generation_and_tasks(
    tiny: dict[str, fallow.Model], take: Take, tmp_path: Path
) -> None:
    from fallow.measure.tasks import evaluate_task

    task = tmp_path / "task.jsonl"
    task.write_text('{"query": "neuron 3", "choices": ["rests", "works"], "gold": 0}\n')
    windows = tiny["llama"].windows(JUDGE, CONTEXT, WINDOWS)
    expected = window_losses(tiny["llama"], windows, None)
    text = list(tiny["llama"].generate("neuron 3", 8))
    scored = evaluate_task(tiny["llama"], None, task)
    model = take("llama")
    np.testing.assert_allclose(window_losses(model, windows, None), expected, rtol=1e-5)
    assert list(model.generate("neuron 3", 8)) == text
    assert evaluate_task(model, None, task)["accuracy"] == scored["accuracy"]


class _SmallMemory:
    """Logits of as many tokens as fit."""

    def __init__(self, model: fallow.Model, fitting: int) -> None:
        self.logits, self.fitting, self.asked = model.logits, fitting, 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        if len(hidden) > self.fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.logits(hidden)


@pytest.mark.parametrize("in_torch", [False, True])
def test_parts_are_halved_until_they_fit(
    in_torch: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "on_cpu", lambda _: not in_torch)
    model = fallow.load(copy)
    window = model.windows(JUDGE, CONTEXT, 1)[0]
    expected, (plain,) = run_window(model, window, [None])
    small = _SmallMemory(model, 5)
    monkeypatch.setattr(model, "logits", small)
    found, (other,) = run_window(model, window, [None])
    assert small.asked > 8
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    np.testing.assert_allclose(other.kl, plain.kl, atol=1e-7)
    small.fitting = 0
    with pytest.raises(FallowError, match="--device cpu"):
        run_window(model, window, [None])


def test_what_does_not_fit_says_the_remedy(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = fallow.load(copy)
    remedy = "smaller --context, --dtype bfloat16, or --device cpu"
    with monkeypatch.context() as patched:
        patched.setattr(model.module.model, "forward", full)
        with pytest.raises(FallowError, match=remedy):
            model.hidden(np.zeros((1, 4), dtype=np.int64))
    monkeypatch.setattr(model.module, "to", full)
    with pytest.raises(FallowError, match=remedy):
        model.to("cpu")


def test_devices_have_names(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.device_named("auto") == devices.device_named("cpu") == "cpu"
    with pytest.raises(UsageError, match="finds no GPU here; give --device cpu"):
        fallow.load(folders["llama"], device="cuda")
    with pytest.raises(UsageError, match="unknown device 'gpu'; known: auto, cpu, cuda"):
        fallow.load(folders["llama"], device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [devices.device_named(name) for name in devices.DEVICES] == ["cuda", "cpu", "cuda"]


def test_commands_take_a_device(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fallow", "profile", str(folders["llama"]), "--device", "tpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "unknown device 'tpu'" in capsys.readouterr().err


@needs_gpu
def test_a_model_goes_to_the_gpu_and_back(folders: dict[str, Path]) -> None:
    model = fallow.load(folders["llama"], device="auto")
    assert model.device.type == model.layers[0].device.type == "cuda"
    assert model.layers[0].down_norm.is_cuda
    assert model.dtype == torch.float32
    assert model.to("cpu").layers[0].down_norm.is_cpu


@needs_gpu
def test_pack_and_optimize_read_a_model_on_the_gpu(
    tmp_path: Path, texts: tuple[Path, Path]
) -> None:
    from conftest import make_folder

    folder = make_folder("llama", tmp_path / "model", hidden_size=32, intermediate_size=64)
    fallow.pack(fallow.load(folder, "float32", "cuda"), tmp_path / "gpu.gguf", shortlist=True)
    found = fallow.optimize(
        folder, tmp_path / "out.gguf", max_ppl_increase=20.0, calibration_text=texts[0],
        text=texts[1], context=32, windows=2, validation_windows=2, check_windows=2, threads=1,
        device="cuda",
    )  # fmt: skip
    assert found.ppl_change_percent < 25
