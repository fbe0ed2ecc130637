"""Gemma 3 (text). GeGLU, sliding-window layers, norms before and after attention and FFN."""

from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import (
    KINDS_OF_LAYERS,
    LLAMA_BLOCK,
    QK_NORMS,
    QK_NORMS_BLOCK,
    Architecture,
    Tensors,
    layer_types,
    llama_config,
)


def _config(file: GgufFile) -> dict[str, Any]:
    config = llama_config(file)
    rope = config.pop("rope_parameters")
    # The local layers' base is not in the file; it is 10,000 in every Gemma 3 (report, 2.1).
    local = {"rope_type": "default", "rope_theta": file.get("gemma3.rope.freq_base_swa", 10000.0)}
    # Not in the file either: the 27B model (62 layers) alone scales by hidden / heads.
    per_head = config["hidden_size"] // config["num_attention_heads"]
    scale = per_head if config["num_hidden_layers"] == 62 else config["head_dim"]
    pattern = file.get("gemma3.attention.sliding_window_pattern", 6)
    return config | {
        "rope_parameters": dict(zip(KINDS_OF_LAYERS, (rope, local), strict=True)),
        "sliding_window": file.get("gemma3.attention.sliding_window"),
        "query_pre_attn_scalar": scale,
        "layer_types": layer_types(pattern, config["num_hidden_layers"]),
    }


def less_one(name: str, values: np.ndarray, config: Any) -> Tensors:
    """Gemma's norms multiply by 1 + weight; GGUF stores the sum."""
    return {name: values - 1 if "norm" in name and name.endswith(".weight") else values}


GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}

GEMMA_NORMS_BLOCK = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ARCHITECTURE = Architecture(
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    norms=GEMMA_NORMS | QK_NORMS,
    norm_offset=1.0,  # as in less_one
    config_keys=("sliding_window_pattern", "rope_local_base_freq"),
    gguf_name="gemma3",
    gguf_block=LLAMA_BLOCK | QK_NORMS_BLOCK | GEMMA_NORMS_BLOCK,
    gguf_config=_config,
    from_gguf=less_one,
)
