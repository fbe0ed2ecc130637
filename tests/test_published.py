"""Published thresholds as plans."""

import json
from pathlib import Path

import numpy as np
import pytest

import fallow
from conftest import DATA, make_folder
from fallow.calibration.imported import import_thresholds
from fallow.checkpoints.text import Text, check_no_leakage
from fallow.common.errors import FallowError, UsageError


@pytest.mark.parametrize(("name", "file"), [("mistral", "mistral-7b_50"), ("phi3", "phi-3_30")])
def test_published_files(name: str, file: str, tmp_path: Path) -> None:
    path = DATA / "thresholds" / f"{file}.json"
    if not path.exists():
        pytest.skip(f"{path} is missing; set FALLOW_DATA")
    model = fallow.load(make_folder(name, tmp_path / "m", num_hidden_layers=32))
    plan = import_thresholds(path, model)
    content = json.loads(path.read_text())
    key = "gate_proj" if name == "mistral" else "gate_up_proj"
    assert plan.arrays["gate_pre.threshold"][31] == np.float32(content[key]["layer_31"])
    assert plan.arrays["ffn_out.threshold"][7] == np.float32(content["down_proj"]["layer_7"])
    assert ("up.threshold" in plan.arrays) == (name == "mistral")
    assert (plan.rule, plan.knob) == ("percentile", int(file[-2:]) / 100)
    with model.sparse(plan):
        model.hidden(np.arange(2, 12)[None])


def write(path: Path, layers: int = 2) -> Path:
    values = {f"layer_{i}": 0.5 for i in range(layers)}
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    path.write_text(json.dumps(dict.fromkeys(names, values)))
    return path


def test_errors(tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    model = tiny["mistral"]
    with pytest.raises(FallowError, match="cannot read thresholds"):
        import_thresholds(tmp_path / "none_50.json", model)
    with pytest.raises(
        UsageError, match=r"the name t.json does not end in a percentile; give --kn"
    ):
        import_thresholds(write(tmp_path / "t.json"), model)
    assert import_thresholds(tmp_path / "t.json", model, knob=0.3).knob == 0.3
    with pytest.raises(FallowError, match=r"has gate_pre \(3 layers\), up \(3 layers\), ffn_out"):
        import_thresholds(write(tmp_path / "t_50.json", layers=3), model)
    (tmp_path / "t_50.json").write_text("[]")
    with pytest.raises(FallowError, match="is no threshold file"):
        import_thresholds(tmp_path / "t_50.json", model)


def test_the_text_of_the_authors_is_leakage(
    tiny: dict[str, fallow.Model], wikitext: tuple[Path, Path], tmp_path: Path
) -> None:
    """The published thresholds were calibrated on the WikiText-2 test split."""
    plan = import_thresholds(write(tmp_path / "t_50.json"), tiny["mistral"])
    test_text = Text("test", wikitext[1].read_text())
    with pytest.raises(UsageError, match="is the text the plan was calibrated on"):
        check_no_leakage(plan.calibration_sha256, test_text, allow_leakage=False)
    copy = Text("test", "\n" + test_text.content)
    with pytest.raises(UsageError, match="has 100% in common with the text the plan was calibra"):
        check_no_leakage(plan.calibration_sha256, copy, False, plan.calibration_sketch)
    other = Text("validation", wikitext[0].read_text())
    check_no_leakage(plan.calibration_sha256, other, False, plan.calibration_sketch)
