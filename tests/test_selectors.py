"""Every selector against a numpy statement of its score, on every architecture."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import VOCABULARY
from fallow.calibration.calibrator import Calibrator
from fallow.common.errors import FallowError, UsageError
from fallow.engine.engine import Engine
from fallow.measure.evaluation import run_window
from fallow.models import ARCHITECTURES
from fallow.models.taps import Layer, attach
from fallow.packing.packer import pack
from fallow.patterns.store import unpack_bits
from fallow.plan import Plan
from fallow.rules import Arrays, find_rule
from fallow.selectors import SELECTORS, cluster
from fallow.selectors._base import Seen, Selector, watch
from fallow.selectors._compensation import RIDGE
from fallow.selectors._rounding import top_bits
from fallow.selectors.gate_bucket import BUCKETS
from fallow.selectors.learned import Learned, arrays_of, initial, predicted
from fallow.selectors.previous import DECAY

IDS = np.random.default_rng(2).integers(2, VOCABULARY, 48)
NAMES = (
    *SELECTORS,
    "lowbit:gate=2:up=1",
    "lowbit:up=4",
    "lowbit:gate=3:rank=5",
    "lowbit:cett=1",
    "gate_bucket:cett=1",
    "learned:rank=5",
    "lowrank:rank=5:bits=8",
    "lowrank:rank=5:gate=1",
    "lowrank:cett=1",
    "blend:rank=5",
    "ahead:map=0",
    "ahead:map=3:gate=2:up=2:rank=2",
    "ahead:cett=1",
    "cluster:k=9",
    "cluster:k=9:oracle=1",
)


def plan_of(calibrator: Calibrator, selector: str, sparsity: float) -> Plan:
    """A plan that was not judged; of `learned`, with networks as they are before training."""
    rule, cache = find_rule(selector), calibrator.calibration.cache
    if issubclass(rule, Learned) and rule.scores_key() not in cache:
        cache[rule.scores_key()] = untrained(calibrator, rule)
    return calibrator.plan(selector, sparsity=sparsity, measure=False)


def untrained(calibrator: Calibrator, rule: type[Learned]) -> Arrays:
    networks = []
    for layer, moment in zip(
        calibrator.model.layers, calibrator.calibration.input_moments, strict=True
    ):
        network, basis = initial(layer, rule.options, torch.from_numpy(moment))
        networks.append(network | {"in": network["in"] @ basis.T})
    return arrays_of(networks)


def seen_by(model: fallow.Model, plan: Plan) -> list[dict[str, np.ndarray]]:
    """Per layer, with the plan at work: x, the x before, gate_act, inter and what is left of it."""
    found: list[dict[str, np.ndarray]] = [{} for _ in model.layers]

    def keep(name: str) -> Any:
        def look(index: int, value: torch.Tensor) -> None:
            found[index][name] = value.double().numpy().copy()

        return look

    before = {"x": keep("x"), "gate_act": keep("gate_act"), "inter": keep("inter")}
    with (
        attach(model.layers, before),
        model.sparse(plan),
        attach(model.layers, {"inter": keep("after")}),
    ):
        model.hidden(IDS[None])
    for index, layer in enumerate(found):
        layer["earlier"] = found[max(index - 1, 0)]["x"]
    return found


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
    layer: Layer, x: np.ndarray, approximate: Any, errors: dict[str, np.ndarray]
) -> np.ndarray:
    """c sqrt(E[act(g + s e)²] E[(u + s e)²]) by three-point quadrature over the normal e."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    norm = layer.down_norm.double().numpy()
    functions = {"gate": lambda v: layer.act(torch.from_numpy(v)).numpy(), "up": lambda v: v}
    for (name, function), value in zip(
        functions.items(), split(layer, x, approximate), strict=False
    ):
        s = errors.get(name, np.zeros(value.shape[1]))
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


def expected_score(plan: Plan, layer: Layer, index: int, seen: dict[str, Any]) -> np.ndarray:
    name, arrays = plan.rule.partition(":")[0], plan.arrays
    norm = layer.down_norm.double().numpy()
    truth = np.abs(seen["inter"]) * norm
    if name == "oracle":
        return truth
    if name == "static":
        return np.broadcast_to(arrays["mean"][index], truth.shape)
    if name == "previous":
        return earlier_mean(arrays["mean"][index], truth)
    if name == "gate":
        return np.abs(seen["gate_act"]) * arrays["weight.gate_act"][index]
    if name == "gate_bucket":
        bucket = (seen["gate_act"][:, None] >= arrays["edges"][index]).sum(axis=1)
        means = np.take_along_axis(arrays["means"][index], bucket, axis=0)
        return np.abs(seen["gate_act"]) * means
    options = find_rule(plan.rule).options
    if name == "cluster":
        return cluster_rate(arrays, options, index, seen["x"], truth)
    if name == "learned":
        return learned_score(arrays, options, layer, index, seen)

    def approximate(weight: np.ndarray, part: str) -> np.ndarray:
        if name in ("lowrank", "blend"):
            if f"{part}.error" not in arrays:
                return weight
            rows = slice(-len(weight), None) if part == "up" else slice(len(weight))
            return arrays["out"][index].astype(np.float64)[rows] @ arrays["in"][index]
        rounded = expected_bits(weight, options[part])
        if f"{part}.out" in arrays:
            product = arrays[f"{part}.out"][index].astype(np.float64) @ arrays[f"{part}.in"][index]
            assert np.linalg.matrix_rank(product) <= options["rank"]
            rounded = rounded + product
        return rounded

    x = seen["x"]
    if name == "ahead":
        y = seen["earlier"]
        x = y * arrays["map.scale"][index].astype(np.float64)
        if options["map"]:
            x += y @ (arrays["map.out"][index].astype(np.float64) @ arrays["map.in"][index]).T
    errors = {
        part: arrays[f"{part}.error"][index].astype(np.float64)
        for part in ("gate", "up")
        if f"{part}.error" in arrays
    }
    score = expected_norm(layer, x, approximate, errors)
    if name == "blend":
        own, before, mean = arrays["blend"][index].astype(np.float64).T
        start = arrays["mean"][index]
        score = own * score + before * earlier_mean(start, truth) + mean * start
        score = np.maximum(score, 0)
    return score


def earlier_mean(start: np.ndarray, truth: np.ndarray) -> np.ndarray:
    state, means = start.astype(np.float64), []
    for row in truth:
        means.append(state)
        state = DECAY * state + (1 - DECAY) * row
    return np.array(means)


def learned_score(
    arrays: Arrays, options: dict[str, int], layer: Layer, index: int, seen: dict[str, Any]
) -> np.ndarray:
    """What the quantised network says of its parts; the parts that it does not predict, exactly."""
    outer, inner = (
        arrays[name][index].astype(np.float64) * arrays[f"{name}.scale"][index][:, None]
        for name in ("out", "in")
    )
    assert len(inner) == min(options["rank"], layer.down_proj.out_features)
    parts = predicted(layer, options)
    weights = dict(zip(parts, np.split(outer @ inner, len(parts)), strict=True))
    noise = np.exp(arrays["noise"][index].astype(np.float64))
    variance = dict(zip(parts, np.split(noise, len(parts)), strict=True))
    gate, *up = split(layer, seen["x"], lambda weight, part: weights.get(part, weight))
    squared = layer.act(torch.from_numpy(gate)).numpy() ** 2 + variance.get("gate", 0)
    if up:
        squared = squared * (up[0] ** 2 + variance.get("up", 0))
    return np.sqrt(squared) * layer.down_norm.double().numpy()


def cluster_rate(
    arrays: Arrays, options: dict[str, int], index: int, x: np.ndarray, truth: np.ndarray
) -> np.ndarray:
    """The chosen cluster's rate times loudness; of equal rates the lower numbers first."""
    width = truth.shape[1]
    centroids = unpack_bits(arrays["centroids"][index], width)
    weighted = centroids * arrays["weights"][index].astype(int)
    assert (centroids.sum(axis=1) == round(0.5 * width)).all()
    if options["oracle"]:
        k = round(0.5 * width)
        active = truth > np.sort(truth, axis=1)[:, -k - 1 : -k]
        labels = (active.astype(int) @ weighted.T).argmax(axis=1)
    else:
        choice = arrays["choice"][index] * arrays["choice.scale"][index].astype(float)[:, None]
        labels = (x @ choice.T + arrays["bias"][index]).argmax(axis=1)
    rate = arrays["rate"][index][labels] + np.arange(width, 0, -1) / (2 * width)
    return rate * arrays["loudness"][index].astype(np.float64)


@pytest.mark.parametrize("selector", [n for n in NAMES if n != "random"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_chosen_neurons(
    name: str, selector: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model = tiny[name]
    plan = plan_of(calibrators[name], selector, 0.5)
    for index, seen in enumerate(seen_by(model, plan)):
        score = expected_score(plan, model.layers[index], index, seen)
        k = round(0.5 * score.shape[1])
        threshold = np.sort(score, axis=1)[:, -k - 1 : -k]
        if "threshold.inter" in plan.arrays:
            threshold = plan.arrays["threshold.inter"][index]
        kept = seen["after"] != 0
        natural = seen["inter"] == 0
        # float32 against float64; zeros are zeros in both.
        near = (np.abs(score - threshold) <= 1e-5 * np.abs(score).max()) & (score > 0)
        assert near.mean() < 0.1 or selector == "static"
        np.testing.assert_array_equal((kept | near), ((score > threshold) & ~natural) | near)
        np.testing.assert_array_equal(seen["after"][kept], seen["inter"][kept])


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2"])
def test_learned_with_the_gate_known(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    test_chosen_neurons(name, "learned:rank=5:gate=1", tiny, calibrators)


def test_learned_of_full_rank_is_nearly_exact(
    tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    plans = [
        plan_of(calibrators["llama"], f"learned:rank={rank}:gate={gate}", 0.5)
        for rank, gate in ((4, 0), (4, 1), (24, 0))
    ]
    _, results = run_window(tiny["llama"], IDS, plans)
    low, known, whole = (r.energy_recall for r in results)
    assert None not in (low, known, whole)
    assert low < known < whole
    assert whole > 0.999


def test_learned_needs_training(calibrators: dict[str, Calibrator]) -> None:
    with pytest.raises(UsageError, match=r"learned:rank=7 needs training: run fallow select train"):
        calibrators["llama"].plan("learned:rank=7", sparsity=0.5)
    with pytest.raises(UsageError, match="no gate to know; leave out gate=1"):
        plan_of(calibrators["opt"], "learned:gate=1", 0.5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compensation_is_added(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model = tiny[name]
    plan = calibrators[name].plan("lowbit:compensation=3", sparsity=0.5, measure=False)
    found: list[dict[str, np.ndarray]] = [{} for _ in model.layers]

    def keep(tap: str) -> Any:
        return lambda i, value: found[i].update({tap: value.double().numpy().copy()})

    with (
        attach(model.layers, {"x": keep("x")}),
        model.sparse(plan),
        attach(model.layers, {tap: keep(tap) for tap in ("inter", "ffn_out")}),
    ):
        model.hidden(IDS[None])
    for index, (layer, seen) in enumerate(zip(model.layers, found, strict=True)):
        outer, inner, bias = compensation(plan, index)
        expected = seen["inter"] @ layer.down_proj.weight.double().numpy().T
        expected += seen["x"] @ (outer @ inner).T + bias
        if layer.down_proj.bias is not None:
            expected += layer.down_proj.bias.double().numpy()
        assert (seen["inter"] == 0).mean() > 0.4
        np.testing.assert_allclose(seen["ffn_out"], expected, atol=1e-4 * np.abs(expected).max())


def compensation(plan: Plan, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    outer, inner = (
        plan.arrays[f"compensation.{part}"][index].astype(np.float64)
        * plan.arrays[f"compensation.{part}.scale"][index][:, None]
        for part in ("out", "in")
    )
    return outer, inner, plan.arrays["compensation.bias"][index].astype(np.float64)


@pytest.mark.parametrize("rank", [2, 24])
def test_compensation_is_the_best_of_its_rank(
    rank: int, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """Ridge regression by least squares, tokens weighted; then the fit's truncated SVD."""
    model, calibrator = tiny["llama"], calibrators["llama"]
    plan = calibrator.plan(f"gate:compensation={rank}", sparsity=0.5, measure=False)
    found: dict[tuple[int, str], list[np.ndarray]] = {}

    def keep(tap: str) -> Any:
        return lambda i, v: found.setdefault((i, tap), []).append(v.double().numpy().copy())

    with attach(model.layers, {tap: keep(tap) for tap in ("gate_proj", "gate_act", "inter")}):
        for window in calibrator.calibration.windows:
            model.hidden(window[None])
    for index, layer in enumerate(model.layers):
        x, gate, inter = (
            np.concatenate(found[index, t]) for t in ("gate_proj", "gate_act", "inter")
        )
        score = np.abs(gate) * plan.arrays["weight.gate_act"][index]
        k = round(0.5 * score.shape[1])
        down = layer.down_proj.weight.double().numpy()
        y = (inter * (score <= np.sort(score, axis=1)[:, -k - 1 : -k])) @ down.T
        root = 1 / np.linalg.norm(inter @ down.T, axis=1)
        weight = root**2 / (root**2).sum()
        mean_x, mean_y = weight @ x, weight @ y
        ridge = RIDGE * (weight @ (x - mean_x) ** 2).mean()
        rows = np.concatenate(
            [np.sqrt(weight)[:, None] * (x - mean_x), np.sqrt(ridge) * np.eye(24)]
        )
        targets = np.pad(np.sqrt(weight)[:, None] * (y - mean_y), ((0, 24), (0, 0)))
        full = np.linalg.lstsq(rows, targets, rcond=None)[0]
        top = np.linalg.svd(rows @ full)[2][:rank]
        expected = full @ top.T @ top
        outer, inner, bias = compensation(plan, index)
        product = (outer @ inner).T
        np.testing.assert_allclose(product, expected, atol=0.02 * np.abs(expected).max())
        np.testing.assert_allclose(bias, mean_y - mean_x @ expected, atol=2e-3 * np.abs(y).max())
        left = ((y - x @ product - bias) ** 2).sum(axis=1) @ weight
        assert left < (y**2).sum(axis=1) @ weight


@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
def test_cluster_of_the_largest_expected_overlap(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """Ridge regression of active sets on x, summed over centroids; and what and=1 leaves."""
    model, calibrator = tiny[name], calibrators[name]
    plans = [plan_of(calibrators[name], f"cluster:k=6:and={both}", 0.5) for both in (0, 1)]
    found: dict[tuple[int, str], list[np.ndarray]] = {}

    def keep(tap: str) -> Any:
        return lambda i, v: found.setdefault((i, tap), []).append(v.double().numpy().copy())

    first_input = next(iter(model.layers[0].ffn_inputs))
    with attach(model.layers, {tap: keep(tap) for tap in (first_input, "inter")}):
        for window in calibrator.calibration.windows:
            model.hidden(window[None])
    for index, layer in enumerate(model.layers):
        x, inter = (np.concatenate(found[index, tap]) for tap in (first_input, "inter"))
        truth = np.abs(inter) * layer.down_norm.double().numpy()
        k = round(0.5 * truth.shape[1])
        active = truth > np.sort(truth, axis=1)[:, -k - 1 : -k]
        ridge = np.sqrt(cluster.RIDGE * (x**2).sum(axis=0).mean()) * np.eye(x.shape[1])
        rows = np.block([[x, np.ones((len(x), 1))], [ridge, np.zeros((x.shape[1], 1))]])
        targets = np.pad(active.astype(float), ((0, x.shape[1]), (0, 0)))
        weights = np.linalg.lstsq(rows, targets, rcond=None)[0]
        arrays = plans[0].arrays
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
    alone, both = (seen_by(model, plan)[0] for plan in plans)  # of equal input
    truth = np.abs(both["inter"]) * model.layers[0].down_norm.double().numpy()
    best = truth > np.sort(truth, axis=1)[:, -k - 1 : -k]
    np.testing.assert_array_equal(both["after"] != 0, (alone["after"] != 0) & best)


def test_more_clusters_than_tokens(calibrators: dict[str, Calibrator]) -> None:
    with pytest.raises(UsageError, match="k=129 clusters of 128 calibration tokens"):
        calibrators["llama"].plan("cluster:k=129", sparsity=0.5)


def test_scores_are_shared_by_budget_and_compensation() -> None:
    keys = [
        rule.scores_key()
        for rule in map(find_rule, ("lowbit:compensation=2", "lowbit:cett=1", "lowbit:up=1"))
        if issubclass(rule, Selector)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_random_is_repeatable(
    tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    plan = plan_of(calibrators["llama"], "random", 0.75)
    first, second = (seen_by(tiny["llama"], plan)[0]["after"] != 0 for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first.sum(axis=1), round(0.25 * first.shape[1]))
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("selector", NAMES)
def test_sparsity_zero_is_dense(
    selector: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model = tiny["llama"]
    plan = plan_of(calibrators["llama"], selector, 0.0)
    dense = model.hidden(IDS[None])
    with model.sparse(plan):
        assert torch.equal(model.hidden(IDS[None]), dense)


def test_plans_keep_their_scores(
    tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator], tmp_path: Path
) -> None:
    for selector in NAMES:
        plan = plan_of(calibrators["llama"], selector, 0.5)
        plan.save(tmp_path / "a.plan")
        loaded = Plan.load(tmp_path / "a.plan")
        assert loaded.rule == find_rule(selector).name
        with tiny["llama"].sparse(plan):
            expected = tiny["llama"].hidden(IDS[None])
        with tiny["llama"].sparse(loaded):
            assert torch.equal(tiny["llama"].hidden(IDS[None]), expected)


def test_recall(tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]) -> None:
    """The oracle finds all; another what it keeps of the best, energy token by token."""
    model = tiny["llama"]
    plans = [
        plan_of(calibrators["llama"], selector, 0.75)
        for selector in ("oracle", "lowbit:up=4", "gate")
    ]
    _, (oracle, whole, gate) = run_window(model, IDS, plans)
    assert (oracle.recall, oracle.energy_recall) == (1, 1)
    assert whole.recall == pytest.approx(1, abs=0.01)
    recalls, energies = [], []
    for layer, seen in zip(model.layers, seen_by(model, plans[2]), strict=True):
        truth = np.abs(seen["inter"]) * layer.down_norm.double().numpy()
        kept, k = seen["after"] != 0, round(0.25 * truth.shape[1])
        best = truth > np.sort(truth, axis=1)[:, -k - 1 : -k]
        recalls.append((kept & best).sum() / best.sum())
        found, whole = ((truth**2 * some).sum(axis=1) for some in (kept & best, best))
        energies.append((found / whole).mean())
    assert gate.recall == pytest.approx(np.mean(recalls), abs=1e-3)
    assert gate.energy_recall == pytest.approx(np.mean(energies), abs=1e-3)
    assert 0.25 < gate.recall < 1


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_blend_is_the_best_of_its_features(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """No other weights of a neuron have a smaller error on what they were fitted on."""
    rule, calibration = find_rule("blend:rank=5"), calibrators[name].calibration
    selector: Any = rule(0.0, rule.learn_scores(calibration))
    errors = dict.fromkeys(("fitted", "lowrank", "more", "less"), 0.0)

    def add(index: int, inter: torch.Tensor, seen: Seen) -> None:
        features = selector.features(index, tiny[name].layers[index], seen)
        weight = seen.out_norm.square().sum(dim=1, keepdim=True).reciprocal()
        fitted = torch.from_numpy(selector.arrays["blend"][index]).float()
        alone = torch.tensor([1.0, 0, 0])
        for key, blend in (
            ("fitted", fitted),
            ("lowrank", alone),
            ("more", 1.2 * fitted),
            ("less", 0.8 * fitted),
        ):
            off = (features * blend).sum(dim=-1) - seen.out_norm
            errors[key] += float((off.square() * weight).sum())

    calibration.run("check", watch(calibration.layers, add))
    assert errors["fitted"] < 0.95 * errors["lowrank"]
    assert errors["fitted"] < min(errors["more"], errors["less"])


EXTRA = 8 / (24 * 37) / 14.5  # of one byte, of a dense FFN's


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("random", 0.5),
        ("oracle", (9 + 0.5 * 5.5) / 14.5),
        ("gate", (4.5 + 0.5 * 10) / 14.5),
        ("lowbit", (4.5 + 2.5 + 0.5 * (2 + 5.5)) / 14.5),
        ("lowbit:gate=1:up=1", (1.5 + 1.5 + 0.5 * (3 + 3 + 5.5)) / 14.5),
        # int8 matrices; scales, noise and bias as float16; d_model 24, d_ff 37.
        ("learned:rank=4", 0.5 + EXTRA * (4 * (24 + 74) + 2 * (4 + 2 * 74))),
        (
            "learned:rank=4:gate=1",
            (4.5 + 0.5 * 10) / 14.5 + EXTRA * (4 * (24 + 37) + 2 * (4 + 2 * 37)),
        ),
        ("gate:compensation=3", (4.5 + 0.5 * 10) / 14.5 + EXTRA * (2 * 3 * 24 + 2 * (3 + 2 * 24))),
    ],
)
def test_bytes(selector: str, expected: float, tiny: dict[str, fallow.Model]) -> None:
    rule: Any = find_rule(selector)
    layer = tiny["llama"].layers[0]
    assert rule.ffn_bytes(0.5, layer) == pytest.approx(expected)
    extra = EXTRA * rule._all_extra_bytes(layer)
    assert rule.ffn_bytes(1.0, layer) == pytest.approx(1 + extra)


def four_bits(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix as Q4_K has it: half a byte each, and 16 bits per group of 32."""
    rows, columns = shape
    return rows * (-(-columns // 2) + 2 * -(-columns // 32))


def read_to_choose(selector: str, arrays: dict[str, tuple[int, ...]]) -> int:
    """Bytes that one token's choice takes in one layer, from the shapes of a plan's arrays.

    int8 as it is, other fractions in half precision; one factor per neuron is free.
    """
    size = {name: math.prod(shape) for name, shape in arrays.items()}
    if selector.startswith("lowbit"):  # the correction's factors
        return 2 * sum(size.values())
    if selector == "gate_bucket":
        return 2 * (size["edges"] + size["means"])
    if selector == "previous":  # the mean is read, and written
        return 2 * 2 * size["mean"]
    if selector.startswith("cluster"):
        mask = -(-size["loudness"] // 8)
        if "oracle=1" in selector:
            return arrays["centroids"][0] * mask + size["weights"] + mask
        return size["choice"] + 2 * (size["choice.scale"] + size["bias"]) + mask
    if selector.startswith("learned"):
        return size["in"] + size["out"] + 2 * (
            size["in.scale"] + size["out.scale"] + size["noise"]
        )  # fmt: skip
    errors = sum(n for name, n in size.items() if name.endswith(".error"))
    if selector.startswith("ahead"):
        bits = sum(size.get(f"{part}.{end}", 0) for part in ("gate", "up") for end in ("out", "in"))
        rows = arrays.get("map.out", (0,))[0] + arrays.get("map.in", (0,))[0]  # a scale each
        product = size.get("map.out", 0) + size.get("map.in", 0)
        return 2 * (bits + errors + size["map.scale"] + rows) + product
    if selector.startswith("lowrank:bits=8"):
        rows = arrays["out"][0] + arrays["in"][0]
        return size["out"] + size["in"] + 2 * (rows + errors)
    extra = four_bits(arrays["out"]) + four_bits(arrays["in"]) + 2 * errors
    if selector.startswith("blend"):  # the mean of all tokens, and that of the last, written too
        extra += 2 * (size["blend"] + 3 * size["mean"])
    return extra


@pytest.mark.parametrize(
    ("selector", "first"),
    [
        ("lowbit:rank=5", 4.5 + 2.5),
        ("lowbit:gate=3:up=1:rank=5", 3.5 + 1.5),
        ("lowbit:rank=999", 4.5 + 2.5),  # no more than d_model
        ("gate_bucket", 4.5),
        ("previous", 9),  # it knows what all neurons put out for the token before
        ("cluster:k=9", 0),
        ("cluster:k=9:oracle=1", 9),  # as the truth is known
        ("cluster:k=9:and=1", 9),
        ("learned:rank=5", 0),
        ("lowrank:rank=5", 0),
        ("lowrank:bits=8:rank=5", 0),
        ("lowrank:rank=5:gate=1", 4.5),
        ("blend:rank=5", 9),
        ("blend:rank=5:gate=1", 9),
        ("ahead:map=3", 9),
        ("ahead:map=0", 9),
        ("ahead:map=3:gate=2:up=2:rank=2", 5),
    ],
)
def test_bytes_of_what_is_read(
    selector: str, first: float, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """Bits of gate and up that all neurons take, arrays of the plan, and rows of the kept."""
    layer = tiny["llama"].layers[0]
    plan = plan_of(calibrators["llama"], selector, 0.5)
    arrays = {name: a.shape[1:] for name, a in plan.arrays.items() if name != "kept"}
    neurons, extra = layer.down_proj.weight.numel(), read_to_choose(selector, arrays)
    rule: Any = find_rule(selector)
    again = first if selector.startswith("ahead") else 0
    bits = first + 0.25 * (14.5 - first + again) + 8 * extra / neurons
    assert rule.ffn_bytes(0.25, layer) == pytest.approx(bits / 14.5)
    assert rule.cost(layer)[0] == pytest.approx(first / 8 * neurons + extra)


def test_correction(calibrators: dict[str, Calibrator], tiny: dict[str, fallow.Model]) -> None:
    """It removes error where the calibration's inputs are, and costs 2 rank (d_model + d_ff)."""
    layer = tiny["llama"].layers[0]
    weight = layer.ffn_inputs["up_proj"].weight.detach()
    moment = torch.from_numpy(calibrators["llama"].calibration.input_moments[0])
    plan = calibrators["llama"].plan("lowbit:rank=4", sparsity=0.5, measure=False)
    error = weight - top_bits(weight, 2)
    correction = torch.from_numpy(
        plan.arrays["up.out"][0].astype(np.float32) @ plan.arrays["up.in"][0].astype(np.float32)
    )

    def loss(e: torch.Tensor) -> float:
        return float((e @ moment * e).sum())

    plain = torch.linalg.svd(error, full_matrices=False)
    truncated = plain.U[:, :4] * plain.S[:4] @ plain.Vh[:4]
    assert loss(error - correction) < loss(error - truncated) < loss(error)
    rule: Any = find_rule("lowbit:rank=4")
    d_model, d_ff = layer.down_proj.weight.shape
    more = rule.ffn_bytes(0.5, layer) - find_rule("lowbit").ffn_bytes(0.5, layer)  # type: ignore[attr-defined]
    assert more == pytest.approx(4 * 16 * (d_model + d_ff) / (d_model * d_ff) / 14.5)


@pytest.fixture(scope="module")
def inputs(tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]) -> list[np.ndarray]:
    """Each layer's FFN input x of the llama's whole calibration text, (T, d_model)."""
    found: list[list[np.ndarray]] = [[] for _ in tiny["llama"].layers]

    def keep(index: int, value: torch.Tensor) -> None:
        found[index].append(value.double().numpy().copy())

    calibrators["llama"].calibration.run("x", {"up_proj": keep})
    return [np.concatenate(parts) for parts in found]


def root_mean_square(value: np.ndarray) -> np.ndarray:
    return np.sqrt((value**2).mean(axis=0))


@pytest.mark.parametrize("bits", [4, 8])
def test_low_rank_factors(
    bits: int,
    inputs: list[np.ndarray],
    tiny: dict[str, fallow.Model],
    calibrators: dict[str, Calibrator],
) -> None:
    """They are rounded, nearly as close as the closest, and know how far they miss."""
    layer, x = tiny["llama"].layers[1], inputs[1]
    plan = calibrators["llama"].plan(f"lowrank:rank=7:bits={bits}", sparsity=0.5, measure=False)
    out, inner = (plan.arrays[key][1].astype(np.float64) for key in ("out", "in"))
    for factor in (out, inner):  # half precision in the plan
        levels = max(len(np.unique(row)) for row in factor)
        assert levels <= 2**bits
    weight = np.concatenate([m.weight.double().numpy() for m in layer.ffn_inputs.values()])
    truth, found = x @ weight.T, x @ (out @ inner).T
    least = np.linalg.svd(truth, compute_uv=False)[7:]
    slack = {4: 1.1, 8: 1.001}[bits]
    assert (least**2).sum() <= ((truth - found) ** 2).sum() <= slack * (least**2).sum()
    errors = np.concatenate([plan.arrays[f"{name}.error"][1] for name in ("gate", "up")])
    np.testing.assert_allclose(errors, root_mean_square(truth - found), rtol=5e-3)


def test_look_ahead(
    inputs: list[np.ndarray], tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """The map is the least-squares one, whole at full rank, and knows how far it misses."""
    (y, x), layer = inputs, tiny["llama"].layers[1]
    best = np.linalg.lstsq(y, x, rcond=None)[0].T
    missed = []
    for rank in (0, 6, 24):
        plan = calibrators["llama"].plan(f"ahead:map={rank}", sparsity=0.5, measure=False)
        arrays = {k: v[1].astype(np.float64) for k, v in plan.arrays.items() if k != "kept"}
        whole = np.diag(arrays["map.scale"])
        if rank:
            whole = whole + arrays["map.out"] @ arrays["map.in"]
        error = x - y @ whole.T
        missed.append((error**2).sum())
        for name, module in zip(("gate", "up"), layer.ffn_inputs.values(), strict=True):
            expected = root_mean_square(error @ module.weight.double().numpy().T)
            np.testing.assert_allclose(arrays[f"{name}.error"], expected, rtol=5e-3)
    scale = (x * y).sum(axis=0) / (y**2).sum(axis=0)
    assert missed[0] == pytest.approx(((x - y * scale) ** 2).sum(), rel=1e-3)
    assert missed[2] == pytest.approx(((x - y @ best.T) ** 2).sum(), rel=1e-2)
    assert missed[2] < missed[1] < missed[0]


def test_look_ahead_forgets(
    tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """Neither another text, nor one that broke off, nor a neighbour in the batch is looked at."""
    model = tiny["llama"]
    plan = calibrators["llama"].plan("ahead", sparsity=0.5, measure=False)
    with model.sparse(plan):
        alone = model.hidden(IDS[None])

    def stop(index: int, value: torch.Tensor) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with model.sparse(plan):
        with pytest.raises(KeyboardInterrupt), attach(model.layers, {"ffn_out": stop}):
            model.hidden(IDS[None, ::-1])
        assert torch.equal(model.hidden(IDS[None]), alone)
        both = model.hidden(np.stack([IDS[::-1], IDS]))
    torch.testing.assert_close(both[1:], alone)


def test_top_bits_of_constant_weights() -> None:
    weight = torch.full((2, 33), 0.25)
    torch.testing.assert_close(top_bits(weight, 1)[:, :32], weight[:, :32])
    assert torch.isfinite(top_bits(torch.zeros(1, 32), 2)).all()


def test_buckets_hold_equal_shares(calibrators: dict[str, Calibrator]) -> None:
    plan = calibrators["llama"].plan("gate_bucket", sparsity=0.5, measure=False)
    gate = calibrators["llama"].calibration.gate_act[0].float().numpy()
    bucket = (gate[:, None] >= plan.arrays["edges"][0]).sum(axis=1)
    shares = np.stack([(bucket == b).mean(axis=0) for b in range(BUCKETS)])
    np.testing.assert_allclose(shares, 1 / BUCKETS, atol=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lowbit:gate=5",
            "no option 'gate=5'; it has: gate=1..4, up=1..4, rank=0..1024, ",
        ),
        ("lowbit:down=2", "has no option 'down=2'"),
        ("lowrank:bits=6", r"no option 'bits=6'; it has: rank=1..1024, bits=4\|8, gate=0..1, "),
        ("lowbit:up", "has no option 'up'"),
        ("topk:k=2", "rule topk has no option 'k=2'; it has: none"),
        ("magic", "unknown rule 'magic'; known rules: cats, .*; known selectors: ahead, blend, "),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_rule(text)


def test_the_engine_refuses(
    folders: dict[str, Path], calibrators: dict[str, Calibrator], tmp_path: Path
) -> None:
    pack(folders["llama"], tmp_path / "m.gguf", quant="f32")
    plan = calibrators["llama"].plan("lowbit", sparsity=0.5, measure=False)
    with pytest.raises(FallowError, match="the engine cannot run plans of 'lowbit'; it runs cats"):
        Engine(tmp_path / "m.gguf", plan)
