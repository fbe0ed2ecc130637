"""Qwen3. SwiGLU, normed queries and keys."""

from fallow.models._base import (
    LLAMA_BLOCK,
    LLAMA_NORMS,
    QK_NORMS,
    QK_NORMS_BLOCK,
    Architecture,
    llama_config,
)

ARCHITECTURE = Architecture(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    norms=LLAMA_NORMS | QK_NORMS,
    gguf_name="qwen3",
    gguf_block=LLAMA_BLOCK | QK_NORMS_BLOCK,
    gguf_config=llama_config,
)
