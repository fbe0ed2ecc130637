"""Gemma 3n (text). GeGLU, whose first layers keep the top of gate_proj's outputs.

Of these a layer with the share s in `activation_sparsity_pattern` keeps ReLU(y - m - d z), where m
and d are mean and standard deviation of a token's y, and z is the normal distribution's quantile at
s: exact zeros of gate_act come of it.
"""

from fallow.models._base import Architecture

ARCHITECTURE = Architecture(
    model_type="gemma3n_text",
    hf_class="Gemma3nForCausalLM",
    # The last layers take their keys and values from earlier ones.
    attention=("self_attn.q_proj", "self_attn.o_proj"),
    computes=lambda name, value: name == "final_logit_softcapping",
    check=lambda config: (
        "four residual streams (AltUp), LAuReL, inputs of each layer, and a top-k of gate_proj"
    ),
)
