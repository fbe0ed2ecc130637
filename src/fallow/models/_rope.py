"""Rotary embeddings that a GGUF describes, in transformers' terms."""

import math
from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.common.errors import FallowError

# Factors that divide the frequencies, (rotary_dim / 2,): Llama 3.1's, and LongRoPE's.
_EVERYWHERE, _SHORT, _LONG = "rope_freqs", "rope_factors_short", "rope_factors_long"
ROPE_TENSORS = tuple(f"{name}.weight" for name in (_EVERYWHERE, _SHORT, _LONG))


def rope_parameters(file: GgufFile, rotary_dim: int, head_dim: int) -> dict[str, Any]:
    """transformers' rope_parameters for a GGUF whose heads turn `rotary_dim` of their dimensions.

    As in llama.cpp (`llama-model.cpp`, `ggml_rope_ext`) a factor without a type is linear scaling,
    `rope.scale_linear` is the factor of older files, a factor of 0 is none, and the type "none"
    sets it aside. A tensor of factors divides the frequencies: `rope_freqs` (Llama 3.1 and later)
    everywhere, `rope_factors_short` and `_long` (LongRoPE) up to the original context and beyond.

    Raises:
        FallowError: a scaling of another type, or what does not go together.
    """
    default = {
        "rope_type": "default",
        "rope_theta": file.get("{arch}.rope.freq_base", 10000.0),
        "partial_rotary_factor": rotary_dim / head_dim,
    }
    kind = file.get("{arch}.rope.scaling.type", "linear")
    old = file.get("{arch}.rope.scale_linear", 0)
    factor = float(file.get("{arch}.rope.scaling.factor", old) or 1)
    context = file.get("{arch}.context_length")
    original = file.get("{arch}.rope.scaling.original_context_length", 0) or context
    magnitude = float(file.get("{arch}.rope.scaling.attn_factor", 1.0))
    everywhere, short, long = (_factors(file, n, rotary_dim) for n in (_EVERYWHERE, _SHORT, _LONG))
    has_factors = everywhere is not None or short is not None
    if (short is None) != (long is None) or (everywhere is not None and short is not None):
        raise _refused(file, "factors of only one length, or of two kinds")
    if kind == "yarn" and not has_factors:
        return default | _yarn(file, factor, magnitude) | _original(original)
    known = ("none", "linear", "longrope") if has_factors else ("none", "linear")
    if kind not in known or (magnitude != 1 and not has_factors):
        factors = "their factors" if has_factors else "no factors"
        raise _refused(file, f"the scaling {kind!r}, the attn_factor {magnitude:g} and {factors}")
    scale = 1.0 if kind == "none" else factor
    if not has_factors:
        return default | ({"rope_type": "linear", "factor": scale} if scale != 1 else {})
    return default | {
        "rope_type": "longrope",  # which with the same factors for every length is any factors
        "short_factor": _times(scale, everywhere if short is None else short),
        "long_factor": _times(scale, everywhere if long is None else long),
        "attention_factor": magnitude,
        **_original(context if short is None else original),
    }


def _yarn(file: GgufFile, factor: float, magnitude: float) -> dict[str, Any]:
    """https://arxiv.org/abs/2309.00071"""

    def get(name: str, default: float) -> float:
        return float(file.get("{arch}.rope.scaling.yarn_" + name, default))

    for name in ("ext_factor", "attn_factor"):  # of the latter transformers and llama.cpp differ
        if (value := get(name, 1.0)) != 1:
            raise _refused(file, f"the yarn_{name} {value:g}")
    stretched = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": magnitude * stretched,
        "beta_fast": get("beta_fast", 32.0),
        "beta_slow": get("beta_slow", 1.0),
    }


def _original(context: int) -> dict[str, Any]:
    return {"original_max_position_embeddings": context}


def _times(scale: float, factors: np.ndarray | None) -> list[float]:
    return [] if factors is None else [float(scale * one) for one in factors]


def _factors(file: GgufFile, name: str, rotary_dim: int) -> np.ndarray | None:
    tensor = file.tensors.get(f"{name}.weight")
    if tensor is None:
        return None
    values = tensor.dequantize().reshape(-1)
    if len(values) != rotary_dim // 2:
        raise _refused(file, f"{len(values)} factors in {name}.weight, not {rotary_dim // 2}")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise _refused(file, f"factors in {name}.weight that are not all positive")
    return values


def _refused(file: GgufFile, what: str) -> FallowError:
    return FallowError(
        f"GGUF {file.path} has rotary embeddings with {what}, which is not understood; give the "
        "model as a Hugging Face folder"
    )
