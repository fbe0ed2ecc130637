"""What a dense model does on calibration text: the statistics that rules are fitted on."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from fallow import _core
from fallow.common.errors import FallowError
from fallow.common.metrics import histogram_quantile
from fallow.common.progress import progress
from fallow.models import devices
from fallow.models.taps import Layer, attach
from fallow.plan import NEURON_TAPS, ROUTER

# Tokens kept whole for searches that no histogram can answer (CETT, tail budget): 1024 tokens of
# Qwen2.5-1.5B are 0.5 GB in bf16. TEAL's search runs each block some hundred times, on fewer:
# the first tokens of the first windows.
SAMPLE_TOKENS = 1024
BLOCK_WINDOWS, BLOCK_TOKENS = 2, 128


class Runnable(Protocol):
    """What capturing needs of a model."""

    name: str
    layers: list[Layer]

    def hidden(self, ids: np.ndarray) -> torch.Tensor: ...


def n_threads() -> int:
    return torch.get_num_threads()


class Histograms:
    """Magnitude histograms of one tap in every layer; exact, streaming."""

    def __init__(self, tap: str, n_layers: int) -> None:
        self.tap = tap
        self._counts = np.zeros((n_layers, _core.HISTOGRAM_BINS), dtype=np.uint64)
        self._on_device: torch.Tensor | None = None  # counts that are yet to be added to those
        self.zeros = np.zeros(n_layers, dtype=np.int64)  # exact zeros

    @property
    def counts(self) -> np.ndarray:
        """(L, bins) uint64."""
        if self._on_device is not None:
            self._counts += devices.as_array(self._on_device).astype(np.uint64)
            self._on_device = None
        return self._counts

    def add(self, layer: int, value: torch.Tensor) -> None:
        """Counts |value| (T, width).

        Raises:
            FallowError: NaN or infinity, naming tensor and layer.
        """
        if devices.on_cpu(value):
            flat = devices.as_floats(value).reshape(-1)
            zeros, non_finite = _core.add_magnitudes(flat, self._counts[layer], n_threads())
        else:
            zeros, non_finite = self._add_in_torch(layer, value)
        if non_finite:
            raise non_finite_error(self.tap, layer, non_finite)
        self.zeros[layer] += zeros

    @torch.inference_mode()
    def _add_in_torch(self, layer: int, value: torch.Tensor) -> tuple[int, int]:
        """The core's add_magnitudes on the value's device: exact zeros, non-finite values."""
        found = _count_magnitudes(value)
        if self._on_device is None:
            self._on_device = found.new_zeros(self._counts.shape)
        self._on_device[layer] += found[:-1]
        zeros, non_finite = torch.stack([(value == 0).sum(), found[-1]]).tolist()
        return zeros, non_finite

    def quantile(self, layer: int, q: float) -> float:
        """The q-th quantile of the layer's magnitudes; 0 at q = 0."""
        return histogram_quantile(self.counts[layer], q)

    def pooled_quantile(self, q: float) -> float:
        """The q-th quantile of all layers' magnitudes together."""
        return histogram_quantile(self.counts.sum(axis=0), q)


def _count_magnitudes(value: torch.Tensor) -> torch.Tensor:
    """Counts of |value| in the core's bins and, last, of NaN and infinity: (bins + 1,) int64.

    A bin is a float's exponent and top 10 mantissa bits (csrc/stats/histogram.cpp).
    """
    bits = value.detach().float().flatten().view(torch.int32) & 0x7FFFFFFF
    bins, per_octave = _core.HISTOGRAM_BINS, _core.HISTOGRAM_BINS_PER_OCTAVE
    first = (127 + _core.HISTOGRAM_MIN_EXPONENT) * per_octave
    position = ((bits >> 13) - first).clamp_(0, bins - 1)
    position[bits >= 0x7F800000] = bins
    return torch.bincount(position, minlength=bins + 1)


def non_finite_error(tap: str, layer: int, count: int) -> FallowError:
    return FallowError(
        f"{count} NaN or infinite values in {tap} of layer {layer}; "
        "try --dtype float32, or check the checkpoint"
    )


class Calibration:
    """Statistics of a dense model over `windows` (n, context); each is collected when asked for."""

    def __init__(self, model: Runnable, windows: np.ndarray) -> None:
        self.model = model
        self.windows = windows
        self.cache: dict[str, Any] = {}  # for rules whose search is worth keeping (TEAL's path)
        # Of a mixture, of the rows of `inter` and `gate_act` the expert that each is of: (T',)
        # int64 per layer. Of other models there are none.
        self.sampled_experts: list[torch.Tensor] = []

    @property
    def layers(self) -> list[Layer]:
        return self.model.layers

    @property
    def n_tokens(self) -> int:
        return int(self.windows.size)

    @cached_property
    def histograms(self) -> dict[str, Histograms]:
        """Per tap; projections that share an input (q, k, v; gate, up) are counted once."""
        layer = self.layers[0]
        taps = [tap for tap in layer.ffn_taps if tap != ROUTER]
        names = dict.fromkeys([*taps, *(input_histogram(layer, p) for p in layer.projections)])
        found = {name: Histograms(name, len(self.layers)) for name in names}
        self.run("histograms", {name: h.add for name, h in found.items()})
        return found

    @cached_property
    def inter(self) -> list[torch.Tensor]:
        """`inter` of an even sample of tokens, per layer (T', d_ff), as the model computes it.

        Of a mixture a sample of tokens and one of the experts that each uses.
        """
        return self.sample("inter")

    @cached_property
    def gate_act(self) -> list[torch.Tensor]:
        """`gate_act` of the same tokens."""
        return self.sample("gate_act")

    def sample(self, tap: str, tokens: int = SAMPLE_TOKENS) -> list[torch.Tensor]:
        """A tap's values at an even sample of tokens, per layer (T', d_ff)."""
        sample = _Sample(self, tap, tokens)
        self.run("activations", {tap: sample.add})
        self.sampled_experts = sample.experts or self.sampled_experts
        return sample.found

    def scores(
        self, values: list[torch.Tensor], weights: Iterable[torch.Tensor], step: int = 1
    ) -> list[torch.Tensor]:
        """|value| times its neuron's weight, of every `step`-th row, per layer (T', d_ff) float32.

        Of `inter` or `gate_act` and weights (d_ff,) per layer; of a mixture (n_experts, d_ff), or
        the same in one row.
        """
        found = []
        for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
            if self.sampled_experts:
                rows = self.sampled_experts[index][::step]
                weight = weight.view(-1, value.shape[1])[rows]
            found.append(value[::step].abs().float() * weight)
        return found

    @cached_property
    def mean_up(self) -> list[np.ndarray]:
        """E|up_i| of every neuron, per layer (d_ff,) float32; ones for an FFN without a gate.

        Of a mixture (n_experts * d_ff,), each expert's over the tokens that use it; of one that
        none uses, the mean of the layer's neurons.
        """
        mean = _MeanUp(self)
        if mean.gated:
            self.run("mean up", {"up": mean.add})
        return mean.found

    def collect_stages(self) -> None:
        """`mean_up`, `gate_act` and `inter` from one run of the model."""
        mean = _MeanUp(self)
        taps = ("gate_act", "inter") if mean.gated else ("inter",)
        samples = {tap: _Sample(self, tap, SAMPLE_TOKENS) for tap in taps}
        adding: dict[str, Callable[..., Any]] = {tap: s.add for tap, s in samples.items()}
        self.run("activations", adding | ({"up": mean.add} if mean.gated else {}))
        self.sampled_experts = samples["inter"].experts
        vars(self).update({tap: s.found for tap, s in samples.items()}, mean_up=mean.found)

    @cached_property
    def input_moments(self) -> np.ndarray:
        """E[x xᵀ] of the FFN's input per layer, (L, d_model, d_model) float32."""
        return self._input_statistics[0]

    @cached_property
    def mean_input(self) -> np.ndarray:
        """E[x] of the FFN's input per layer, (L, d_model) float32."""
        return self._input_statistics[1]

    @cached_property
    def _input_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        width, device = self.layers[0].down_proj.out_features, self.layers[0].device
        moments = torch.zeros(len(self.layers), width, width, device=device)
        means = torch.zeros(len(self.layers), width, device=device)

        def add(layer: int, value: torch.Tensor) -> None:
            x = value.float()
            moments[layer] += x.T @ x
            means[layer] += x.sum(dim=0)

        self.run("input moments", {next(iter(self.layers[0].ffn_inputs)): add})
        return devices.as_array(moments / self.n_tokens), devices.as_array(means / self.n_tokens)

    @cached_property
    def successive_moments(self) -> np.ndarray:
        """E[x yᵀ] of the FFN's input x and that of the layer before, y: (L, d_model, d_model).

        float32; the first layer's y is its own input.
        """
        width = self.layers[0].down_proj.out_features
        total = torch.zeros(len(self.layers), width, width, device=self.layers[0].device)
        before = torch.empty(0)

        def add(layer: int, value: torch.Tensor) -> None:
            nonlocal before
            x = value.float()
            total[layer] += x.T @ (before if layer else x)
            before = x

        self.run("successive moments", {next(iter(self.layers[0].ffn_inputs)): add})
        return devices.as_array(total / self.n_tokens)

    @cached_property
    def block_inputs(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments with which each decoder layer is called on the first tokens of the text."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((args, kwargs))

        with ExitStack() as stack:
            for layer in self.layers:
                handle = layer.block.register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(handle.remove)
            self.model.hidden(self.windows[:BLOCK_WINDOWS, :BLOCK_TOKENS])
        return found

    def run(self, what: str, taps: dict[str, Callable[..., Any]]) -> None:
        """Runs the dense model over the windows, one by one, with `taps`; `what` names it."""
        with (
            progress(f"calibration {what}", len(self.windows)) as ticker,
            attach(self.layers, taps),
        ):
            for window in self.windows:
                self.model.hidden(window[None])
                ticker.advance()


class _Sample:
    """A tap's values at an even sample of a calibration's tokens."""

    def __init__(self, calibration: Calibration, tap: str, tokens: int) -> None:
        n_rows, n_layers = calibration.n_tokens, len(calibration.layers)
        mixture = calibration.layers[0].experts if tap in NEURON_TAPS else None
        if mixture is not None:
            n_rows *= mixture.used
        count = min(tokens, n_rows)
        # From the middle of each stride: a window's first token is an attention sink with
        # activations of its own kind, and must not be over-represented.
        self._wanted = ((np.arange(count) + 0.5) * n_rows / count).astype(np.int64)
        self._tap, self._seen = tap, [0] * n_layers
        self._parts: list[list[torch.Tensor]] = [[] for _ in range(n_layers)]
        self._layers = calibration.layers if mixture is not None else []
        self._experts: list[list[torch.Tensor]] = [[] for _ in self._layers]

    def add(self, layer: int, value: torch.Tensor) -> None:
        if not torch.isfinite(value).all():
            raise non_finite_error(self._tap, layer, int((~torch.isfinite(value)).sum()))
        first, wanted = self._seen[layer], self._wanted
        here = wanted[(wanted >= first) & (wanted < first + len(value))]
        self._parts[layer].append(value[here - first].clone())
        self._seen[layer] += len(value)
        if self._layers and (mixture := self._layers[layer].experts) is not None:
            self._experts[layer].append(torch.full((len(here),), mixture.current))

    @property
    def found(self) -> list[torch.Tensor]:
        """Per layer (T', d_ff)."""
        return [torch.cat(parts) for parts in self._parts]

    @property
    def experts(self) -> list[torch.Tensor]:
        """Of a mixture's neurons the expert of each row, per layer (T',) int64."""
        return [torch.cat(parts) for parts in self._experts]


class _MeanUp:
    """E|up_i| of every neuron."""

    def __init__(self, calibration: Calibration) -> None:
        self._layers = layers = calibration.layers
        self.gated = layers[0].gated
        experts = [1 if layer.experts is None else layer.experts.count for layer in layers]
        self._total = [np.zeros((n, at.d_ff)) for n, at in zip(experts, layers, strict=True)]
        self._n_tokens = [np.zeros((n, 1), dtype=np.int64) for n in experts]

    def add(self, layer: int, value: torch.Tensor) -> None:
        mixture = self._layers[layer].experts
        expert = 0 if mixture is None else mixture.current
        self._total[layer][expert] += devices.as_array(value.abs().float().sum(dim=0))
        self._n_tokens[layer][expert] += len(value)

    @property
    def found(self) -> list[np.ndarray]:
        """Per layer (d_ff,) float32; ones for an FFN without a gate. Or (n_experts * d_ff,)."""
        found = []
        for layer, (total, uses) in enumerate(zip(self._total, self._n_tokens, strict=True)):
            if not np.isfinite(total).all():
                raise non_finite_error("up", layer, int((~np.isfinite(total)).sum()))
            # Nothing is known of an expert that no token used. Zeros would drop all of its neurons.
            usual = (total.sum(axis=0) / max(1, uses.sum())).mean()
            mean = np.where(uses > 0, total / np.maximum(uses, 1), usual)
            found.append((mean if self.gated else np.ones_like(total)).astype(np.float32).ravel())
        return found


def input_histogram(layer: Layer, projection: str) -> str:
    """The tap under which a projection's input is counted."""
    if projection == "down_proj":
        return "inter"
    if projection in layer.ffn_inputs:
        return next(iter(layer.ffn_inputs))
    if projection == "o_proj":
        return "o_proj"
    return next(iter(layer.attention))
