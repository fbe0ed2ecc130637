"""Nemotron. No gate, ReLU²: most neurons are exactly zero. LayerNorm, partial rotary embeddings."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config
from fallow.models.gemma3 import less_one


def _config(file: GgufFile) -> dict[str, Any]:
    return llama_config(file, partial_rotary=True, layer_norm="norm_eps")


ARCHITECTURE = Architecture(
    model_type="nemotron",
    hf_class="NemotronForCausalLM",
    gate_proj=None,
    norm_offset=1.0,
    layer_norm=True,
    partial_rotary=True,
    gguf_name="nemotron",
    gguf_block=LLAMA_BLOCK,
    gguf_config=_config,
    from_gguf=less_one,
)
