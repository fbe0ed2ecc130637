"""Mixtral. Of Mistral's shape, with experts; its GGUF files call themselves llama."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import (
    EXPERTS_BLOCK,
    EXPERTS_SETTINGS,
    LLAMA_BLOCK,
    Architecture,
    ExpertPaths,
    expert_config,
    llama_config,
    unpermute_qk,
)


def _config(file: GgufFile) -> dict[str, Any]:
    return llama_config(file) | expert_config(file, "num_local_experts")


ARCHITECTURE = Architecture(
    model_type="mixtral",
    hf_class="MixtralForCausalLM",
    experts=ExpertPaths(stored_as={".mlp.": ".block_sparse_moe."}),
    settings=EXPERTS_SETTINGS,
    gguf_name="llama",
    gguf_block=LLAMA_BLOCK | EXPERTS_BLOCK,
    gguf_config=_config,
    from_gguf=unpermute_qk,
)
