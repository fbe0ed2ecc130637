"""Phi-2. Non-gated GELU, attention and FFN in parallel, partial rotary embeddings, biases."""

from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import Architecture, Tensors, vocabulary_size
from fallow.models._rope import rope_parameters


def _config(file: GgufFile) -> dict[str, Any]:
    heads = file.get("phi2.attention.head_count")
    hidden = file.get("phi2.embedding_length")
    head_dim = hidden // heads
    return {
        "vocab_size": vocabulary_size(file),
        "hidden_size": hidden,
        "intermediate_size": file.get("phi2.feed_forward_length"),
        "num_hidden_layers": file.get("phi2.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("phi2.attention.head_count_kv", heads),
        "layer_norm_eps": file.get("phi2.attention.layer_norm_epsilon"),
        "rope_parameters": rope_parameters(file, file.get("phi2.rope.dimension_count"), head_dim),
        "max_position_embeddings": file.get("phi2.context_length"),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id", None),
    }


def _from_gguf(name: str, values: np.ndarray, config: Any) -> Tensors:
    if ".qkv_proj." not in name:
        return {name: values}
    head_dim = config.hidden_size // config.num_attention_heads
    sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    parts = np.split(values, np.cumsum([n * head_dim for n in sizes])[:2])
    return {name.replace("qkv", x): part for x, part in zip("qkv", parts, strict=True)}


def _check(config: Any) -> str | None:
    return "normed queries and keys (qk_layernorm)" if config.qk_layernorm else None


ARCHITECTURE = Architecture(
    model_type="phi",
    hf_class="PhiForCausalLM",
    norms={"attn_norm": "input_layernorm"},
    final_norm="model.final_layernorm",
    layer_norm=True,
    parallel=True,
    partial_rotary=True,
    check=_check,
    act="mlp.activation_fn",
    gate_proj=None,
    up_proj="mlp.fc1",
    down_proj="mlp.fc2",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
    gguf_name="phi2",
    gguf_block={
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    },
    gguf_global={
        "token_embd": "model.embed_tokens",
        "output_norm": "model.final_layernorm",
        "output": "lm_head",
    },
    gguf_config=_config,
    from_gguf=_from_gguf,
)
