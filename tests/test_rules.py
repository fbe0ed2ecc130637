"""Every rule against a numpy statement of its formula, on every architecture; ties included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import DENSE, NEURON_RULES, VOCABULARY
from fallow.calibration.calibrator import Calibrator
from fallow.common.errors import FallowError, UsageError
from fallow.models.capture import Calibration, input_histogram
from fallow.models.taps import Layer, attach
from fallow.plan import Cut, Plan
from fallow.rules import find_rule
from fallow.rules.cett import CettSearch

IDS = np.random.default_rng(1).integers(2, VOCABULARY, (3, 32))


def column_norm(projection: torch.nn.Linear) -> np.ndarray:
    return np.sqrt((projection.weight.double().numpy() ** 2).sum(axis=0)).astype(np.float32)


def expected_active(
    plan: Plan, layer: Layer, index: int, tap: str, value: np.ndarray
) -> np.ndarray:
    """The formulas of docs/methods.md, a value being inactive iff its score is <= the threshold."""
    magnitude = np.abs(value)
    if plan.rule in ("percentile", "cats", "fat", "teal"):
        return magnitude > plan.arrays[f"{tap}.threshold"][index]
    if plan.rule == "relu":
        return value != 0
    if plan.rule in ("gate_topk", "gate_tail") or (plan.rule, tap) == ("two_stage", "gate_act"):
        norm = plan.arrays["gate_act.weight"][index]
    else:
        norm = column_norm(layer.projections[tap if tap in layer.projections else "down_proj"])
    score = magnitude * norm
    if plan.rule in ("cett", "two_stage"):
        return score > plan.arrays[f"{tap}.threshold"][index]
    ordered = np.sort(score, axis=1)
    if plan.rule in ("topk", "gate_topk", "wina"):
        dropped = value.shape[1] - round(plan.knob * value.shape[1])
        threshold = ordered[:, dropped - 1 : dropped] if dropped else np.zeros((len(value), 1))
        return score > threshold
    assert plan.rule in ("tail", "gate_tail")
    square = ordered.astype(np.float64) ** 2
    fits = square.cumsum(axis=1) <= plan.knob**2 * square.sum(axis=1, keepdims=True)
    threshold = np.where(fits, ordered, 0).max(axis=1, keepdims=True)
    return score > threshold


def run_and_record(
    model: fallow.Model, plan: Plan, convert: Callable[[Any], Any] = lambda value: value
) -> dict[str, list[Any]]:
    """(layer, value before, value after) of every tap that the plan's rule cuts."""
    before: dict[str, list[Any]] = {cut.tap: [] for cut in plan.cuts}
    after: dict[str, list[Any]] = {tap: [] for tap in before}

    def record(store: dict[str, list[Any]], tap: str) -> Any:
        return lambda layer, value: store[tap].append((layer, convert(value).numpy().copy()))

    with (
        attach(model.layers, {tap: record(before, tap) for tap in before}),
        model.sparse(plan),
        attach(model.layers, {tap: record(after, tap) for tap in after}),
    ):
        model.hidden(IDS)
    return {
        tap: [(layer, b, a) for (layer, b), (_, a) in zip(before[tap], after[tap], strict=True)]
        for tap in before
    }


@pytest.mark.parametrize("rule", NEURON_RULES)
@pytest.mark.parametrize("name", DENSE)
def test_masks(
    name: str, rule: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model = tiny[name]
    target = {"knob": 0} if rule == "relu" else {"sparsity": 0.5}
    plan = calibrators[name].plan(rule, measure=False, **target)  # type: ignore[arg-type]
    for tap, values in run_and_record(model, plan).items():
        assert len(values) == len(model.layers)
        for index, before, after in values:
            layer = model.layers[index]
            active = expected_active(plan, layer, index, tap, before)
            np.testing.assert_array_equal(after, np.where(active, before, 0))


@pytest.mark.parametrize("rule", [r for r in NEURON_RULES if r != "relu"])
@pytest.mark.parametrize("name", DENSE)
def test_sparsity_zero_is_dense_bit_for_bit(
    name: str, rule: str, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model = tiny[name]
    plan = calibrators[name].plan(rule, sparsity=0.0, measure=False)
    dense = model.logits(model.hidden(IDS))
    with model.sparse(plan):
        sparse = model.logits(model.hidden(IDS))
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("rule", [r for r in NEURON_RULES if r != "relu"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_target_sparsity_is_reached(
    name: str, rule: str, calibrators: dict[str, Calibrator]
) -> None:
    """On held-out text; percentile's target is that of three outputs, S(inter) their union."""
    found = calibrators[name].plan(rule, sparsity=0.5).achieved_sparsity
    assert found is not None
    if rule == "percentile" and name == "llama":
        assert 0.65 < found < 0.85
    elif rule in ("topk", "wina"):
        assert found == pytest.approx(0.5, abs=0.02)  # rounding of k
    else:
        assert found == pytest.approx(0.5, abs=0.1)


def test_natural_zeros_count_as_sparsity(calibrators: dict[str, Calibrator]) -> None:
    relu = calibrators["opt"].plan("relu", knob=0).achieved_sparsity
    cats = calibrators["opt"].plan("cats", sparsity=0.7).achieved_sparsity
    assert relu is not None
    assert cats is not None
    assert 0.3 < relu < cats
    assert cats == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_ties_are_inactive_together(name: str, folders: dict[str, Path]) -> None:
    """Two neurons with the same weights are kept or dropped together by every neuron rule."""
    model = fallow.load(folders[name])
    for layer in model.layers:
        for module in layer.ffn_inputs.values():
            module.weight[1] = module.weight[0]
            if module.bias is not None:
                module.bias[1] = module.bias[0]
        layer.down_proj.weight[:, 1] = layer.down_proj.weight[:, 0]
    seen: list[np.ndarray] = []
    for kept in np.linspace(0.1, 0.9, 9):
        plan = Plan(
            model=model.name,
            fingerprint=model.fingerprint,
            rule="topk",
            knob=float(kept),
            knob_name="",
            cuts=(Cut("inter", "topk", np.full(len(model.layers), kept), "column_norm"),),
        )
        with (
            model.sparse(plan),
            attach(model.layers, {"inter": lambda _, v: seen.append((v != 0).numpy())}),
        ):
            model.hidden(IDS)
    active = np.concatenate(seen)
    np.testing.assert_array_equal(active[:, 0], active[:, 1])
    assert 0 < active[:, 0].mean() < 1


@pytest.mark.parametrize("rule", [r for r in NEURON_RULES if r != "relu"])
def test_bfloat16(rule: str, folders: dict[str, Path], texts: tuple[Path, Path]) -> None:
    """A bfloat16 model is calibrated and cut like any other; scores are float32."""
    model = fallow.load(folders["qwen2"], dtype="bfloat16")
    plan = fallow.calibrate(
        model, rule, sparsity=0.5, text=texts[0], context=32, windows=2, validation_windows=1
    )
    assert plan.dtype == "bfloat16"
    for tap, values in run_and_record(model, plan, torch.Tensor.float).items():
        for index, before, after in values:
            active = expected_active(plan, model.layers[index], index, tap, before)
            np.testing.assert_array_equal(after, np.where(active, before, 0))


# Thresholds ------------------------------------------------------------------------------------


def stored(model: fallow.Model, windows: np.ndarray, tap: str) -> list[np.ndarray]:
    """All values of a tap on the calibration windows, per layer."""
    values: list[list[np.ndarray]] = [[], []]
    with attach(model.layers, {tap: lambda layer, v: values[layer].append(v.numpy().copy())}):
        for window in windows:
            model.hidden(window[None])
    return [np.concatenate(v) for v in values]


@pytest.mark.parametrize("q", [0.3, 0.5, 0.9])
def test_percentile_is_numpys(
    q: float, tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    calibrator = calibrators["llama"]
    plan = calibrator.plan("percentile", knob=q, measure=False)
    for tap in ("gate_pre", "up", "ffn_out"):
        for i, values in enumerate(stored(tiny["llama"], calibrator.calibration.windows, tap)):
            expected = np.percentile(np.abs(values), 100 * q)
            assert plan.arrays[f"{tap}.threshold"][i] == pytest.approx(expected, rel=2e-3)


def test_phi3_percentile_is_joint_and_leaves_up_whole(
    tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    calibrator = calibrators["phi3"]
    plan = calibrator.plan("percentile", knob=0.5, measure=False)
    assert set(plan.arrays) == {"gate_pre.threshold", "ffn_out.threshold"}
    windows = calibrator.calibration.windows
    gate, up = (stored(tiny["phi3"], windows, tap) for tap in ("gate_pre", "up"))
    for i in range(2):
        expected = np.percentile(np.abs(np.concatenate([gate[i], up[i]])), 50)
        assert plan.arrays["gate_pre.threshold"][i] == pytest.approx(expected, rel=2e-3)


def test_fat_has_one_threshold(calibrators: dict[str, Calibrator]) -> None:
    plan = calibrators["llama"].plan("fat", sparsity=0.5, measure=False)
    assert plan.arrays["gate_act.threshold"].tolist() == [np.float32(plan.knob)] * 2


def test_relu_changes_nothing_and_finds_natural_sparsity(
    calibrators: dict[str, Calibrator],
) -> None:
    plan = calibrators["opt"].plan("relu", knob=0)
    assert plan.achieved_ppl_increase == 0
    assert plan.achieved_sparsity is not None
    assert 0.2 < plan.achieved_sparsity < 0.8
    assert calibrators["llama"].plan("relu", knob=0).achieved_sparsity == 0


# CETT --------------------------------------------------------------------------------------------


def make_search(scale: float = 1.0) -> CettSearch:
    generator = torch.Generator().manual_seed(3)
    inter = torch.randn(11, 37, generator=generator) * scale
    down = torch.randn(5, 37, generator=generator)
    return CettSearch(inter, down, inter.abs() * torch.linalg.vector_norm(down, dim=0))


def brute_force_error(search: CettSearch, threshold: float) -> float:
    inter, down = search.inter.double().numpy(), search.down_proj.double().numpy()
    score = search.score.numpy()
    dropped = np.where(score <= np.float32(threshold), inter, 0) @ down.T
    ratio = np.linalg.norm(dropped, axis=1) / np.linalg.norm(inter @ down.T, axis=1)
    return float(ratio.mean())


@pytest.mark.parametrize("target", [0.05, 0.2, 0.5])
def test_cett_threshold_against_all_candidates(
    target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fallow.rules.cett.N_CANDIDATES", 512)
    search = make_search()
    errors = [brute_force_error(search, search.candidate(i)) for i in range(512)]
    found = search.threshold(target)
    index = next(i for i in range(512) if search.candidate(i) == found)
    assert search.errors[index] == pytest.approx(errors[index], rel=1e-4)
    # Below the first candidate beyond the target the error is within it everywhere; a bisection
    # on a curve that is not monotone may end at a later crossing, never inside a failing stretch.
    first_beyond = next(i for i, e in enumerate(errors) if e > target)
    assert index >= first_beyond - 1
    assert errors[index] <= target * (1 + 1e-4)
    assert errors[index + 1] > target * (1 - 1e-4)


def test_cett_search_remembers_what_it_evaluated() -> None:
    search = make_search()
    fresh = {t: make_search().threshold(t) for t in (0.1, 0.2, 0.3)}
    for target in (0.3, 0.1, 0.2):
        assert search.threshold(target) == fresh[target]


def test_cett_below_the_lowest_candidate_cuts_nothing() -> None:
    """The published code's index becomes -1 there, and picks the largest threshold."""
    search = make_search()
    assert search.error(0) > 0
    assert search.threshold(search.error(0) / 2) < 0


def test_cett_of_a_token_without_output() -> None:
    search = make_search(scale=0.0)
    assert search.threshold(0.1) == 0.0
    assert np.isfinite(list(search.errors.values())).all()


# TEAL --------------------------------------------------------------------------------------------


def test_teal_reaches_every_blocks_target(
    tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    model, calibration = tiny["llama"], calibrators["llama"].calibration
    plan = calibrators["llama"].plan("teal", sparsity=0.4, measure=False)
    sizes = np.array([m.weight.numel() for m in model.layers[0].projections.values()])
    sparsity = np.stack([path.at(0.4) for path in calibration.cache["teal"]])
    np.testing.assert_allclose(sparsity @ sizes / sizes.sum(), 0.4, atol=1e-6)
    for p, name in enumerate(model.layers[0].projections):
        histogram = calibration.histograms[input_histogram(model.layers[0], name)]
        for i in range(2):
            found = plan.arrays[f"{name}.threshold"][i]
            if sparsity[i, p] == 0:
                assert found < 0
            else:
                assert found == pytest.approx(histogram.quantile(i, sparsity[i, p]), rel=1e-3)


def test_teal_spares_what_the_block_needs_most(calibrators: dict[str, Calibrator]) -> None:
    """The greedy allocation is not uniform, and no step costs more than the uniform one."""
    calibration = calibrators["qwen2"].calibration
    find_rule("teal").fit(calibration, sparsity=0.5)
    for path in calibration.cache["teal"]:
        greedy, uniform = path.at(0.5), np.full(len(path.names), 0.5)
        assert greedy.std() > 0.02
        errors = [float((path._run(s) - path.dense).norm(dim=-1).mean()) for s in (greedy, uniform)]
        assert errors[0] < errors[1]


# Searching for a loss ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [r for r in NEURON_RULES if r != "relu"])
def test_search_ends_below_the_target_and_close_to_it(
    rule: str, calibrators: dict[str, Calibrator]
) -> None:
    """One tolerance further on, the target is missed."""
    calibrator = calibrators["llama"]
    plan = calibrator.plan(rule, max_ppl_increase=5.0)
    assert plan.target_ppl_increase == 5.0
    assert plan.achieved_ppl_increase is not None
    assert plan.achieved_ppl_increase < 5.0
    assert plan.achieved_ppl_increase_se is not None
    rule_class = find_rule(rule)
    assert rule_class.search is not None
    level = plan.knob if rule_class.search == "knob" or rule == "teal" else None
    if rule in ("topk", "wina"):
        level = 1 - plan.knob
    step = rule_class.search_limit / 2**10
    if level is not None and level + 2 * step < rule_class.search_limit:
        beyond = calibrator.plan(rule, **{rule_class.search: level + 1.01 * step})
        assert beyond.achieved_ppl_increase is not None
        assert beyond.achieved_ppl_increase >= 5.0


def test_search_is_p3s_bisection(
    calibrators: dict[str, Calibrator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a known curve, PPL +10 v %, the search ends within 1e-3 below v = 0.3."""
    calibrator = calibrators["llama"]
    monkeypatch.setattr(calibrator, "_ppl_increase", lambda plan, enough: 10 * plan.knob)
    monkeypatch.setattr(calibrator, "measure", lambda plan: (0.0, 0.0, None))
    plan = calibrator.plan("tail", max_ppl_increase=3.0)
    assert 0.299 <= plan.knob < 0.3


# Bad input ---------------------------------------------------------------------------------------


def test_unknown_rule() -> None:
    with pytest.raises(UsageError) as error:
        find_rule("magic")
    assert str(error.value) == (
        "unknown rule 'magic'; known rules: cats, cett, expert_mass, expert_share, expert_topk, "
        "fat, gate_tail, gate_topk, percentile, relu, tail, teal, topk, two_stage, wina"
    )


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("rule", [r for r in NEURON_RULES if r != "relu"])
def test_sparsity_out_of_range(
    rule: str, sparsity: float, calibrators: dict[str, Calibrator]
) -> None:
    with pytest.raises(UsageError) as error:
        calibrators["llama"].plan(rule, sparsity=sparsity)
    assert str(error.value) == (
        f"sparsity {sparsity:g} is outside [0, 1); give a fraction such as 0.5"
    )


def test_targets_are_checked(calibrators: dict[str, Calibrator]) -> None:
    calibrator = calibrators["llama"]
    with pytest.raises(UsageError, match="exactly one of --sparsity, --knob and --max-ppl"):
        calibrator.plan("topk", sparsity=0.5, knob=0.5)
    with pytest.raises(UsageError, match=r"knob 2 of rule tail is outside \[0, 1\]"):
        calibrator.plan("tail", knob=2.0)
    with pytest.raises(UsageError, match=r"knob inf of rule fat is outside \[0, inf\]"):
        calibrator.plan("fat", knob=float("inf"))
    with pytest.raises(UsageError, match="has no parameter to search"):
        calibrator.plan("relu", max_ppl_increase=1.0)
    with pytest.raises(UsageError, match="--max-ppl-increase -1"):
        calibrator.plan("topk", max_ppl_increase=-1.0)
    with pytest.raises(UsageError, match="relu has no parameter"):
        calibrator.plan("relu", sparsity=0.5)


def test_nan_names_tensor_and_layer(folders: dict[str, Path], texts: tuple[Path, Path]) -> None:
    model = fallow.load(folders["llama"])
    model.layers[1].up_proj.weight[3, 0] = float("nan")  # type: ignore[union-attr]
    windows = Calibrator(model, texts[0], context=32, windows=1, validation_windows=1)
    with pytest.raises(FallowError) as error:
        _ = windows.calibration.histograms
    assert str(error.value) == (
        "32 NaN or infinite values in up of layer 1; try --dtype float32, or check the checkpoint"
    )
    with pytest.raises(FallowError, match="NaN or infinite values in inter of layer 1"):
        _ = Calibration(model, windows.calibration.windows).inter
    with pytest.raises(FallowError, match="NaN or infinite values in up of layer 1"):
        fallow.evaluate(model, text=texts[1], context=32, windows=1)


def test_gate_weights(calibrators: dict[str, Calibrator]) -> None:
    """E|up| ||down_proj[:, i]||, from the calibration windows themselves."""
    for name in ("llama", "phi3", "opt"):
        calibrator = calibrators[name]
        model, windows = calibrator.model, calibrator.calibration.windows
        total: dict[int, list[np.ndarray]] = {0: [], 1: []}

        def keep(layer: int, value: torch.Tensor, total: Any = total) -> None:
            total[layer].append(value.abs().double().numpy())

        gated = model.layers[0].gated
        with attach(model.layers, {"up": keep} if gated else {}):
            model.hidden(windows)
        weights = calibrator.plan("gate_topk", sparsity=0.5).arrays["gate_act.weight"]
        for i, layer in enumerate(model.layers):
            mean = np.concatenate(total[i]).mean(axis=0) if gated else 1.0
            np.testing.assert_allclose(weights[i], mean * column_norm(layer.down_proj), rtol=1e-4)
