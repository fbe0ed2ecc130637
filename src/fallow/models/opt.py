"""OPT. Non-gated ReLU with biases; naturally sparse. llama.cpp has no GGUF form of it."""

from typing import Any

from fallow.models._base import Architecture


def _check(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "norms after attention and FFN (do_layer_norm_before)"
    if config.word_embed_proj_dim != config.hidden_size:
        return "embeddings of another width (word_embed_proj_dim)"
    if config._remove_final_layer_norm or not config.layer_norm_elementwise_affine:
        return "norms without weights (_remove_final_layer_norm, layer_norm_elementwise_affine)"
    return None


ARCHITECTURE = Architecture(
    model_type="opt",
    hf_class="OPTForCausalLM",
    act="activation_fn",
    gate_proj=None,
    up_proj="fc1",
    down_proj="fc2",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    layers="model.decoder.layers",
    norms={"attn_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm"},
    final_norm="model.decoder.final_layer_norm",
    embed_tokens="model.decoder.embed_tokens",
    embed_positions="model.decoder.embed_positions",
    first_position=2,
    rotary=None,
    layer_norm=True,
    check=_check,
)
