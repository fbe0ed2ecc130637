"""Qwen2 and Qwen1.5 with experts. SwiGLU, biases on q, k and v, an expert that all tokens share."""

from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import (
    EXPERTS_BLOCK,
    EXPERTS_SETTINGS,
    LLAMA_BLOCK,
    Architecture,
    ExpertPaths,
    Tensors,
    expert_config,
    llama_config,
)


def _config(file: GgufFile) -> dict[str, Any]:
    width = file.get("{arch}.expert_feed_forward_length")
    shared = file.get("{arch}.expert_shared_feed_forward_length")
    return (
        llama_config(file)
        | expert_config(file)
        | {"moe_intermediate_size": width, "shared_expert_intermediate_size": shared}
    )


def _from_gguf(name: str, values: np.ndarray, config: Any) -> Tensors:
    # The file has a vector in place of a matrix of one row.
    return {name: values[None] if ".shared_expert_gate." in name and values.ndim == 1 else values}


ARCHITECTURE = Architecture(
    model_type="qwen2_moe",
    hf_class="Qwen2MoeForCausalLM",
    experts=ExpertPaths(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"),
    config_keys=("num_experts",),
    settings=EXPERTS_SETTINGS,
    gguf_name="qwen2moe",
    gguf_block=LLAMA_BLOCK
    | EXPERTS_BLOCK
    | {
        "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
        "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
        "ffn_up_shexp": "mlp.shared_expert.up_proj",
        "ffn_down_shexp": "mlp.shared_expert.down_proj",
    },
    gguf_config=_config,
    from_gguf=_from_gguf,
)
