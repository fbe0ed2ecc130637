"""LLaMA, and the many models of its shape (SmolLM2, TinyLlama, Llama 2 and 3). SwiGLU."""

from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config, unpermute_qk

ARCHITECTURE = Architecture(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    gguf_name="llama",
    gguf_block=LLAMA_BLOCK,
    gguf_config=llama_config,
    from_gguf=unpermute_qk,
)
