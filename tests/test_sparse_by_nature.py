"""Models whose neurons are exactly zero by an activation that transformers does not have."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

import fallow
from conftest import OWN_CONFIGS, VOCABULARY, make_folder
from fallow.engine.engine import Engine
from fallow.models import Rectified
from fallow.packing.packer import pack
from fallow.reference.sparsified import load_sparse
from test_models import IDS, message
from test_variants import change_config

ids = np.random.default_rng(0).integers(2, VOCABULARY, 60)


@pytest.fixture
def bamboo(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["bamboo"], tmp_path / "bamboo"))


def test_sparse_relu_whatever_its_config_says(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["llama_sparse_relu"] / "config.json").read_text())
    assert config["hidden_act"] == "silu"
    relu = fallow.load(make_folder("llama", tmp_path / "relu", hidden_act="relu"))
    found = fallow.load(folders["llama_sparse_relu"])
    assert torch.equal(found.hidden(IDS), relu.hidden(IDS))
    assert found.fingerprint == relu.fingerprint


@pytest.mark.parametrize("name", ["sparsellama", "bamboo", "minicpm"])
def test_ffn_by_its_formula(name: str, tiny: dict[str, fallow.Model]) -> None:
    x = torch.randn(11, 24, generator=torch.Generator().manual_seed(0))
    for layer in tiny[name].layers:
        assert layer.gate_proj is not None
        assert layer.up_proj is not None
        gate = functional.linear(x, layer.gate_proj.weight)
        up = functional.linear(x, layer.up_proj.weight)
        active = (gate > 0) & (up > 0) if name == "bamboo" else gate > 0.02
        inter = gate * up * active
        expected = functional.linear(inter, layer.down_proj.weight)
        torch.testing.assert_close(layer.block.get_submodule("mlp")(x), expected)


def test_minicpm_is_a_llama_with_other_weights(
    folders: dict[str, Path], tiny: dict[str, fallow.Model]
) -> None:
    """Its factors are those of the embeddings' and of output projections' weights."""
    told: Any = OWN_CONFIGS["minicpm"]
    llama = transformers.LlamaForCausalLM.from_pretrained(folders["minicpm"], hidden_act="relu")
    with torch.no_grad():
        head = llama.lm_head.weight.clone() / (24 / told["dim_model_base"])
        llama.model.embed_tokens.weight.mul_(told["scale_emb"])
        llama.lm_head.weight = torch.nn.Parameter(head)
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight.mul_(told["scale_depth"] / 2**0.5)
            layer.mlp.down_proj.weight.mul_(told["scale_depth"] / 2**0.5)
            layer.mlp.act_fn = torch.nn.Threshold(0.02, 0.0)
        expected = llama(torch.from_numpy(IDS)).logits
    model = tiny["minicpm"]
    torch.testing.assert_close(model.logits(model.hidden(IDS)), expected, rtol=1e-4, atol=1e-4)


def test_drelu_leaves_out_more_than_its_gate(
    packed: dict[str, Path], tiny: dict[str, fallow.Model], texts: tuple[Path, Path]
) -> None:
    """The engine reads down_proj's rows of neurons alone that neither ReLU makes zero."""
    summary = fallow.profile(tiny["bamboo"], texts[0], context=32, windows=2).summary
    zeros = [layer["zeros"] for layer in summary["layers"]]
    assert np.mean([layer["gate_act"] for layer in zeros]) < 0.6
    assert np.mean([layer["inter"] for layer in zeros]) > 0.7
    engine = Engine(packed["bamboo"], threads=1)
    token_by_token = np.concatenate([engine.forward([i]) for i in ids])
    idle = engine.idle_neurons()
    assert (idle > 0.6).all()
    dense = Engine(packed["bamboo"], threads=1, skip_zeros=False)
    expected = np.concatenate([dense.forward([i]) for i in ids])
    assert (dense.idle_neurons() == 0).all()
    np.testing.assert_allclose(token_by_token, expected, atol=1e-4)
    with torch.inference_mode():
        logits = tiny["bamboo"].module(torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(token_by_token - logits).max() < 0.01 * np.ptp(logits)


@pytest.mark.parametrize("name", ["bamboo", "bitnet"])
@pytest.mark.parametrize("rule", ["two_stage", "topk", "percentile", "gate_topk"])
def test_plans_of_drelu_and_of_a_norm_before_down_proj(
    name: str,
    rule: str,
    packed: dict[str, Path],
    folders: dict[str, Path],
    tiny: dict[str, fallow.Model],
    texts: tuple[Path, Path],
) -> None:
    """Cuts of gate_act, up and inter: the engine computes what the reference masks."""
    model = tiny[name]
    plan = fallow.calibrate(model, rule, sparsity=0.8, text=texts[0], context=32, windows=4)
    with torch.inference_mode(), model.sparse(plan):
        expected = model.module(torch.from_numpy(ids)[None]).logits[0].numpy()
    for engine in (Engine(packed[name], plan), Engine(packed[name], plan)):
        found = np.concatenate([engine.forward([i]) for i in ids])
        near = np.abs(found - expected).max(axis=1) < 0.01 * np.ptp(expected)
        assert near.mean() > 0.9  # the rest: near ties at a threshold, in a cache of float16
        engine.reset()


def test_bitnet_skips_zeros(packed: dict[str, Path]) -> None:
    engine, dense = (Engine(packed["bitnet"], skip_zeros=skip) for skip in (True, False))
    found, expected = (np.concatenate([e.forward([i]) for i in ids]) for e in (engine, dense))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (engine.idle_neurons() > 0.3).all()


def test_predictors_are_left_out(bamboo: Path, tiny: dict[str, fallow.Model], capfd: Any) -> None:
    path = bamboo / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.predictor.fc1.weight"] = torch.ones(4, 24)
    state["model.layers.0.mlp.predictor.fc2.weight"] = torch.ones(37, 4)
    save_file(state, path, {"format": "pt"})
    assert torch.equal(fallow.load(bamboo).hidden(IDS), tiny["bamboo"].hidden(IDS))
    said = " ".join(capfd.readouterr().err.split())
    assert "2 tensors mlp.predictor.* of" in said
    state["model.layers.0.mlp.other.weight"] = torch.ones(4, 24)
    save_file(state, path, {"format": "pt"})
    assert "has a tensor model.layers.0.mlp.other.weight that bamboo models" in message(bamboo)


def test_saved_models_keep_their_activation(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """A sparsified folder has transformers' model_type and the activation of fallow's."""
    for name in OWN_CONFIGS:
        model = fallow.load(folders[name])
        plan = fallow.calibrate(model, "topk", sparsity=0.5, text=texts[0], context=32, windows=4)
        expected = model.hidden(IDS)
        fallow.save_sparse(fallow.sparsify(model, plan), tmp_path / name, model.tokenizer)
        assert load_sparse(tmp_path / name).config.hidden_act != "silu"
        torch.testing.assert_close(fallow.load(tmp_path / name).hidden(IDS), expected)


@pytest.mark.parametrize("threshold", [None, -0.1, "a", float("nan")])
def test_fatrelu_without_a_threshold(threshold: object, copy: Path) -> None:
    change_config(copy, {"hidden_act": "fatrelu", "hidden_act_param": threshold})
    assert message(copy) == (
        f"M/config.json: hidden_act is fatrelu, and hidden_act_param is {threshold!r}, no "
        "threshold of 0 or more; add the one that the model was made with"
    )


def test_drelu_without_a_gate(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["arcee"], tmp_path / "arcee"))
    change_config(folder, {"hidden_act": "drelu"})
    assert "hidden_act is drelu, but arcee models have no gate_proj and up_proj" in message(folder)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_experts_with_activations_of_their_own(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[name], tmp_path / name))
    for changes in ({"hidden_act": "drelu"}, {"hidden_act": "fatrelu", "hidden_act_param": 0.1}):
        change_config(folder, changes)
        assert f"which is not computed for the experts of {name} models" in message(folder)


def test_sparse_attention_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["minicpm"], tmp_path / "minicpm"))
    change_config(folder, {"sparse_config": {"topk": 64}})
    assert "sparse_config is {'topk': 64}, which is not computed for minicpm" in message(folder)


def test_drelu_and_fatrelu_of_other_models(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The activation's name is enough, with biases too."""
    folder = make_folder("llama", tmp_path / "folder", mlp_bias=True)
    for changes in ({"hidden_act": "drelu"}, {"hidden_act": "fatrelu", "hidden_act_param": 0.3}):
        change_config(folder, changes)
        model = fallow.load(folder)
        assert isinstance(model.layers[0].up_proj, Rectified) == (len(changes) == 1)
        with torch.inference_mode():
            expected = model.module(torch.from_numpy(ids)[None]).logits[0].numpy()
        pack(folder, tmp_path / "packed.gguf", quant="f32")
        engine = Engine(tmp_path / "packed.gguf")
        block = engine.logits(ids)
        engine.reset()
        for found in (block, np.concatenate([engine.forward([i]) for i in ids])):
            assert np.abs(found - expected).max() < 0.01 * np.ptp(expected)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma4"])
@pytest.mark.parametrize("act", ["drelu", "fatrelu"])
def test_gemma_reads_another_key(
    act: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Their class has its activation from hidden_activation, inputs of Gemma 4's layers too."""
    folder = Path(shutil.copytree(folders[name], tmp_path / name))
    change_config(folder, {"hidden_act": act, "hidden_act_param": 0.1})
    assert f"hidden_act is {act}, but {name}" in (said := message(folder))
    assert "have their activation from hidden_activation; say it there" in said
    other = fallow.load(folders[name])
    limit = 0.1 if act == "fatrelu" else 0.0
    for block in other.module.model.layers:
        for module in (block.mlp, *([block] if hasattr(block, "act_fn") else [])):
            module.act_fn = torch.nn.Threshold(limit, 0.0)
        if act == "drelu":
            block.mlp.up_proj.register_forward_hook(lambda _module, _args, out: out.relu())
    change_config(folder, {"hidden_act": "gelu", "hidden_activation": act})
    model = fallow.load(folder)
    assert model.module.config.hidden_activation == act
    expected = other.module(torch.from_numpy(IDS)).logits
    assert torch.equal(model.module(torch.from_numpy(IDS)).logits, expected)
    pack(folder, tmp_path / "packed.gguf", quant="f32")
    found, expected = Engine(tmp_path / "packed.gguf").logits(IDS[0]), expected[0].detach().numpy()
    assert np.abs(found - expected).max() < 0.01 * np.ptp(expected)
