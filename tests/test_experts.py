"""Mixtures of experts: their files, the router's rules, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import fallow
from conftest import EXPERTS, VOCABULARY, engine_plan, make_folder
from engines import ERROR, IDS, check_a_few, fails, one_by_one, reference
from fallow import _core
from fallow.calibration.calibrator import Calibrator
from fallow.checkpoints.weights import read_safetensors
from fallow.common.errors import FallowError, UsageError
from fallow.engine.engine import Engine
from fallow.measure.quality import evaluate_engine
from fallow.models.taps import attach
from fallow.packing.packer import pack
from fallow.plan import Cut, Plan
from test_models import write_gguf

ROUTER_RULES = {"expert_topk": 2 / 7, "expert_mass": 0.4, "expert_share": 0.25}


def hidden_with(model: fallow.Model, tap: Any) -> torch.Tensor:
    with attach(model.layers, {"router": tap}):
        return model.hidden(IDS[None])


@pytest.mark.parametrize("name", EXPERTS)
def test_the_router_is_read_and_cut(name: str, tiny: dict[str, fallow.Model]) -> None:
    model, seen = tiny[name], []
    dense = model.hidden(IDS[None])
    assert torch.equal(hidden_with(model, lambda _, value: seen.append(value)), dense)
    layer = model.layers[0]
    assert layer.experts is not None
    assert seen[0].shape == (len(IDS), layer.experts.count)
    assert (seen[0].count_nonzero(dim=1) == layer.experts.used).all()
    torch.testing.assert_close(seen[0].square().sum(dim=1), torch.ones(len(IDS)))
    assert torch.equal(hidden_with(model, lambda _, value: value), dense)
    # A model whose experts put out nothing.
    cut = hidden_with(model, lambda _, value: torch.zeros_like(value))
    all_experts = [layer.experts for layer in model.layers if layer.experts]
    last = [w for e in all_experts for w in (e.down_proj, e.biases.get("down_proj"))]
    weights = [w for w in last if w is not None]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.zero_()
    expected = model.hidden(IDS[None])
    for weight, values in zip(weights, kept, strict=True):
        weight.copy_(values)
    torch.testing.assert_close(cut, expected)
    assert not torch.allclose(cut, dense, atol=0.1)


@pytest.mark.parametrize("name", EXPERTS)
def test_fewer_experts_are_those_of_another_config(
    name: str, folders: dict[str, Path], tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    """expert_topk with k is the model whose config says k, in the reference and in the engine."""
    folder = Path(shutil.copytree(folders[name], tmp_path / "fewer"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    fewer = fallow.load(folder)
    model = tiny[name]
    assert model.layers[0].experts is not None
    one = 1 / model.layers[0].experts.count
    plan = Plan(name, model.fingerprint, "by hand", one, "", (_cut("topk", one),))
    np.testing.assert_allclose(reference(model, plan), reference(fewer), atol=1e-4)
    pack(folder, tmp_path / "fewer.gguf", quant="f32")
    assert np.abs(Engine(tmp_path / "fewer.gguf").logits(IDS) - reference(fewer)).max() < ERROR


def _cut(kind: str, value: float) -> Cut:
    return Cut("router", kind, value).of_layers(2)


@pytest.mark.parametrize("rule", ROUTER_RULES)
@pytest.mark.parametrize("name", EXPERTS)
def test_router_rules_are_those_of_the_reference(
    name: str,
    rule: str,
    tiny: dict[str, fallow.Model],
    packed: dict[str, Path],
    calibrators: dict[str, Calibrator],
) -> None:
    model, plan = tiny[name], calibrators[name].plan(rule, knob=ROUTER_RULES[rule])
    engine = Engine(packed[name], plan)
    expected, dense = reference(model, plan), reference(model)
    assert np.abs(expected - dense).max() > 10 * ERROR
    for found in (engine.logits(IDS), one_by_one(engine)):
        near = np.abs(found - expected).max(axis=1) < ERROR
        assert near.mean() > 0.95  # but where a share is within rounding of the threshold
        assert near[:10].all()
    check_a_few(engine)
    engine.reset_stats()
    engine.logits(IDS)
    zeros: list[float] = []
    with model.sparse(plan), attach(model.layers, {"router": lambda _, v: zeros.append(_zeros(v))}):
        model.hidden(IDS[None])
    if engine.file.get("fallow.shared_intermediate_size") == 0:
        np.testing.assert_allclose(engine.idle_neurons(), zeros, atol=0.01)
    uses = engine.expert_uses()
    np.testing.assert_allclose(1 - uses.sum(axis=1) / (len(IDS) * uses.shape[1]), zeros, atol=0.01)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_active_neurons_of_experts(name: str, packed: dict[str, Path]) -> None:
    engine = Engine(packed[name])
    width = engine.n_experts * engine.file.get(
        "fallow.intermediate_size"
    )  # less that of a shared expert
    for part in np.split(IDS[:40], [1, 7]):
        engine.reset_stats()
        engine.forward(part, record=True)
        figures, neurons = engine.core_stats(), engine.active_neurons()
        experts = neurons[..., :width].reshape(*neurons.shape[:2], engine.n_experts, -1)
        used = experts.any(axis=3)  # (T, L, experts)
        assert (experts.all(axis=3) == used).all()
        assert (used.sum(axis=2) == engine.file.get("fallow.n_experts_used")).all()
        assert neurons[..., width:].all()
        if len(part) > _core.FEW:  # of the last token alone
            assert len(neurons) == 1
            assert (engine.expert_uses() >= used[0]).all()
        else:
            assert len(neurons) == len(part)
            np.testing.assert_array_equal(neurons.sum(axis=(0, 2)), figures["active"])
            np.testing.assert_array_equal(used.sum(axis=0), engine.expert_uses())


def _zeros(value: torch.Tensor) -> float:
    return float((value == 0).float().mean())


@pytest.mark.parametrize("rule", ROUTER_RULES)
def test_router_rules_reach_a_sparsity(rule: str, calibrators: dict[str, Calibrator]) -> None:
    """Of 7 experts 3 are used: from 4 / 7 on something is left out."""
    calibrator = calibrators["qwen3_moe"]
    plan = calibrator.plan(rule, sparsity=0.0)
    assert plan.achieved_sparsity == pytest.approx(4 / 7)
    assert plan.achieved_ppl_increase == 0
    plan = calibrator.plan(rule, sparsity=5 / 7)
    assert plan.where == "experts"
    assert plan.achieved_sparsity == pytest.approx(5 / 7, abs=0.05)
    again = Plan.from_bytes(plan.to_bytes(), "here")
    assert again.cuts[0].tap == "router"
    np.testing.assert_array_equal(again.cuts[0].value, plan.cuts[0].value)


def test_dropped_shares_go_to_the_others_where_the_model_says_so(
    packed: dict[str, Path], tiny: dict[str, fallow.Model]
) -> None:
    """Mixtral's shares sum to 1 with one expert too; OLMoE's stay what they were."""
    for name, whole in (("mixtral", True), ("olmoe", False)):
        sums: list[torch.Tensor] = []
        layer = tiny[name].layers[1]
        assert layer.experts is not None
        plan = engine_plan(Engine(packed[name]), Cut("router", "topk", 1 / layer.experts.count))
        with tiny[name].sparse(plan):
            handle = layer.experts.router.register_forward_hook(
                lambda _module, _args, output, sums=sums: sums.append(output[1].sum(dim=-1))
            )
            tiny[name].hidden(IDS[None])
            handle.remove()
        assert bool((sums[0] - 1).abs().max() < 1e-5) == whole


def test_inputs_of_attention_are_cut(
    tiny: dict[str, fallow.Model], packed: dict[str, Path], calibrators: dict[str, Calibrator]
) -> None:
    plan = calibrators["qwen3_moe"].plan("teal_relative", sparsity=0.4)
    assert plan.inputs == ("q_proj", "k_proj", "v_proj", "o_proj")
    found = Engine(packed["qwen3_moe"], plan).logits(IDS)
    assert np.median(np.abs(found - reference(tiny["qwen3_moe"], plan)).max(axis=1)) < ERROR


def test_many_experts(tmp_path: Path) -> None:
    """Of which each has few of a block's tokens, which prefill then takes as decode does."""
    many = {"num_experts": 24, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 41}
    folder = make_folder("qwen2_moe", tmp_path / "m", **many)
    pack(folder, tmp_path / "m.gguf", quant="f32")
    model, engine = fallow.load(folder), Engine(tmp_path / "m.gguf", threads=3)
    expected = reference(model)
    for found in (engine.logits(IDS), one_by_one(engine)):
        errors = np.abs(found - expected).max(axis=1)
        assert (errors < ERROR).mean() > 0.95  # but where experts are as likely as each other
        assert (errors[:10] < ERROR).all()
    check_a_few(engine)


# Files ------------------------------------------------------------------------------------------


def test_folder_with_stacked_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    """As transformers has them in memory, in place of each by itself."""
    folder = Path(shutil.copytree(folders["qwen3_moe"], tmp_path / "stacked"))
    model = fallow.load(folders["qwen3_moe"])
    state = {k: v.clone() for k, v in model.module.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(fallow.load(folder).hidden(IDS[None]), model.hidden(IDS[None]))


def test_folder_that_lacks_an_expert(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["qwen3_moe"], tmp_path / "m"))
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.experts.6.up_proj.weight")
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    fails(FallowError, lambda: fallow.load(folder))
    names = [t.name for t in read_safetensors(folders["qwen3_moe"])]
    assert "model.layers.1.mlp.experts.6.up_proj.weight" in names


def test_layers_without_experts_are_refused(tmp_path: Path) -> None:
    folder = make_folder("qwen3_moe", tmp_path / "m", mlp_only_layers=[1])
    assert fails(FallowError, lambda: fallow.load(folder)) == (
        "some of the model's layers have no experts (mlp_only_layers, decoder_sparse_step), which "
        "is not supported; give a model that has them in every layer"
    )


def test_gguf_with_half_of_the_experts_inputs(
    tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    path = write_gguf("qwen3_moe", tiny["qwen3_moe"], tmp_path / "m.gguf")
    changed = path.read_bytes().replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_down_exps.weigh_")
    assert changed != path.read_bytes()
    wrong = np.zeros((6, 19, 24), dtype=np.float32)
    changes = {"blk.1.ffn_up_exps.weight": wrong}
    path = write_gguf("qwen3_moe", tiny["qwen3_moe"], tmp_path / "m.gguf", **changes)
    assert fails(FallowError, lambda: fallow.load(path)).endswith(
        "tensor blk.1.ffn_up_exps.weight gives model.layers.1.mlp.experts.up_proj.weight the shape "
        "(6, 19, 24), expected (7, 19, 24)"
    )


@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "q4_k", "q6_k", "f16", "bf16"])
def test_types(kind: str, tmp_path: Path) -> None:
    """Decode and prefill of every type, against the same weights in transformers."""
    from fallow.packing.quantize import dequantize, quantize

    width = {"hidden_size": 256, "head_dim": 64, "moe_intermediate_size": 48}
    folder = make_folder("qwen3_moe", tmp_path / "m", initializer_range=0.05, **width)
    pack(folder, tmp_path / "m.gguf", quant=kind)
    model = fallow.load(folder)
    for name, parameter in model.module.named_parameters():
        if parameter.ndim == 1 or name.endswith("mlp.gate.weight"):
            continue
        values = parameter.transpose(1, 2) if name.endswith("experts.down_proj") else parameter
        rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]).numpy())
        rounded = torch.from_numpy(dequantize(quantize(rows, kind.upper()))).view(values.shape)
        parameter.copy_(rounded.transpose(1, 2) if name.endswith("experts.down_proj") else rounded)
    model.refresh_head()
    engine = Engine(tmp_path / "m.gguf")
    expected = reference(model)
    spread = np.ptp(expected)
    for found in (engine.logits(IDS), one_by_one(engine)):
        errors = np.abs(found - expected).max(axis=1) / spread
        assert np.median(errors) < 0.008  # decode may round inputs by 0.95 % of their norm
        assert (errors < 0.02).mean() >= 0.9  # but where experts are as likely as each other
    check_a_few(engine)


# What is refused --------------------------------------------------------------------------------


def test_rules_of_experts_are_refused_without_any(calibrators: dict[str, Calibrator]) -> None:
    with pytest.raises(UsageError, match=r"the plan cuts router, .* has gate_pre, gate_act"):
        calibrators["llama"].plan("expert_topk", sparsity=0.5)


def test_plans_that_do_not_fit(packed: dict[str, Path]) -> None:
    for name, cut in (
        ("mixtral", Cut("up_proj", "threshold", 0.5)),
        ("mixtral", Cut("down_proj", "topk", 0.5)),
        ("mixtral", Cut("ffn_out", "threshold", 0.5)),
        ("llama", Cut("router", "topk", 0.5)),
    ):
        engine = Engine(packed[name])
        plan = engine_plan(engine, cut)
        said = fails(FallowError, lambda e=engine, p=plan: e.use_plan(p))  # type: ignore[misc]
        is_kind = "is a mixture of experts" if name == "mixtral" else "is no mixture of experts"
        assert is_kind in said
        assert cut.tap in said


def test_sparsify_says_what_it_does_not_do(tiny: dict[str, fallow.Model]) -> None:
    plan = Plan("m", tiny["mixtral"].fingerprint, "by hand", 0, "", (_cut("topk", 0.25),))
    module = fallow.sparsify(tiny["mixtral"], plan)
    fallow.densify(module)
    said = fails(UsageError, lambda: fallow.sparsify(module, plan))
    assert said.endswith("is a mixture of experts; give what fallow.load makes of it")


def test_damaged_packed_files(packed: dict[str, Path], tmp_path: Path) -> None:
    content = packed["qwen2_moe"].read_bytes()

    def message(changed: bytes) -> str:
        assert changed != content
        (tmp_path / "m.gguf").write_bytes(changed)
        return fails(FallowError, lambda: Engine(tmp_path / "m.gguf"))

    def with_number(key: bytes, value: int) -> bytes:
        at = content.index(key) + len(key) + 4
        return content[:at] + value.to_bytes(4, "little") + content[at + 4 :]

    assert "fallow.n_experts must be an unsigned integer from 1" in message(
        with_number(b"fallow.n_experts", 0)
    )
    assert "fallow.n_experts_used must be an unsigned integer from 1 to 7" in message(
        with_number(b"fallow.n_experts_used", 8)
    )
    assert "has no tensor layers.0.experts.7.gate_proj.weight" in message(
        with_number(b"fallow.n_experts", 8)
    ) or "layers.0.router.weight" in message(with_number(b"fallow.n_experts", 8))
    assert "layers.0.shared_expert.gate_proj.weight has the shape (41, 24), expected (40, 24)" in (
        message(with_number(b"fallow.shared_intermediate_size", 40))
    )
    assert "has no tensor layers.1.experts.3.up_proj.weight" in message(
        content.replace(b"layers.1.experts.3.up_proj", b"layers.1.experts.3.up_prox")
    )


# Figures ----------------------------------------------------------------------------------------


def test_evaluation(
    tiny: dict[str, fallow.Model],
    packed: dict[str, Path],
    calibrators: dict[str, Calibrator],
    texts: tuple[Path, Path],
) -> None:
    plan = calibrators["olmoe"].plan("expert_topk", knob=1 / 7)
    whole = fallow.evaluate(tiny["olmoe"], plan, texts[1], context=32, windows=4)
    engine = evaluate_engine(Engine(packed["olmoe"]), plan, texts[1], context=32, windows=4)
    assert whole.sparsity_ratio["router"] == pytest.approx(6 / 7)
    assert whole.sparsity_ratio["inter"] is None
    assert engine.achieved_sparsity == pytest.approx(6 / 7, abs=1e-6)
    assert engine.ppl == pytest.approx(whole.ppl, rel=0.02)
    assert whole.kl_to_dense["mean"] > 0.01
    dense = fallow.evaluate(tiny["olmoe"], None, texts[1], context=32, windows=4)
    assert dense.achieved_sparsity == pytest.approx(4 / 7)
    assert dataclasses.replace(dense).ppl_change_percent == 0


def test_generation(packed: dict[str, Path]) -> None:
    engine = Engine(packed["qwen2_moe"])
    list(engine.generate(IDS[:20], 10))
    assert engine.stats.new_tokens > 0
    assert 0.3 < engine.stats.sparsity < 0.6  # of 7 experts 3 are used, and the shared one
    assert engine.vocabulary_size == VOCABULARY
