"""Mistral. SwiGLU. Its GGUF files call themselves llama and are read as that."""

from fallow.models._base import Architecture

ARCHITECTURE = Architecture(model_type="mistral", hf_class="MistralForCausalLM")
