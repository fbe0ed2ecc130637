"""SparseLM of Sakana AI. A LLaMA with ReLU, whatever `hidden_act` is left over in its config."""

from fallow.models._base import Architecture

ARCHITECTURE = Architecture(
    model_type="llama_sparse_relu",
    hf_class="LlamaForCausalLM",
    settings={"hidden_act": "relu"},
)
