"""Gemma 4 (text). GeGLU, heads of another width in global layers, inputs of each layer.

The last layers may have the keys and values of earlier ones, and then twice the neurons. Values of
global layers may be what k_proj puts out, and values are normed.
"""

from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.common.errors import FallowError
from fallow.models._base import (
    KINDS_OF_LAYERS,
    LLAMA_BLOCK,
    LLAMA_GLOBAL,
    QK_NORMS,
    QK_NORMS_BLOCK,
    Architecture,
    Tensors,
    layer_types,
    llama_config,
    rows_of,
)
from fallow.models.gemma3 import GEMMA_NORMS, GEMMA_NORMS_BLOCK
from fallow.models.gemma3n import PER_LAYER_BLOCK, PER_LAYER_GLOBAL


def _config(file: GgufFile) -> dict[str, Any]:
    def get(key: str, *default: Any) -> Any:
        return file.get(f"gemma4.{key}", *default)

    config = llama_config(file)  # of global layers
    n, dim, rope = config["num_hidden_layers"], config["head_dim"], config["rope_parameters"]
    kinds = layer_types(get("attention.sliding_window_pattern"), n)
    is_global = [kind == KINDS_OF_LAYERS[0] for kind in kinds]
    local_dim = get("attention.key_length_swa")
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if (value := get(key, local_dim)) != local_dim:
            raise FallowError(
                f"GGUF {file.path}: gemma4.{key} is {value}, not {local_dim}, "
                "which is not supported"
            )
    kv_heads = np.broadcast_to(config["num_key_value_heads"], n).tolist()
    shared = get("attention.shared_kv_layers", 0)
    widths = np.ravel(config["intermediate_size"]).tolist()
    is_wide = widths[-1] != widths[0]
    if len(widths) > 1 and widths != [widths[0] << (is_wide and i >= n - shared) for i in range(n)]:
        raise FallowError(
            f"GGUF {file.path}: gemma4.feed_forward_length is {widths}; the layers that have keys "
            "and values of others may have twice the neurons, and all others have as many"
        )
    width = get("embedding_length_per_layer_input", 0)
    first_global = is_global.index(True) if any(is_global) else 0
    proportional = {
        "rope_type": "proportional",
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": _turning(file, rope, dim),
    }
    local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10000.0)}
    return config | {
        "intermediate_size": widths[0],
        "use_double_wide_mlp": is_wide,
        "num_key_value_heads": kv_heads[0],
        "head_dim": local_dim,
        "per_layer_config": {
            i: {"head_dim": dim if is_global[i] else local_dim, "num_key_value_heads": kv_heads[i]}
            for i in range(n)
        },
        "attention_k_eq_v": f"blk.{first_global}.attn_v.weight" not in file.tensors,
        "num_kv_shared_layers": shared,
        "layer_types": kinds,
        "sliding_window": get("attention.sliding_window"),
        "rope_parameters": dict(zip(KINDS_OF_LAYERS, (proportional, local), strict=True)),
        "final_logit_softcapping": get("final_logit_softcapping", 0.0) or None,
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": rows_of(file, "per_layer_token_embd.weight") if width else 0,
    }


def _turning(file: GgufFile, rope: dict[str, Any], head_dim: int) -> float:
    """The leading share of a global head's frequencies that turn: others are divided by 1e30."""
    factors = np.array(rope.get("short_factor", []), dtype=np.float32)
    turning = int((factors == 1).sum())
    expected = np.where(np.arange(head_dim // 2) < turning, 1, 1e30).astype(np.float32)
    if not np.array_equal(factors, expected) or rope["attention_factor"] != 1:
        raise FallowError(
            f"GGUF {file.path} has no rope_freqs.weight as Gemma 4's, 1 and then 1e30, or its "
            "rotary embeddings are scaled, which is not understood; give the model as a Hugging "
            "Face folder"
        )
    return turning / len(factors)


def _from_gguf(name: str, values: np.ndarray, config: Any) -> Tensors:
    return {name.removesuffix(".weight") if ".layer_scalar." in name else name: values}


def _computes(name: str, value: Any) -> bool:
    if name == "per_layer_config":  # of layers, by their indices
        return all(set(layer) <= {"head_dim", "num_key_value_heads"} for layer in value.values())
    return name == "final_logit_softcapping" or (
        name == "use_bidirectional_attention" and value == "vision"  # of pictures alone
    )


def _check(config: Any) -> str | None:
    if (
        config.hidden_size_per_layer_input
        and config.vocab_size_per_layer_input != config.vocab_size
    ):
        return "inputs of each layer for other tokens (vocab_size_per_layer_input)"
    return None


ARCHITECTURE = Architecture(
    model_type="gemma4_text",
    hf_class="Gemma4ForCausalLM",
    norms=GEMMA_NORMS | QK_NORMS | {"v_norm": "self_attn.v_norm"},
    computes=_computes,
    check=_check,
    gguf_name="gemma4",
    gguf_block=LLAMA_BLOCK
    | QK_NORMS_BLOCK
    | GEMMA_NORMS_BLOCK
    | PER_LAYER_BLOCK
    | {"layer_output_scale": "layer_scalar"},
    gguf_global=LLAMA_GLOBAL | PER_LAYER_GLOBAL,
    gguf_config=_config,
    from_gguf=_from_gguf,
)
