"""MiniCPM, and MiniCPM-S with FATReLU. A Granite that calls its factors by other names.

scale_emb is the embeddings' factor, scale_depth / sqrt(layers) that of what attention and FFN add,
and logits are divided by hidden_size / dim_model_base (arXiv:2404.06395, Appendix A).
"""

import math
from typing import Any

from fallow.models._base import Architecture


def _translate(config: dict[str, Any]) -> dict[str, Any]:
    depth, base = config.get("scale_depth", 1), config.get("dim_model_base", 1)
    return {
        "embedding_multiplier": float(config.get("scale_emb", 1)),
        "residual_multiplier": depth / math.sqrt(config["num_hidden_layers"]),
        "attention_multiplier": (config["hidden_size"] / config["num_attention_heads"]) ** -0.5,
        "logits_scaling": config["hidden_size"] / base,
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


ARCHITECTURE = Architecture(
    model_type="minicpm",
    hf_class="GraniteForCausalLM",
    config_keys=("scale_emb", "scale_depth", "dim_model_base"),
    translate=_translate,
)
