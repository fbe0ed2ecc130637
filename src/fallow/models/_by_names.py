"""Architectures of transformers that have no file here, found by the names of their modules.

Such a model is measured and calibrated, in transformers; the engine does not know it, but llama.cpp
with our plugin runs its plans. Names promise nothing of what is computed, so that it is tried.
"""

from typing import Any

import torch
from torch import nn

from fallow.common.errors import FallowError
from fallow.models._base import Architecture

_FFN = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "activation_fn")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CLOSE = 1e-2  # of the largest value: bfloat16 rounds to 0.004


def by_names(model_type: str) -> Architecture | None:
    """The architecture of a model_type; None: transformers has none, or its FFNs are not found."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    hf_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if hf_class is None:
        return None
    try:
        built = getattr(transformers, hf_class)
        with torch.device("meta"):
            module = built(built.config_class())
    except Exception:  # a class of transformers' may want whatever it likes
        return None
    for path, blocks in module.named_modules():
        if isinstance(blocks, nn.ModuleList) and (act := _activation(blocks)) is not None:
            return Architecture(
                model_type=model_type,
                hf_class=hf_class,
                act=f"mlp.{act}",
                attention=_attention(blocks),
                layers=path,
                partial_rotary=True,  # transformers computes them all
                by_names=True,
                check=lambda _: (
                    f"the architecture {model_type}, which has no file in fallow.models"
                ),
            )
    return None


def _activation(blocks: nn.ModuleList) -> str | None:
    """The name of the activation in every block's `mlp`; None: not all have one, or an FFN."""
    found = set()
    for block in blocks:
        mlp = getattr(block, "mlp", None)
        if not all(isinstance(getattr(mlp, name, None), nn.Linear) for name in _FFN):
            return None
        found.add(
            next((n for n in _ACTIVATIONS if isinstance(getattr(mlp, n, None), nn.Module)), None)
        )
    return found.pop() if len(found) == 1 else None


def _attention(blocks: nn.ModuleList) -> tuple[str, ...]:
    """Paths of the attention's projections; none where they have other names: they are not cut."""
    found = all(
        isinstance(getattr(getattr(block, "self_attn", None), name, None), nn.Linear)
        for block in blocks
        for name in _ATTENTION
    )
    return tuple(f"self_attn.{name}" for name in _ATTENTION) if found else ()


@torch.inference_mode()
def check_names(architecture: Architecture, module: Any, where: str) -> None:
    """Raises FallowError unless a model's FFNs compute what the names of their modules promise."""
    problem = None
    for block in module.get_submodule(architecture.layers).children():
        mlp: Any = getattr(block, "mlp", None)
        if not all(isinstance(getattr(mlp, name, None), nn.Linear) for name in _FFN):
            problem = "some of its layers have no mlp with gate_proj, up_proj and down_proj"
            break
        weight = mlp.gate_proj.weight
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
        act = block.get_submodule(architecture.act)
        expected = mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))
        if not _are_close(mlp(x), expected):
            problem = "its FFN is not down_proj(act(gate_proj(x)) * up_proj(x))"
            break
    if problem is not None:
        raise FallowError(
            f"unknown architecture {architecture.model_type!r} in {where}: {problem}; see "
            "docs/developing.md for how to add one"
        )


def check_logits(model: Any) -> None:
    """Raises FallowError unless logits are what the head makes of hidden states."""
    ids = torch.arange(2, device=model.device)[None]
    with torch.inference_mode():
        expected = model.module(input_ids=ids, use_cache=False).logits.float()
        found = model.logits(model.hidden(ids.cpu().numpy()))
    if not _are_close(found, expected):
        raise FallowError(
            f"{model.name} makes its logits in another way than by its head alone, which is not "
            f"known of {model.architecture.model_type} models; see docs/developing.md for how to "
            "add one"
        )


def _are_close(a: Any, b: Any) -> bool:
    return bool((a - b).abs().max() <= CLOSE * b.abs().max())
