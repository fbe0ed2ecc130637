"""ProSparse's LLaMA, with ReLU or FATReLU. Its files' own code is a LLaMA's and is not run."""

from fallow.models._base import Architecture

ARCHITECTURE = Architecture(model_type="sparsellama", hf_class="LlamaForCausalLM")
