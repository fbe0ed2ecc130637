"""SmolLM3. SwiGLU, of whose layers every fourth has no rotary embedding."""

from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config, unpermute_qk

ARCHITECTURE = Architecture(
    model_type="smollm3",
    hf_class="SmolLM3ForCausalLM",
    gguf_name="smollm3",
    gguf_block=LLAMA_BLOCK,
    gguf_config=llama_config,
    from_gguf=unpermute_qk,
)
