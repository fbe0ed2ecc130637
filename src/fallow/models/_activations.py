"""Activations that transformers does not have, by what a config.json calls them.

It says so where its class reads the activation: `hidden_act`, or of Gemma `hidden_activation`.

fatrelu: x where x > hidden_act_param, else 0 (FATReLU; ProSparse, arXiv:2402.13516 3.3).
drelu: ReLU of gate_proj, and ReLU of up_proj too (dReLU; TurboSparse, arXiv:2406.05955 3.2).
"""

from typing import Any

import torch
from torch import nn

from fallow.common.errors import FallowError
from fallow.models._base import Architecture, has_part

REPLACEMENTS = ("relu", "drelu")
_BUILT_WITH = {"fatrelu": "relu", "drelu": "relu"}  # what transformers is told in their place


class FatRelu(nn.Module):
    """x where x > threshold, else 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.threshold(x, self.threshold, 0.0)


class Rectified(nn.Linear):
    """ReLU of what a projection puts out; it has that projection's own weights."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__(projection.in_features, projection.out_features, device="meta")
        self.weight, self.bias = projection.weight, projection.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.relu(super().forward(x))


def told(architecture: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """What transformers' class of a model is told in place of what a config says."""
    found = architecture.settings | architecture.translate(config)
    key, act = activation_key(architecture), _activation(architecture, config)
    return found | {key: _BUILT_WITH[act]} if key and act in _BUILT_WITH else found


def check_activation(architecture: Architecture, config: dict[str, Any], where: str) -> None:
    """Raises FallowError for FATReLU without a threshold, dReLU without a gate, and experts.

    And for one of them under a key that the model's class passes over.
    """
    act, threshold = _activation(architecture, config), config.get("hidden_act_param")
    key = activation_key(architecture)
    if (other := config.get("hidden_act")) in _BUILT_WITH and key not in (None, "hidden_act"):
        raise FallowError(
            f"{where}: hidden_act is {other}, but {architecture.model_type} models have their "
            f"activation from {key}; say it there"
        )
    if act in _BUILT_WITH and architecture.experts is not None:
        raise FallowError(
            f"{where}: {key} is {act}, which is not computed for the experts of "
            f"{architecture.model_type} models; give a model without it"
        )
    if act == "fatrelu" and not (isinstance(threshold, int | float) and 0 <= threshold < 1e6):
        raise FallowError(
            f"{where}: {key} is fatrelu, and hidden_act_param is {threshold!r}, no threshold "
            "of 0 or more; add the one that the model was made with"
        )
    if act == "drelu" and (architecture.gate_proj is None or architecture.up_proj is None):
        raise FallowError(
            f"{where}: {key} is drelu, but {architecture.model_type} models have no gate_proj "
            "and up_proj; give a model without it"
        )


def activate(architecture: Architecture, config: dict[str, Any], module: Any) -> None:
    """Gives a model that was built so its own activation.

    Its config then says all that it computes, in transformers' names but for that activation.
    """
    if architecture.translate(config):
        for name in architecture.config_keys:
            vars(module.config).pop(name, None)
    act = _activation(architecture, config)
    if act not in _BUILT_WITH:
        return
    setattr(module.config, str(activation_key(architecture)), act)
    for block in module.get_submodule(architecture.layers).children():
        if act == "fatrelu":
            _put(architecture, block, FatRelu(float(config["hidden_act_param"])))
        else:
            _rectify(architecture, block)


def replace_activation(architecture: Architecture, module: Any, act: str) -> None:
    """Gives a loaded model one of REPLACEMENTS, and says so in its config.

    Raises:
        FallowError: the FFN has no gate for dReLU, or its activation is no setting of its config.
    """
    name = activation_key(architecture)
    if name is None or name in architecture.settings:
        raise FallowError(
            f"the activation of {architecture.model_type} models is no setting of theirs, so that "
            f"{act} cannot take its place; give another model"
        )
    check_activation(architecture, {name: act}, "--activation")
    setattr(module.config, name, act)
    for block in module.get_submodule(architecture.layers).children():
        _put(architecture, block, nn.ReLU())
        if act == "drelu":
            _rectify(architecture, block)


def activation_key(architecture: Architecture) -> str | None:
    """What the config of such models calls their activation, if it has one."""
    import transformers

    config = getattr(transformers, architecture.hf_class).config_class()
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((n for n in names if getattr(config, n, None) is not None), None)


def _put(architecture: Architecture, block: Any, act: nn.Module) -> None:
    """In the FFN's place and, where a layer has inputs of its own, in theirs: it is one setting."""
    block.set_submodule(architecture.act, act)
    if has_part(block, "act_fn"):
        block.set_submodule("act_fn", act)


def _rectify(architecture: Architecture, block: Any) -> None:
    path = str(architecture.up_proj)
    block.set_submodule(path, Rectified(block.get_submodule(path)))


def _activation(architecture: Architecture, config: dict[str, Any]) -> Any:
    key = activation_key(architecture)
    return None if key is None else (config | architecture.settings).get(key)
