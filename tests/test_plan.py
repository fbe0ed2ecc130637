"""The plan file: round trips, and every way it can be wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import fallow
from fallow.common.errors import FallowError
from fallow.plan import Plan


def make_plan(**changes: object) -> Plan:
    settings = {
        "model": "tiny",
        "fingerprint": "0123456789abcdef",
        "rule": "cett",
        "where": "inter",
        "knob": 0.25,
        "knob_name": "CETT",
        "arrays": {"threshold.inter": np.array([0.5, 1.5], dtype=np.float32)},
        "target_sparsity": 0.5,
    }
    return Plan(**(settings | changes))  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "p.plan")
    loaded = Plan.load(tmp_path / "p.plan")
    assert loaded.metadata == plan.metadata
    np.testing.assert_array_equal(loaded.arrays["threshold.inter"], [0.5, 1.5])
    assert [p.name for p in tmp_path.iterdir()] == ["p.plan"]


def test_the_sketch_is_kept_beside_the_arrays(tmp_path: Path) -> None:
    sketch = np.array([3, 2**64 - 1], dtype=np.uint64)
    plan = make_plan(calibration_sketch=sketch)
    plan.save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p")
    np.testing.assert_array_equal(loaded.calibration_sketch, sketch)
    assert list(loaded.arrays) == ["threshold.inter"]
    assert "calibration_sketch" not in plan.metadata
    make_plan(calibration_sketch=np.zeros(2)).save(tmp_path / "p")
    assert message(tmp_path / "p") == "plan P: array calibration_sketch is damaged; calibrate again"


def test_a_plan_without_a_sketch(tmp_path: Path) -> None:
    plan = make_plan()
    text = json.dumps(plan.metadata)
    save_file(plan.arrays, tmp_path / "p", metadata={"fallow_plan": text})
    assert len(Plan.load(tmp_path / "p").calibration_sketch) == 0


def message(path: Path) -> str:
    with pytest.raises(FallowError) as error:
        Plan.load(path)
    return str(error.value).replace(str(path), "P")


def test_missing(tmp_path: Path) -> None:
    assert message(tmp_path / "p") == "cannot read plan P: no such file; check --plan"


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "p"
    make_plan().save(path)
    path.write_bytes(path.read_bytes()[:-3])
    assert message(path).startswith("plan P is truncated or no safetensors file (")
    assert message(path).endswith("); calibrate again")


def test_not_a_plan(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1)}, tmp_path / "p")
    assert message(tmp_path / "p") == (
        "P is a safetensors file but no plan; make one with calibrate"
    )


def test_newer_format(tmp_path: Path) -> None:
    make_plan(format=2).save(tmp_path / "p")
    assert message(tmp_path / "p") == "plan P has format 2, this fallow reads 1; calibrate again"


def test_nan_in_an_array(tmp_path: Path) -> None:
    make_plan(arrays={"threshold.inter": np.array([np.nan])}).save(tmp_path / "p")
    assert message(tmp_path / "p") == (
        "plan P: array threshold.inter has NaN, infinity or a negative value; calibrate again"
    )


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FallowError, match=r"cannot write .*: its folder is a file; choose a folder"
    ):
        make_plan().save(tmp_path / "file" / "p.plan")


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "p.plan"
    path.write_text("before")
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(FallowError) as error:
        make_plan().save(path)
    assert str(error.value) == (
        f"cannot write {path}: No space left on device; "
        "choose a folder with space and write permission"
    )
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_plan_for_another_model(tiny: dict[str, fallow.Model]) -> None:
    model = tiny["llama"]
    with pytest.raises(FallowError) as error, model.sparse(make_plan()):
        pass
    assert str(error.value) == (
        f"this plan is for tiny (fingerprint 0123456789abcdef), not for {model.name} "
        f"(fingerprint {model.fingerprint}); calibrate a plan for {model.name}"
    )


def test_plan_with_too_few_layers(tiny: dict[str, fallow.Model]) -> None:
    model = tiny["llama"]
    arrays = {"threshold.inter": np.zeros(1, dtype=np.float32)}
    plan = make_plan(fingerprint=model.fingerprint, arrays=arrays)
    with pytest.raises(FallowError) as error, model.sparse(plan):
        pass
    assert str(error.value) == (
        f"this plan's array threshold.inter has the shape (2,) for {model.name}, "
        "the file has (1,); calibrate again"
    )
    plan = make_plan(fingerprint=model.fingerprint, rule="tail")
    with pytest.raises(FallowError, match="the file has nothing"), model.sparse(plan):
        pass
    plan = make_plan(fingerprint=model.fingerprint, rule="magic")
    with (
        pytest.raises(FallowError, match="cannot run this plan: unknown rule 'magic'"),
        model.sparse(plan),
    ):
        pass
