"""Every selector against a numpy statement of its score, on every architecture."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import DENSE
from fallow.calibration.calibrator import Calibrator
from fallow.common.errors import UsageError
from fallow.measure.evaluation import run_window
from fallow.models.taps import Layer
from fallow.patterns.store import unpack_bits
from fallow.selectors import SELECTORS, Selector, cluster, find
from fallow.selectors._rounding import top_bits
from selecting import (
    EXTRA,
    IDS,
    calibration_values,
    check_chosen,
    fitted,
    hidden,
    largest,
    lowbit_score,
    seen_by,
)

NAMES = (
    *SELECTORS,
    "lowbit:gate=2:up=1",
    "lowbit:up=4",
    "lowbit:gate=3:rank=5",
    "lowbit:cett=1",
    "cluster:k=9",
    "cluster:k=9:oracle=1",
)


def expected_score(
    selector: Selector, layer: Layer, index: int, seen: dict[str, Any]
) -> np.ndarray:
    name, arrays = selector.name.partition(":")[0], selector.arrays
    truth = np.abs(seen["inter"]) * layer.down_norm.double().numpy()
    if name == "oracle":
        return truth
    if name == "static":
        return np.broadcast_to(arrays["mean"][index], truth.shape)
    if name == "gate":
        return np.abs(seen["gate_act"]) * arrays["weight"][index]
    if name == "cluster":
        return cluster_rate(selector, index, seen["x"], truth)
    return lowbit_score(selector, layer, index, seen["x"])


def cluster_rate(selector: Selector, index: int, x: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The chosen cluster's rate times loudness; of equal rates the lower numbers first."""
    arrays, width = selector.arrays, truth.shape[1]
    centroids = unpack_bits(arrays["centroids"][index], width)
    weighted = centroids * arrays["weights"][index].astype(int)
    assert (centroids.sum(axis=1) == round(0.5 * width)).all()
    if selector.options["oracle"]:
        active = largest(truth, round(0.5 * width))
        labels = (active.astype(int) @ weighted.T).argmax(axis=1)
    else:
        choice = arrays["choice"][index] * arrays["choice.scale"][index].astype(float)[:, None]
        labels = (x @ choice.T + arrays["bias"][index]).argmax(axis=1)
    rate = arrays["rate"][index][labels] + np.arange(width, 0, -1) / (2 * width)
    return rate * arrays["loudness"][index].astype(np.float64)


@pytest.mark.parametrize("selector", [n for n in NAMES if n != "random"])
@pytest.mark.parametrize("name", DENSE)
def test_chosen_neurons(
    name: str, selector: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    check_chosen(tiny[name], fitted(calibrators[name], selector), expected_score)


@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
def test_cluster_of_the_largest_expected_overlap(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """Ridge regression of active sets on x, summed over centroids; and what and=1 leaves."""
    model, calibrator = tiny[name], calibrators[name]
    selectors = [fitted(calibrator, f"cluster:k=6:and={both}") for both in (0, 1)]
    arrays = selectors[0].arrays
    inputs, inters = (
        calibration_values(calibrator, tap)
        for tap in (next(iter(model.layers[0].ffn_inputs)), "inter")
    )
    for index, (layer, x, inter) in enumerate(zip(model.layers, inputs, inters, strict=True)):
        truth = np.abs(inter) * layer.down_norm.double().numpy()
        k = round(0.5 * truth.shape[1])
        active = largest(truth, k)
        ridge = np.sqrt(cluster.RIDGE * (x**2).sum(axis=0).mean()) * np.eye(x.shape[1])
        rows = np.block([[x, np.ones((len(x), 1))], [ridge, np.zeros((x.shape[1], 1))]])
        targets = np.pad(active.astype(float), ((0, x.shape[1]), (0, 0)))
        weights = np.linalg.lstsq(rows, targets, rcond=None)[0]
        centroids = unpack_bits(arrays["centroids"][index], truth.shape[1])
        energy = truth**2 / (truth**2).sum(axis=1, keepdims=True) * active
        loudness = energy.sum(axis=0) / np.maximum(active.sum(axis=0), 1)
        np.testing.assert_allclose(
            arrays["loudness"][index], np.maximum(loudness, 1e-6 * loudness.max()), rtol=1e-4
        )
        expected = weights @ (centroids * arrays["weights"][index].astype(float)).T
        choice = arrays["choice"][index] * arrays["choice.scale"][index][:, None]
        np.testing.assert_allclose(choice.T, expected[:-1], atol=0.02 * np.abs(expected).max())
        np.testing.assert_allclose(arrays["bias"][index], expected[-1], rtol=1e-3)
    alone, both = (seen_by(model, selector)[0] for selector in selectors)  # of equal input
    best = largest(np.abs(both["inter"]) * model.layers[0].down_norm.double().numpy(), k)
    np.testing.assert_array_equal(both["after"] != 0, (alone["after"] != 0) & best)


def test_more_clusters_than_tokens(calibrators: dict[str, Calibrator]) -> None:
    with pytest.raises(UsageError, match="k=129 clusters of 128 calibration tokens"):
        calibrators["llama"].fit("cluster:k=129", sparsity=0.5)


def test_scores_are_shared_by_budgets() -> None:
    found = map(find, ("lowbit", "lowbit:cett=1", "lowbit:up=1"))
    keys = [each.scores_key() for each in found if issubclass(each, Selector)]
    assert keys[0] == keys[1] != keys[2]


def test_random_is_repeatable(
    tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    selector = fitted(calibrators["llama"], "random", 0.75)
    first, second = (seen_by(tiny["llama"], selector)[0]["after"] != 0 for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first.sum(axis=1), round(0.25 * first.shape[1]))
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("selector", NAMES)
def test_sparsity_zero_is_dense(
    selector: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model = tiny["llama"]
    assert torch.equal(hidden(model, fitted(calibrators["llama"], selector, 0.0)), hidden(model))


@pytest.mark.parametrize(("knob", "text"), [(0.25, "lowbit"), (0.1, "lowbit:cett=1")])
def test_what_is_fitted(knob: float, text: str, calibrators: dict[str, Calibrator]) -> None:
    """A knob is taken as it is; what the same numbers make again chooses the same."""
    selector = calibrators["llama"].fit(text, knob=knob)
    assert isinstance(selector, Selector)
    assert (selector.name, selector.knob) == (text, knob)
    assert selector.kept == (None if "cett" in text else knob)
    model = calibrators["llama"].model
    again = type(selector)(knob, selector.arrays)
    assert torch.equal(hidden(model, selector), hidden(model, again))
    assert not torch.equal(hidden(model, selector), hidden(model))


def test_recall(tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]) -> None:
    """The oracle finds all; another what it keeps of the best, energy token by token."""
    model = tiny["llama"]
    selectors = [
        fitted(calibrators["llama"], selector, 0.75)
        for selector in ("oracle", "lowbit:up=4", "gate")
    ]
    _, (oracle, whole, gate) = run_window(model, IDS, selectors)
    assert (oracle.recall, oracle.energy_recall) == (1, 1)
    assert whole.recall == pytest.approx(1, abs=0.01)
    recalls, energies = [], []
    for layer, seen in zip(model.layers, seen_by(model, selectors[2]), strict=True):
        truth = np.abs(seen["inter"]) * layer.down_norm.double().numpy()
        kept, best = seen["after"] != 0, largest(truth, round(0.25 * truth.shape[1]))
        recalls.append((kept & best).sum() / best.sum())
        found, whole = ((truth**2 * some).sum(axis=1) for some in (kept & best, best))
        energies.append((found / whole).mean())
    assert gate.recall == pytest.approx(np.mean(recalls), abs=1e-3)
    assert gate.energy_recall == pytest.approx(np.mean(energies), abs=1e-3)
    assert 0.25 < gate.recall < 1


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("random", 0.5),
        ("oracle", (9 + 0.5 * 5.5) / 14.5),
        ("gate", (4.5 + 0.5 * 10) / 14.5),
        ("lowbit", (4.5 + 2.5 + 0.5 * (2 + 5.5)) / 14.5),
        ("lowbit:gate=1:up=1", (1.5 + 1.5 + 0.5 * (3 + 3 + 5.5)) / 14.5),
    ],
)
def test_bytes(selector: str, expected: float, tiny: dict[str, fallow.Model]) -> None:
    rule: Any = find(selector)
    layer = tiny["llama"].layers[0]
    assert rule.ffn_bytes(0.5, layer) == pytest.approx(expected)
    assert rule.ffn_bytes(1.0, layer) == pytest.approx(1 + EXTRA * rule.extra_bytes(layer))


def read_to_choose(selector: str, arrays: dict[str, tuple[int, ...]]) -> int:
    """Bytes that one token's choice takes in one layer, from the shapes of its arrays.

    int8 as it is, other fractions in half precision; one factor per neuron is free.
    """
    size = {name: math.prod(shape) for name, shape in arrays.items()}
    if selector.startswith("lowbit"):  # the correction's factors
        return 2 * sum(size.values())
    mask = -(-size["loudness"] // 8)
    if "oracle=1" in selector:
        return arrays["centroids"][0] * mask + size["weights"] + mask
    return size["choice"] + 2 * (size["choice.scale"] + size["bias"]) + mask


@pytest.mark.parametrize(
    ("selector", "first"),
    [
        ("lowbit:rank=5", 4.5 + 2.5),
        ("lowbit:gate=3:up=1:rank=5", 3.5 + 1.5),
        ("lowbit:rank=999", 4.5 + 2.5),  # no more than d_model
        ("cluster:k=9", 0),
        ("cluster:k=9:oracle=1", 9),  # as the truth is known
        ("cluster:k=9:and=1", 9),
    ],
)
def test_bytes_of_what_is_read(
    selector: str, first: float, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """Bits of gate and up that all neurons take, the selector's arrays, and rows of the kept."""
    layer = tiny["llama"].layers[0]
    arrays = fitted(calibrators["llama"], selector).arrays
    shapes = {name: array.shape[1:] for name, array in arrays.items()}
    neurons, extra = layer.down_proj.weight.numel(), read_to_choose(selector, shapes)
    rule: Any = find(selector)
    bits = first + 0.25 * (14.5 - first) + 8 * extra / neurons
    assert rule.ffn_bytes(0.25, layer) == pytest.approx(bits / 14.5)
    assert rule.cost(layer)[0] == pytest.approx(first / 8 * neurons + extra)


def test_correction(calibrators: dict[str, Calibrator], tiny: dict[str, fallow.Model]) -> None:
    """It removes error where the calibration's inputs are, and costs 2 rank (d_model + d_ff)."""
    layer = tiny["llama"].layers[0]
    weight = layer.ffn_inputs["up_proj"].weight.detach()
    moment = torch.from_numpy(calibrators["llama"].calibration.input_moments[0])
    arrays = fitted(calibrators["llama"], "lowbit:rank=4").arrays
    error = weight - top_bits(weight, 2)
    correction = torch.from_numpy(
        arrays["up.out"][0].astype(np.float32) @ arrays["up.in"][0].astype(np.float32)
    )

    def loss(e: torch.Tensor) -> float:
        return float((e @ moment * e).sum())

    plain = torch.linalg.svd(error, full_matrices=False)
    truncated = plain.U[:, :4] * plain.S[:4] @ plain.Vh[:4]
    assert loss(error - correction) < loss(error - truncated) < loss(error)
    with_it, without = (find(name) for name in ("lowbit:rank=4", "lowbit"))
    assert issubclass(with_it, Selector)
    assert issubclass(without, Selector)
    d_model, d_ff = layer.down_proj.weight.shape
    more = with_it.ffn_bytes(0.5, layer) - without.ffn_bytes(0.5, layer)
    assert more == pytest.approx(4 * 16 * (d_model + d_ff) / (d_model * d_ff) / 14.5)


def test_top_bits_of_constant_weights() -> None:
    weight = torch.full((2, 33), 0.25)
    torch.testing.assert_close(top_bits(weight, 1)[:, :32], weight[:, :32])
    assert torch.isfinite(top_bits(torch.zeros(1, 32), 2)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lowbit:gate=5",
            "no option 'gate=5'; it has: gate=1..4, up=1..4, rank=0..1024, cett=0..1",
        ),
        ("lowbit:down=2", "has no option 'down=2'"),
        ("lowbit:up", "has no option 'up'"),
        ("lowbit:compensation=2", "has no option 'compensation=2'"),
        ("topk:k=2", "rule topk has no option 'k=2'; it has: none"),
        (
            "magic",
            "unknown rule 'magic'; known rules: act_topk, .*; known selectors: cluster, gate, ",
        ),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find(text)


def test_calibrate_refuses(calibrators: dict[str, Calibrator]) -> None:
    """No plan can hold a choice by code."""
    with pytest.raises(UsageError, match="lowbit is a selector"):
        calibrators["llama"].plan("lowbit", sparsity=0.5)
