"""Arcee's AFM. Of LLaMA's shape without a gate, ReLU²: most neurons are exactly zero."""

from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config, unpermute_qk

ARCHITECTURE = Architecture(
    model_type="arcee",
    hf_class="ArceeForCausalLM",
    gate_proj=None,
    gguf_name="arcee",
    gguf_block=LLAMA_BLOCK,
    gguf_config=llama_config,
    from_gguf=unpermute_qk,
)
