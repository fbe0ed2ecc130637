"""The plan file: round trips, and every way it can be wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import fallow
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.plan import Cut, Plan


def make_plan(**changes: object) -> Plan:
    settings = {
        "model": "tiny",
        "fingerprint": "0123456789abcdef",
        "rule": "cett",
        "knob": 0.25,
        "knob_name": "CETT",
        "cuts": (Cut("inter", "threshold", np.array([0.5, 1.5]), "column_norm"),),
        "target_sparsity": 0.5,
    }
    return Plan(**(settings | changes))  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    plan = make_plan()
    plan.save(tmp_path / "p.plan")
    loaded = Plan.load(tmp_path / "p.plan")
    assert loaded.metadata == plan.metadata
    (cut,) = loaded.cuts
    assert (cut.tap, cut.kind, cut.weight) == ("inter", "threshold", "column_norm")
    np.testing.assert_array_equal(cut.value, np.array([0.5, 1.5], dtype=np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["p.plan"]


def test_the_sketch_is_kept_beside_the_arrays(tmp_path: Path) -> None:
    sketch = np.array([3, 2**64 - 1], dtype=np.uint64)
    plan = make_plan(calibration_sketch=sketch)
    plan.save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p")
    np.testing.assert_array_equal(loaded.calibration_sketch, sketch)
    assert list(loaded.arrays) == ["inter.threshold"]
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


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "fallow calibrate tiny --rule cett --sparsity 0.5 -o PLAN"),
        (
            {"target_sparsity": None, "target_ppl_increase": 1.0, "model": "a b"},
            "fallow calibrate 'a b' --rule cett --max-ppl-increase 1.0 -o PLAN",
        ),
        ({"target_sparsity": None}, "fallow calibrate tiny --rule cett --knob 0.25 -o PLAN"),
        ({"rule": "two_stage", "knob": 0.0}, "fallow optimize tiny"),
    ],
)
def test_another_format_names_what_makes_it_anew(
    changes: dict[str, object], command: str, tmp_path: Path
) -> None:
    make_plan(format=1, **changes).save(tmp_path / "p")
    assert message(tmp_path / "p") == (
        f"plan P has format 1, this fallow reads 2; make it anew: {command}"
    )


def test_all_there_is_in_a_plan_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cuts = (
        Cut("qkv_proj", "topk", np.array([0.25, 1.0]), "column_norm"),
        Cut("gate_act", "tail", np.array([0.5, 0.0]), rng.random((2, 3))),
        Cut("up", "threshold", np.array([-1.0, 0.0])),
    )
    make_plan(cuts=cuts, head_margin=2.5, head_limit=9).save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p")
    assert (loaded.head_margin, loaded.head_limit) == (2.5, 9)
    assert (loaded.inputs, loaded.where, loaded.n_layers) == (("qkv_proj",), "input", 2)
    for found, made in zip(loaded.cuts, cuts, strict=True):
        assert (found.tap, found.kind) == (made.tap, made.kind)
        np.testing.assert_array_equal(found.value, made.value)
        np.testing.assert_array_equal(found.weight, made.weight)
    assert [cut.leaves_out.tolist() for cut in loaded.cuts] == [
        [True, False], [True, False], [False, True],
    ]  # fmt: skip


INTER = {"tap": "inter", "kind": "threshold", "weight": None}
VALUES = {"inter.threshold": np.ones(2, dtype=np.float32)}


@pytest.mark.parametrize(
    ("cuts", "arrays", "said"),
    [
        (3, {}, "cuts is no list"),
        ([3], {}, "a cut is 3"),
        ([INTER | {"group": 4}], VALUES, "a cut is {'tap': 'inter', "),
        ([{"tap": "inter"}], VALUES, "a cut is {'tap': 'inter'}"),
        ([INTER | {"kind": "softmax"}], VALUES, "a cut has the unknown kind softmax"),
        ([INTER | {"kind": ["topk"]}], VALUES, "a cut has the unknown kind ['topk']"),
        ([INTER], {}, "array inter.threshold is missing"),
        ([INTER], {"inter.threshold": np.ones(2)}, "array inter.threshold is float64 (2,)"),
        ([INTER], {"inter.threshold": np.ones((2, 1), "f4")}, "is float32 (2, 1)"),
        ([INTER], {"inter.threshold": np.array([1, np.nan], "f4")}, "is no finite number per"),
        ([INTER | {"tap": "outer"}], {"outer.threshold": np.ones(2, "f4")}, "cut at outer"),
        ([INTER | {"tap": "ffn_out", "weight": "column_norm"}],
         {"ffn_out.threshold": np.ones(2, "f4")}, "column_norm is no weight of ffn_out"),
        ([INTER | {"weight": "row_norm"}], VALUES, "row_norm is no weight of inter"),
        ([INTER | {"weight": "array"}], VALUES, "array inter.weight is missing"),
        ([INTER | {"weight": "array"}], VALUES | {"inter.weight": -np.ones((2, 3), "f4")},
         "the weight of inter has NaN, infinity or a negative value"),
        ([INTER | {"weight": "array"}], VALUES | {"inter.weight": np.ones((3, 3), "f4")},
         "the weight of inter has 3 layers, not 2"),
        ([INTER | {"kind": "topk"}], {"inter.topk": np.array([0.5, 1.5])}, "is outside 0 to 1"),
        ([INTER, INTER | {"kind": "topk"}], VALUES | {"inter.topk": np.ones(2)}, "is cut twice"),
        ([INTER, INTER | {"tap": "up"}], VALUES | {"up.threshold": np.ones(3, "f4")},
         "the threshold of up has 3 layers, not 2"),
        ([INTER], VALUES | {"up.threshold": np.ones(2, "f4")}, "up.threshold belongs to no cut"),
    ],
)  # fmt: skip
def test_cuts_that_are_none(
    cuts: object, arrays: dict[str, np.ndarray], said: str, tmp_path: Path
) -> None:
    metadata = make_plan().metadata | {"cuts": cuts}
    save_file(arrays, tmp_path / "p", metadata={"fallow_plan": json.dumps(metadata)})
    found = message(tmp_path / "p")
    assert said in found
    assert found.startswith("plan P: ")
    assert found.endswith("; calibrate again")


@pytest.mark.parametrize("changes", [{"head_margin": -1.0}, {"head_limit": -1}])
def test_shortlists_out_of_range(changes: dict[str, object], tmp_path: Path) -> None:
    make_plan(**changes).save(tmp_path / "p")
    assert message(tmp_path / "p") == (
        "plan P: head_margin or head_limit is negative; calibrate again"
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


def test_plans_for_other_layers(tiny: dict[str, fallow.Model], packed: dict[str, Path]) -> None:
    model, engine = tiny["llama"], Engine(packed["llama"])
    for cut, said in (
        (Cut("inter", "topk", np.ones(1)), "topk of inter is for 1 layers, {} has 2"),
        (Cut("up", "topk", np.ones(2), np.ones((2, 3))), r"weight of up has the shape (2, 3), "),
        (Cut("k_proj", "topk", np.ones(2), np.ones((2, 37))), "{} needs (2, 24); calibrate again"),
    ):
        plan = make_plan(fingerprint=model.fingerprint, cuts=(cut,))
        with pytest.raises(FallowError) as error, model.sparse(plan):
            pass
        assert said.format(model.name) in str(error.value)
        with pytest.raises(FallowError) as error:
            engine.use_plan(plan)
        assert said.format(engine.name) in str(error.value)


def test_taps_that_a_model_does_not_have(
    tiny: dict[str, fallow.Model], packed: dict[str, Path]
) -> None:
    model = tiny["opt"]
    plan = make_plan(fingerprint=model.fingerprint, cuts=(Cut("up", "topk", np.ones(2)),))
    with pytest.raises(FallowError, match=r"the plan cuts up, .* has gate_pre, gate_act, inter, "):
        model.taps(plan)
    with pytest.raises(FallowError, match=r"the plan cuts up, which .* does not have"):
        Engine(packed["opt"], plan)
