"""Qwen2 and Qwen2.5. SwiGLU, biases on q, k and v."""

from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config

ARCHITECTURE = Architecture(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    gguf_name="qwen2",
    gguf_block=LLAMA_BLOCK,
    gguf_config=llama_config,
)
