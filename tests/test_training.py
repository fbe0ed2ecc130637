"""Training of the selector `learned`: what it learns, stopping, continuing, and bad input."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

import fallow
from fallow.calibration.calibrator import Calibrator
from fallow.calibration.tradeoff import make_rows
from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError, UsageError
from fallow.measure.evaluation import run_window
from fallow.models.capture import Calibration
from fallow.models.taps import attach
from fallow.plan import Plan
from fallow.research import training
from fallow.research.learned import Trained
from fallow.research.training import BATCH, Student, selection_loss, train
from fallow.selectors import Seen, Selector, find
from fallow.selectors._base import watch

LEARNED = "fallow.research.learned:Learned"
Texts = tuple[Path, Path]
SETTINGS: dict[str, Any] = {
    "rank": 3,
    "tokens": 32 * 40,
    "context": 32,
    "validation_windows": 2,
    "checks": 4,
}


def run(model: fallow.Model, texts: Texts, output: Path, **changes: Any) -> Trained:
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
    whole = run(tiny["llama"], texts, tmp_path / "whole.trained", patience=9)
    read: list[int] = []
    real = training.Trainer.read

    def interrupted(self: Any, number: int, total: int) -> None:
        if len(read) == 27:
            raise KeyboardInterrupt
        read.append(number)
        real(self, number, total)

    monkeypatch.setattr(training.Trainer, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny["llama"], texts, tmp_path / "a.trained", patience=9)
    assert not (tmp_path / "a.trained").exists()
    assert [p.name for p in tmp_path.iterdir() if "a.trained" in p.name] == ["a.trained.training"]

    read.clear()
    read.append(-1)
    trained = run(tiny["llama"], texts, tmp_path / "a.trained", patience=9)
    assert read == [-1, *range(20, 40)]  # from the second of four checks
    assert not (tmp_path / "a.trained.training").exists()
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(trained.arrays[name], array)
    assert trained.achieved_ppl_increase == whole.achieved_ppl_increase


def test_training_stops_early_and_keeps_the_best(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, seen = iter([5.0, 3.0, 4.0, 3.5, 1.0]), []

    def scripted(self: Any, arrays: Any) -> float:
        seen.append(arrays)
        return next(changes)

    monkeypatch.setattr(training.Trainer, "ppl_change", scripted)
    trained = run(tiny["llama"], texts, tmp_path / "a.trained", patience=1)
    assert len(seen) == 3
    assert not np.array_equal(seen[1]["out"], seen[2]["out"])
    np.testing.assert_array_equal(trained.arrays["out"], seen[1]["out"])


def test_the_file(tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path) -> None:
    """It has what was trained, on what, and how that was judged."""
    model, path = tiny["qwen2"], tmp_path / "a.trained"
    trained = run(model, texts, path, gate=True, sparsity=0.25)
    assert (trained.selector, trained.knob) == (f"{LEARNED}:rank=3:gate=1", 0.75)
    assert (trained.model, trained.fingerprint) == (model.name, model.fingerprint)
    assert trained.target_sparsity == 0.25
    assert trained.achieved_sparsity == pytest.approx(0.25, abs=0.02)
    assert trained.achieved_ppl_increase_se is not None
    assert trained.calibration_sha256
    assert trained.calibration_tokens == 32 * 40
    assert trained.arrays["in"].dtype == trained.arrays["out"].dtype == np.int8

    loaded = Trained.load(path)
    assert loaded.metadata == trained.metadata
    assert loaded.arrays.keys() == trained.arrays.keys()
    for name, array in trained.arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)
    np.testing.assert_array_equal(loaded.calibration_sketch, trained.calibration_sketch)
    selector = find(loaded.selector)
    assert issubclass(selector, Selector)
    chosen = selector(loaded.knob, loaded.arrays)
    with model.sparse(chosen):
        assert torch.isfinite(model.hidden(np.arange(2, 34)[None])).all()


@pytest.fixture(scope="module")
def trained_file(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("trained") / "a.trained"
    run(tiny["llama"], texts, path, tokens=64, checks=1)
    return path


def test_damaged_files(trained_file: Path, tmp_path: Path) -> None:
    content, path = trained_file.read_bytes(), tmp_path / "b.trained"
    for damaged in (content[:-9], content[:40], content[:5], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(FallowError, match="is truncated or no safetensors file"):
            Trained.load(path)
    with pytest.raises(FallowError, match=r"cannot read trained selector .*: No such file"):
        Trained.load(tmp_path / "none")
    with pytest.raises(FallowError, match=r"cannot read trained selector .*: Is a directory"):
        Trained.load(tmp_path)
    with pytest.raises(FallowError, match=r"cannot write .*a\.trained: "):
        Trained.load(trained_file).save(trained_file / "a.trained")


def test_other_files(
    tiny: dict[str, fallow.Model], texts: Texts, trained_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "b.trained"
    path.write_bytes(save_arrays({"in": np.zeros(3)}))
    with pytest.raises(FallowError, match="is a safetensors file but no trained selector"):
        Trained.load(path)
    fallow.calibrate(
        tiny["llama"], "topk", sparsity=0.5, text=texts[0], context=32, windows=1,
        validation_windows=1,
    ).save(path)  # fmt: skip
    with pytest.raises(FallowError, match="no trained selector; make one with fallow select train"):
        Trained.load(path)
    with pytest.raises(FallowError, match="is a safetensors file but no plan"):
        Plan.load(trained_file)


def rewritten(source: Path, path: Path, arrays: dict[str, Any], **metadata: Any) -> Path:
    """A copy with other arrays and metadata; what is None is left out."""
    trained = Trained.load(source)
    stored = {"calibration_sketch": trained.calibration_sketch, **trained.arrays, **arrays}
    written = {k: v for k, v in (trained.metadata | metadata).items() if v is not None}
    kept = {k: v for k, v in stored.items() if v is not None}
    path.write_bytes(save_arrays(kept, metadata={"fallow_trained": json.dumps(written)}))
    return path


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": 7}, "it has format 7, this fallow reads 1; train again with"),
        ({"format": None}, "it has format None"),
        ({"model": None, "knob": None}, "it lacks knob, model; train again"),
        ({"knob": "much"}, "knob cannot be much"),
        ({"date": 5}, "date cannot be 5"),
        ({"selector": "lowbit"}, "lowbit is no selector that is trained"),
        ({"selector": "os:system"}, "os:system is no selector that is trained"),
        ({"selector": f"{LEARNED}s:rank=3"}, "is no selector that is trained"),
        ({"selector": f"{LEARNED}:rank=none"}, "has no option 'rank=none'"),
        ({"selector": f"{LEARNED}:rank=4"}, "its arrays do not fit each other"),
    ],
)
def test_damaged_metadata(
    metadata: dict[str, Any], message: str, trained_file: Path, tmp_path: Path
) -> None:
    path = rewritten(trained_file, tmp_path / "b.trained", {}, **metadata)
    with pytest.raises(FallowError, match=message):
        Trained.load(path)


def test_metadata_that_is_no_object(trained_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.trained"
    arrays = load_arrays(trained_file.read_bytes())
    for text in ("{", "[1]", "null", "7", '{"format": 1, "format": 1}', "[" * 100_000):
        path.write_bytes(save_arrays(arrays, metadata={"fallow_trained": text}))
        with pytest.raises(FallowError, match="damaged metadata; train again"):
            Trained.load(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"noise": None}, "it has the arrays in, in.scale, out, out.scale; train again"),
        ({"more": np.zeros(2)}, "it has the arrays in, in.scale, more, noise, out"),
        ({"in": np.zeros((2, 3), dtype=np.int8)}, "array in is damaged"),
        ({"in": np.zeros((2, 3, 24), dtype=np.float32)}, "array in is damaged"),
        ({"noise": np.full((2, 74), np.nan, dtype=np.float32)}, "array noise is damaged"),
        ({"noise": np.zeros((2, 73), dtype=np.float32)}, "its arrays do not fit each other"),
        ({"in": np.zeros((1, 3, 24), dtype=np.int8)}, "its arrays do not fit each other"),
        ({"calibration_sketch": np.zeros(3)}, "array calibration_sketch is damaged"),
    ],
)
def test_damaged_arrays(
    arrays: dict[str, Any], message: str, trained_file: Path, tmp_path: Path
) -> None:
    path = rewritten(trained_file, tmp_path / "b.trained", arrays)
    with pytest.raises(FallowError, match=message):
        Trained.load(path)


def test_files_without_a_sketch(trained_file: Path, tmp_path: Path) -> None:
    path = rewritten(trained_file, tmp_path / "b.trained", {"calibration_sketch": None})
    assert Trained.load(path).calibration_sketch.shape == (0,)


def compare(
    model: fallow.Model, texts: Texts, output: Path, rule: str, trained: list[Trained]
) -> list[dict[str, Any]]:
    return fallow.tradeoff(
        model, make_rows([rule], [0.5]), output, calibration_text=texts[0], text=texts[1],
        context=32, windows=2, calibration_windows=2, validation_windows=1, trained=trained,
    )  # fmt: skip


def test_comparing(tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path) -> None:
    """The file's networks, at the row's own budget."""
    model = tiny["llama"]
    trained = run(model, texts, tmp_path / "a.trained", sparsity=0.25, tokens=64)
    rule = f"{LEARNED}:rank=3"
    _, row = compare(model, texts, tmp_path / "out", rule, [trained])
    assert row["achieved_sparsity"] == pytest.approx(0.5, abs=0.02)
    selector = find(rule)
    assert issubclass(selector, Selector)
    _, (result,) = run_window(
        model,
        model.windows(load_text(texts[1], "evaluation"), 32, 1)[0],
        [selector(0.5, trained.arrays)],
    )
    first = json.loads((tmp_path / "out" / "cells.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(result.loss)
    assert not list(tmp_path.glob("out/plans/*"))
    again = [Trained.load(tmp_path / "a.trained")]
    assert compare(model, texts, tmp_path / "out", rule, again)[1] == row

    other = run(model, texts, tmp_path / "b.trained", tokens=640)
    with pytest.raises(UsageError, match=f"out holds results of another training of {rule}"):
        compare(model, texts, tmp_path / "out", rule, [other])
    with pytest.raises(FallowError, match=r"this trained selector is for .*; train one for"):
        compare(tiny["qwen2"], texts, tmp_path / "q", rule, [trained])
    with pytest.raises(UsageError, match="is the text the plan was calibrated on"):
        compare(model, (texts[0], texts[0]), tmp_path / "l", rule, [trained])
    with pytest.raises(UsageError, match="rank=5 needs training: run fallow select train"):
        compare(model, texts, tmp_path / "r", f"{LEARNED}:rank=5", [trained])


@pytest.mark.parametrize("budget", ["", ":cett=1"])
def test_any_budget(budget: str, calibrators: dict[str, Calibrator], trained_file: Path) -> None:
    """The networks are asked of the calibration's cache by one key, whatever the budget."""
    calibrator, trained = calibrators["llama"], Trained.load(trained_file)
    selector = find(trained.selector + budget)
    assert issubclass(selector, Selector)
    cache = calibrator.calibration.cache
    cache[selector.scores_key()] = trained.arrays
    try:
        fitted = calibrator.fit(selector.name, sparsity=0.5)
    finally:
        del cache[selector.scores_key()]
    assert isinstance(fitted, Selector)
    assert fitted.arrays["in"] is trained.arrays["in"]
    assert ("threshold" in fitted.arrays) == bool(budget)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "Learned has no option 'rank=0'; it has: rank=1..1024, gate=0..1"),
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
        run(tiny["llama"], texts, tmp_path / "a.trained", **changes)
    assert list(tmp_path.iterdir()) == []


def test_bad_input(
    tiny: dict[str, fallow.Model], folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    output = tmp_path / "a.trained"
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
    output, model = tmp_path / "a.trained", tiny["llama"]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, texts, output)
    with pytest.raises(UsageError, match="from a training with another selector, tokens; delete"):
        run(model, texts, output, rank=2, tokens=64)
    path = tmp_path / "a.trained.training"
    content = path.read_bytes()
    for damaged in (content[:-100], content[: len(content) // 2], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(FallowError, match="is damaged; delete it to train from the start"):
            run(model, texts, output)
