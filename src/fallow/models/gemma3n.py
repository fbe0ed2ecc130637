"""Gemma 3n (text). GeGLU, whose first layers keep the top of gate_proj's outputs.

Of these a layer with the share s in `activation_sparsity_pattern` keeps ReLU(y - m - d z), where m
and d are mean and standard deviation of a token's y, and z is the normal distribution's quantile at
s: exact zeros of gate_act come of it.
"""

from statistics import NormalDist
from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.models._base import (
    KINDS_OF_LAYERS,
    LLAMA_BLOCK,
    LLAMA_GLOBAL,
    QK_NORMS_BLOCK,
    Architecture,
    Tensors,
    layer_types,
    llama_config,
    rows_of,
)
from fallow.models.gemma3 import GEMMA_NORMS_BLOCK

# GGUF names of what makes and takes inputs of each layer.
PER_LAYER_BLOCK = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
PER_LAYER_GLOBAL = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_STACKED = {  # matrices that a GGUF has in one tensor
    "altup_proj": "model.altup_projections",
    "altup_unembd_proj": "model.altup_unembed_projections",
}


def _config(file: GgufFile) -> dict[str, Any]:
    config = llama_config(file)
    rope = config.pop("rope_parameters")
    local = {"rope_type": "default", "rope_theta": file.get("gemma3n.rope.freq_base_swa", 10000.0)}
    pattern = file.get("gemma3n.attention.sliding_window_pattern")
    quantiles = file.get("gemma3n.activation_sparsity_scale")  # minus infinity: no top-k
    return config | {
        "rope_parameters": dict(zip(KINDS_OF_LAYERS, (rope, local), strict=True)),
        "layer_types": layer_types(pattern, config["num_hidden_layers"]),
        "sliding_window": file.get("gemma3n.attention.sliding_window"),
        "final_logit_softcapping": file.get("gemma3n.final_logit_softcapping", 30.0),
        "activation_sparsity_pattern": [NormalDist().cdf(z) for z in quantiles.tolist()],
        "num_kv_shared_layers": file.get("gemma3n.attention.shared_kv_layers"),
        "hidden_size_per_layer_input": file.get("gemma3n.embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": rows_of(file, "per_layer_token_embd.weight"),
        "altup_active_idx": file.get("gemma3n.altup.active_idx"),
        "altup_num_inputs": file.get("gemma3n.altup.num_inputs"),
        "laurel_rank": rows_of(file, "blk.0.laurel_l.weight"),
    }


def _from_gguf(name: str, values: np.ndarray, config: Any) -> Tensors:
    stem = name.removesuffix(".weight")
    if stem in _STACKED.values():
        return {f"{stem}.{i}.weight": np.ascontiguousarray(m) for i, m in enumerate(values)}
    return {stem if name.endswith("_scale.weight") else name: values}


ARCHITECTURE = Architecture(
    model_type="gemma3n_text",
    hf_class="Gemma3nForCausalLM",
    computes=lambda name, value: name == "final_logit_softcapping",
    check=lambda config: (
        "four residual streams (AltUp), LAuReL, inputs of each layer, and a top-k of gate_proj"
    ),
    gguf_name="gemma3n",
    gguf_block=LLAMA_BLOCK
    | QK_NORMS_BLOCK
    | GEMMA_NORMS_BLOCK
    | PER_LAYER_BLOCK
    | {
        "laurel_l": "laurel.linear_left",
        "laurel_r": "laurel.linear_right",
        "laurel_post_norm": "laurel.post_laurel_norm",
        "altup_correct_coef": "altup.correction_coefs",
        "altup_correct_scale": "altup.correct_output_scale",
        "altup_predict_coef": "altup.prediction_coefs",
        "altup_router": "altup.modality_router",
        "altup_router_norm": "altup.router_norm",
    },
    gguf_global=LLAMA_GLOBAL | _STACKED | PER_LAYER_GLOBAL,
    gguf_config=_config,
    from_gguf=_from_gguf,
)
