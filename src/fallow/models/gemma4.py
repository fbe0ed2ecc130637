"""Gemma 4 (text). GeGLU, heads of another width in global layers, inputs of each layer."""

from typing import Any

from fallow.models._base import Architecture


def _computes(name: str, value: Any) -> bool:
    if name == "per_layer_config":  # of layers, by their indices
        return all(set(layer) <= {"head_dim", "num_key_value_heads"} for layer in value.values())
    return name == "final_logit_softcapping" or (
        name == "use_bidirectional_attention" and value == "vision"  # of pictures alone
    )


ARCHITECTURE = Architecture(
    model_type="gemma4_text",
    hf_class="Gemma4ForCausalLM",
    # The last layers may take their keys and values from earlier ones, and values may be keys.
    attention=("self_attn.q_proj", "self_attn.o_proj"),
    computes=_computes,
    check=lambda config: (
        "heads of two widths, normed values, inputs of each layer, and keys and values that "
        "layers share"
    ),
    gguf_name="gemma4",
)
