"""OLMo 2. SwiGLU, norms after attention and FFN and not before, and of whole queries and keys."""

from fallow.models._base import QK_NORMS, Architecture

NORMS = {
    "attn_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
    **QK_NORMS,
}
# Its GGUF files are read as OLMo 3's, which have the same name and may have windows.
ARCHITECTURE = Architecture(model_type="olmo2", hf_class="Olmo2ForCausalLM", norms=NORMS)
