"""Training of the selector `learned`: what it learns, stopping, continuing, and bad input."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from fallow.calibration.calibrator import Calibrator
from fallow.calibration.tradeoff import make_rows
from fallow.common.errors import FallowError, UsageError
from fallow.models.capture import Calibration
from fallow.models.taps import attach
from fallow.plan import Plan
from fallow.research import learning as training
from fallow.research.learning import BATCH, Student, selection_loss, train
from fallow.selectors._base import Seen, watch

Texts = tuple[Path, Path]
SETTINGS: dict[str, Any] = {
    "rank": 3,
    "tokens": 32 * 40,
    "context": 32,
    "validation_windows": 2,
    "checks": 4,
}


def run(model: fallow.Model, texts: Texts, output: Path, **changes: Any) -> Plan:
    return train(model, output, text=texts[0], **(SETTINGS | changes))


def seen_by(calibration: Calibration) -> list[Seen]:
    """Per layer, what the dense model computes on the calibration text."""
    found: list[list[Seen]] = [[] for _ in calibration.layers]

    def keep(index: int, inter: torch.Tensor, seen: Seen) -> None:
        with torch.inference_mode(False):
            found[index].append(Seen(*(value.clone() for value in vars(seen).values())))

    with attach(calibration.layers, watch(calibration.layers, keep)):
        for window in calibration.windows:
            calibration.model.hidden(window[None])
    return [
        Seen(**{f.name: torch.cat([getattr(s, f.name) for s in parts]) for f in fields(Seen)})
        for parts in found
    ]


@pytest.mark.parametrize("name", ["llama", "phi3", "opt"])
def test_students_learn_the_choice(name: str, calibrators: dict[str, Calibrator]) -> None:
    """After some passes less of the energy is lost; all parameters have moved."""
    calibration = calibrators[name].calibration
    for index, seen in enumerate(seen_by(calibration)):
        moment = torch.from_numpy(calibration.input_moments[index])
        layer = calibration.layers[index]
        student = Student(layer, {"rank": 3, "gate": 0}, moment, 0.25)
        assert len(seen.x) < BATCH
        before, start = lost(student, seen), {k: v.clone() for k, v in student.parameters.items()}
        for _ in range(150):
            student.learn(seen, 3e-3)
        assert lost(student, seen) < 0.9 * before
        assert all(not torch.equal(v, start[k]) for k, v in student.parameters.items())


def lost(student: Student, seen: Seen) -> float:
    """Energy of the three quarters that the network drops, over all of it; float64."""
    with torch.no_grad():
        score = training.log_score(
            student.network, student.layer, student.options, seen.x, seen.gate_act
        ).double()
    energy = seen.out_norm.double().numpy() ** 2
    order = np.argsort(score.numpy(), axis=1)[:, : round(0.75 * score.shape[1])]
    return float((np.take_along_axis(energy, order, axis=1).sum(1) / energy.sum(1)).mean())


def test_selection_loss() -> None:
    rng = np.random.default_rng(0)
    truth = rng.exponential(size=(5, 9)) ** 3
    score, slope = rng.normal(size=(5, 9)), 1.5
    threshold = np.sort(truth, axis=1)[:, 4:5]
    weight = np.abs(truth - threshold)
    weight = np.minimum(weight / weight.mean(axis=1, keepdims=True), training.LARGEST_WEIGHT)
    p = 1 / (1 + np.exp(-slope * (score - np.log(threshold))))
    expected = -(weight * np.where(truth > threshold, np.log(p), np.log(1 - p))).mean()
    tensors = (torch.from_numpy(a) for a in (score, np.array(slope), truth, threshold))
    assert selection_loss(*[t.float() for t in tensors]).item() == pytest.approx(expected, rel=1e-5)


def test_a_stopped_training_continues(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny["llama"], texts, tmp_path / "whole.plan", patience=9)
    read: list[int] = []
    real = training.Trainer.read

    def interrupted(self: Any, number: int, total: int) -> None:
        if len(read) == 27:
            raise KeyboardInterrupt
        read.append(number)
        real(self, number, total)

    monkeypatch.setattr(training.Trainer, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny["llama"], texts, tmp_path / "a.plan", patience=9)
    assert not (tmp_path / "a.plan").exists()
    assert [p.name for p in tmp_path.iterdir() if "a.plan" in p.name] == ["a.plan.training"]

    read.clear()
    read.append(-1)
    plan = run(tiny["llama"], texts, tmp_path / "a.plan", patience=9)
    assert read == [-1, *range(20, 40)]  # from the second of four checks
    assert not (tmp_path / "a.plan.training").exists()
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(plan.arrays[name], array)
    assert plan.achieved_ppl_increase == whole.achieved_ppl_increase


def test_training_stops_early_and_keeps_the_best(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, seen = iter([5.0, 3.0, 4.0, 3.5, 1.0]), []

    def scripted(self: Any, arrays: Any) -> float:
        seen.append(arrays)
        return next(changes)

    monkeypatch.setattr(training.Trainer, "ppl_change", scripted)
    plan = run(tiny["llama"], texts, tmp_path / "a.plan", patience=1)
    assert len(seen) == 3
    assert not np.array_equal(seen[1]["out"], seen[2]["out"])
    np.testing.assert_array_equal(plan.arrays["out"], seen[1]["out"])


def test_the_plan(tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path) -> None:
    """It says what it was trained on, and judges as evaluate does."""
    model = tiny["qwen2"]
    run(model, texts, tmp_path / "a.plan", gate=True, sparsity=0.25)
    plan = Plan.load(tmp_path / "a.plan")
    assert (plan.rule, plan.knob) == ("learned:rank=3:gate=1", 0.75)
    assert plan.arrays["in"].dtype == plan.arrays["out"].dtype == np.int8
    result = fallow.evaluate(model, plan, texts[1], context=32, windows=2)
    assert result.achieved_sparsity == pytest.approx(0.25, abs=0.02)
    with pytest.raises(UsageError, match="is the text the plan was calibrated on"):
        fallow.evaluate(model, plan, texts[0], context=32, windows=2)


def compare(
    model: fallow.Model, texts: Texts, output: Path, rule: str, plans: list[Plan]
) -> list[dict[str, Any]]:
    return fallow.tradeoff(
        model, make_rows([rule], [0.5]), output, calibration_text=texts[0], text=texts[1],
        context=32, windows=2, calibration_windows=2, validation_windows=1, trained=plans,
    )  # fmt: skip


def test_comparing(tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path) -> None:
    """The file's networks, at the row's own budget, with what its name has besides."""
    model = tiny["llama"]
    plan = run(model, texts, tmp_path / "a.plan", sparsity=0.25, tokens=64)
    rule = "learned:rank=3:compensation=2"
    _, row = compare(model, texts, tmp_path / "out", rule, [plan])
    assert row["achieved_sparsity"] == pytest.approx(0.5, abs=0.02)
    used = Plan.load(tmp_path / "out" / "plans" / f"{rule}-0.5.plan")
    for name in ("in", "out", "noise"):
        np.testing.assert_array_equal(used.arrays[name], plan.arrays[name])
    assert "compensation.out" in used.arrays
    assert compare(model, texts, tmp_path / "out", rule, [plan])[1] == row

    other = run(model, texts, tmp_path / "b.plan", tokens=640)
    with pytest.raises(UsageError, match=r"out holds results of another training of learned:rank"):
        compare(model, texts, tmp_path / "out", rule, [other])
    with pytest.raises(FallowError, match="this plan is for"):
        compare(tiny["qwen2"], texts, tmp_path / "q", rule, [plan])
    with pytest.raises(UsageError, match="is the text the plan was calibrated on"):
        compare(model, (texts[0], texts[0]), tmp_path / "l", rule, [plan])
    with pytest.raises(UsageError, match="learned:rank=5 needs training: run fallow select train"):
        compare(model, texts, tmp_path / "r", "learned:rank=5", [plan])
    topk = fallow.calibrate(
        model, "topk", sparsity=0.5, text=texts[0], context=32, windows=1, validation_windows=1
    )
    with pytest.raises(UsageError, match="a plan of topk is no trained selector"):
        compare(model, texts, tmp_path / "t", rule, [topk])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rule learned has no option 'rank=0'; it has: rank=1..1024, gate=0..1"),
        ({"sparsity": 1.0}, "sparsity 1 is outside"),
        ({"tokens": 0}, "--tokens 0 is too few; give at least 1"),
        ({"checks": 0}, "--checks 0 is too few"),
        ({"patience": 0}, "--patience 0 is too few"),
        ({"validation_windows": 0}, "--validation-windows 0 is too few"),
        ({"context": 1}, "--context 1 is too short"),
    ],
)
def test_wrong_numbers(
    changes: dict[str, Any],
    message: str,
    tiny: dict[str, fallow.Model],
    texts: Texts,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=message):
        run(tiny["llama"], texts, tmp_path / "a.plan", **changes)
    assert list(tmp_path.iterdir()) == []


def test_bad_input(
    tiny: dict[str, fallow.Model], folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    output = tmp_path / "a.plan"
    (tmp_path / "short.txt").write_text("neuron 3 rests while neuron 21 works. " * 9)
    with pytest.raises(FallowError, match="the calibration text gives 2 windows, 3 are needed"):
        run(tiny["llama"], (tmp_path / "short.txt", texts[1]), output)
    with pytest.raises(UsageError, match="no gate to know; leave out gate=1"):
        run(tiny["opt"], texts, output, gate=True)
    model = fallow.load(folders["llama"])
    model.layers[1].up_proj.weight[3, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(FallowError, match="NaN or infinite values in up of layer 1"):
        run(model, texts, output)
    assert not output.exists()


def test_bad_progress_files(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, model = tmp_path / "a.plan", tiny["llama"]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, texts, output)
    with pytest.raises(UsageError, match="from a training with another rule, tokens; delete it"):
        run(model, texts, output, rank=2, tokens=64)
    path = tmp_path / "a.plan.training"
    content = path.read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(FallowError, match="is damaged; delete it to train from the start"):
            run(model, texts, output)
