"""Granite with experts."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import (
    EXPERTS_BLOCK,
    EXPERTS_SETTINGS,
    LLAMA_BLOCK,
    Architecture,
    ExpertPaths,
    expert_config,
    unpermute_qk,
)
from fallow.models.granite import granite_config

_MOE = "block_sparse_moe"


def _config(file: GgufFile) -> dict[str, Any]:
    return granite_config(file) | expert_config(file, "num_local_experts")


ARCHITECTURE = Architecture(
    model_type="granitemoe",
    hf_class="GraniteMoeForCausalLM",
    experts=ExpertPaths(
        router=f"{_MOE}.router",
        experts=f"{_MOE}.experts",
        stored_as={
            f"{_MOE}.experts.gate_up_proj": f"{_MOE}.input_linear.weight",
            f"{_MOE}.experts.down_proj": f"{_MOE}.output_linear.weight",
            f"{_MOE}.router.weight": f"{_MOE}.router.layer.weight",
        },
    ),
    settings=EXPERTS_SETTINGS,
    gguf_name="granitemoe",
    gguf_block=LLAMA_BLOCK
    | {part: path.replace("mlp", _MOE) for part, path in EXPERTS_BLOCK.items()}
    | {"ffn_gate_inp": f"{_MOE}.router"},
    gguf_config=_config,
    from_gguf=unpermute_qk,
)
