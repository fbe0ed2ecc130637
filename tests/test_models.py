"""Every architecture, as a folder and as a GGUF file; and every way a model can be unusable."""

import json
import shutil
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import fallow
from conftest import CONFIGS, DENSE, EXPERTS, VOCABULARY, make_folder
from fallow.checkpoints.weights import read_gguf, read_safetensors
from fallow.common.errors import FallowError, UsageError
from fallow.models import ARCHITECTURES, architectures
from fallow.models._base import unpermute
from fallow.models.taps import attach, tap_names

IDS = np.random.default_rng(0).integers(2, VOCABULARY, (2, 19))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_transformers_own(name: str, tiny: dict[str, fallow.Model]) -> None:
    model = tiny[name]
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(IDS)).logits
    torch.testing.assert_close(model.logits(model.hidden(IDS)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_taps_read_the_ffn(name: str, tiny: dict[str, fallow.Model]) -> None:
    """The tapped values obey the equations of docs/methods.md."""
    model = tiny[name]
    seen: dict[tuple[str, int], torch.Tensor] = {}
    names = tap_names(model.layers[0])
    taps = {n: (lambda layer, value, n=n: seen.__setitem__((n, layer), value)) for n in names}
    with attach(model.layers, taps):
        model.hidden(IDS)
    for i, layer in enumerate(model.layers):
        v = {n: seen[n, i] for n in names}
        assert v["x"].shape == (IDS.size, 24)
        assert v["inter"].shape == (IDS.size, 37)
        inter = v["gate_act"] * v["up"] if layer.gated else v["gate_act"]
        if name == "bitnet":
            inter = layer.block.get_submodule("mlp.ffn_sub_norm")(inter)
        torch.testing.assert_close(v["inter"], inter)
        torch.testing.assert_close(v["gate_act"], layer.act(v["gate_pre"]))
        torch.testing.assert_close(v["ffn_out"], layer.down_proj(v["inter"]))
        if layer.gate_up_proj is not None:
            gate, up = layer.gate_up_proj(v["x"]).chunk(2, dim=-1)
            torch.testing.assert_close(v["gate_pre"], gate)
            torch.testing.assert_close(v["up"], up)
        else:
            first = layer.gate_proj if layer.gated else layer.up_proj
            expected = first(v["x"])  # type: ignore[misc]
            if name == "gemma3n" and i < 2:
                expected = kept_of_gate(expected, 0.7)
                assert 0.6 < float((v["gate_act"] == 0).float().mean()) < 0.8
            torch.testing.assert_close(v["gate_pre"], expected)
        for projection, module in layer.projections.items():
            assert v[projection].shape == (IDS.size, module.in_features)


def kept_of_gate(values: torch.Tensor, share: float) -> torch.Tensor:
    """What a layer of Gemma 3n keeps of its gate: what a Gaussian's quantile at `share` exceeds."""
    quantile = NormalDist().inv_cdf(share)
    limits = values.mean(dim=1) + quantile * values.var(dim=1, correction=0).sqrt()
    return (values - limits[:, None]).clamp_min(0)


@pytest.mark.parametrize("name", DENSE)
def test_taps_replace_values(name: str, tiny: dict[str, fallow.Model]) -> None:
    """Zeroing the input of down_proj everywhere equals zeroing its weights."""
    model = tiny[name]
    for tap in ("inter", "down_proj", "gate_act", *(["up"] if model.layers[0].gated else [])):
        with attach(model.layers, {tap: lambda _, value: torch.zeros_like(value)}):
            cut = model.hidden(IDS)
        down = [layer.down_proj for layer in model.layers]
        kept = [d.weight.clone() for d in down]
        for d in down:
            d.weight.zero_()
        expected = model.hidden(IDS)
        for d, weight in zip(down, kept, strict=True):
            d.weight.copy_(weight)
        torch.testing.assert_close(cut, expected)
    assert not torch.equal(model.hidden(IDS), expected)


def test_unknown_tap_names_the_known_ones(tiny: dict[str, fallow.Model]) -> None:
    with (
        pytest.raises(UsageError, match="unknown tap 'up'; this model has x, gate_pre"),
        attach(tiny["opt"].layers, {"up": lambda *_: None}),
    ):
        pass


# GGUF ------------------------------------------------------------------------------------------


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the llama family."""
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


PERMUTED = ("llama", "arcee", "granite", "smollm3", "mixtral", "granitemoe", "ministral3")
PARTIAL = ("phi", "gpt_neox", "nemotron")
LAYER_NORM_EPS = ("layer_norm_eps", "norm_epsilon", "norm_eps")


def write_gguf(
    name: str,
    model: fallow.Model,
    path: Path,
    keys: dict[str, Any] | None = None,
    part: int = 0,
    add: dict[str, np.ndarray] | None = None,
    quant: str = "",
    widths: list[int] | None = None,
    **changes: Any,
) -> Path:
    """A GGUF file of a tiny model, as llama.cpp's converter would write it.

    `keys`: more metadata; `part`: split into parts of so many tensors; `add`: more tensors;
    `changes`: other ones, of which bytes are of the type `quant`; `widths`: other FFN widths.
    """
    arch, config = model.architecture, model.module.config
    assert arch.gguf_name is not None
    writer = gguf.GGUFWriter(path, arch.gguf_name, split_max_tensors=part)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    if name == "gemma4":
        writer.add_feed_forward_length(widths or one_or_all(model.intermediate_sizes))
    else:
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if name == "gemma4":
        layers = range(config.num_hidden_layers)
        writer.add_head_count_kv([config.per_layer_config[i].num_key_value_heads for i in layers])
    elif name != "gpt_neox":
        writer.add_head_count_kv(config.num_key_value_heads)
    if name in PARTIAL:
        writer.add_rope_dimension_count(int(8 * config.rope_parameters["partial_rotary_factor"]))
    if (eps := next((e for e in LAYER_NORM_EPS if hasattr(config, e)), None)) is not None:
        writer.add_layer_norm_eps(getattr(config, eps))
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if name in ("qwen3", "qwen3_moe", "gemma2", "gemma3", "ministral3", "gpt_oss"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if name in ("gemma2", "gemma3", "olmo3", "gpt_oss"):
        writer.add_sliding_window(16)
    if name == "olmo3":
        writer.add_sliding_window_pattern([True, False])
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "gemma3n":
        add_gemma3n(writer, config)
    if name == "gemma4":
        add_gemma4(writer, config)
    if name in EXPERTS:
        add_experts(writer, model)
    if name in ("granite", "granitemoe"):
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if name == "gpt_neox":
        writer.add_parallel_residual(True)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if name in ("ministral3", "gpt_oss") and rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if name == "ministral3" and rope["rope_type"] == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    writer.add_rope_freq_base(rope["rope_theta"])
    tokens = [t for t, _ in sorted(model.tokenizer.backend.get_vocab().items(), key=lambda e: e[1])]
    merges = json.loads(model.tokenizer.backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 2 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    for key, value in (keys or {}).items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    for tensor_name, values in (gguf_tensors(name, model) | (add or {})).items():
        changed = changes.get(tensor_name, values)
        kind = None if changed.dtype != np.uint8 else gguf.GGMLQuantizationType[quant]
        writer.add_tensor(tensor_name, changed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one_or_all(values: list[int]) -> int | list[int]:
    return values if len({*values}) > 1 else values[0]


def add_gemma3n(writer: Any, config: Any) -> None:
    """Keys that no other architecture has."""
    writer.add_key_length(8)
    writer.add_sliding_window(16)
    writer.add_sliding_window_pattern([k == "sliding_attention" for k in config.layer_types])
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_altup_active_idx(config.altup_active_idx)
    writer.add_altup_num_inputs(config.altup_num_inputs)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    shares = torch.tensor(config.activation_sparsity_pattern)
    writer.add_activation_sparsity_scale(torch.special.ndtri(shares).tolist())


def add_gemma4(writer: Any, config: Any) -> None:
    """Keys that no other architecture has."""
    is_local = [kind == "sliding_attention" for kind in config.layer_types]
    dims = [config.per_layer_config[is_local.index(one)].head_dim for one in (False, True)]
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(dims[0])
    writer.add_key_length_swa(dims[1])
    writer.add_value_length_swa(dims[1])
    writer.add_rope_dimension_count_swa(dims[1])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_sliding_window(16)
    writer.add_sliding_window_pattern(is_local)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)


def add_experts(writer: Any, model: fallow.Model) -> None:
    """Keys of a mixture of experts."""
    config, experts = model.module.config, model.layers[0].experts
    assert experts is not None
    writer.add_expert_count(experts.count)
    writer.add_expert_used_count(experts.used)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "gpt_oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def gguf_tensors(name: str, model: fallow.Model) -> dict[str, np.ndarray]:
    """The weights under the names that the gguf package gives them."""
    kinds = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    n_layers = len(model.layers)
    names = gguf.get_tensor_name_map(kinds[model.architecture.gguf_name or ""], n_layers)
    state = {k: v.float().numpy() for k, v in model.module.state_dict().items()}
    if model.module.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if name == "phi":  # the file fuses q, k and v
        for i in range(2):
            for kind in ("weight", "bias"):
                prefix = f"model.layers.{i}.self_attn"
                parts = [state.pop(f"{prefix}.{x}_proj.{kind}") for x in "qkv"]
                state[f"{prefix}.qkv_proj.{kind}"] = np.concatenate(parts)
    found = {}
    if name == "gemma3n":
        for part, short in (("projections", "proj"), ("unembed_projections", "unembd_proj")):
            matrices = [state.pop(f"model.altup_{part}.{i}.weight") for i in range(3)]
            found[f"altup_{short}.weight"] = np.stack(matrices)
        # Those of the layers that do not read them are in published files all the same.
        own = {k: v for k, v in state.items() if k.startswith("model.layers.1.self_attn.k_")}
        state |= {k.replace(".1.", ".3."): v + 1 for k, v in own.items()}
    if name == "gemma4":
        rope = model.module.model.rotary_emb.full_attention_inv_freq
        found["rope_freqs.weight"] = np.where(rope > 0, 1, 1e30).astype(np.float32)
    if name == "gpt_oss":
        found |= gpt_oss_experts(state)
    for key in [key for key in state if key.endswith("experts.gate_up_proj")]:
        for part, half in zip(("gate", "up"), np.split(state.pop(key), 2, axis=1), strict=True):
            index = key.split(".")[2]
            found[f"blk.{index}.ffn_{part}_exps.weight"] = half
    for key, values in state.items():
        key = key.replace(".sinks", ".sinks.weight")
        if key.endswith("experts.down_proj"):
            found[f"blk.{key.split('.')[2]}.ffn_down_exps.weight"] = values
            continue
        key = key.replace("moe.router.weight", "moe.router.layer.weight")  # Granite's
        key = key.replace("_output_scale", "_output_scale.weight")  # Gemma 3n's
        key = key.replace(".layer_scalar", ".layer_scalar.weight")  # Gemma 4's
        if key.endswith("shared_expert_gate.weight"):
            values = values[0]
        if name in PERMUTED and ".q_proj." in key:
            values = permute(values, 4)
        if name in PERMUTED and ".k_proj." in key:
            values = permute(values, 2)
        if model.architecture.norm_offset and "norm" in key and key.endswith(".weight"):
            values = values + 1
        if ".query_key_value." in key:  # head by head; the file has all of q first
            heads = values.reshape(3, 3, 8, *values.shape[1:])
            values = heads.swapaxes(0, 1).reshape(values.shape)
        found[names.get_name(key, try_suffixes=(".weight", ".bias"))] = values
    assert None not in found
    return found


def gpt_oss_experts(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the experts of GPT-OSS, which have rows of gate and up in turn, (n, in, out)."""
    found = {}
    for key in [key for key in state if ".experts." in key]:
        values, index = state.pop(key), key.split(".")[2]
        kind = "bias" if key.endswith("_bias") else "weight"
        values = values.swapaxes(1, -1)  # of a matrix; a bias has one of the two
        halves = {"gate": values[:, ::2], "up": values[:, 1::2]}
        parts = {"down": values} if "down" in key else halves
        for part, rows in parts.items():
            found[f"blk.{index}.ffn_{part}_exps.{kind}"] = np.ascontiguousarray(rows)
    return found


GGUF_NAMES = [n for n, a in zip(ARCHITECTURES, architectures(), strict=True) if a.gguf_config]


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_gguf_equals_folder(name: str, tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    model = fallow.load(write_gguf(name, tiny[name], tmp_path / "m.gguf"))
    expected = tiny[name].hidden(IDS)
    torch.testing.assert_close(model.hidden(IDS), expected, rtol=1e-5, atol=1e-5)
    text = "neuron 5 rests; the 3rd gate lets é through </s>"
    assert model.tokenizer.encode(text).tolist() == tiny[name].tokenizer.encode(text).tolist()
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_unpermute_undoes_permute() -> None:
    values = np.arange(48.0).reshape(16, 3)
    np.testing.assert_array_equal(unpermute(permute(values, 2), 2), values)


# What can be wrong -----------------------------------------------------------------------------


def message(path: str | Path, shown: str | Path | None = None) -> str:
    with pytest.raises(FallowError) as error:
        fallow.load(path)
    return str(error.value).replace(str(shown or path), "M")


def test_missing_model() -> None:
    assert message("nowhere.gguf") == (
        "model M not found: no such file or folder, and no alias (smollm2, gemma3, qwen2.5-1.5b); "
        "see: fallow models"
    )


def test_hub_id_is_downloaded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(hub_id: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append((hub_id, allow_patterns))
        return str(folders["llama"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert fallow.load("some-org/some-model").architecture.model_type == "llama"
    assert asked[0][0] == "some-org/some-model"
    assert "*.safetensors" in asked[0][1]


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert message("some-org/some-model") == (
        "cannot download M from the hub (no route to host); check the id and the network, "
        "or give a local folder or .gguf file"
    )


def test_broken_gguf(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    path = write_gguf("llama", tiny["llama"], tmp_path / "m.gguf")
    data = path.read_bytes()
    last = list(read_gguf(path).tensors)[-1]
    path.write_bytes(data[:-100])
    assert message(path) == (
        f"GGUF M is not usable: truncated: tensor {last} lies outside the file of "
        f"{len(data) - 100} bytes; download or convert it again"
    )
    path.write_bytes(data[:10])
    assert message(path) == (
        "GGUF M is not usable: truncated: tensor count at byte 8 needs 8 bytes, the file has 2 "
        "left; download or convert it again"
    )
    path.write_bytes(b"PWRI" + data[4:])
    assert message(path) == (
        "GGUF M is not usable: wrong magic: not a GGUF file; download or convert it again"
    )
    path.write_bytes(b"")
    assert message(path) == "GGUF M is empty (0 bytes); download or convert it again"


def test_gguf_with_a_wrong_shape(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    wrong = np.zeros((36, 24), dtype=np.float32)
    changes = {"blk.1.ffn_up.weight": wrong}
    path = write_gguf("llama", tiny["llama"], tmp_path / "m.gguf", **changes)
    assert message(path) == (
        "GGUF M: tensor blk.1.ffn_up.weight gives model.layers.1.mlp.up_proj.weight the shape "
        "(36, 24), expected (37, 24)"
    )


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert message(tmp_path / "m.gguf") == (
        "unknown architecture 'mamba' in GGUF M; known: arcee, gemma2, gemma3, gemma3n, gemma4, "
        "gpt-oss, gptneox, granite, granitemoe, llama, mistral3, nemotron, olmo2, olmoe, phi2, "
        "phi3, qwen2, qwen2moe, qwen3, qwen3moe, smollm3, starcoder2"
    )


def test_gguf_without_embeddings(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    path = write_gguf("llama", tiny["llama"], tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"token_embd.weight", b"token_embx.weight"))
    assert message(path) == "GGUF M has no token_embd.weight; is it a whole language model?"


def test_gguf_that_transformers_refuses(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    path = write_gguf("llama", tiny["llama"], tmp_path / "m.gguf")
    key = b"llama.attention.head_count"
    at = path.read_bytes().index(key) + len(key) + 4
    data = path.read_bytes()
    path.write_bytes(data[:at] + (5).to_bytes(4, "little") + data[at + 4 :])
    assert message(path).startswith("GGUF M: transformers cannot build LlamaForCausalLM: ")


def test_folder_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert message(copy) == "cannot read M/config.json: No such file or directory"


def test_folder_of_an_unknown_architecture(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "mamba"}')
    assert message(copy) == (
        "unknown architecture 'mamba' in M/config.json; "
        "known: arcee, bamboo, bitnet, gemma2, gemma3_text, gemma3n_text, gemma4_text, gpt_neox, "
        "gpt_oss, granite, granitemoe, llama, llama_sparse_relu, minicpm, ministral, ministral3, "
        "mistral, mixtral, nemotron, olmo2, olmo3, olmoe, opt, phi, phi3, qwen2, qwen2_moe, qwen3, "
        "qwen3_5_text, qwen3_moe, smollm3, sparsellama, starcoder2"
    )


def test_folder_with_a_broken_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert message(copy) == "M/config.json is damaged; download it again"
    (copy / "config.json").write_text("{}")
    assert message(copy) == "M/config.json is not a model's config; download it again"


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert message(copy) == (
        "M has neither model.safetensors nor model.safetensors.index.json; "
        "fallow reads safetensors and GGUF weights"
    )


def test_truncated_safetensors(copy: Path) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 8])
    assert "M/model.safetensors is truncated: tensor" in message(copy)
    path.write_bytes(data[:100])
    length = int.from_bytes(data[:8], "little")
    assert message(copy) == (
        "safetensors file M/model.safetensors is truncated or no safetensors file: its header "
        f"needs {length} bytes, 92 are there; download it again"
    )


def test_folder_with_a_wrong_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 38}))
    assert message(copy) == (
        "M: tensor model.layers.0.mlp.down_proj.weight has the shape (24, 37), expected (24, 38)"
    )


def test_folder_that_lacks_a_tensor(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert message(copy).startswith("M lacks the tensors model.layers.2.")


def test_folder_without_tokenizer(copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert message(copy) == "M has no usable tokenizer; add its tokenizer.json"


def test_sharded_folder(
    tiny: dict[str, fallow.Model], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "sharded"
    tiny["llama"].module.save_pretrained(folder, max_shard_size="20KB")
    for path in folders["llama"].glob("tokenizer*"):
        shutil.copy(path, folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    model = fallow.load(folder)
    assert torch.equal(model.hidden(IDS), tiny["llama"].hidden(IDS))
    assert model.fingerprint == tiny["llama"].fingerprint
    shards[0].unlink()
    assert message(folder) == (
        f"shard M/{shards[0].name} listed in model.safetensors.index.json is missing"
    )


def test_unknown_dtype(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int3'; known: auto, float32"):
        fallow.load(folders["llama"], dtype="int3")


def test_bfloat16_keeps_float32_logits(folders: dict[str, Path]) -> None:
    model = fallow.load(folders["qwen2"], dtype="bfloat16")
    hidden = model.hidden(IDS)
    assert hidden.dtype == torch.bfloat16
    logits = model.logits(hidden)
    expected = hidden.double() @ model.module.lm_head.weight.double().T
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_another_model_has_another_fingerprint(
    tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    folder = make_folder("llama", tmp_path / "other", initializer_range=0.2)
    assert fallow.load(folder).fingerprint != tiny["llama"].fingerprint


def test_fingerprint_is_of_the_weights(tiny: dict[str, fallow.Model]) -> None:
    prints = {name: model.fingerprint for name, model in tiny.items()}
    own = ("llama_sparse_relu", "sparsellama", "bamboo")
    alike = (
        ("llama", "mistral", "ministral", "granite", *own),
        ("olmo2", "olmo3"),
        ("minicpm", "smollm3"),
    )
    for names in alike:  # the same seed and shapes
        assert len({prints[name] for name in names}) == 1
    assert len(set(prints.values())) == len(CONFIGS) - sum(len(names) - 1 for names in alike)


def test_generation_is_deterministic_and_sees_the_plan(
    tiny: dict[str, fallow.Model], texts: tuple[Path, Path]
) -> None:
    model = tiny["llama"]
    plan = fallow.calibrate(model, "topk", sparsity=0.9, text=texts[0], context=32, windows=4)
    dense = list(model.generate("neuron 4", 20))
    assert dense == list(model.generate("neuron 4", 20))
    assert dense != list(model.generate("neuron 4", 20, plan=plan))
    sampled = [list(model.generate("neuron", 9, 1.0, seed=s)) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


# Among them those with sliding windows, linear attention and states of convolutions in the cache.
@pytest.mark.parametrize("name", ["llama", "opt", "gemma3", "gemma3n", "gpt_oss", "qwen3_5"])
def test_generation_is_that_of_transformers(tiny: dict[str, fallow.Model], name: str) -> None:
    model = tiny[name]
    ids = torch.from_numpy(model.tokenizer.prompt("neuron 4 rests"))[None]
    told = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        eos_token_id=list(model.tokenizer.eos_ids) or None, pad_token_id=0,
    )  # fmt: skip
    expected = model.tokenizer.decode(told[0, ids.shape[1] :].tolist(), after=ids[0])
    assert "".join(model.generate(ids[0].numpy(), 12)) == expected


def test_generation_errors(tiny: dict[str, fallow.Model]) -> None:
    with pytest.raises(FallowError, match="the prompt is empty"):
        tiny["llama"].generate("")
    with pytest.raises(FallowError, match="exceed the model's context of 128"):
        tiny["llama"].generate("neuron " * 200)
    with pytest.raises(UsageError, match="--max-new-tokens must be at least 1"):
        tiny["llama"].generate("neuron", 0)
    with pytest.raises(FallowError, match="no chat template"):
        tiny["llama"].generate("hello", chat=True)


def test_reading_files_needs_no_torch(
    folders: dict[str, Path], tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    names = {t.name: t for t in read_safetensors(folders["llama"])}
    file = read_gguf(write_gguf("llama", tiny["llama"], tmp_path / "m.gguf"))
    np.testing.assert_array_equal(
        names["model.norm.weight"].dequantize(), file.tensors["output_norm.weight"].dequantize()
    )
