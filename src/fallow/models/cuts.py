"""Cuts of a plan on a transformers model: values become zero, and nothing gets faster.

One convention for ties, everywhere: a value is inactive iff its score is <= the threshold.
"""

from collections.abc import Sequence

import numpy as np
import torch

from fallow import _core
from fallow.common.errors import FallowError
from fallow.models.capture import as_floats, n_threads
from fallow.models.taps import Layer, Tap, cut_names
from fallow.plan import ROUTER, Cut


def cut_taps(cuts: Sequence[Cut], layers: list[Layer], name: str) -> dict[str, Tap]:
    """The taps that apply cuts to a model with these layers; `name` is the model's in errors.

    Raises:
        FallowError: the cuts are for other layers.
    """
    return {cut.tap: _tap(cut, layers, name) for cut in cuts}


def _tap(cut: Cut, layers: list[Layer], name: str) -> Tap:
    check_fits(cut, layers, name)
    weights = [weight_of(cut, i, layer) for i, layer in enumerate(layers)]

    def apply(index: int, value: torch.Tensor) -> torch.Tensor:
        score = value.abs().float()
        weight = weights[index]
        if weight is not None:
            score *= weight
        return zero_where(score <= threshold_of(cut, index, score), value)

    return apply


def check_fits(cut: Cut, layers: list[Layer], name: str) -> None:
    """Raises FallowError if a cut is for other layers than these."""
    if cut.tap not in cut_names(layers[0]):
        raise FallowError(
            f"the plan cuts {cut.tap}, {name} has {', '.join(cut_names(layers[0]))}; "
            "calibrate again"
        )
    cut.check_layers(len(layers), width_of(cut.tap, layers[0]), name)


def width_of(tap: str, layer: Layer) -> int:
    """How many values of a token a tap has."""
    if tap == "ffn_out":
        return layer.down_proj.out_features
    if layer.experts is not None and tap == ROUTER:
        return layer.experts.count
    return (layer.projections.get(tap) or layer.down_proj).in_features


def weight_of(cut: Cut, index: int, layer: Layer) -> torch.Tensor | None:
    """Factor of layer `index`'s scores, (width,) float32; None: plain magnitude."""
    if isinstance(cut.weight, np.ndarray):
        return torch.from_numpy(cut.weight[index])
    if cut.weight is None:
        return None
    return layer.input_norms[cut.tap if cut.tap in layer.projections else "down_proj"]


def threshold_of(cut: Cut, index: int, score: torch.Tensor) -> float | torch.Tensor:
    """Scores (T, width) of layer `index` up to this are inactive: one number, or (T, 1)."""
    value = float(cut.value[index])
    if cut.kind == "threshold":
        return value
    return per_token_topk(score, value) if cut.kind == "topk" else per_token_tail(score, value)


def per_token_topk(score: torch.Tensor, kept: float) -> torch.Tensor:
    """Thresholds (T, 1) that leave round(kept * width) scores of each token above them."""
    scores = as_floats(score)
    found = np.empty(len(scores), dtype=np.float32)
    _core.topk_thresholds(scores, round(kept * scores.shape[1]), found, n_threads())
    return torch.from_numpy(found)[:, None]


def per_token_tail(score: torch.Tensor, tau: float) -> torch.Tensor:
    """Thresholds (T, 1): the largest with sum of score² below it <= tau² of the token's sum."""
    scores = as_floats(score)
    found = np.empty(len(scores), dtype=np.float32)
    _core.tail_thresholds(scores, tau, found, n_threads())
    return torch.from_numpy(found)[:, None]


def zero_where(inactive: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value with its inactive entries set to zero; NaN stays NaN.

    A product, because torch's masked_fill branches on every entry (17 against 4 ms for 1024 tokens
    of 8960 neurons).
    """
    return value * ~inactive
