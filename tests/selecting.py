"""What tests of selectors share: how they are fitted, what they see, and expected scores."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import fallow
from conftest import VOCABULARY, WITH_RELU
from fallow.calibration.calibrator import Calibrator
from fallow.models.taps import Layer, attach
from fallow.selectors import Selector

IDS = np.random.default_rng(2).integers(2, VOCABULARY, 48)
EXTRA = 8 / (24 * 37) / 14.5  # of one byte, of a dense FFN's

Expected = Callable[[Selector, Layer, int, dict[str, Any]], np.ndarray]
"""The score (T, d_ff) of a selector in a layer, by its index and what `seen_by` found there."""


def fitted(calibrator: Calibrator, name: str, sparsity: float = 0.5) -> Selector:
    selector = calibrator.fit(name, sparsity=sparsity)
    assert isinstance(selector, Selector)
    return selector


def hidden(model: fallow.Model, selector: Selector | None = None) -> torch.Tensor:
    with model.sparse(selector):
        return model.hidden(IDS[None])


def seen_by(model: fallow.Model, selector: Selector) -> list[dict[str, np.ndarray]]:
    """Per layer, with the choice at work: x, the x before, gate_act, inter and what is left."""
    found: list[dict[str, np.ndarray]] = [{} for _ in model.layers]

    def keep(name: str) -> Any:
        def look(index: int, value: torch.Tensor) -> None:
            found[index][name] = value.double().numpy().copy()

        return look

    before = {"x": keep("x"), "gate_act": keep("gate_act"), "inter": keep("inter")}
    with (
        attach(model.layers, before),
        model.sparse(selector),
        attach(model.layers, {"inter": keep("after")}),
    ):
        model.hidden(IDS[None])
    for index, layer in enumerate(found):
        layer["earlier"] = found[max(index - 1, 0)]["x"]
    return found


def calibration_values(calibrator: Calibrator, tap: str) -> list[np.ndarray]:
    """What the dense model has at a tap over the calibration text, (T, width) per layer."""
    found: list[list[np.ndarray]] = [[] for _ in calibrator.model.layers]

    def keep(index: int, value: torch.Tensor) -> None:
        found[index].append(value.double().numpy().copy())

    calibrator.calibration.run(tap, {tap: keep})
    return [np.concatenate(parts) for parts in found]


def largest(score: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, bool; fewer where the next one is as large."""
    return score > np.sort(score, axis=1)[:, -k - 1 : -k]


def check_chosen(model: fallow.Model, selector: Selector, expected: Expected) -> None:
    """Half of the neurons are kept, unchanged, by the expected score."""
    for index, seen in enumerate(seen_by(model, selector)):
        score = expected(selector, model.layers[index], index, seen)
        k = round(0.5 * score.shape[1])
        threshold = np.sort(score, axis=1)[:, -k - 1 : -k]
        if selector.kept is None:
            threshold = selector.arrays["threshold"][index]
        kept = seen["after"] != 0
        natural = seen["inter"] == 0
        # float32 against float64; zeros are zeros in both.
        near = (np.abs(score - threshold) <= 1e-5 * np.abs(score).max()) & (score > 0)
        # Squares of what ReLU leaves are nearer to each other.
        # What is trained differs by processor: on Zen 3 0.34 of arcee's are near.
        few = 0.4 if model.architecture.model_type in WITH_RELU else 0.1
        assert near.mean() < few or selector.name == "static"
        np.testing.assert_array_equal((kept | near), ((score > threshold) & ~natural) | near)
        np.testing.assert_array_equal(seen["after"][kept], seen["inter"][kept])


def split(layer: Layer, x: np.ndarray, approximate: Any) -> list[np.ndarray]:
    """gate_pre and, with a gate, up of a layer whose weights went through `approximate`."""
    weights = [m.weight.double().numpy() for m in layer.ffn_inputs.values()]
    biases = [0 if m.bias is None else m.bias.double().numpy() for m in layer.ffn_inputs.values()]
    if layer.gate_up_proj is not None:
        weights, biases = list(np.split(weights[0], 2)), biases * 2
    return [
        x @ approximate(w, name).T + b
        for w, b, name in zip(weights, biases, ("gate", "up"), strict=False)
    ]


def expected_norm(
    selector: Selector, layer: Layer, index: int, x: np.ndarray, approximate: Any
) -> np.ndarray:
    """c sqrt(E[act(g + s e)²] E[(u + s e)²]) by three-point quadrature over the normal e."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    norm = layer.down_norm.double().numpy()
    functions = {"gate": lambda v: layer.act(torch.from_numpy(v)).numpy(), "up": lambda v: v}
    for (name, function), value in zip(
        functions.items(), split(layer, x, approximate), strict=False
    ):
        s = np.zeros(value.shape[1])
        if f"{name}.error" in selector.arrays:
            s = selector.arrays[f"{name}.error"][index].astype(np.float64)
        squares = [w * function(value + n * s) ** 2 for n, w in zip(nodes, weights, strict=True)]
        norm = norm * np.sqrt(sum(squares) / weights.sum())
    return norm


def expected_bits(weight: np.ndarray, bits: int) -> np.ndarray:
    """Groups of 32 in 16 levels; of those that share their top bits, the mean."""
    if bits == 4:
        return weight
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 32)))
    groups = padded.reshape(len(weight), -1, 32)
    low = groups.min(axis=2, keepdims=True)
    step = (groups.max(axis=2, keepdims=True) - low) / 15
    stored = np.round((groups - low) / step)
    top = stored // 2 ** (4 - bits)
    for value in np.unique(top):
        stored[top == value] = stored[top == value].mean()
    return (low + stored * step).reshape(padded.shape)[:, : weight.shape[1]]


def lowbit_weight(selector: Selector, index: int, weight: np.ndarray, part: str) -> np.ndarray:
    """What `lowbit` takes for a layer's weight of gate or up, its correction included."""
    rounded = expected_bits(weight, selector.options[part])
    if f"{part}.out" not in selector.arrays:
        return rounded
    outer, inner = (
        selector.arrays[f"{part}.{end}"][index].astype(np.float64) for end in ("out", "in")
    )
    assert np.linalg.matrix_rank(outer @ inner) <= selector.options["rank"]
    return rounded + outer @ inner


def lowbit_score(selector: Selector, layer: Layer, index: int, x: np.ndarray) -> np.ndarray:
    """The score of `lowbit` for the FFN's inputs x (T, d_model)."""
    return expected_norm(
        selector, layer, index, x, lambda weight, part: lowbit_weight(selector, index, weight, part)
    )
