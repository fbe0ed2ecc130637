"""Phi-3. SwiGLU with gate and up fused in one projection, and q, k, v in another."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import Architecture, llama_config


def _config(file: GgufFile) -> dict[str, Any]:
    # llama.cpp's converter writes 0 where there is no window, in Phi-4.
    window = file.get("phi3.attention.sliding_window", None) or None
    config = llama_config(file, partial_rotary=True) | {"sliding_window": window}
    # transformers overrides that of rope_parameters with this one.
    original = config["rope_parameters"].get("original_max_position_embeddings")
    return config | ({"original_max_position_embeddings": original} if original else {})


ARCHITECTURE = Architecture(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    act="mlp.activation_fn",
    gate_proj=None,
    up_proj=None,
    gate_up_proj="mlp.gate_up_proj",
    partial_rotary=True,
    attention=("self_attn.qkv_proj", "self_attn.o_proj"),
    gguf_name="phi3",
    gguf_block={
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    gguf_config=_config,
)
