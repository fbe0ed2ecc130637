"""Cuts of a plan on a transformers model: values become zero, and nothing gets faster.

One convention for ties, everywhere: a value is inactive iff its score is <= the threshold.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fallow import _core
from fallow.common.errors import FallowError
from fallow.models import devices
from fallow.models.capture import n_threads
from fallow.models.devices import as_floats
from fallow.models.taps import Layer, Tap, cut_names
from fallow.plan import NEURON_TAPS, ROUTER, Cut


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
        score = value.detach().abs().float()  # what is cut is a constant for a gradient
        weight = weights[index]
        if weight is not None:
            score *= layers[index].of_tapped(weight) if cut.tap in NEURON_TAPS else weight
        return zero_where(score <= threshold_of(cut, index, score), value)

    return apply


def check_fits(cut: Cut, layers: list[Layer], name: str) -> None:
    """Raises FallowError if a cut is for other layers than these."""
    if cut.tap not in cut_names(layers[0]):
        raise FallowError(
            f"the plan cuts {cut.tap}, {name} has {', '.join(cut_names(layers[0]))}; "
            "calibrate again"
        )
    cut.check_layers([width_of(cut.tap, layer) for layer in layers], name)


def width_of(tap: str, layer: Layer) -> int:
    """How many values of a token a tap has; of a mixture's neurons those of all experts."""
    if tap == "ffn_out":
        return layer.down_proj.out_features
    if (experts := layer.experts) is not None and tap not in layer.projections:
        return experts.count * (1 if tap == ROUTER else experts.d_ff)
    return (layer.projections.get(tap) or layer.down_proj).in_features


def weight_of(cut: Cut, index: int, layer: Layer) -> torch.Tensor | None:
    """Factor of layer `index`'s scores, (width,) float32 on its device; None: plain magnitude.

    Of a mixture's neurons of all experts.
    """
    if isinstance(cut.weight, np.ndarray):
        return devices.tensor(cut.weight[index, : width_of(cut.tap, layer)], layer.device)
    if cut.weight is None:
        return None
    return layer.input_norms[cut.tap] if cut.tap in layer.projections else layer.down_norm


def threshold_of(cut: Cut, index: int, score: torch.Tensor) -> float | torch.Tensor:
    """Scores (T, width) of layer `index` up to this are inactive: one number, or (T, 1)."""
    value = float(cut.value[index])
    if cut.kind == "threshold":
        return value
    return _PER_TOKEN[cut.kind](score, value)


def per_token_topk(score: torch.Tensor, kept: float) -> torch.Tensor:
    """Thresholds (T, 1) that leave round(kept * width) scores of each token above them.

    Constants for a gradient, on the scores' device. A token with NaN or infinity has NaN, so that
    it stays whole and reaches the check on the model's output.
    """
    k = round(kept * score.shape[1])
    if not devices.on_cpu(score):
        return _topk_in_torch(score, k)
    return _in_core(_core.topk_thresholds, score, k)


def per_token_tail(score: torch.Tensor, tau: float) -> torch.Tensor:
    """Thresholds (T, 1): the largest with sum of score² up to it <= tau² of the token's sum.

    0 if there is none; otherwise as `per_token_topk`.
    """
    if not devices.on_cpu(score):
        return _tail_in_torch(score, tau * tau, power=2)
    return _in_core(_core.tail_thresholds, score, tau)


def per_token_mass(score: torch.Tensor, share: float) -> torch.Tensor:
    """Thresholds (T, 1): the largest with sum of score up to it <= share of the token's sum.

    0 if there is none; otherwise as `per_token_topk`.
    """
    if not devices.on_cpu(score):
        return _tail_in_torch(score, share, power=1)
    return _in_core(_core.mass_thresholds, score, share)


def _in_core(thresholds: Callable[..., None], score: torch.Tensor, value: float) -> torch.Tensor:
    scores = as_floats(score)
    found = np.empty(len(scores), dtype=np.float32)
    thresholds(scores, value, found, n_threads())
    return torch.from_numpy(found)[:, None]


_PER_TOKEN = {"topk": per_token_topk, "tail": per_token_tail, "mass": per_token_mass}


@torch.no_grad()
def _topk_in_torch(score: torch.Tensor, k: int) -> torch.Tensor:
    """The core's topk_thresholds, equal to the bit."""
    score = score.float()
    width = score.shape[1]
    if k >= width:
        return _nan_unless_finite(score, score.new_zeros(len(score), 1))
    return _nan_unless_finite(score, score.kthvalue(width - k, dim=1, keepdim=True).values)


@torch.no_grad()
def _tail_in_torch(score: torch.Tensor, share: float, power: int) -> torch.Tensor:
    """The core's tail_thresholds (power 2) and mass_thresholds (1), up to rounding in float64."""
    score = score.float()
    ordered = score.sort(dim=1).values
    spent = ordered.double().pow_(power).cumsum(dim=1)
    fits = spent <= share * spent[:, -1:]
    fits[:, :-1] &= ordered[:, :-1] != ordered[:, 1:]  # equal scores fit together or not
    return _nan_unless_finite(score, (ordered * fits).amax(dim=1, keepdim=True))


def _nan_unless_finite(score: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    finite = score.isfinite().all(dim=1, keepdim=True)
    return torch.where(finite, threshold, torch.nan)


def zero_where(inactive: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value with its inactive entries set to zero; NaN stays NaN.

    A product, because torch's masked_fill branches on every entry (17 against 4 ms for 1024 tokens
    of 8960 neurons).
    """
    return value * ~inactive
