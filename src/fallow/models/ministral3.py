"""Ministral 3, and the text model of Mistral Small 3. SwiGLU; long texts sharpen attention.

Queries grow with their position p by 1 + beta ln(1 + floor(p / the original context)), beta being
llama_4_scaling_beta of the rope_parameters (Llama 4's attention temperature).
"""

import math
from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.common.errors import FallowError
from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config, unpermute_qk


def _config(file: GgufFile) -> dict[str, Any]:
    config = llama_config(file)
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        # In llama.cpp (`llama-context.cpp`) this is mscale_all_dim where mscale is 1.
        multiplier = float(file.get("mistral3.rope.scaling.yarn_log_multiplier", 0.0))
        rope["attention_factor"] /= 0.1 * multiplier * math.log(max(rope["factor"], 1)) + 1
    beta = float(file.get("mistral3.attention.temperature_scale", 0.0))
    if beta != 0 and rope["rope_type"] == "longrope":
        raise FallowError(
            f"GGUF {file.path} has rotary embeddings with factors of their own and an "
            "attention.temperature_scale, which together are not understood; give the model as a "
            "Hugging Face folder"
        )
    context = config["max_position_embeddings"]
    original = file.get("mistral3.rope.scaling.original_context_length", 0) or context
    return config | {
        "rope_parameters": {"original_max_position_embeddings": original}
        | rope
        | {"llama_4_scaling_beta": beta}
    }


def _translate(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' class multiplies by what is not there."""
    key = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    rope = config.get(key)
    if not isinstance(rope, dict) or rope.get("llama_4_scaling_beta") is not None:
        return {}
    neutral = {"llama_4_scaling_beta": 0.0}
    if rope.get("original_max_position_embeddings") is None:
        neutral["original_max_position_embeddings"] = config["max_position_embeddings"]
    return {key: rope | neutral}


ARCHITECTURE = Architecture(
    model_type="ministral3",
    hf_class="Ministral3ForCausalLM",
    computes=lambda name, value: name in ("llama_4_scaling_beta", "max_position_embeddings"),
    translate=_translate,
    gguf_name="mistral3",
    gguf_block=LLAMA_BLOCK,
    gguf_config=_config,
    from_gguf=unpermute_qk,
)
