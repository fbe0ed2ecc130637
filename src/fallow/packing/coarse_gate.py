"""A coarse copy of a gate that a ReLU follows: it predicts the neurons that are not zero.

Of a gate most of whose outputs are below zero, only their signs matter. Products with two bits per
weight tell them nearly always (signs alone were the idea of SparseInfer, arXiv:2411.12692), and the
rows of neurons that they put far below zero need not be read: neither gate_proj's nor the others'.
How far is fitted, so that a stated share of the active neurons' energy is kept.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError, UsageError
from fallow.common.progress import progress
from fallow.models import FatRelu
from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.packing.coarse_head import coarse_rows, decode_rows
from fallow.packing.quantize import Matrix, dequantize
from fallow.reference.model import Model

# Of the default calibration text: windows by which the copy is rounded, and others for the margin,
# which on the former would come out too small. On the model in tests/data/relu a margin that keeps
# 99 % of the energy there kept 98.7 % elsewhere.
CONTEXT, ROUNDING_WINDOWS, MARGIN_WINDOWS = 256, 24, 8
RELUS = ("relu", "relu2", "fatrelu", "drelu")


def coarse_gates(
    model: Model, matrices: Mapping[str, Matrix], activation: str, recall: float
) -> dict[str, Matrix]:
    """Codes (d_ff, d_model / 4 + 4) and bias (d_ff,) of every layer's gate, by the engine's names.

    Codes and scales are rows in two bits (csrc/formats/two_bits.h). A neuron is predicted active if
    their product with x and the bias come to more than zero: the bias is what the rounding takes
    from E[x]'s product, with the gate's own, less FATReLU's threshold, and m standard deviations of
    the product's error; m, the least that keeps `recall` of sum_i (inter_i ||down_proj[:, i]||)^2,
    is a layer's.

    Raises:
        UsageError: `recall` is not between 0 and 1.
        FallowError: no ReLU follows a gate, or its rows are not whole bytes.
    """
    check_predictable(model, activation, recall)
    context = min(CONTEXT, model.module.config.max_position_embeddings)
    count = ROUNDING_WINDOWS + MARGIN_WINDOWS
    windows = model.windows(load_text(None, "calibration"), context, at_most=count)
    fitted = max(1, len(windows) * MARGIN_WINDOWS // count)
    first, rest = windows[fitted:], windows[:fitted]
    inputs = Calibration(model, first if len(first) else rest)
    gates = []
    with progress("coarse gates", len(model.layers)) as ticker:
        for i, layer in enumerate(model.layers):
            weight = dequantize(matrices[f"layers.{i}.gate_proj.weight"])
            gates.append(_Gate(layer, weight, inputs.input_moments[i], inputs.mean_input[i]))
            ticker.advance()
    margins = _margins(model, gates, Calibration(model, rest), recall)
    return dict(_tensors(gates, margins))


def check_predictable(model: Model, activation: str, recall: float) -> None:
    """Raises as `coarse_gates` does."""
    if not 0 < recall < 1:
        raise UsageError(f"--predictor {recall} is not between 0 and 1, 0.99 say")
    if not model.layers[0].gated or activation not in RELUS:
        raise FallowError(
            f"{model.name} has no gate that a ReLU follows, whose zeros could be predicted; pack "
            "without --predictor"
        )
    width = model.layers[0].down_proj.out_features
    if width % 4:
        raise FallowError(
            f"{model.name} has {width} hidden units, no multiple of 4: there is no coarse gate for "
            "it; pack without --predictor"
        )


class _Gate:
    """A layer's gate W (d_ff, d_model) in two bits, and how far its products are from W's."""

    def __init__(
        self, layer: Layer, weight: np.ndarray, moment: np.ndarray, mean: np.ndarray
    ) -> None:
        second = torch.from_numpy(moment)
        self.rows = coarse_rows(torch.from_numpy(weight), second)
        self.values = decode_rows(self.rows)
        error = torch.from_numpy(weight) - self.values
        short = error @ torch.from_numpy(mean)
        self.bias = short + _gate_bias(layer, len(weight))
        if isinstance(layer.act, FatRelu):
            self.bias -= layer.act.threshold
        square = ((error @ second) * error).sum(dim=1)
        self.spread = (square - short.square()).clamp_min(0).sqrt()  # 0: a row without an error

    def margins(self, x: torch.Tensor) -> torch.Tensor:
        """Standard deviations by which a neuron's score lies above zero, (T, d_ff)."""
        return (x @ self.values.T + self.bias) / self.spread.clamp_min(1e-12)


def _gate_bias(layer: Layer, d_ff: int) -> torch.Tensor:
    module = layer.gate_proj or layer.gate_up_proj
    assert module is not None
    if module.bias is None:
        return torch.zeros(d_ff)
    return module.bias.detach().float().cpu()[:d_ff]


def _margins(
    model: Model, gates: list[_Gate], calibration: Calibration, recall: float
) -> list[float]:
    """The least m per layer with which neurons above -m have `recall` of the energy."""
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in gates]
    inputs: dict[int, torch.Tensor] = {}

    def keep(layer: int, x: torch.Tensor) -> None:
        inputs[layer] = x

    def add(layer: int, inter: torch.Tensor) -> None:
        energy = (inter.float() * model.layers[layer].down_norm).square().cpu()
        active = energy > 0
        above = gates[layer].margins(inputs.pop(layer).float().cpu())
        found[layer].append((above[active], energy[active]))

    calibration.run(
        "margins of the predictor", {next(iter(model.layers[0].ffn_inputs)): keep, "inter": add}
    )
    return [_least_margin(parts, recall) for parts in found]


def _least_margin(parts: list[tuple[torch.Tensor, torch.Tensor]], recall: float) -> float:
    above, energy = (torch.cat(part).double() for part in zip(*parts, strict=True))
    if not len(above):
        return 0.0  # nothing is ever active
    order = torch.argsort(above, descending=True)
    kept = energy[order].cumsum(0)
    last = min(int((kept < recall * kept[-1]).sum()), len(order) - 1)
    # The next float, since a score must be above zero.
    return math.nextafter(-float(above[order[last]]), math.inf)


def _tensors(gates: list[_Gate], margins: list[float]) -> Iterator[tuple[str, Matrix]]:
    for i, (gate, margin) in enumerate(zip(gates, margins, strict=True)):
        bias = (gate.bias + margin * gate.spread).numpy()
        yield f"layers.{i}.gate_coarse.codes", Matrix("I8", gate.rows.shape, gate.rows)
        yield f"layers.{i}.gate_coarse.bias", Matrix("F32", bias.shape, bias)
