"""OLMo 2. SwiGLU, norms after attention and FFN and not before, and of whole queries and keys."""

from fallow.models._base import Architecture

NORMS = {
    "attn_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
# Its GGUF files are read as OLMo 3's, which have the same name and may have windows.
ARCHITECTURE = Architecture(model_type="olmo2", hf_class="Olmo2ForCausalLM", norms=NORMS)
