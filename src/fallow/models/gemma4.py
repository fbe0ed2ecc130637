"""Gemma 4 (text). GeGLU, heads of another width in global layers, inputs of each layer.

The last layers may have the keys and values of earlier ones, values of global layers may be what
k_proj puts out, and values are normed.
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
    rows_of,
    vocabulary_size,
)
from fallow.models.gemma3 import GEMMA_NORMS, GEMMA_NORMS_BLOCK
from fallow.models.gemma3n import PER_LAYER_BLOCK, PER_LAYER_GLOBAL


def _config(file: GgufFile) -> dict[str, Any]:
    def get(key: str, *default: Any) -> Any:
        return file.get(f"gemma4.{key}", *default)

    n = get("block_count")
    kinds = layer_types(get("attention.sliding_window_pattern"), n)
    is_global = [kind == KINDS_OF_LAYERS[0] for kind in kinds]
    dim, local_dim = get("attention.key_length"), get("attention.key_length_swa")
    for key, usual in {
        "attention.value_length": dim,
        "attention.value_length_swa": local_dim,
        "rope.dimension_count": dim,
        "rope.dimension_count_swa": local_dim,
    }.items():
        if (value := get(key, usual)) != usual:
            raise FallowError(
                f"GGUF {file.path}: gemma4.{key} is {value}, not {usual}, which is not supported"
            )
    kv_heads = np.broadcast_to(get("attention.head_count_kv"), n).tolist()
    widths = np.broadcast_to(get("feed_forward_length"), n).tolist()
    width = get("embedding_length_per_layer_input", 0)
    full = next((i for i in range(n) if is_global[i]), 0)
    rope = {
        "rope_type": "proportional",
        "rope_theta": get("rope.freq_base"),
        "partial_rotary_factor": _turning(file, dim),
    }
    local = {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 10000.0)}
    return {
        "vocab_size": vocabulary_size(file),
        "hidden_size": get("embedding_length"),
        "intermediate_size": min(widths),
        "use_double_wide_mlp": min(widths) != max(widths),
        "num_hidden_layers": n,
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": kv_heads[0],
        "head_dim": local_dim,
        "per_layer_config": {
            i: {"head_dim": dim if is_global[i] else local_dim, "num_key_value_heads": kv_heads[i]}
            for i in range(n)
        },
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensors,
        "num_kv_shared_layers": get("attention.shared_kv_layers", 0),
        "layer_types": kinds,
        "sliding_window": get("attention.sliding_window"),
        "rope_parameters": dict(zip(KINDS_OF_LAYERS, (rope, local), strict=True)),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "final_logit_softcapping": get("final_logit_softcapping", 0.0) or None,
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": rows_of(file, "per_layer_token_embd.weight") if width else 0,
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id", None),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id", None),
    }


def _turning(file: GgufFile, head_dim: int) -> float:
    """The leading share of a global head's frequencies that turn: others are divided by 1e30."""
    if "rope_freqs.weight" not in file.tensors:
        raise FallowError(f"GGUF {file.path} has no rope_freqs.weight; download it again")
    factors = file.tensors["rope_freqs.weight"].dequantize()
    turning = int((factors == 1).sum())
    expected = np.where(np.arange(head_dim // 2) < turning, 1, 1e30).astype(np.float32)
    if not np.array_equal(factors, expected):
        raise FallowError(
            f"GGUF {file.path} has other factors in rope_freqs.weight than Gemma 4's, which is not "
            "understood; give the model as a Hugging Face folder"
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
