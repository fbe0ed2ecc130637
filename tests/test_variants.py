"""What a model's metadata say of its computation: transformers' answer, or a refusal by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

import fallow
from conftest import CONFIGS, VOCABULARY, make_folder, make_tokenizer
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.packing.packer import pack
from test_models import GGUF_NAMES, IDS, message, write_gguf

# GGUF ------------------------------------------------------------------------------------------

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = PLAIN | {"rope_type": "linear", "factor": 4.0}
YARN = PLAIN | {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 2.0,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0],
}
OF_64 = {"original_max_position_embeddings": 64}
YARN_KEYS = {
    "type": "yarn",
    "factor": 4.0,
    "original_context_length": 32,
    "yarn_beta_fast": 8.0,
    "yarn_beta_slow": 2.0,
}

# Of llama.cpp's keys, https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py,
# and of one that nobody knows.
CHANGING_KEYS = [
    ("llama", "rope.scaling.type", "su"),
    ("llama", "rope.scaling.attn_factor", 0.5),
    ("llama", "rope.scaling.yarn_log_multiplier", 0.1),
    ("llama", "rope.dimension_count", 4),
    ("llama", "attention.value_length", 4),
    ("llama", "attn_logit_softcapping", 50.0),
    ("llama", "final_logit_softcapping", 30.0),
    ("llama", "attention.sliding_window", 16),
    ("llama", "attention.scale", 0.5),
    ("llama", "attention.causal", False),
    ("llama", "attention.max_alibi_bias", 8.0),
    ("llama", "logit_scale", 0.5),
    ("qwen2", "expert_count", 8),
    ("llama", "swiglu_clamp_exp", [0.0, 7.0]),
    ("llama", "unheard_of", 1),
    ("qwen2", "attention.clamp_kqv", 8.0),
    ("gemma3", "final_logit_softcapping", 30.0),
    ("gemma3", "rope.local.freq_base", 500.0),
    ("phi", "residual_scale", 0.5),
    ("phi3", "rope.scaling.type", "longrope"),
    ("llama", "attention.temperature_scale", 0.1),
    ("ministral3", "attention.temperature_length", 16),
    ("ministral3", "rope.scaling.yarn_ext_factor", 0.5),
    ("ministral3", "attention.sliding_window", 16),
    ("ministral3", "expert_count", 4),
]


@pytest.mark.parametrize(("name", "key", "value"), CHANGING_KEYS)
def test_gguf_key_that_changes_the_computation(
    name: str, key: str, value: Any, tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    arch = tiny[name].architecture.gguf_name
    path = write_gguf(name, tiny[name], tmp_path / "m.gguf", keys={f"{arch}.{key}": value})
    said = message(path)
    assert key in said or key.removeprefix("rope.scaling.") in said or repr(value) in said
    assert said.startswith("GGUF M")
    assert "\n" not in said


HEADS_OF_8 = (
    "qwen3", "qwen3_moe", "gemma2", "gemma3", "gemma3n", "nemotron", "ministral3", "gpt_oss",
)  # fmt: skip
# What llama.cpp's converters write beside what is read, older ones among them, and values that
# llama.cpp takes for "none".
NEUTRAL_KEYS = {
    "vocab_size": VOCABULARY,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.type": "none",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.finetuned": True,
    "rope.scaling.attn_factor": 1.0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "pooling_type": 3,
    "attention.layer_norm_epsilon": 0.5,  # of a model that has RMSNorm
}


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_gguf_keys_without_effect(name: str, tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    arch = tiny[name].architecture.gguf_name
    lengths = {}
    if name not in ("phi", "gpt_neox"):
        lengths["attention.value_length"] = 8 if name in HEADS_OF_8 else 6
    if name not in ("phi", "phi3", "gemma3"):
        lengths["rope.dimension_count"] = lengths.get("attention.value_length", 4)
        lengths["attention.sliding_window"] = 128  # the whole context
    plain = read_gguf(write_gguf(name, tiny[name], tmp_path / "plain.gguf")).metadata
    keys = {f"{arch}.{key}": value for key, value in (NEUTRAL_KEYS | lengths).items()}
    keys = {key: value for key, value in keys.items() if key not in plain}
    model = fallow.load(write_gguf(name, tiny[name], tmp_path / "m.gguf", keys=keys))
    expected = tiny[name].hidden(IDS)
    torch.testing.assert_close(model.hidden(IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keys", [{"rope.scale_linear": 1.0}, {"rope.scaling.type": "linear"}])
def test_gguf_scaling_by_nothing(
    keys: dict[str, Any], tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    keys = {f"llama.{key}": value for key, value in keys.items()}
    model = fallow.load(write_gguf("llama", tiny["llama"], tmp_path / "m.gguf", keys=keys))
    expected = tiny["llama"].hidden(IDS)
    torch.testing.assert_close(model.hidden(IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "keys"),
    [
        (
            "gemma3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"attention.sliding_window_pattern": [False, True]},
        ),
        (
            "gemma3",
            {"layer_types": ["sliding_attention", "full_attention"]},
            {"attention.sliding_window_pattern": 2},
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 4 / 6}},
            {"rope.dimension_count": 4},
        ),
        ("llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}),
        ("llama", {"rope_parameters": LINEAR}, {"rope.scaling.factor": 4.0}),
        (
            "qwen2",
            {"rope_parameters": YARN},
            {f"rope.scaling.{k}": v for k, v in YARN_KEYS.items()},
        ),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": LINEAR | {"rope_theta": 1e6},
                    "sliding_attention": PLAIN,
                },
                "layer_types": ["full_attention", "sliding_attention"],
            },
            {
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 4.0,
                "attention.sliding_window_pattern": [False, True],
            },
        ),
        ("phi3", {"sliding_window": 8}, {"attention.sliding_window": 8}),
        ("phi3", {"sliding_window": None}, {"attention.sliding_window": 0}),
    ],
)
def test_gguf_key_equals_config(
    name: str, changes: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    """transformers, told the same by its config, has the same hidden states."""
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (1, 40))
    source = fallow.load(make_folder(name, tmp_path / "folder", **changes))
    keys = {f"{name}.{key}": value for key, value in keys.items()}
    model = fallow.load(write_gguf(name, source, tmp_path / "m.gguf", keys=keys))
    torch.testing.assert_close(model.hidden(ids), source.hidden(ids), rtol=1e-5, atol=1e-5)
    plain = fallow.load(write_gguf(name, source, tmp_path / "plain.gguf"))
    assert (keys == {"phi3.attention.sliding_window": 0}) == torch.allclose(
        plain.hidden(ids), source.hidden(ids), atol=1e-3
    )


LLAMA3 = PLAIN | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_gguf_factors_of_llama_3(tmp_path: Path) -> None:
    """What llama.cpp's converter writes of rope_type llama3: a factor for every frequency."""
    model = fallow.load(make_folder("llama", tmp_path / "folder", rope_parameters=LLAMA3))
    plain = 1e4 ** (-np.arange(0, 6, 2) / 6)
    factors = plain / model.module.model.rotary_emb.inv_freq.numpy()
    assert factors.max() > 2
    add = {"rope_freqs.weight": factors.astype(np.float32)}
    found = fallow.load(write_gguf("llama", model, tmp_path / "m.gguf", add=add))
    expected = model.hidden(IDS)
    torch.testing.assert_close(found.hidden(IDS), expected, rtol=1e-5, atol=1e-5)
    pack(tmp_path / "m.gguf", tmp_path / "packed.gguf", down="f32")
    ids = np.random.default_rng(0).integers(2, VOCABULARY, 120)
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(ids)[None]).logits[0].numpy()
    engine = Engine(tmp_path / "packed.gguf", context=128)
    np.testing.assert_allclose(engine.logits(ids), logits, atol=0.04)


def test_gguf_factors_of_longrope(tmp_path: Path) -> None:
    folder = make_folder(
        "phi3", tmp_path / "folder", rope_scaling={"type": "longrope", **LONG}, **OF_64
    )
    model = fallow.load(folder)
    add = {
        f"rope_factors_{kind}.weight": np.array(LONG[f"{kind}_factor"], dtype=np.float32)
        for kind in ("short", "long")
    }
    keys = {
        "phi3.rope.scaling.original_context_length": 64,
        "phi3.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(2) / np.log(64))),
    }
    found = fallow.load(write_gguf("phi3", model, tmp_path / "m.gguf", keys=keys, add=add))
    for length in (60, 100):  # short and long
        ids = np.random.default_rng(0).integers(2, VOCABULARY, (1, length))
        torch.testing.assert_close(found.hidden(ids), model.hidden(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "add", "reason"),
    [
        ("none", {"rope_freqs": [1, 2]}, "2 factors in rope_freqs.weight, not 3"),
        (
            "none",
            {"rope_freqs": [1, 2, 0]},
            "factors in rope_freqs.weight that are not all positive",
        ),
        ("none", {"rope_factors_long": [1, 2, 3]}, "factors of only one length, or of two kinds"),
        ("yarn", {"rope_freqs": [1, 2, 3]}, "'yarn', the attn_factor 1 and their factors"),
        ("longrope", {}, "'longrope', the attn_factor 1 and no factors"),
    ],
)
def test_gguf_rotary_embeddings_that_are_refused(
    kind: str, add: dict[str, Any], reason: str, tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    tensors = {f"{name}.weight": np.array(values, dtype=np.float32) for name, values in add.items()}
    keys = {"llama.rope.scaling.type": kind}
    path = write_gguf("llama", tiny["llama"], tmp_path / "m.gguf", keys=keys, add=tensors)
    assert reason in message(path)


def test_gguf_of_ministral_3(tmp_path: Path) -> None:
    """Queries grow with their position from 8 on; the engine, at once and token by token."""
    source = fallow.load(make_folder("ministral3", tmp_path / "folder"))
    write_gguf("ministral3", source, tmp_path / "m.gguf")
    pack(tmp_path / "folder", tmp_path / "of_folder.gguf", quant="f32")
    pack(tmp_path / "m.gguf", tmp_path / "of_gguf.gguf", down="f32")
    ids = np.random.default_rng(0).integers(2, VOCABULARY, 120)
    with torch.inference_mode():
        expected = source.module(torch.from_numpy(ids)[None]).logits[0].numpy()
        rope = source.module.config.rope_parameters
        rope["llama_4_scaling_beta"] = 0.0
        without = source.module(torch.from_numpy(ids)[None]).logits[0].numpy()
    spread = np.ptp(expected, axis=1).mean()
    assert np.abs(without - expected)[:8].max() < 1e-4 * spread
    assert np.abs(without - expected)[8:].max() > 0.05 * spread
    for name in ("of_folder.gguf", "of_gguf.gguf"):
        engine = Engine(tmp_path / name, plan=False)
        found = engine.logits(ids)
        engine.reset()
        one_by_one = np.concatenate([engine.forward(ids[i : i + 1]) for i in range(len(ids))])
        for logits in (found, one_by_one):
            assert np.abs(logits - expected).max() < 0.01 * spread
            assert (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.995


MINISTRAL3: dict[str, Any] = dict(CONFIGS["ministral3"][1])


@pytest.mark.parametrize("multiplier", [0.0, 0.5])
def test_gguf_multiplier_of_yarns_magnitude(multiplier: float, tmp_path: Path) -> None:
    """mscale_all_dim, where mscale is 1: that is all that llama.cpp knows of both."""
    rope = MINISTRAL3["rope_parameters"] | {"mscale_all_dim": multiplier}
    folder = make_folder("ministral3", tmp_path / "folder", rope_parameters=rope)
    source = fallow.load(folder)
    model = fallow.load(write_gguf("ministral3", source, tmp_path / "m.gguf"))
    scale = source.module.model.rotary_emb.attention_scaling
    assert scale > 1.06
    assert model.module.model.rotary_emb.attention_scaling == pytest.approx(scale)
    torch.testing.assert_close(model.hidden(IDS), source.hidden(IDS), rtol=1e-5, atol=1e-5)


def test_gguf_of_mistral_small_3(tmp_path: Path) -> None:
    """Without yarn and temperature, a mistral3 file and a ministral3 folder are a Mistral."""
    folder = make_folder("ministral3", tmp_path / "folder", rope_parameters=PLAIN)
    model = fallow.load(folder)
    path = write_gguf("ministral3", model, tmp_path / "m.gguf")
    change_config(folder, {"model_type": "mistral"})
    expected = fallow.load(folder).hidden(IDS)
    torch.testing.assert_close(model.hidden(IDS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fallow.load(path).hidden(IDS), expected, rtol=1e-5, atol=1e-5)


def test_gguf_temperature_beside_factors(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    keys = {"mistral3.rope.scaling.type": "none"}
    add = {"rope_freqs.weight": np.ones(4, dtype=np.float32)}
    model = fallow.load(make_folder("ministral3", tmp_path / "folder", rope_parameters=PLAIN))
    write_gguf("ministral3", model, tmp_path / "fine.gguf", keys=keys, add=add)
    expected = model.hidden(IDS)
    found = fallow.load(tmp_path / "fine.gguf").hidden(IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    keys |= {"mistral3.attention.temperature_scale": 0.1}
    said = message(write_gguf("ministral3", model, tmp_path / "m.gguf", keys=keys, add=add))
    assert "factors of their own and an attention.temperature_scale" in said


@pytest.mark.parametrize(
    "keys", [{"general.type": "adapter"}, {"general.type": "mmproj"}, {"adapter.lora.alpha": 1.0}]
)
def test_gguf_that_is_no_model(
    keys: dict[str, Any], tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    kind = keys.get("general.type", "adapter")
    assert message(write_gguf("llama", tiny["llama"], tmp_path / "m.gguf", keys=keys)) == (
        f"GGUF M has the general.type '{kind}', not model; give the model that it belongs to, and "
        "an adapter to pack --lora"
    )


# Types that nothing here quantises to: bytes of a block, weights in it, where its scale lies, and
# whether the engine has kernels for them.
RARE_TYPES = {
    "IQ4_NL": (18, 32, slice(0, 2), True),
    "IQ4_XS": (136, 256, slice(0, 2), True),
    "IQ2_XXS": (66, 256, slice(0, 2), False),
    "TQ1_0": (54, 256, slice(52, 54), False),
    "TQ2_0": (66, 256, slice(64, 66), False),
    "MXFP4": (17, 32, slice(0, 1), True),
}


@pytest.mark.parametrize("quant", RARE_TYPES)
def test_rare_types_are_kept_or_written_anew(quant: str, tmp_path: Path, capfd: Any) -> None:
    n_bytes, size, scale, is_kept = RARE_TYPES[quant]
    source = fallow.load(make_folder("llama", tmp_path / "folder", hidden_size=256))
    raw = np.random.default_rng(0).integers(0, 256, (37, 256 // size * n_bytes), dtype=np.uint8)
    if quant == "TQ2_0":  # of its four codes three are used
        raw = raw & ~(raw >> 1 & 0x55)
    kind = gguf.GGMLQuantizationType[quant]
    one = np.array([127], np.uint8) if quant == "MXFP4" else np.array([1.0], "<f2").view(np.uint8)
    raw.reshape(37, -1, n_bytes)[:, :, scale] = one
    size_now = float(gguf.dequantize(raw, kind).std())
    value = np.array([0.1 / size_now], "<f2").view(np.uint8)
    if quant == "MXFP4":  # a power of two
        value = np.array([127 + round(np.log2(0.1 / size_now))], np.uint8)
    raw.reshape(37, -1, n_bytes)[:, :, scale] = value
    changes = {"blk.1.ffn_up.weight": raw}
    path = write_gguf("llama", source, tmp_path / "m.gguf", quant=quant, **changes)
    model = fallow.load(path)
    expected = gguf.dequantize(raw, kind)
    np.testing.assert_array_equal(model.layers[1].up_proj.weight.numpy(), expected)
    pack(path, tmp_path / "packed.gguf", down="f32")
    said = " ".join(capfd.readouterr().err.split())
    told = f"tensors in {quant} (1, blk.1.ffn_up.weight first) are written in Q6_K" in said
    assert told != is_kept
    written = read_gguf(tmp_path / "packed.gguf").tensors["layers.1.up_proj.weight"]
    assert written.type == (quant if is_kept else "Q6_K")
    ids = np.random.default_rng(0).integers(2, VOCABULARY, 60)
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = Engine(tmp_path / "packed.gguf").logits(ids)
    assert np.abs(found - logits).max() < 0.05 * np.ptp(logits)


# Folders ----------------------------------------------------------------------------------------


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


QUANTIZED = {"quant_method": "gptq", "bits": 4}
# What transformers' class of the model passes over, or fallow does not compute.
CHANGING_CONFIGS = [
    ("llama", {"quantization_config": QUANTIZED}, "quantization_config is {'quant_method': 'gptq'"),
    ("bitnet", {"quantization_config": {"quant_method": "bitnet"}}, "quantization_config is"),
    ("llama", {"quantization": {"bits": 4}}, "quantization is {'bits': 4}"),  # MLX's
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("llama", {"sliding_window": 16}, "sliding_window is 16"),
    ("llama", {"layer_types": ["full_attention"] * 2}, "layer_types is ['full_attention'"),
    ("llama", {"num_experts": 8}, "num_experts is 8"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier is 0.2"),
    ("llama", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("llama", {"is_causal": False}, "is_causal is False"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": {"factor": 4.0}}, "the factor 4.0, but no rope_type"),
    (
        "qwen2",
        {"rope_parameters": None, "rope_scaling": {"type": None, "factor": 2.0}},
        "the factor 2.0, but no rope_type",
    ),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    ("mistral", {"rope_parameters": PLAIN | {"llama_4_scaling_beta": 1}}, "llama_4_scaling_beta 1"),
    ("ministral3", {"rope_parameters": PLAIN | {"llama_4_scaling_gamma": 2}}, "scaling_gamma 2"),
    ("ministral3", {"layer_types": ["full_attention"] * 2}, "layer_types is ['full_attention'"),
    ("mistral", {"per_layer_config": {"0": {}, "1": {}}}, "per_layer_config is {'0'"),
    ("qwen2", {"layer_types": ["linear_attention", "full_attention"]}, "layer_types has 'linear"),
    (
        "qwen2",
        {"layer_types": ["sliding_attention", "full_attention"]},
        "sliding_window is None, but must be 1 or more",
    ),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
]


@pytest.mark.parametrize(("name", "changes", "said"), CHANGING_CONFIGS)
def test_config_that_changes_the_computation(
    name: str, changes: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[name], tmp_path / "copy"))
    change_config(folder, changes)
    found = message(folder)
    assert said in found
    assert "\n" not in found


def test_config_of_real_models(folders: dict[str, Path], copy: Path) -> None:
    """Notes of SmolLM2's, Qwen2.5's and other configs; none of them changes what is computed."""
    notes = {
        "_name_or_path": "x",
        "_attn_implementation_autoset": True,
        "attn_logit_softcapping": None,
        "is_llama_config": True,
        "logits_scaling": 1.0,
        "max_window_layers": 21,
        "num_experts": 0,
        "residual_dropout": 0.1,
        "quantization_config": None,
        "rope_interleaved": False,
        "rope_scaling": None,
        "sliding_window": 128,
        "torch_dtype": "float32",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "unsloth_version": "2025.1",
        "use_mrope": False,
        "use_sliding_window": False,
    }
    change_config(copy, notes)
    expected = fallow.load(folders["llama"]).hidden(IDS)
    assert torch.equal(fallow.load(copy).hidden(IDS), expected)


# Folders of pictures and text --------------------------------------------------------------------


def make_wrapper(name: str, folder: Path, **changes: Any) -> Any:
    """A tiny random model of pictures and text, whose text model is that of a folder of `name`."""
    class_name, settings = CONFIGS[name]
    vision = transformers.PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        image_size=28,
        patch_size=14,
    )
    text = getattr(transformers, class_name)(**settings)
    config = transformers.Mistral3Config(vision_config=vision, text_config=text, **changes)
    torch.manual_seed(0)
    module = transformers.Mistral3ForConditionalGeneration(config).eval()
    module.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return module


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["mistral", "ministral", "ministral3"])
def test_text_model_of_a_folder_that_reads_pictures(
    name: str, tied: bool, tmp_path: Path, capfd: Any
) -> None:
    module = make_wrapper(name, tmp_path / "folder", tie_word_embeddings=tied)
    ids = np.random.default_rng(0).integers(2, VOCABULARY, 60)
    with torch.inference_mode():
        expected = module(torch.from_numpy(ids)[None]).logits[0]
    model = fallow.load(tmp_path / "folder")
    assert model.architecture.model_type == name
    found = model.logits(model.hidden(ids[None]))[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    note = " ".join(capfd.readouterr().err.split())
    assert "its text model; 15 tensors are left out: multi_modal_projector, vision_tower" in note
    # The names that transformers has for them in memory may be those of a file, too.
    state = {k: v.clone() for k, v in module.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    save_file(state, tmp_path / "folder" / "model.safetensors", {"format": "pt"})
    again = fallow.load(tmp_path / "folder")
    assert torch.equal(again.hidden(ids[None]), model.hidden(ids[None]))
    assert again.fingerprint == model.fingerprint
    pack(tmp_path / "folder", tmp_path / "packed.gguf", quant="f32")
    logits = Engine(tmp_path / "packed.gguf", plan=False).logits(ids)
    np.testing.assert_allclose(logits, expected.numpy(), atol=0.04)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": QUANTIZED}, "quantization_config is {'quant_method': 'gptq'"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5, which is not computed for mistral3 models"),
        ({"text_config": None}, "has no text_config"),
        ({"text_config": {"model_type": "odd"}}, "unknown architecture 'odd'"),
        ({"text_config": {"final_logit_softcapping": 3.0}}, "final_logit_softcapping is 3.0"),
        ({"text_config": {"num_hidden_layers": 3}}, "lacks the tensors model.layers.2."),
    ],
)
def test_folder_that_reads_pictures_and_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    make_wrapper("ministral3", tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    if isinstance(found := changes.get("text_config"), dict):
        changes = {"text_config": text | found}
    change_config(tmp_path, changes)
    assert said in message(tmp_path)


# Packed models ----------------------------------------------------------------------------------

# As Gemma 4 31B has it: values of global layers are what k_proj puts out.
WITHOUT_INPUTS = {
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
PACKED_VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0} | OF_64}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    ("llama", {"rope_parameters": LONG | OF_64}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("phi3", {"rope_scaling": {"type": "longrope", **LONG}} | OF_64),
    ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 4 / 6}}),
    ("mistral", {"sliding_window": 3}),
    ("ministral3", {"sliding_window": 24}),
    ("ministral3", {"rope_parameters": PLAIN}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    (
        "gemma3",
        {"query_pre_attn_scalar": 3, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    ("gemma4", WITHOUT_INPUTS),
    ("gemma4", {"num_kv_shared_layers": 0, "num_global_key_value_heads": 1}),
    ("gemma4", {"global_head_dim": 8, "attention_bias": True, "hidden_activation": "silu"}),
    ("gemma4", {"num_kv_shared_layers": 1, "head_dim": 16}),
]


@pytest.mark.parametrize(("name", "changes"), PACKED_VARIANTS)
def test_packed_variant_equals_transformers(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The engine's cache is of float16: 0.02 of logits up to 6."""
    model = fallow.load(make_folder(name, tmp_path / "folder", **changes))
    pack(tmp_path / "folder", tmp_path / "packed.gguf", quant="f32")
    engine = Engine(tmp_path / "packed.gguf", plan=False)
    ids = np.random.default_rng(0).integers(2, VOCABULARY, 60)
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(engine.logits(ids), expected, atol=0.04)
    # Frequencies for longer texts are others; the file ends where they would be needed.
    has_two = "short_factor" in str(changes)
    assert engine.file.get("fallow.context_length") == (64 if has_two else 128)


@pytest.mark.parametrize("name", ["_remove_final_layer_norm", "layer_norm_elementwise_affine"])
def test_norms_that_cannot_be_packed(name: str, tmp_path: Path) -> None:
    folder = make_folder("opt", tmp_path / "folder", **{name: name[0] == "_"})
    with pytest.raises(FallowError, match="has norms without weights"):
        pack(folder, tmp_path / "packed.gguf", quant="f32")
