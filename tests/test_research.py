"""Selectors that lost, against numpy statements of their scores, on every architecture."""

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
from fallow.models.taps import Layer, attach
from fallow.research.compensation import RIDGE, compensation_bytes
from fallow.research.gate_bucket import BUCKETS
from fallow.research.learned import Learned, arrays_of, initial, predicted
from fallow.research.previous import DECAY
from fallow.selectors import Arrays, Seen, Selector, find
from fallow.selectors._base import watch
from selecting import (
    EXTRA,
    IDS,
    calibration_values,
    check_chosen,
    expected_norm,
    fitted,
    hidden,
    largest,
    lowbit_score,
    split,
)

CLASSES = {
    "ahead": "fallow.research.ahead:Ahead",
    "blend": "fallow.research.blend:Blend",
    "gate": "fallow.research.compensation:Gate",
    "gate_bucket": "fallow.research.gate_bucket:GateBucket",
    "learned": "fallow.research.learned:Learned",
    "lowbit": "fallow.research.compensation:LowBit",
    "lowrank": "fallow.research.lowrank:LowRank",
    "previous": "fallow.research.previous:Previous",
}
CHOOSING = (
    "previous",
    "gate_bucket",
    "gate_bucket:cett=1",
    "learned",
    "learned:rank=5",
    "lowrank",
    "lowrank:rank=5:bits=8",
    "lowrank:rank=5:gate=1",
    "lowrank:cett=1",
    "blend",
    "blend:rank=5",
    "ahead",
    "ahead:map=0",
    "ahead:map=3:gate=2:up=2:rank=2",
    "ahead:cett=1",
)
COMPENSATED = ("gate:compensation=3", "lowbit:gate=2:rank=2:compensation=3")


def full(short: str) -> str:
    """The name of a selector by which it is found."""
    bare, colon, options = short.partition(":")
    return CLASSES[bare] + colon + options


def short(selector: Selector) -> str:
    """Without its options."""
    return next(k for k, v in CLASSES.items() if f"{selector.name}:".startswith(f"{v}:"))


def made(calibrator: Calibrator, name: str, sparsity: float = 0.5) -> Selector:
    """A selector; `learned` with networks as they are before training."""
    rule, cache = find(full(name)), calibrator.calibration.cache
    if issubclass(rule, Learned) and rule.scores_key() not in cache:
        cache[rule.scores_key()] = untrained(calibrator, rule)
    return fitted(calibrator, full(name), sparsity)


def untrained(calibrator: Calibrator, rule: type[Learned]) -> Arrays:
    networks = []
    for layer, moment in zip(
        calibrator.model.layers, calibrator.calibration.input_moments, strict=True
    ):
        network, basis = initial(layer, rule.options, torch.from_numpy(moment))
        networks.append(network | {"in": network["in"] @ basis.T})
    return arrays_of(networks)


def expected_score(
    selector: Selector, layer: Layer, index: int, seen: dict[str, Any]
) -> np.ndarray:
    name, arrays = short(selector), selector.arrays
    truth = np.abs(seen["inter"]) * layer.down_norm.double().numpy()
    if name == "previous":
        return earlier_mean(arrays["mean"][index], truth)
    if name == "gate_bucket":
        bucket = (seen["gate_act"][:, None] >= arrays["edges"][index]).sum(axis=1)
        means = np.take_along_axis(arrays["means"][index], bucket, axis=0)
        return np.abs(seen["gate_act"]) * means
    if name == "gate":
        return np.abs(seen["gate_act"]) * arrays["weight"][index]
    if name == "lowbit":
        return lowbit_score(selector, layer, index, seen["x"])
    if name == "learned":
        return learned_score(selector, layer, index, seen)
    if name == "ahead":
        y = seen["earlier"]
        x = y * arrays["map.scale"][index].astype(np.float64)
        if selector.options["map"]:
            x += y @ (arrays["map.out"][index].astype(np.float64) @ arrays["map.in"][index]).T
        return lowbit_score(selector, layer, index, x)

    def approximate(weight: np.ndarray, part: str) -> np.ndarray:
        if f"{part}.error" not in arrays:
            return weight
        rows = slice(-len(weight), None) if part == "up" else slice(len(weight))
        return arrays["out"][index].astype(np.float64)[rows] @ arrays["in"][index]

    score = expected_norm(selector, layer, index, seen["x"], approximate)
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


def learned_score(selector: Selector, layer: Layer, index: int, seen: dict[str, Any]) -> np.ndarray:
    """What the quantised network says of its parts; the parts that it does not predict, exactly."""
    arrays, options = selector.arrays, selector.options
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


@pytest.mark.parametrize("selector", [*CHOOSING, *COMPENSATED])
@pytest.mark.parametrize("name", DENSE)
def test_chosen_neurons(
    name: str, selector: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    check_chosen(tiny[name], made(calibrators[name], selector), expected_score)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2"])
def test_learned_with_the_gate_known(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    check_chosen(tiny[name], made(calibrators[name], "learned:rank=5:gate=1"), expected_score)


def test_learned_of_full_rank_is_nearly_exact(
    tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    selectors = [
        made(calibrators["llama"], f"learned:rank={rank}:gate={gate}")
        for rank, gate in ((4, 0), (4, 1), (24, 0))
    ]
    _, results = run_window(tiny["llama"], IDS, selectors)
    low, known, whole = (r.energy_recall for r in results)
    assert None not in (low, known, whole)
    assert low < known < whole
    assert whole > 0.999


def test_learned_needs_training(calibrators: dict[str, Calibrator]) -> None:
    with pytest.raises(UsageError, match=r"rank=7 needs training: run fallow select train, and"):
        calibrators["llama"].fit(full("learned:rank=7"), sparsity=0.5)
    with pytest.raises(UsageError, match="no gate to know; leave out gate=1"):
        made(calibrators["opt"], "learned:gate=1")


@pytest.mark.parametrize("name", DENSE)
def test_compensation_is_added(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model = tiny[name]
    selector = made(calibrators[name], "lowbit:compensation=3")
    found: list[dict[str, np.ndarray]] = [{} for _ in model.layers]

    def keep(tap: str) -> Any:
        return lambda i, value: found[i].update({tap: value.double().numpy().copy()})

    with (
        attach(model.layers, {"x": keep("x")}),
        model.sparse(selector),
        attach(model.layers, {tap: keep(tap) for tap in ("inter", "ffn_out")}),
    ):
        model.hidden(IDS[None])
    for index, (layer, seen) in enumerate(zip(model.layers, found, strict=True)):
        outer, inner, bias = compensation(selector, index)
        expected = seen["inter"] @ layer.down_proj.weight.double().numpy().T
        expected += seen["x"] @ (outer @ inner).T + bias
        if layer.down_proj.bias is not None:
            expected += layer.down_proj.bias.double().numpy()
        assert (seen["inter"] == 0).mean() > 0.4
        np.testing.assert_allclose(seen["ffn_out"], expected, atol=1e-4 * np.abs(expected).max())


def compensation(selector: Selector, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    outer, inner = (
        selector.arrays[f"compensation.{part}"][index].astype(np.float64)
        * selector.arrays[f"compensation.{part}.scale"][index][:, None]
        for part in ("out", "in")
    )
    return outer, inner, selector.arrays["compensation.bias"][index].astype(np.float64)


@pytest.mark.parametrize("rank", [2, 24])
def test_compensation_is_the_best_of_its_rank(
    rank: int, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """Ridge regression by least squares, tokens weighted; then the fit's truncated SVD."""
    model, calibrator = tiny["llama"], calibrators["llama"]
    selector = made(calibrator, f"gate:compensation={rank}")
    taps = [calibration_values(calibrator, tap) for tap in ("gate_proj", "gate_act", "inter")]
    for index, (layer, x, gate, inter) in enumerate(zip(model.layers, *taps, strict=True)):
        score = np.abs(gate) * selector.arrays["weight"][index]
        down = layer.down_proj.weight.double().numpy()
        y = (inter * ~largest(score, round(0.5 * score.shape[1]))) @ down.T
        root = 1 / np.linalg.norm(inter @ down.T, axis=1)
        weight = root**2 / (root**2).sum()
        mean_x, mean_y = weight @ x, weight @ y
        ridge = RIDGE * (weight @ (x - mean_x) ** 2).mean()
        rows = np.concatenate(
            [np.sqrt(weight)[:, None] * (x - mean_x), np.sqrt(ridge) * np.eye(24)]
        )
        targets = np.pad(np.sqrt(weight)[:, None] * (y - mean_y), ((0, 24), (0, 0)))
        whole = np.linalg.lstsq(rows, targets, rcond=None)[0]
        top = np.linalg.svd(rows @ whole)[2][:rank]
        expected = whole @ top.T @ top
        outer, inner, bias = compensation(selector, index)
        product = (outer @ inner).T
        np.testing.assert_allclose(product, expected, atol=0.02 * np.abs(expected).max())
        np.testing.assert_allclose(bias, mean_y - mean_x @ expected, atol=2e-3 * np.abs(y).max())
        left = ((y - x @ product - bias) ** 2).sum(axis=1) @ weight
        assert left < (y**2).sum(axis=1) @ weight


def test_compensation_of_default_rank() -> None:
    for name in ("gate", "lowbit"):
        rule = find(full(f"{name}:compensation=64"))
        assert (rule.name, rule.options["compensation"]) == (full(name), 64)


def test_scores_are_shared_by_budgets_and_compensations() -> None:
    names = ("lowbit:compensation=2", "lowbit:compensation=23", "lowbit:cett=1", "lowbit:up=1")
    found = [find(full(name)) for name in names]
    keys = [rule.scores_key() for rule in found if issubclass(rule, Selector)]
    assert keys[0] == keys[1] == keys[2] != keys[3]


@pytest.mark.parametrize("selector", [*CHOOSING, *COMPENSATED])
def test_sparsity_zero_is_dense(
    selector: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model = tiny["llama"]
    assert torch.equal(hidden(model, made(calibrators["llama"], selector, 0.0)), hidden(model))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_blend_is_the_best_of_its_features(
    name: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """No other weights of a neuron have a smaller error on what they were fitted on."""
    selector: Any = made(calibrators[name], "blend:rank=5")
    calibration = calibrators[name].calibration
    errors = dict.fromkeys(("fitted", "lowrank", "more", "less"), 0.0)

    def add(index: int, inter: torch.Tensor, seen: Seen) -> None:
        features = selector.features(index, tiny[name].layers[index], seen)
        weight = seen.out_norm.square().sum(dim=1, keepdim=True).reciprocal()
        found = torch.from_numpy(selector.arrays["blend"][index]).float()
        alone = torch.tensor([1.0, 0, 0])
        for key, blend in (
            ("fitted", found),
            ("lowrank", alone),
            ("more", 1.2 * found),
            ("less", 0.8 * found),
        ):
            off = (features * blend).sum(dim=-1) - seen.out_norm
            errors[key] += float((off.square() * weight).sum())

    calibration.run("check", watch(calibration.layers, add))
    assert errors["fitted"] < 0.95 * errors["lowrank"]
    assert errors["fitted"] < min(errors["more"], errors["less"])


MAP = 2 * 3 * 24 + 2 * (3 + 2 * 24)  # bytes of a compensation of rank 3


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        # int8 matrices; scales, noise and bias as float16; d_model 24, d_ff 37.
        ("learned:rank=4", 0.5 + EXTRA * (4 * (24 + 74) + 2 * (4 + 2 * 74))),
        (
            "learned:rank=4:gate=1",
            (4.5 + 0.5 * 10) / 14.5 + EXTRA * (4 * (24 + 37) + 2 * (4 + 2 * 37)),
        ),
        ("gate:compensation=3", (4.5 + 0.5 * 10) / 14.5 + EXTRA * MAP),
        (
            "lowbit:rank=2:compensation=3",
            (4.5 + 2.5 + 0.5 * (2 + 5.5)) / 14.5 + EXTRA * (2 * 2 * (24 + 37) + MAP),
        ),
    ],
)
def test_bytes(selector: str, expected: float, tiny: dict[str, fallow.Model]) -> None:
    rule: Any = find(full(selector))
    layer = tiny["llama"].layers[0]
    assert rule.ffn_bytes(0.5, layer) == pytest.approx(expected)
    assert rule.ffn_bytes(1.0, layer) == pytest.approx(1 + EXTRA * rule.extra_bytes(layer))


@pytest.mark.parametrize("plain", ["gate", "lowbit", "lowbit:gate=2:rank=5", "lowbit:cett=1"])
def test_compensation_counts_once(plain: str, tiny: dict[str, fallow.Model]) -> None:
    """Bytes and multiplications are those of the selector alone, and the map's."""
    layer = tiny["llama"].layers[0]
    alone, with_it = find(plain), find(full(f"{plain}:compensation=3"))
    assert issubclass(alone, Selector)
    assert issubclass(with_it, Selector)
    assert compensation_bytes(layer, 3) == MAP
    read, multiplied = alone.cost(layer)
    assert with_it.cost(layer) == (read + MAP, multiplied + MAP)


def four_bits(shape: tuple[int, ...]) -> int:
    """Bytes of a matrix as Q4_K has it: half a byte each, and 16 bits per group of 32."""
    rows, columns = shape
    return rows * (-(-columns // 2) + 2 * -(-columns // 32))


def read_to_choose(selector: str, arrays: dict[str, tuple[int, ...]]) -> int:
    """Bytes that one token's choice takes in one layer, from the shapes of its arrays.

    int8 as it is, other fractions in half precision; one factor per neuron is free.
    """
    size = {name: math.prod(shape) for name, shape in arrays.items()}
    if selector == "gate_bucket":
        return 2 * (size["edges"] + size["means"])
    if selector == "previous":  # the mean is read, and written
        return 2 * 2 * size["mean"]
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
        ("gate_bucket", 4.5),
        ("previous", 9),  # it knows what all neurons put out for the token before
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
    """Bits of gate and up that all neurons take, the selector's arrays, and rows of the kept."""
    layer = tiny["llama"].layers[0]
    arrays = made(calibrators["llama"], selector).arrays
    shapes = {name: array.shape[1:] for name, array in arrays.items()}
    neurons, extra = layer.down_proj.weight.numel(), read_to_choose(selector, shapes)
    rule: Any = find(full(selector))
    again = first if selector.startswith("ahead") else 0
    bits = first + 0.25 * (14.5 - first + again) + 8 * extra / neurons
    assert rule.ffn_bytes(0.25, layer) == pytest.approx(bits / 14.5)
    assert rule.cost(layer)[0] == pytest.approx(first / 8 * neurons + extra)


def root_mean_square(value: np.ndarray) -> np.ndarray:
    return np.sqrt((value**2).mean(axis=0))


@pytest.mark.parametrize("bits", [4, 8])
def test_low_rank_factors(
    bits: int, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    """They are rounded, nearly as close as the closest, and know how far they miss."""
    layer, x = tiny["llama"].layers[1], calibration_values(calibrators["llama"], "up_proj")[1]
    arrays = made(calibrators["llama"], f"lowrank:rank=7:bits={bits}").arrays
    out, inner = (arrays[key][1].astype(np.float64) for key in ("out", "in"))
    for factor in (out, inner):  # stored in half precision
        levels = max(len(np.unique(row)) for row in factor)
        assert levels <= 2**bits
    weight = np.concatenate([m.weight.double().numpy() for m in layer.ffn_inputs.values()])
    truth, found = x @ weight.T, x @ (out @ inner).T
    least = np.linalg.svd(truth, compute_uv=False)[7:]
    slack = {4: 1.1, 8: 1.001}[bits]
    assert (least**2).sum() <= ((truth - found) ** 2).sum() <= slack * (least**2).sum()
    errors = np.concatenate([arrays[f"{name}.error"][1] for name in ("gate", "up")])
    np.testing.assert_allclose(errors, root_mean_square(truth - found), rtol=5e-3)


def test_look_ahead(tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]) -> None:
    """The map is the least-squares one, whole at full rank, and knows how far it misses."""
    y, x = calibration_values(calibrators["llama"], "up_proj")
    layer = tiny["llama"].layers[1]
    best = np.linalg.lstsq(y, x, rcond=None)[0].T
    missed = []
    for rank in (0, 6, 24):
        selector = made(calibrators["llama"], f"ahead:map={rank}")
        arrays = {k: v[1].astype(np.float64) for k, v in selector.arrays.items()}
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
    selector = made(calibrators["llama"], "ahead")
    alone = hidden(model, selector)

    def stop(index: int, value: torch.Tensor) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with model.sparse(selector):
        with pytest.raises(KeyboardInterrupt), attach(model.layers, {"ffn_out": stop}):
            model.hidden(IDS[None, ::-1])
        assert torch.equal(model.hidden(IDS[None]), alone)
        both = model.hidden(np.stack([IDS[::-1], IDS]))
    torch.testing.assert_close(both[1:], alone)


def test_buckets_hold_equal_shares(calibrators: dict[str, Calibrator]) -> None:
    arrays = made(calibrators["llama"], "gate_bucket").arrays
    gate = calibrators["llama"].calibration.gate_act[0].float().numpy()
    bucket = (gate[:, None] >= arrays["edges"][0]).sum(axis=1)
    shares = np.stack([(bucket == b).mean(axis=0) for b in range(BUCKETS)])
    np.testing.assert_allclose(shares, 1 / BUCKETS, atol=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (full("lowrank:bits=6"), r"no option 'bits=6'; it has: rank=1..1024, bits=4\|8, gate=0..1"),
        (full("gate:compensation=0"), r"'compensation=0'; it has: cett=0..1, compensation=1..1024"),
        (full("gate:gate=2"), "has no option 'gate=2'"),
        ("ahead", "unknown rule 'ahead'"),
        ("fallow.research.ahead:Behind", "fallow.research.ahead has no class Behind"),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find(text)
