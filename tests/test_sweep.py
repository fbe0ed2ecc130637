"""The trade-off table: what it holds, and that a stopped run continues."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fallow
from fallow.calibration import tradeoff as sweep
from fallow.calibration.tradeoff import Row, make_rows, pareto_front
from fallow.common.errors import UsageError

Texts = tuple[Path, Path]
SETTINGS: dict[str, Any] = {
    "context": 32,
    "windows": 3,
    "calibration_windows": 2,
    "validation_windows": 2,
}


def run(model: fallow.Model, texts: Texts, output: Path, rows: list[Row], **changes: Any) -> Any:
    settings = SETTINGS | changes
    return fallow.tradeoff(
        model, rows, output, calibration_text=texts[0], text=texts[1], **settings
    )


def test_rows() -> None:
    keys = [row.key for row in make_rows(["topk", "relu"], [0.3, 0.5], [1.0])]
    assert keys == ["topk-0.3", "topk-0.5", "topk-ppl1", "relu-0"]
    with pytest.raises(UsageError, match="unknown rule 'x'"):
        make_rows(["x"], [0.5])
    with pytest.raises(UsageError, match="nothing to do"):
        make_rows(["topk"], [])


def test_table_equals_evaluate(tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path) -> None:
    model = tiny["llama"]
    rows = make_rows(["cats", "tail"], [0.4], [2.0])
    table = run(model, texts, tmp_path / "out", rows)
    assert [row["rule"] for row in table] == ["dense", "cats", "cats", "tail", "tail"]
    for row, plan_row in zip(table[1:], rows, strict=True):
        plan = fallow.Plan.load(tmp_path / "out" / "plans" / f"{plan_row.key}.plan")
        expected = fallow.evaluate(model, plan, texts[1], context=32, windows=3)
        assert row["ppl"] == pytest.approx(expected.ppl)
        assert row["ppl_change_percent"] == pytest.approx(expected.ppl_change_percent)
        assert row["ppl_change_se"] == pytest.approx(expected.ppl_change_se)
        assert row["kl_to_dense"] == pytest.approx(expected.kl_to_dense["mean"])
        assert row["sparsity_inter"] == pytest.approx(expected.sparsity_ratio["inter"], abs=1e-4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "run.json",
        "cells.jsonl",
        "plans",
        "table.csv",
        "table.json",
        "tradeoff.png",
        "tradeoff.svg",
    }
    written = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert [row["rule"] for row in written] == [row["rule"] for row in table]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == table


def test_selectors(tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path) -> None:
    rows = make_rows(["oracle", "lowbit:gate=2:cett=1", "cats"], [0.5])
    _, oracle, lowbit, cats = run(tiny["llama"], texts, tmp_path / "out", rows)
    assert (oracle["recall"], oracle["energy_recall"]) == (1, 1)
    assert oracle["ffn_bytes"] == pytest.approx((9 + 0.5 * 5.5) / 14.5, abs=0.01)
    assert lowbit["rule"] == "lowbit:gate=2:cett=1"
    assert 0.3 < lowbit["ffn_bytes"] < oracle["ffn_bytes"]
    assert "recall" not in lowbit  # it has no k
    assert "ffn_bytes" not in cats


def test_ctrl_c_keeps_finished_windows_and_the_run_continues(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny["qwen2"], make_rows(["topk"], [0.3, 0.6])
    whole = run(model, texts, tmp_path / "whole", rows)
    measured: list[int] = []
    real = sweep.run_window

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*arguments, **settings)

    monkeypatch.setattr(sweep, "run_window", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, texts, tmp_path / "out", rows)
    partial = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["windows"] for row in partial] == [2, 2, 2]

    monkeypatch.setattr(sweep, "run_window", lambda *a, **k: measured.append(1) or real(*a, **k))
    assert run(model, texts, tmp_path / "out", rows) == whole
    assert len(measured) == 3  # the two finished windows were not measured again
    shutil.rmtree(tmp_path / "out" / "plans")
    assert run(model, texts, tmp_path / "out", rows) == whole
    assert len(measured) == 3
    assert not (tmp_path / "out" / "plans").exists()  # nor is what is measured calibrated again


def test_a_half_written_line_is_measured_again(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path
) -> None:
    model, rows = tiny["qwen2"], make_rows(["topk"], [0.5])
    whole = run(model, texts, tmp_path, rows)
    cells = tmp_path / "cells.jsonl"
    cells.write_text(cells.read_text()[:-20])
    assert run(model, texts, tmp_path, rows) == whole
    kept = cells.read_text()
    assert run(model, texts, tmp_path, rows) == whole
    assert cells.read_text() == kept


def test_folder_of_another_run_is_refused(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path
) -> None:
    rows = make_rows(["topk"], [0.5])
    run(tiny["llama"], texts, tmp_path, rows)
    with pytest.raises(UsageError) as error:
        run(tiny["llama"], texts, tmp_path, rows, context=16)
    assert str(error.value) == (
        f"{tmp_path} holds a run with another context; choose another --output folder"
    )
    with pytest.raises(UsageError, match="another model, fingerprint"):
        run(tiny["qwen2"], texts, tmp_path, rows)


def test_leakage_is_refused(tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the text the plan was calibrated on"):
        run(tiny["llama"], (texts[1], texts[1]), tmp_path, make_rows(["topk"], [0.5]))
    copy = tmp_path / "copy"
    copy.write_text(texts[1].read_text().replace(" ", "\n"))
    with pytest.raises(UsageError, match="has 100% in common with the text the plan was calibra"):
        run(tiny["llama"], (copy, texts[1]), tmp_path, make_rows(["topk"], [0.5]))


def test_a_budget_of_no_neurons_has_no_recall(
    tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path
) -> None:
    _, row = run(tiny["llama"], texts, tmp_path, make_rows(["topk"], [0.99]))
    assert row["sparsity_inter"] == 1
    assert "recall" not in row
    assert "energy_recall" not in row


def test_pareto_front() -> None:
    points = [(0.8, 0.1), (0.7, 0.5), (0.7, 0.4), (0.75, 0.6), (0.5, 9.0), (0.6, 9.0)]
    rows = [{"ffn_bytes": b, "ppl_change_percent": c} for b, c in points]
    front = [(r["ffn_bytes"], r["ppl_change_percent"]) for r in pareto_front(rows)]
    assert front == [(0.8, 0.1), (0.7, 0.4), (0.5, 9.0)]
