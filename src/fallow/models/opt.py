"""OPT. Non-gated ReLU with biases; naturally sparse. llama.cpp has no GGUF form of it."""

from fallow.models._base import Architecture

ARCHITECTURE = Architecture(
    model_type="opt",
    hf_class="OPTForCausalLM",
    act="activation_fn",
    gate_proj=None,
    up_proj="fc1",
    down_proj="fc2",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    layers="model.decoder.layers",
)
