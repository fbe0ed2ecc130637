"""An affine map of low rank of the FFN's input, for what dropped neurons would have added."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fallow.models.capture import Calibration
from fallow.models.devices import as_array, tensor
from fallow.models.taps import Layer, Tap
from fallow.selectors import gate, lowbit
from fallow.selectors._base import Arrays, Seen, Selector, watch
from fallow.selectors._rounding import from_int8, to_int8

# Ridge, as a share of the input's mean variance. On held-out text maps of rank 64, fitted on 8192
# tokens of SmolLM2, explain 1 to 3 points more of the dropped sums with 0.3 than with 1e-3, fitted
# on 32768 up to 1 more; 1.0 takes 1 to 2 points from the gate's.
RIDGE = 0.3


class Moments:
    """Weighted sums over tokens of an input x and a target y, both (T, width)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.weight = 0.0
        self.xx = torch.zeros(width + 1, width + 1, device=device)  # of [x, 1]
        self.xy = torch.zeros(width + 1, width, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        """Counts tokens with float32 x and y (T, width) and weight (T,)."""
        with_one = nn.functional.pad(x, (0, 1), value=1.0)
        weighted = with_one * weight[:, None]
        self.xx += weighted.T @ with_one
        self.xy += weighted.T @ y
        self.weight += float(weight.sum())


def affine_map(sums: Moments, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (d_model, rank), B (rank, d_model) and b (d_model,) with y near x Bᵀ Aᵀ + b.

    Reduced-rank regression (Izenman 1975): the ridge solution M, projected on the directions of y
    in which M explains most.
    """
    xx, xy = (m.double() / sums.weight for m in (sums.xx, sums.xy))
    mean_x, mean_y = xx[-1, :-1], xy[-1]
    covariance = xx[:-1, :-1] - torch.outer(mean_x, mean_x)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    cross = xy[:-1] - torch.outer(mean_x, mean_y)
    full = torch.linalg.solve(covariance, cross)  # (d_model, d_model): y near x @ full
    top = torch.linalg.eigh(cross.T @ full)[1][:, -rank:]
    inner = (full @ top).T
    return top, inner, mean_y - top @ (inner @ mean_x)


def fit_compensation(sums: Sequence[Moments], rank: int) -> Arrays:
    """The maps of layers with these sums: the factors "compensation.out" (L, d_model, rank) and
    "compensation.in" (L, rank, d_model) as int8, a scale per row of each, "compensation.bias".
    """
    parts: dict[str, list[np.ndarray]] = {}
    for layer in sums:
        out, inner, bias = affine_map(layer, rank)
        for name, matrix in (("out", out), ("in", inner)):
            values, scale = to_int8(matrix)
            parts.setdefault(f"compensation.{name}", []).append(values)
            parts.setdefault(f"compensation.{name}.scale", []).append(scale)
        parts.setdefault("compensation.bias", []).append(as_array(bias.float()))
    return {name: np.stack(values) for name, values in parts.items()}


def compensation_bytes(layer: Layer, rank: int) -> int:
    """Bytes per token: both factors as int8, scales and bias as float16."""
    width = layer.down_proj.out_features
    rank = min(rank, width)
    return 2 * rank * width + 2 * (rank + 2 * width)


@dataclass
class Compensation:
    """One layer's map, ready to use."""

    out: torch.Tensor  # (d_model, rank)
    inner: torch.Tensor  # (rank, d_model)
    bias: torch.Tensor  # (d_model,)

    @classmethod
    def from_arrays(cls, arrays: Arrays, index: int, device: torch.device) -> "Compensation":
        return cls(
            from_int8(arrays, "compensation.out", index, device),
            from_int8(arrays, "compensation.in", index, device),
            tensor(arrays["compensation.bias"][index], device),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What to add to the FFN's output (T, d_model), float32, for its input x (T, d_model)."""
        return nn.functional.linear(
            nn.functional.linear(x.float(), self.inner), self.out, self.bias
        )


class Compensated(Selector):
    """Adds to another selector's choice an affine map of rank `compensation` of the FFN's input.

    It stands for what the dropped neurons would have added to the FFN's output. A mixin: the
    selector comes behind it.
    """

    options: ClassVar[dict[str, int]] = {"compensation": 64}
    option_ranges: ClassVar[dict[str, range]] = {"compensation": range(1, 1025)}

    @classmethod
    def scores_key(cls) -> str:
        parts = super().scores_key().split(":")
        return ":".join(part for part in parts if not part.startswith("compensation="))

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        arrays = super().learn(calibration, knob)
        return arrays | cls(knob, arrays)._fit(calibration)

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        return super().extra_bytes(layer) + compensation_bytes(layer, cls.options["compensation"])

    def taps(self, layers: list[Layer]) -> dict[str, Tap]:
        compensations = [
            Compensation.from_arrays(self.arrays, i, layer.device) for i, layer in enumerate(layers)
        ]
        added: dict[int, torch.Tensor] = {}

        def prepare(index: int, x: torch.Tensor) -> None:
            added[index] = compensations[index](x)

        def add(index: int, out: torch.Tensor) -> torch.Tensor:
            return out + added.pop(index).to(out.dtype)

        first_input = next(iter(layers[0].ffn_inputs))
        return {first_input: prepare, **super().taps(layers), "ffn_out": add}

    def _fit(self, calibration: Calibration) -> Arrays:
        """The compensation of every layer for this choice, on the dense model's inputs.

        A token counts by the inverse of its FFN output's squared norm: the relative error is what
        matters, and attention sinks would otherwise decide the fit.
        """
        layers = calibration.layers
        sums = [Moments(layer.down_proj.out_features, layer.device) for layer in layers]

        def add(index: int, inter: torch.Tensor, seen: Seen) -> None:
            down = layers[index].down_proj.weight
            dropped = inter * self.inactive(index, layers[index], seen)
            out = nn.functional.linear(inter, down).float()
            weight = out.square().sum(dim=1).clamp_min(1e-30).reciprocal()
            sums[index].add(seen.x.float(), nn.functional.linear(dropped, down).float(), weight)

        calibration.run("compensation", watch(layers, add))
        return fit_compensation(sums, self.options["compensation"])


class Gate(Compensated, gate.Gate):
    """The selector `gate`, compensated."""

    options: ClassVar[dict[str, int]] = {**gate.Gate.options, **Compensated.options}
    option_ranges: ClassVar[dict[str, range]] = {
        **gate.Gate.option_ranges,
        **Compensated.option_ranges,
    }


class LowBit(Compensated, lowbit.LowBit):
    """The selector `lowbit`, compensated."""

    options: ClassVar[dict[str, int]] = {**lowbit.LowBit.options, **Compensated.options}
    option_ranges: ClassVar[dict[str, range]] = {
        **lowbit.LowBit.option_ranges,
        **Compensated.option_ranges,
    }

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        # Those of `lowbit` are not its bytes, so that the map's have to be added.
        own = super().extra_multiplications(layer)
        return own + compensation_bytes(layer, cls.options["compensation"])
