"""Qwen3 with experts. SwiGLU, normed queries and keys."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import (
    EXPERTS_BLOCK,
    EXPERTS_SETTINGS,
    LLAMA_BLOCK,
    LLAMA_NORMS,
    QK_NORMS,
    QK_NORMS_BLOCK,
    Architecture,
    ExpertPaths,
    expert_config,
    llama_config,
)


def _config(file: GgufFile) -> dict[str, Any]:
    width = file.get("{arch}.expert_feed_forward_length")
    found = llama_config(file) | expert_config(file)
    return found | {"moe_intermediate_size": width, "norm_topk_prob": True}


ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    experts=ExpertPaths(),
    norms=LLAMA_NORMS | QK_NORMS,
    config_keys=("num_experts",),
    settings=EXPERTS_SETTINGS,
    gguf_name="qwen3moe",
    gguf_block=LLAMA_BLOCK | EXPERTS_BLOCK | QK_NORMS_BLOCK,
    gguf_config=_config,
)
