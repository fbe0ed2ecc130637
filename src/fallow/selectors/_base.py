"""What all selectors share: they see a layer's input and gate, and cut its neurons."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import nn

from fallow.models import devices
from fallow.models.capture import Calibration
from fallow.models.cuts import per_token_topk, zero_where
from fallow.models.taps import Layer, Tap, one_width
from fallow.rules import Choice
from fallow.rules.cett import Cett

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Bits:
    """Stored bits per weight, scales included."""

    gate: float = 4.5  # Q4_K
    up: float = 4.5
    down: float = 5.5  # Q5_K, what `fallow pack` takes for Qwen2.5-1.5B


@dataclass
class Seen:
    """What one layer has computed for a block of tokens."""

    x: torch.Tensor  # (T, d_model), the FFN's input
    gate_act: torch.Tensor  # (T, d_ff)
    out_norm: torch.Tensor  # (T, d_ff) float32: |inter_i| ||down_proj[:, i]||, the truth
    earlier: torch.Tensor  # (T, d_model), the FFN input of the layer before; the first's own


class Selector(Choice):
    """Keeps the k neurons of each token with the largest predicted out_norm.

    It chooses by code of its own, which no plan holds: it runs on the model, to be judged. With the
    option cett=1 it keeps, instead, the neurons above the layer's threshold of the rule `cett`, so
    that layers and tokens share the budget unevenly.
    """

    paper = "ours (docs/methods.md)"
    where = "inter"
    knob_name = "k / d_ff, the share kept per token"
    options: ClassVar[dict[str, int]] = {"cett": 0}
    option_ranges: ClassVar[dict[str, range]] = {"cett": range(2)}

    def __init__(self, knob: float, arrays: Arrays) -> None:
        self.knob = knob
        self.arrays = arrays
        self._tensors: dict[tuple[str, int, torch.device], torch.Tensor] = {}

    def tensor(self, name: str, index: int, like: torch.Tensor) -> torch.Tensor:
        """Layer `index`'s part of an array, on the device of another tensor: brought there once."""
        key = name, index, like.device
        if key not in self._tensors:
            self._tensors[key] = devices.tensor(self.arrays[name][index], like.device)
        return self._tensors[key]

    @classmethod
    def with_options(cls, text: str) -> type[Self]:
        made = super().with_options(text)
        if made.options.get("cett"):
            made.knob_name = Cett.knob_name
        return made

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        return Cett.knob_for(calibration, sparsity) if cls.options.get("cett") else 1 - sparsity

    @classmethod
    def fit(
        cls, calibration: Calibration, *, sparsity: float | None = None, knob: float | None = None
    ) -> Self:
        """As `Choice.fit`.

        Raises:
            FallowError: a mixture of experts, or layers that differ in the number of their neurons.
        """
        calibration.layers[0].one_ffn()
        one_width(calibration.layers)
        return super().fit(calibration, sparsity=sparsity, knob=knob)

    @classmethod
    def fit_knob(cls, calibration: Calibration, knob: float) -> Self:
        return cls(knob, cls.learn(calibration, knob))

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Arrays:
        """What the choice needs; the scores' part is learned once per calibration."""
        key = cls.scores_key()
        if key not in calibration.cache:
            calibration.cache[key] = cls.learn_scores(calibration)
        if not cls.options.get("cett"):
            return calibration.cache[key]
        return {"threshold": Cett.learn(calibration, knob).value} | calibration.cache[key]

    @classmethod
    def scores_key(cls) -> str:
        """The scores' key in a calibration's cache: the budget does not change them."""
        names = [part for part in cls.name.split(":") if "=" not in part]
        own = [f"{k}={v}" for k, v in cls.options.items() if k not in Selector.options]
        return ":".join(["selector", *names, *own])

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        """The arrays that `score` needs; they do not depend on the knob."""
        return {}

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        """Bits per weight of gate_proj and up_proj that are read of every neuron, to choose."""
        return 0.0, 0.0

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        """Bytes per token read (or written) besides the FFN's own weights, to choose.

        Fractions count in half precision. One factor per neuron, such as ||down_proj[:, i]||, which
        nearly every score has, is not counted.
        """
        return 0

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        """Multiplications per token with what `extra_bytes` counts; by default one per byte."""
        return cls.extra_bytes(layer)

    @classmethod
    def cost(cls, layer: Layer) -> tuple[float, int]:
        """What choosing takes per token and layer: bytes read, multiplications."""
        size = layer.down_proj.weight.numel()
        first = cls.first_bits(Bits())
        read = sum(first) / 8 * size + cls.extra_bytes(layer)
        return read, sum(b > 0 for b in first) * size + cls.extra_multiplications(layer)

    @classmethod
    def ffn_bytes(cls, kept: float, layer: Layer) -> float:
        """Bytes of a gated FFN read per decoded token, over those of the dense FFN."""
        stored = Bits()
        total = stored.gate + stored.up + stored.down
        first = sum(cls.first_bits(stored))
        extra = 8 * cls.extra_bytes(layer) / layer.down_proj.weight.numel()
        return (first + kept * (total - first) + extra) / total

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        """The prediction (T, d_ff), float32, up to a factor per token."""
        raise NotImplementedError

    @property
    def kept(self) -> float | None:
        """The share of neurons kept of every token; None: it differs between them."""
        return None if self.options.get("cett") else self.knob

    def threshold(self, index: int, score: torch.Tensor) -> float | torch.Tensor:
        """Scores (T, d_ff) of layer `index` up to this are inactive: one number, or (T, 1)."""
        if self.kept is None:
            return float(self.arrays["threshold"][index])
        return per_token_topk(score, self.kept)

    def inactive(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        """The neurons (T, d_ff), bool, that are not chosen."""
        score = self.score(index, layer, seen)
        return score <= self.threshold(index, score)

    def taps(self, layers: list[Layer]) -> dict[str, Tap]:
        """The taps that apply the choice to a model with these layers."""

        def cut(index: int, inter: torch.Tensor, seen: Seen) -> torch.Tensor:
            return zero_where(self.inactive(index, layers[index], seen), inter)

        return watch(layers, cut)


def watch(
    layers: list[Layer], at_inter: Callable[[int, torch.Tensor, Seen], torch.Tensor | None]
) -> dict[str, Tap]:
    """Taps that call `at_inter(layer, inter, what was seen before)`; as a tap it may replace.

    Every layer overwrites what an earlier pass left of it before the next layer reads it, and the
    first reads its own alone: nothing reaches from one pass of the model into another.
    """
    values: dict[tuple[int, str], torch.Tensor] = {}

    def look(tap: str) -> Tap:
        def keep(index: int, value: torch.Tensor) -> None:
            values[index, tap] = value

        return keep

    def tap(index: int, inter: torch.Tensor) -> torch.Tensor | None:
        x = values[index, "x"]
        seen = Seen(
            x=x,
            gate_act=values.pop((index, "gate_act")),
            out_norm=inter.abs().float() * layers[index].down_norm,
            earlier=values.pop((index - 1, "x"), x),
        )
        return at_inter(index, inter, seen)

    return {"x": look("x"), "gate_act": look("gate_act"), "inter": tap}


class Approximate(Selector):
    """Scores the norm to expect of a neuron whose gate_pre and up are known up to an error:

        sqrt(E[act(g + s_g e)²] E[(u + s_u e)²]) ||down_proj[:, i]||, e ~ N(0, 1)

    for g = x G'ᵀ and u = x U'ᵀ, G' and U' near gate_proj and up_proj. The arrays "gate.error" and
    "up.error" (L, d_ff) hold s, 0 if they are missing. Without s a neuron of which little is known
    would pass for a small one (SmolLM2, `lowrank` with 8 bits, 2 windows, 50 %: KL 0.267 nats
    without s, 0.176 with it; `ahead` 0.173 and 0.129).
    """

    def __init__(self, knob: float, arrays: Arrays) -> None:
        super().__init__(knob, arrays)
        self._made: dict[int, list[Linear]] = {}

    def approximate(self, index: int, weight: torch.Tensor, name: str) -> torch.Tensor:
        """What stands for layer `index`'s weight (d_ff, d_model); `name` is "gate" or "up"."""
        raise NotImplementedError

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        return self.expected_norm(index, layer, seen.x)

    def expected_norm(self, index: int, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """The score (T, d_ff) for FFN inputs x (T, d_model)."""
        if index not in self._made:
            self._made[index] = [
                (self.approximate(index, weight, name), bias)
                for name, (weight, bias) in zip(("gate", "up"), input_weights(layer), strict=False)
            ]
        gate, *up = (nn.functional.linear(x, *linear) for linear in self._made[index])
        score = (
            root_mean_square(layer.act, gate, self._error(index, "gate", gate)) * layer.down_norm
        )
        if up:
            score = score * root_mean_square(nn.Identity(), up[0], self._error(index, "up", gate))
        return score

    def _error(self, index: int, name: str, like: torch.Tensor) -> torch.Tensor | None:
        key = f"{name}.error"
        return self.tensor(key, index, like).float() if key in self.arrays else None


def root_mean_square(
    function: nn.Module, mean: torch.Tensor, error: torch.Tensor | None
) -> torch.Tensor:
    """sqrt(E[function(mean + error e)²]), e ~ N(0, 1): mean (T, d_ff), error (d_ff,); float32.

    Gauss-Hermite quadrature at three points, exact for the square of a linear function.
    """
    if error is None:
        return function(mean).abs().float()
    shift = (3**0.5 * error).to(mean.dtype)
    low, middle, high = (
        function(value).float().square() for value in (mean - shift, mean, mean + shift)
    )
    return (middle * 2 / 3 + (low + high) / 6).sqrt()


Linear = tuple[torch.Tensor, torch.Tensor | None]
"""A weight (out, in) and a bias (out,)."""


def input_weights(layer: Layer) -> list[Linear]:
    """gate_proj and up_proj, also of a fused gate_up_proj; up_proj alone without a gate."""
    linears: list[Linear] = [(m.weight.detach(), m.bias) for m in layer.ffn_inputs.values()]
    if layer.gate_up_proj is None:
        return linears
    weight, bias = linears[0]
    halves = [None, None] if bias is None else bias.detach().chunk(2)
    return list(zip(weight.chunk(2), halves, strict=True))
