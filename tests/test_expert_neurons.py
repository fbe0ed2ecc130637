"""Neurons inside the experts of a mixture: taps, rules, the engine, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import EXPERTS, engine_plan, make_folder
from engines import ERROR, IDS, check_a_few, fails, one_by_one, reference
from fallow.calibration.calibrator import Calibrator
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.engine.memory import RESERVE, experts_of, parts_of, residencies
from fallow.measure.quality import evaluate_engine
from fallow.models.capture import Calibration
from fallow.models.taps import Experts, attach
from fallow.packing.packer import pack
from fallow.plan import NEURON_TAPS, Cut, Plan
from fallow.rules.cett import CettSearch
from test_engine_plans import f16_cache

RULES = ("act_topk", "cats", "cett", "fat", "gate_tail", "gate_topk", "tail", "topk", "topp")
BOTH = ("mixtral", "qwen3_moe")


def mixture(model: fallow.Model, layer: int = 0) -> Experts:
    found = model.layers[layer].experts
    assert found is not None
    return found


def formulas(experts: Experts, x: np.ndarray, expert: int, config: Any) -> dict[str, np.ndarray]:
    """The values at the taps of one expert for x (T, d_model), by numpy."""

    def product(name: str) -> np.ndarray:
        weight = getattr(experts, name)[expert].double().numpy()
        bias = experts.biases[name][expert].double().numpy() if experts.biases else 0.0
        return np.asarray(x @ weight.T + bias)

    gate, up = product("gate_proj"), product("up_proj")
    if experts.biases:  # GPT-OSS
        alpha, limit = 1.702, 7.0
        act = np.minimum(gate, limit) / (1 + np.exp(-alpha * np.minimum(gate, limit)))
        up = np.clip(up, -limit, limit) + 1
    else:
        act = gate / (1 + np.exp(-gate))
    return {"gate_pre": gate, "gate_act": act, "up": up, "inter": act * up}


@pytest.mark.parametrize("name", EXPERTS)
def test_taps_against_numpy(name: str, tiny: dict[str, fallow.Model]) -> None:
    """Each token of each expert that it uses, one expert after the other."""
    model, seen, inputs = tiny[name], dict[str, list[Any]](), list[Any]()
    experts = mixture(model)

    def keep(tap: str) -> Any:
        def add(layer: int, value: torch.Tensor) -> None:
            if layer == 0:
                seen.setdefault(tap, []).append((experts.current, value.double().numpy()))

        return add

    handle = experts.module.register_forward_pre_hook(lambda _, args: inputs.append(args))
    dense = model.hidden(IDS[None])
    with attach(model.layers, {tap: keep(tap) for tap in NEURON_TAPS}):
        assert torch.equal(model.hidden(IDS[None]), dense)
    handle.remove()
    assert "forward" not in vars(experts.module)
    x, chosen = inputs[0][0].double().numpy(), inputs[0][1].numpy()
    assert [expert for expert, _ in seen["up"]] == sorted(set(chosen.flatten().tolist()))
    for tap, values in seen.items():
        for expert, value in values:
            tokens = np.nonzero(np.equal(chosen.T, expert))[1]
            expected = formulas(experts, x[tokens], expert, model.module.config)[tap]
            np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("tap", NEURON_TAPS)
def test_values_that_stay_what_they_are_change_no_bit(
    name: str, tap: str, tiny: dict[str, fallow.Model]
) -> None:
    model = tiny[name]
    dense = model.hidden(IDS[None])
    with attach(model.layers, {tap: lambda _, value: value.clone()}):
        assert torch.equal(model.hidden(IDS[None]), dense)


@pytest.mark.parametrize("name", EXPERTS)
def test_an_experts_weights_are_its_own(
    name: str, folders: dict[str, Path], tiny: dict[str, fallow.Model]
) -> None:
    """Neurons that a plan never keeps are those of a model whose down_proj has zeros there."""
    other = fallow.load(folders[name])
    experts = mixture(other)
    shape = len(other.layers), experts.count, experts.d_ff
    kept = np.random.default_rng(0).random(shape) < 0.5
    for index in range(len(other.layers)):
        mask = torch.from_numpy(kept[index, :, None, :])
        mixture(other, index).down_proj.mul_(mask)
    weight = np.where(kept, np.float32(1e30), 0).reshape(len(kept), -1)
    plan = Plan(
        name, tiny[name].fingerprint, "by hand", 0, "",
        (Cut("inter", "threshold", np.zeros(len(kept)), weight),),
    )  # fmt: skip
    np.testing.assert_allclose(reference(tiny[name], plan), reference(other), atol=1e-4)
    assert np.abs(reference(other) - reference(tiny[name])).max() > 10 * ERROR


# Rules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, "two_stage"])
@pytest.mark.parametrize("name", BOTH)
def test_rules_reach_a_sparsity(name: str, rule: str, calibrators: dict[str, Calibrator]) -> None:
    """Of the neurons of the experts that a token uses."""
    plan = calibrators[name].plan(rule, sparsity=0.5)
    assert plan.achieved_sparsity == pytest.approx(0.5, abs=0.08)
    assert plan.where == "inter"
    dense = calibrators[name].plan(rule, sparsity=0.0)
    assert dense.achieved_ppl_increase == 0
    again = Plan.from_bytes(plan.to_bytes(), "here")
    assert {k: v.shape for k, v in again.arrays.items()} == {
        k: v.shape for k, v in plan.arrays.items()
    }


@pytest.mark.parametrize("name", BOTH)
def test_gate_topk_keeps_the_best_of_each_expert(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model, calibrator = tiny[name], calibrators[name]
    plan = calibrator.plan("gate_topk", knob=0.3, measure=False)
    experts = mixture(model)
    weights = plan.arrays["gate_act.weight"].reshape(2, experts.count, experts.d_ff)
    norms = np.linalg.norm(experts.down_proj.double().numpy(), axis=1)
    mean_up = mean_up_of(model, calibrator.calibration.windows)
    np.testing.assert_allclose(weights[0], mean_up * norms, rtol=1e-4)
    before: list[tuple[int, np.ndarray]] = []
    after: list[np.ndarray] = []

    def keep(layer: int, value: torch.Tensor) -> None:
        if layer == 0:
            before.append((experts.current, value.numpy().copy()))

    with (
        attach(model.layers, {"gate_act": keep}),
        model.sparse(plan),
        attach(
            model.layers,
            {"gate_act": lambda layer, v: after.append(v.numpy().copy()) if layer == 0 else None},
        ),
    ):
        model.hidden(IDS[None])
    k = round(0.3 * experts.d_ff)
    for (expert, gate), cut in zip(before, after, strict=True):
        score = np.abs(gate) * weights[0, expert]
        best = score >= np.sort(score, axis=1)[:, -k][:, None]
        np.testing.assert_array_equal(cut, np.where(best, gate, 0))


def mean_up_of(model: fallow.Model, windows: np.ndarray) -> np.ndarray:
    """E|up| of the first layer's experts over the tokens that use each, (n_experts, d_ff)."""
    experts = mixture(model)
    inputs: list[Any] = []
    handle = experts.module.register_forward_pre_hook(lambda _, args: inputs.append(args))
    for window in windows:
        model.hidden(window[None])
    handle.remove()
    x = np.concatenate([each[0].double().numpy() for each in inputs])
    chosen = np.concatenate([each[1].numpy() for each in inputs])
    found = []
    for expert in range(experts.count):
        of_expert = x[(chosen == expert).any(axis=1)]
        found.append(np.abs(of_expert @ experts.up_proj[expert].double().numpy().T).mean(axis=0))
    return np.array(found)


def test_mean_up_of_an_expert_that_no_token_used(folders: dict[str, Path]) -> None:
    """Zeros would drop all of its neurons, whenever another text uses it."""
    model = fallow.load(folders["mixtral"])
    experts = mixture(model)
    calibration = Calibration(model, np.full((1, 32), 5))  # a token over and over
    mean = calibration.mean_up[0].reshape(experts.count, experts.d_ff)
    unused = {0, 1, 2, 3} - used_experts(model, calibration.windows)
    assert len(unused) == 2
    of_used = [mean[e] for e in range(4) if e not in unused]
    for expert in unused:
        assert len(set(mean[expert].tolist())) == 1
        assert min(map(np.min, of_used)) < mean[expert, 0] < max(map(np.max, of_used))


def used_experts(model: fallow.Model, windows: np.ndarray) -> set[int]:
    """Of the first layer."""
    experts, found = mixture(model), set[int]()
    handle = experts.module.register_forward_pre_hook(
        lambda _, args: found.update(args[1].flatten().tolist())
    )
    for window in windows:
        model.hidden(window[None])
    handle.remove()
    return found


def test_cett_of_each_rows_own_expert() -> None:
    generator = torch.Generator().manual_seed(3)
    inter, down = (
        torch.randn(12, 37, generator=generator),
        torch.randn(3, 5, 37, generator=generator),
    )
    experts = torch.tensor([0, 2, 1, 1, 0, 2, 2, 2, 0, 1, 0, 2])
    score = inter.abs() * down.norm(dim=1)[experts]
    search = CettSearch(inter, down, score, experts)
    threshold = search.candidate(30000)
    ratios = []
    for row, expert in enumerate(experts.tolist()):
        dropped = torch.where(score[row] <= threshold, inter[row], 0)
        ratios.append(float((down[expert] @ dropped).norm() / (down[expert] @ inter[row]).norm()))
    assert search.error(30000) == pytest.approx(np.mean(ratios), rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_profile(name: str, tiny: dict[str, fallow.Model], texts: tuple[Path, Path]) -> None:
    model = tiny[name]
    found = fallow.profile(model, texts[1], context=32, windows=3)
    experts, rows = mixture(model), list[tuple[int, np.ndarray]]()

    def keep(layer: int, value: torch.Tensor) -> None:
        if layer == 1:
            rows.append((mixture(model, 1).current, value.numpy().copy()))

    from fallow.checkpoints.text import cut_windows, load_text

    with attach(model.layers, {"inter": keep}):
        for window in cut_windows(load_text(texts[1], "evaluation"), model.tokenizer, 32, 3):
            model.hidden(window[None])
    values = np.concatenate([value for _, value in rows])
    assert len(values) == 3 * 32 * experts.used
    row = found.summary["layers"][1]
    exact = np.percentile(np.abs(values), 50)
    assert row["magnitude_quantiles"]["inter"]["0.5"] == pytest.approx(exact, rel=2e-3)
    assert row["inter_at_most"]["0.01"] == pytest.approx((np.abs(values) <= 0.01).mean())
    weight = mixture(model, 1).down_proj.numpy()
    median = row["weight_quantiles"]["down_proj"]["0.5"]
    assert median == pytest.approx(np.median(np.abs(weight)), rel=2e-3)
    uses = np.zeros(experts.count)
    top = np.zeros((experts.count, experts.d_ff))
    norms = np.linalg.norm(weight, axis=1)
    for expert, value in rows:
        score = np.abs(value) * norms[expert]
        uses[expert] += len(value)
        k = round(0.5 * experts.d_ff)
        top[expert] += (score >= np.sort(score, axis=1)[:, -k][:, None]).sum(axis=0)
    np.testing.assert_allclose(found.arrays["expert_frequency"][1], uses / 96, atol=1e-6)
    expected = (top / np.maximum(uses, 1)[:, None]).reshape(-1)
    np.testing.assert_allclose(found.arrays["top_half_frequency"][1], expected, atol=1e-6)
    assert row["unused_experts"] == (uses == 0).sum()


def test_evaluation(
    tiny: dict[str, fallow.Model],
    packed: dict[str, Path],
    calibrators: dict[str, Calibrator],
    texts: tuple[Path, Path],
) -> None:
    """Sparsity is that of neurons of the experts that tokens use, on models and in the engine."""
    for name in ("qwen3_moe", "qwen2_moe"):  # without a shared expert and with one
        plan = calibrators[name].plan("topk", knob=0.3)
        experts = mixture(tiny[name])
        whole = fallow.evaluate(tiny[name], plan, texts[1], context=32, windows=4)
        engine = evaluate_engine(Engine(packed[name]), plan, texts[1], context=32, windows=4)
        expected = 1 - round(0.3 * experts.d_ff) / experts.d_ff
        for found in (whole, engine):
            assert found.achieved_sparsity == pytest.approx(expected, abs=1e-6)
            assert found.sparsity_ratio["inter"] == pytest.approx(expected, abs=1e-6)
            assert found.sparsity_ratio["router"] == pytest.approx(1 - experts.used / experts.count)
        assert engine.ppl == pytest.approx(whole.ppl, rel=0.02)
        assert whole.kl_to_dense["mean"] > 0.001


# The engine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["cats", "gate_topk", "tail", "topk", "topp", "two_stage"])
@pytest.mark.parametrize("name", EXPERTS)
def test_engine_cuts_as_the_model_does(
    name: str,
    rule: str,
    tiny: dict[str, fallow.Model],
    packed: dict[str, Path],
    calibrators: dict[str, Calibrator],
) -> None:
    model = tiny[name]
    plan = calibrators[name].plan(rule, sparsity=0.5, measure=False)
    check_engine(model, packed[name], plan)


def check_engine(model: fallow.Model, path: Path, plan: Plan) -> None:
    engine = Engine(path, plan)
    with f16_cache():  # but in GPT-OSS, whose attention is another
        expected = reference(model, plan)
    assert np.abs(expected - reference(model)).max() > 10 * ERROR
    share = 0.8 if model.architecture.sinks else 0.95
    for found in (engine.logits(IDS), one_by_one(engine)):
        near = np.abs(found - expected).max(axis=1) < ERROR
        assert near.mean() >= share  # but where a score is within rounding of a threshold
    check_a_few(engine)


@pytest.mark.parametrize(
    "cuts",
    [
        (Cut("gate_pre", "threshold", 0.3),),
        (Cut("up", "topk", 0.5),),
        (Cut("gate_pre", "topk", 0.7), Cut("up", "threshold", 0.2), Cut("inter", "tail", 0.1)),
        (Cut("gate_act", "topk", 0.6), Cut("inter", "mass", 0.05, "column_norm")),
        (Cut("router", "topk", 1 / 7), Cut("gate_act", "threshold", 0.1)),
    ],
    ids=lambda cuts: "+".join(cut.tap for cut in cuts),
)
def test_every_cut(
    cuts: tuple[Cut, ...], tiny: dict[str, fallow.Model], packed: dict[str, Path]
) -> None:
    plan = engine_plan(Engine(packed["qwen3_moe"]), *cuts)
    check_engine(tiny["qwen3_moe"], packed["qwen3_moe"], plan)


def test_small_groups_of_prefill(tmp_path: Path) -> None:
    """Of many experts each has few of a block's tokens, which prefill then takes as decode does."""
    many = {"num_experts": 24, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 41}
    folder = make_folder("qwen2_moe", tmp_path / "m", **many)
    pack(folder, tmp_path / "m.gguf", quant="f32")
    plan = engine_plan(Engine(tmp_path / "m.gguf"), Cut("gate_act", "topk", 0.5))
    check_engine(fallow.load(folder), tmp_path / "m.gguf", plan)


@pytest.mark.parametrize("quant", ["q4_k", "q8_0"])
def test_rows_that_are_not_read(quant: str, tmp_path: Path) -> None:
    """Decode reads of a chosen expert its gate, and of up_proj and down_proj what is active."""
    width = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 48}
    folder = make_folder("qwen3_moe", tmp_path / "m", initializer_range=0.05, **width)
    pack(folder, tmp_path / "m.gguf", quant=quant)
    dense, engine = Engine(tmp_path / "m.gguf"), Engine(tmp_path / "m.gguf")
    engine.use_plan(engine_plan(engine, Cut("gate_act", "topk", 0.25)))
    read = []
    for each in (dense, engine):
        each.reset()
        each.forward(IDS[:1])
        each.reset_stats()
        each.forward(IDS[1:2])
        read.append(each.core_stats()["bytes_read"])
    rows = {m: engine.matrix(f"layers.0.experts.0.{m}") for m in ("up_proj", "down_proj_t")}
    per_neuron = sum(w.data.nbytes // 48 for w in rows.values())
    assert read[0] - read[1] == 2 * 3 * (48 - 12) * per_neuron  # layers, experts, neurons
    experts, neurons = engine.idle_in_experts()
    np.testing.assert_allclose(neurons, 0.75)
    np.testing.assert_allclose(experts, 4 / 7)


@pytest.mark.parametrize("rule", ["gate_topk", "two_stage"])
def test_experts_on_the_disk(
    rule: str,
    packed: dict[str, Path],
    calibrators: dict[str, Calibrator],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits under a plan do not depend on where experts come from."""
    path = packed["qwen3_moe"]
    plan = calibrators["qwen3_moe"].plan(rule, sparsity=0.5, measure=False)
    whole = Engine(path, plan)
    least = residencies(parts_of(whole.file, False), None, experts_of(whole.file))[-1]
    monkeypatch.setattr("fallow.engine.engine.rss_bytes", lambda: 0)
    engine = Engine(path, plan, memory=RESERVE + least.memory)
    np.testing.assert_array_equal(one_by_one(engine), one_by_one(whole))
    np.testing.assert_array_equal(engine.logits(IDS), whole.logits(IDS))
    assert engine.core_stats()["disk"]["missing_experts"] > 0


def test_zeros_of_a_relu_are_skipped(tmp_path: Path) -> None:
    folder = make_folder("mixtral", tmp_path / "m", hidden_act="relu")
    pack(folder, tmp_path / "m.gguf", quant="f32")
    engine = Engine(tmp_path / "m.gguf")
    whole = Engine(tmp_path / "m.gguf", skip_zeros=False)
    expected = reference(fallow.load(folder))
    read = []
    for each in (engine, whole):
        each.reset_stats()
        errors = np.abs(one_by_one(each) - expected).max(axis=1)
        assert (errors < ERROR).mean() > 0.95
        read.append(each.core_stats()["bytes_read"])
    assert 0.2 < engine.idle_in_experts()[1].mean() < 0.8
    assert whole.idle_in_experts()[1].mean() == 0
    assert read[0] < 0.9 * read[1]
    check_a_few(engine)


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["percentile", "scap"])
def test_rules_that_cut_more_than_neurons(rule: str, calibrators: dict[str, Calibrator]) -> None:
    said = fails(FallowError, lambda: calibrators["mixtral"].plan(rule, sparsity=0.5))
    assert "the model is a mixture of experts" in said
    assert "router, gate_pre, gate_act, up, inter, q_proj" in said


@pytest.mark.parametrize("selector", ["oracle", "static", "lowbit", "cluster"])
def test_selectors(selector: str, calibrators: dict[str, Calibrator]) -> None:
    said = fails(FallowError, lambda: calibrators["mixtral"].fit(selector, sparsity=0.5))
    assert "the model is a mixture of experts" in said


def test_commands(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, run: Any
) -> None:
    given = [folders["mixtral"], "--text", texts[0], "--context", 32]
    for command in (
        ["neurons", folders["mixtral"], "--layer", 0, "--neuron", 1, *given[1:]],
        ["optimize", folders["mixtral"], "--quant", "f32", "--down", "f32", "-o", tmp_path / "o"],
        ["report", *given, "-o", tmp_path / "r"],
    ):
        found = run(*command)
        assert found.code == 1, command
        assert "mixture of experts" in found.err.replace("\n", " "), command
    assert run("profile", *given, "-o", tmp_path / "p").code == 0


def test_file_of_an_earlier_fallow(packed: dict[str, Path], tmp_path: Path) -> None:
    """Which has no norms of down_proj: only plans that weigh by them need them."""
    content = packed["mixtral"].read_bytes().replace(b".down_norm", b".down_nxrm")
    (tmp_path / "old.gguf").write_bytes(content)
    engine, new = Engine(tmp_path / "old.gguf"), Engine(packed["mixtral"])
    np.testing.assert_array_equal(engine.logits(IDS), new.logits(IDS))
    engine.use_plan(engine_plan(engine, Cut("gate_act", "topk", 0.5)))
    plan = engine_plan(engine, Cut("inter", "topk", 0.5, "column_norm"))
    said = fails(FallowError, lambda: engine.use_plan(plan))
    assert said.startswith("the plan weighs inter by norms of down_proj, which ")
    assert said.endswith("an earlier fallow packed it; pack it again")


def test_weights_of_other_experts(packed: dict[str, Path], tiny: dict[str, fallow.Model]) -> None:
    engine = Engine(packed["mixtral"])
    plan = engine_plan(engine, Cut("gate_act", "topk", 0.5, np.ones((2, 37), dtype=np.float32)))
    for use in (lambda: engine.use_plan(plan), lambda: reference(tiny["mixtral"], plan)):
        assert "needs (2, 148); calibrate again" in fails(FallowError, use)


def test_sparsified_modules(folders: dict[str, Path], calibrators: dict[str, Calibrator]) -> None:
    """The plan on a transformers model, beside taps of another description of its layers."""
    model = fallow.load(folders["qwen3_moe"])
    plan = calibrators["qwen3_moe"].plan("gate_topk", sparsity=0.5, measure=False)
    expected = reference(model, plan)
    fallow.sparsify(model, plan)
    zeros: list[float] = []
    with attach(
        model.layers, {"gate_act": lambda _, v: zeros.append(float((v == 0).float().mean()))}
    ):
        assert np.array_equal(reference(model), expected)
    assert np.mean(zeros) == pytest.approx(9 / 19, abs=1e-6)
    fallow.densify(model.module)
    assert "forward" not in vars(mixture(model).module)
