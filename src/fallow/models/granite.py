"""Granite. Of LLaMA's shape, with factors of embeddings, branches, scores and logits."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config, unpermute_qk


def granite_config(file: GgufFile) -> dict[str, Any]:
    config = llama_config(file)
    return config | {
        "embedding_multiplier": file.get("{arch}.embedding_scale", 0) or 1.0,
        "residual_multiplier": file.get("{arch}.residual_scale", 0) or 1.0,
        "attention_multiplier": file.get("{arch}.attention.scale", 0) or config["head_dim"] ** -0.5,
        "logits_scaling": file.get("{arch}.logit_scale", 0) or 1.0,
    }


ARCHITECTURE = Architecture(
    model_type="granite",
    hf_class="GraniteForCausalLM",
    gguf_name="granite",
    gguf_block=LLAMA_BLOCK,
    gguf_config=granite_config,
    from_gguf=unpermute_qk,
)
