"""A plan applied to a transformers model on CUDA, so that decoding reads less."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fallow.common.errors import FallowError, UsageError
from fallow.common.progress import progress
from fallow.gpu.modules import (
    ACTIVATIONS,
    DenseInputs,
    InputsFfn,
    Limit,
    Shared,
    SparseDown,
    SparseFfn,
    SparseInputs,
)
from fallow.models import FatRelu, Rectified, by_model_type, check_names
from fallow.models.cuts import check_fits, weight_of
from fallow.models.taps import Layer
from fallow.plan import Cut, Plan
from fallow.reference.model import Model
from fallow.reference.sparsified import check_fingerprint

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def accelerate(model: Any, plan: Plan | str | Path | None = None) -> Any:
    """Makes a model on CUDA leave out in decoding what a plan leaves out, by Triton kernels.

    Of at most 8 tokens at once only the active neurons' weights are read; more are computed densely
    with the same values set to zero. Nothing waits for the device: a decoding step with a static
    cache can be captured in a CUDA graph, or compiled. The model is changed for good, since weights
    are kept transposed; load it again for the dense one. For inference.

    Args:
        model: a transformers model of a known architecture on a CUDA device, bfloat16, float16 or
            float32, or what `fallow.load` gave, moved there.
        plan: a plan for that model, or its file, with cuts of `gate_act` (and `inter` by
            threshold), of `inter`, or of the inputs of projections, by threshold or top-k. None:
            of a model with ReLU or ReLU² (not FATReLU, dReLU), the neurons that are exactly zero.

    Returns:
        The transformers model.

    Raises:
        FallowError: the plan is for another model, or has cuts that no kernel knows.
        UsageError: this is no such model, is elsewhere, or has no exact zeros.
    """
    if plan is not None and not isinstance(plan, Plan):
        plan = Plan.load(plan)
    module = model.module if isinstance(model, Model) else model
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    if not isinstance(module, nn.Module) or model_type is None:
        raise UsageError(f"{type(model).__name__} is no transformers model")
    name = str(getattr(module.config, "_name_or_path", "")) or type(module).__name__
    architecture = by_model_type(model_type, name)
    if architecture.by_names:
        check_names(architecture, module, name)
    _check_device(module, name)
    if plan is not None and isinstance(model, Model):
        plan.check_model(model.fingerprint, model.name)
    elif plan is not None:
        check_fingerprint(module, architecture, plan, name)
    if isinstance(model, Model):
        model.layers = []  # or they would keep the dense weights
    replace(module, architecture.find_layers(module), None if plan is None else plan.cuts, name)
    return module


def replace(module: nn.Module, layers: list[Layer], cuts: Sequence[Cut] | None, name: str) -> None:
    """Puts sparse modules in the places of dense ones; raises as `accelerate` does.

    `layers` is emptied: dense weights go, layer by layer, when sparse ones are there.
    """
    n_layers = len(layers)
    act = _activation(layers[0].act)
    if cuts is None:
        cuts = [_zeros(layers, act, name)]
    cuts = [cut.of_layers(n_layers) for cut in cuts]
    for cut in cuts:
        check_fits(cut, layers, name)
    _check_cuts(cuts, layers, act, name)
    with progress("sparse modules", n_layers) as ticker, torch.no_grad():
        for index in range(n_layers):
            layer = layers.pop(0)
            limits = {cut.tap: _limit(cut, index, layer) for cut in cuts if cut.leaves_out[index]}
            _replace_attention(layer, limits)
            if limits.keys() & {"gate_act", "inter"}:
                _replace_ffn(layer, limits, act)
            else:
                _replace_inputs(layer, limits, act)
            ticker.advance()
        head = module.get_output_embeddings()  # type: ignore[operator]
        if type(head) is nn.Linear:
            _put(module, head, DenseInputs([head]))


def _check_device(module: nn.Module, name: str) -> None:
    parameter = next(module.parameters())
    if parameter.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f'{name} is on {parameter.device}; move it: model.to("cuda")')
    if parameter.dtype not in _TYPES:
        raise UsageError(f"{name} has {parameter.dtype} weights; load it as bfloat16 or float16")


def _zeros(layers: list[Layer], act: str | None, name: str) -> Cut:
    """The neurons that a model leaves out by itself."""
    if act not in ("relu", "relu2"):
        raise UsageError(
            f"{name} has no ReLU, and no neuron of it is exactly zero; give a plan, which "
            "fallow calibrate makes"
        )
    return Cut("gate_act", "threshold", [0.0] * len(layers))


def _check_cuts(cuts: Sequence[Cut], layers: list[Layer], act: str | None, name: str) -> None:
    layer, taps = layers[0], {cut.tap: cut for cut in cuts}
    remedy = "use fallow.sparsify, or calibrate with gate_topk, two_stage or teal"
    for cut in cuts:
        if cut.kind in ("tail", "mass"):
            raise FallowError(f"no GPU kernel has cuts of {cut.tap} by {cut.kind}; {remedy}")
        if cut.tap not in layer.projections and cut.tap not in ("gate_act", "inter"):
            raise FallowError(f"no GPU kernel has cuts of {cut.tap}; {remedy}")
    missing = next(filter(None, map(_not_computed, layers)), None)
    if missing is not None and tuple(taps) != ("inter",):
        raise FallowError(f"no GPU kernel has the {missing} of {name}; calibrate with topk")
    inputs = [tap for tap in taps if tap in layer.projections]
    if inputs and len(inputs) < len(taps):
        other = next(tap for tap in taps if tap not in layer.projections)
        raise FallowError(f"no GPU kernel has cuts of {other} beside those of inputs; {remedy}")
    if len(taps) == 2 and not inputs and (taps["inter"].kind != "threshold" or not layer.gated):
        raise FallowError(f"no GPU kernel has cuts of gate_act and of inter by top-k; {remedy}")
    if layer.gated and (inputs or "gate_act" in taps) and act is None:
        raise FallowError(f"no GPU kernel has the activation of {name}; {remedy}")


def _not_computed(layer: Layer) -> str | None:
    """What an FFN has beside gate, up and down, and sparse modules in its place have not."""
    if isinstance(layer.up_proj, Rectified):
        return "ReLU of up_proj"
    if isinstance(layer.act, FatRelu):
        return "FATReLU"
    if getattr(_parent(layer.block, layer.down_proj), "activation_sparsity", 0) > 0:  # Gemma 3n's
        return "top-k of gate_proj"
    normed = any(name.endswith("ffn_sub_norm") for name, _ in layer.block.named_modules())
    return "norm before down_proj" if normed else None


def _activation(module: nn.Module) -> str | None:
    """Which of ACTIVATIONS a module computes, by what it computes."""
    probe = torch.linspace(-6, 6, 97)
    found = module(probe)
    same = (n for n, f in ACTIVATIONS.items() if torch.allclose(f(probe), found, atol=1e-6))
    return next(same, None)


def _limit(cut: Cut, index: int, layer: Layer) -> Limit:
    value = float(cut.value[index])
    width = layer.projections.get(cut.tap, layer.down_proj).in_features
    if cut.kind == "topk":
        return Limit(0.0, round(value * width), weight_of(cut, index, layer))
    return Limit(value, None, weight_of(cut, index, layer))


_NOTHING = Limit(-1.0, None, None)


def _replace_ffn(layer: Layer, limits: dict[str, Limit], act: str | None) -> None:
    if not layer.gated or "gate_act" not in limits:
        (limit,) = limits.values()
        _put(layer.block, layer.down_proj, SparseDown(layer.down_proj, limit))
        _replace_shared(layer, list(layer.ffn_inputs), {})
        return
    assert act is not None
    (gate, up), early = _gate_and_up(layer), limits["gate_act"]
    ffn = SparseFfn(gate, up, layer.down_proj, act, early, limits.get("inter"))
    _put(layer.block, _parent(layer.block, layer.down_proj), ffn)


def _gate_and_up(layer: Layer) -> Any:
    """Weight and bias of both."""
    if layer.gate_up_proj is None:
        return [(p.weight, p.bias) for p in layer.ffn_inputs.values()]
    weights = layer.gate_up_proj.weight.chunk(2)
    bias = layer.gate_up_proj.bias
    return list(zip(weights, (None, None) if bias is None else bias.chunk(2), strict=True))


def _replace_attention(layer: Layer, limits: dict[str, Limit]) -> None:
    names = list(layer.attention)
    for part in (names[:-1], names[-1:]):
        if part:
            _replace_shared(layer, part, limits)


def _replace_inputs(layer: Layer, limits: dict[str, Limit], act: str | None) -> None:
    ffn_inputs = list(layer.ffn_inputs)
    if layer.gated and _together(ffn_inputs, limits) and "down_proj" in limits:
        assert act is not None
        gate_up, down = _inputs(layer, ffn_inputs, limits), _inputs(layer, ["down_proj"], limits)
        _put(layer.block, _parent(layer.block, layer.down_proj), InputsFfn(gate_up, down, act))
    else:
        _replace_shared(layer, ffn_inputs, limits)
        _replace_shared(layer, ["down_proj"], limits)


def _replace_shared(layer: Layer, names: list[str], limits: dict[str, Limit]) -> None:
    """Projections of one input, in the order in which the model calls them."""
    cut = any(name in limits for name in names)
    if cut and len(names) > 1 and not _together(names, limits):
        for name in names:
            _replace_shared(layer, [name], limits)
        return
    projections = [layer.projections[name] for name in names]
    plain = all(type(p) is nn.Linear for p in projections)
    if not cut and not (plain and len({p.bias is None for p in projections}) == 1):
        return
    found = _inputs(layer, names, limits) if cut else DenseInputs(projections)
    left = dict[int, torch.Tensor]()
    for index, projection in enumerate(projections):
        _put(layer.block, projection, found if len(names) == 1 else Shared(found, index, left))


def _together(names: list[str], limits: dict[str, Limit]) -> bool:
    """Whether one call can compute them: cuts by threshold, or by top-k with one k."""
    found = [limits.get(name, _NOTHING) for name in names]
    same_weight = len({limit.weight is None for limit in found}) == 1
    return len(names) <= 3 and same_weight and len({limit.k for limit in found}) == 1


def _inputs(layer: Layer, names: list[str], limits: dict[str, Limit]) -> SparseInputs:
    projections = [layer.projections[name] for name in names]
    return SparseInputs(projections, [limits.get(name, _NOTHING) for name in names])


def _parent(block: nn.Module, child: nn.Module) -> nn.Module:
    """The module in a block that has `child` as its own."""
    return next(m for m in block.modules() if any(c is child for c in m.children()))


def _put(block: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent = _parent(block, old)
    name = next(n for n, child in parent.named_children() if child is old)
    setattr(parent, name, new)
