"""What of a model is trained: whole weights, low-rank changes or scales; and its rounding."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fallow.adaptation.rounding import ROUNDINGS, Rounded, round_together
from fallow.common.errors import FallowError, UsageError
from fallow.models.taps import Layer

TRAINED = {
    "layers": "every weight of the decoder layers",
    "ffn": "the projections of the FFN",
    "lora": "a low-rank change of every projection",
    "scales": "norms, biases and a factor per neuron",
}


class LowRank(nn.Module):
    """A parametrization: weight + out into, arXiv:2106.09685 4.1. Nothing at first."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        rows, cols = weight.shape
        self.into = nn.Parameter(torch.randn(rank, cols) * cols**-0.5)
        self.out = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.out @ self.into


class NeuronScale(nn.Module):
    """A parametrization: column i of down_proj times scale_i."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(weight.shape[1]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.scale


def prepare(
    module: nn.Module, layers: list[Layer], trained: str, rank: int, types: dict[str, str]
) -> list[nn.Parameter]:
    """Makes a model's layers trainable, and rounds what is trained; the parameters to train.

    Args:
        trained: one of TRAINED.
        types: what projections' weights, by their names, are stored as; others are not rounded.
            down_proj is stored transposed.

    Raises:
        UsageError: unknown `trained`.
        FallowError: rows of a matrix are not whole blocks of its type.
    """
    if trained not in TRAINED:
        raise UsageError(f"unknown --train {trained!r}; known: {', '.join(TRAINED)}")
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in layers:
            _make_trainable(layer, trained, rank)
    names = {id(part): f"{name}.weight" for name, part in module.named_modules()}
    for layer in layers:
        ffn = {**layer.ffn_inputs, "down_proj": layer.down_proj}
        for part in (layer.projections if trained in ("layers", "lora") else ffn).values():
            name = names[id(part)]
            if name in types:
                _round(part, types[name], part is layer.down_proj, name)
    return [p for p in module.parameters() if p.requires_grad]


def _make_trainable(layer: Layer, trained: str, rank: int) -> None:
    if trained == "layers":
        layer.block.requires_grad_(True)
    elif trained == "ffn":
        for projection in (*layer.ffn_inputs.values(), layer.down_proj):
            projection.requires_grad_(True)
    elif trained == "lora":
        for projection in layer.projections.values():
            change = LowRank(projection.weight, rank).to(projection.weight.device)
            parametrize.register_parametrization(projection, "weight", change, unsafe=True)
    else:
        scale = NeuronScale(layer.down_proj.weight).to(layer.down_proj.weight.device)
        parametrize.register_parametrization(layer.down_proj, "weight", scale, unsafe=True)
        for parameter in layer.block.parameters():
            if parameter.ndim == 1:
                parameter.requires_grad_(True)


def _round(projection: nn.Linear, kind: str, columns: bool, name: str) -> None:
    if kind not in ROUNDINGS:
        raise FallowError(
            f"{name} is of the type {kind}, to which training cannot round; give --quant "
            f"({', '.join(k.lower() for k in ROUNDINGS)})"
        )
    rows = projection.out_features if columns else projection.in_features
    block = 256 if kind.endswith("_K") else 32 if kind[0] == "Q" else 1
    if rows % block:
        raise FallowError(
            f"rows of {rows} weights of {name} are not whole blocks of {block} of {kind}; give "
            "another --quant, such as bf16"
        )
    parametrize.register_parametrization(projection, "weight", Rounded(kind, columns), unsafe=True)


def renew_rounding(module: nn.Module) -> None:
    """To be called when weights have changed."""
    together: dict[str, list[tuple[Rounded, torch.Tensor]]] = {}
    for part in module.modules():
        if not parametrize.is_parametrized(part, "weight"):
            continue
        changes: Any = part.parametrizations["weight"]  # type: ignore[index]
        if isinstance(changes[-1], Rounded):
            changes[-1].renew()
            if len(changes) == 1:  # or it is rounded when it is asked for
                together.setdefault(changes[-1].kind, []).append((changes[-1], changes.original))
    for group in together.values():
        round_together(group)


def finish(module: nn.Module) -> None:
    """Leaves plain weights, rounded and with every change merged."""
    renew_rounding(module)
    for part in [m for m in module.modules() if parametrize.is_parametrized(m, "weight")]:
        parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)
