"""OLMoE. SwiGLU experts, norms of whole queries and keys."""

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
    return llama_config(file) | expert_config(file) | {"norm_topk_prob": False}


def _check(config: Any) -> str | None:
    return None if config.clip_qkv is None else "a bound of queries, keys and values (clip_qkv)"


ARCHITECTURE = Architecture(
    model_type="olmoe",
    hf_class="OlmoeForCausalLM",
    experts=ExpertPaths(),
    norms=LLAMA_NORMS | QK_NORMS,
    config_keys=("num_experts",),
    check=_check,
    settings=EXPERTS_SETTINGS,
    gguf_name="olmoe",
    gguf_block=LLAMA_BLOCK | EXPERTS_BLOCK | QK_NORMS_BLOCK,
    gguf_config=_config,
)
