"""OLMo 3. OLMo 2 with sliding-window layers, whose rotary embeddings are never stretched."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import (
    KINDS_OF_LAYERS,
    LLAMA_BLOCK,
    QK_NORMS_BLOCK,
    Architecture,
    layer_types,
    llama_config,
)
from fallow.models.olmo2 import NORMS


def _config(file: GgufFile) -> dict[str, Any]:
    config = llama_config(file)
    rope, n_layers = config.pop("rope_parameters"), config["num_hidden_layers"]
    window = file.get("olmo2.attention.sliding_window", None)
    # A GGUF without a window is of OLMo 2; without a pattern every fourth layer sees all, as in
    # llama.cpp.
    every = 1 if window is None else 4
    pattern = file.get("olmo2.attention.sliding_window_pattern", every)
    base = file.get("olmo2.rope.freq_base_swa", rope["rope_theta"])
    local = {"rope_type": "default", "rope_theta": base}
    return config | {
        "rope_parameters": dict(zip(KINDS_OF_LAYERS, (rope, local), strict=True)),
        "layer_types": layer_types(pattern, n_layers),
        "sliding_window": window or config["max_position_embeddings"],
    }


ARCHITECTURE = Architecture(
    model_type="olmo3",
    hf_class="Olmo3ForCausalLM",
    norms=NORMS,
    gguf_name="olmo2",
    gguf_block={name: path for name, path in LLAMA_BLOCK.items() if "norm" not in name}
    | QK_NORMS_BLOCK
    | {
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    gguf_config=_config,
)
