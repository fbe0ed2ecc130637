"""GPT-OSS. Clamped SwiGLU experts with biases, attention sinks, a window in every other layer."""

from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import (
    EXPERTS_BLOCK,
    EXPERTS_SETTINGS,
    LLAMA_BLOCK,
    Architecture,
    ExpertPaths,
    Tensors,
    expert_config,
    layer_types,
    llama_config,
)


def _config(file: GgufFile) -> dict[str, Any]:
    found = llama_config(file) | expert_config(file, "num_local_experts")
    rope = found["rope_parameters"]
    if rope["rope_type"] == "yarn":
        # No key says so, but every GPT-OSS has it: the bounds between frequencies that are
        # stretched and those that are not are no whole numbers. llama.cpp rounds them.
        rope["truncate"] = False
    pattern = file.get("gpt-oss.attention.sliding_window_pattern", 2)
    return found | {
        "intermediate_size": file.get("gpt-oss.expert_feed_forward_length"),
        "layer_types": layer_types(pattern, found["num_hidden_layers"]),
        "sliding_window": file.get("gpt-oss.attention.sliding_window"),
    }


def _from_gguf(name: str, values: np.ndarray, config: Any) -> Tensors:
    return {name.replace(".sinks.weight", ".sinks"): values}


def _translate(config: dict[str, Any]) -> dict[str, Any]:
    if "quantization_config" not in config:
        return {}
    from transformers.utils.quantization_config import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


ARCHITECTURE = Architecture(
    model_type="gpt_oss",
    hf_class="GptOssForCausalLM",
    experts=ExpertPaths(router="mlp.router", is_transposed=True),
    sinks="self_attn.sinks",
    config_keys=("num_experts",),
    settings=EXPERTS_SETTINGS,
    computes=lambda name, value: (
        name == "quantization_config" and (value or {}).get("quant_method") == "mxfp4"
    ),
    translate=_translate,
    gguf_name="gpt-oss",
    gguf_block={name: path for name, path in LLAMA_BLOCK.items() if name != "ffn_norm"}
    | EXPERTS_BLOCK
    | {
        "post_attention_norm": "post_attention_layernorm",
        "attn_sinks": "self_attn.sinks",
        "ffn_gate_inp": "mlp.router",
    },
    gguf_config=_config,
    from_gguf=_from_gguf,
)
