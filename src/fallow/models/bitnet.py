"""BitNet. Gated ReLU², most neurons exactly zero; norms before o_proj and before down_proj.

`inter` is the input of down_proj, so what its norm puts out: a neuron that is zero stays so.
"""

from fallow.models._base import LLAMA_NORMS, Architecture

ARCHITECTURE = Architecture(
    model_type="bitnet",
    hf_class="BitNetForCausalLM",
    norms=LLAMA_NORMS
    | {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"},
)
