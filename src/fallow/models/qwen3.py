"""Qwen3. SwiGLU, normed queries and keys."""

from fallow.models._base import LLAMA_BLOCK, LLAMA_NORMS, Architecture, llama_config

ARCHITECTURE = Architecture(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    norms=LLAMA_NORMS | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    gguf_name="qwen3",
    gguf_block=LLAMA_BLOCK | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    gguf_config=llama_config,
)
