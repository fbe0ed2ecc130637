"""Gemma 2. GeGLU, norms before and after attention and FFN, soft caps, every other layer local."""

from typing import Any

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import LLAMA_BLOCK, Architecture, llama_config
from fallow.models.gemma3 import GEMMA_NORMS, GEMMA_NORMS_BLOCK, less_one


def _config(file: GgufFile) -> dict[str, Any]:
    config = llama_config(file)
    # Not in the file: the 27B model (46 layers) alone scales by hidden / heads.
    per_head = config["hidden_size"] // config["num_attention_heads"]
    scale = per_head if config["num_hidden_layers"] == 46 else config["head_dim"]
    return config | {
        "sliding_window": file.get("gemma2.attention.sliding_window"),
        "attn_logit_softcapping": file.get("gemma2.attn_logit_softcapping", None) or None,
        "final_logit_softcapping": file.get("gemma2.final_logit_softcapping", None) or None,
        "query_pre_attn_scalar": scale,
    }


ARCHITECTURE = Architecture(
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    norms=GEMMA_NORMS,
    norm_offset=1.0,
    computes=lambda name, value: name in ("attn_logit_softcapping", "final_logit_softcapping"),
    settings={"attn_implementation": "eager"},  # others pass over the cap of scores
    gguf_name="gemma2",
    gguf_block=LLAMA_BLOCK | GEMMA_NORMS_BLOCK,
    gguf_config=_config,
    from_gguf=less_one,
)
