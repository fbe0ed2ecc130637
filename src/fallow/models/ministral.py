"""Ministral. SwiGLU, sliding-window layers."""

from fallow.models._base import Architecture

ARCHITECTURE = Architecture(model_type="ministral", hf_class="MinistralForCausalLM")
