"""What a file says of how a model computes: understood, without effect, or refused.

A GGUF's keys are llama.cpp's, https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/
constants.py, and those that an architecture's `gguf_config` asks for are understood. Of a
config.json, what transformers' class has an attribute for is.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fallow.checkpoints.weights import GgufFile
from fallow.common.errors import FallowError, in_one_line
from fallow.models._activations import check_activation
from fallow.models._base import Architecture
from fallow.models._wrappers import config_class

# Keys without their architecture that change nothing: notes, what other keys imply, and what only
# an embedding model reads.
_GGUF_NOTES = (
    "vocab_size",
    "tensor_data_layout",
    "pooling_type",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.scaling.finetuned",
)
# Values of other keys that change nothing. Of the rest it is 0: llama.cpp's hyperparameters begin
# with it, as "none".
_GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
}


def check_gguf_type(file: GgufFile) -> None:
    """Raises FallowError for a file that holds something else than a model."""
    kind = file.get("general.type", "model")
    if any(key.startswith("adapter.") for key in file.metadata):
        kind = "adapter"
    if kind != "model":
        raise FallowError(
            f"GGUF {file.path} has the general.type {_shown(kind)}, not model; give the model that "
            "it belongs to, and an adapter to pack --lora"
        )


def check_gguf_keys(file: GgufFile) -> None:
    """Raises FallowError for a key of the architecture that nobody asked for, if it has an effect.

    To be called after `gguf_config`.
    """
    prefix = f"{file.architecture}."
    for key in sorted(key for key in file.unasked() if key.startswith(prefix)):
        name = key.removeprefix(prefix)
        if name in _GGUF_NOTES:
            continue
        value = file.metadata[key]
        neutral = _GGUF_NEUTRAL.get(name, (0,))
        if all(
            one in neutral for one in (value if isinstance(value, list | np.ndarray) else [value])
        ):
            continue
        if name == "attention.sliding_window" and value >= file.get("{arch}.context_length"):
            continue
        raise FallowError(
            f"GGUF {file.path}: {key} is {_shown(value)}, which is not understood and may change "
            "what the model computes; give a model without it, or if it is only a note, remove it "
            f"with gguf-new-metadata --remove-metadata {key}"
        )


# Names in a config.json that say how to compute. Biases and norms show in the tensors.
_COMPUTES = re.compile(
    "^(?!.*dropout).*(rope|rotary|scal|softcap|multiplier|expert|moe|window|sliding|layer_types|"
    "alibi|residual|logn|clamp|clip_qkv|mup|bidirectional|causal|quant|compress|per_layer|"
    "sparse_config)"
)
# What transformers' classes take besides their attributes, and what has no effect by itself.
_CONFIG_NOTES = ("rope_theta", "rope_scaling", "partial_rotary_factor", "max_window_layers")
# What transformers reads of rotary embeddings, whatever their type.
_ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "finetuned",
}  # fmt: skip
# What transformers has an attribute for, but the engine, or transformers with its usual attention,
# does not compute, save for architectures that say so.
_NOT_COMPUTED = (
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
    "per_layer_config",
    "enable_moe_block",
)
_WITHOUT = "give a model without it"


def check_config(architecture: Architecture, config: dict[str, Any], where: str) -> None:
    """Raises FallowError for what a config.json says of the computation and is not computed so.

    Raises:
        Exception: whatever transformers raises of the config.
    """
    import transformers

    class_ = getattr(transformers, architecture.hf_class).config_class
    known = {*vars(class_()), *architecture.config_keys, *_CONFIG_NOTES} - {*_NOT_COMPUTED}
    _check_names(config, known, architecture.model_type, where, architecture.computes)
    for rope in _ropes(config):
        _check_rope(architecture, rope, config, where)
    found = class_(**config)
    kinds = getattr(found, "layer_types", None) or []
    known_kinds = {"full_attention", "sliding_attention"}
    if unknown := {k for k in kinds if not architecture.computes("layer_types", k)} - known_kinds:
        raise FallowError(f"{where}: layer_types has {_shown(min(unknown))}; {_WITHOUT}")
    window = getattr(found, "sliding_window", None)
    is_needed = "sliding_attention" in kinds if kinds else window is not None
    if "sliding_window" in known and is_needed and (window or 0) < 1:
        raise FallowError(f"{where}: sliding_window is {window}, but must be 1 or more to be used")
    check_activation(architecture, config, where)


def check_wrapper(config: dict[str, Any], where: str) -> None:
    """The same of what a config.json says outside its text_config, if it has one."""
    if (found := config_class(config)) is not None:
        _check_names(config, {*vars(found())}, config["model_type"], where)


def _check_names(
    config: dict[str, Any],
    known: set[str],
    model_type: str,
    where: str,
    computes: Callable[[str, Any], bool] = lambda name, value: False,
) -> None:
    for name, value in config.items():
        is_known = name in known or name.startswith("_") or not _COMPUTES.search(name)
        is_known |= computes(name, value)
        if not is_known and not _has_no_effect(name, value, config):
            remedy = "give the model that was quantised" if "quant" in name else _WITHOUT
            raise FallowError(
                f"{where}: {name} is {_shown(value)}, which is not computed for "
                f"{model_type} models; {remedy}"
            )


def _has_no_effect(name: str, value: Any, config: dict[str, Any]) -> bool:
    if name in ("causal", "is_causal"):
        return value is True or value is None
    if value is True or isinstance(value, dict | list | str):
        return not value
    if value in (None, 0):
        return True
    if name == "experts_per_token":  # GPT-OSS says it by both names
        return bool(value == config.get("num_experts_per_tok"))
    if name == "sliding_window":
        return bool(value >= config.get("max_position_embeddings", value + 1))
    return bool(value == 1) and re.search("scal(?!ing_beta)|multiplier", name) is not None


def _ropes(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a config says of its rotary embeddings, of each kind of layer."""
    found = [
        config[k] for k in ("rope_parameters", "rope_scaling") if isinstance(config.get(k), dict)
    ]
    for ropes in found or [{}]:
        yield from [one for one in ropes.values() if isinstance(one, dict)] or [ropes]


def _check_rope(
    architecture: Architecture, rope: dict[str, Any], config: dict[str, Any], where: str
) -> None:
    """transformers takes a type that is not there for "default", and passes over the factor."""
    kind = rope.get("rope_type", rope.get("type")) or "default"
    for name, value in rope.items():
        is_known = name in _ROPE_KEYS or architecture.computes(name, value)
        if not is_known and not _has_no_effect(name, value, config):
            raise FallowError(
                f"{where}: the rotary embeddings have the {name} {_shown(value)}, which is not "
                f"understood; {_WITHOUT}"
            )
    factors = {k: v for k, v in rope.items() if "factor" in k and v not in (None, 1)}
    partial = factors.pop("partial_rotary_factor", None)
    if kind == "default" and factors:
        name, value = next(iter(factors.items()))
        raise FallowError(
            f"{where}: the rotary embeddings have the {name} {_shown(value)}, but no rope_type "
            "that says how to use it; add its rope_type, such as linear"
        )
    partial = partial or config.get("partial_rotary_factor") or 1
    if partial != 1 and kind != "proportional" and not architecture.partial_rotary:
        raise FallowError(
            f"{where}: partial_rotary_factor is {_shown(partial)}, which is not computed for "
            f"{architecture.model_type} models; {_WITHOUT}"
        )


def _shown(value: Any) -> str:
    text = in_one_line(repr(value))
    return text if len(text) <= 60 else f"{text[:60]}…"
