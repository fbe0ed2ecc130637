"""StarCoder2. Non-gated GELU with biases, LayerNorm."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config

_NAMES = {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}


def _config(file: GgufFile) -> dict[str, Any]:
    window = file.get("starcoder2.attention.sliding_window", None) or None
    return llama_config(file, layer_norm="norm_epsilon") | {"sliding_window": window}


ARCHITECTURE = Architecture(
    model_type="starcoder2",
    hf_class="Starcoder2ForCausalLM",
    act="mlp.act",
    gate_proj=None,
    up_proj="mlp.c_fc",
    down_proj="mlp.c_proj",
    layer_norm=True,
    gguf_name="starcoder2",
    gguf_block={k: v for k, v in LLAMA_BLOCK.items() if k != "ffn_gate"} | _NAMES,
    gguf_config=_config,
)
