"""GPT-NeoX (Pythia). Non-gated GELU with biases, attention and FFN in parallel with a norm each."""

from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import Architecture, Tensors, vocabulary_size
from fallow.models._rope import rope_parameters


def _config(file: GgufFile) -> dict[str, Any]:
    heads, hidden = file.get("{arch}.attention.head_count"), file.get("{arch}.embedding_length")
    rotary_dim = file.get("{arch}.rope.dimension_count")
    return {
        "vocab_size": vocabulary_size(file),
        "hidden_size": hidden,
        "intermediate_size": file.get("{arch}.feed_forward_length"),
        "num_hidden_layers": file.get("{arch}.block_count"),
        "num_attention_heads": heads,
        "layer_norm_eps": file.get("{arch}.attention.layer_norm_epsilon"),
        "use_parallel_residual": file.get("{arch}.use_parallel_residual", True),
        "rope_parameters": rope_parameters(file, rotary_dim, hidden // heads),
        "max_position_embeddings": file.get("{arch}.context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id", None),
    }


def _from_gguf(name: str, values: np.ndarray, config: Any) -> Tensors:
    if ".query_key_value." not in name:
        return {name: values}
    # The file has all of q, then of k, then of v; the checkpoint goes head by head.
    heads = values.reshape(3, config.num_attention_heads, -1, *values.shape[1:])
    return {name: np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(values.shape)}


def _check(config: Any) -> str | None:
    return None if config.use_parallel_residual else "FFNs after attention (use_parallel_residual)"


ARCHITECTURE = Architecture(
    model_type="gpt_neox",
    hf_class="GPTNeoXForCausalLM",
    act="mlp.act",
    gate_proj=None,
    up_proj="mlp.dense_h_to_4h",
    down_proj="mlp.dense_4h_to_h",
    attention=("attention.query_key_value", "attention.dense"),
    interleaves_qkv=True,
    stored_as={"lm_head.weight": "embed_out.weight"},
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    embed_tokens="gpt_neox.embed_in",
    rotary="gpt_neox.rotary_emb",
    layer_norm=True,
    parallel=True,
    partial_rotary=True,
    config_keys=("rotary_pct", "rotary_emb_base"),
    check=_check,
    gguf_name="gptneox",
    gguf_block={
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    gguf_global={
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "lm_head",
    },
    gguf_config=_config,
    from_gguf=_from_gguf,
)
