"""What Python shows of results: lines, data frames, tables; and who watches the work."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fallow
from conftest import OTHER_TEXT, TEXT, make_folder

SHORT: dict[str, Any] = {"context": 32, "windows": 2}
CALIBRATION, EVALUATION = fallow.Text("one", TEXT), fallow.Text("other", OTHER_TEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("llama", tmp_path_factory.mktemp("results") / "llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> fallow.Model:
    return fallow.load(folder)


@pytest.fixture(scope="module")
def plan(model: fallow.Model) -> fallow.Plan:
    return fallow.calibrate(model, "topk", sparsity=0.5, text=CALIBRATION, measure=False, **SHORT)


@pytest.fixture(scope="module")
def evaluation(model: fallow.Model, plan: fallow.Plan) -> fallow.Evaluation:
    return fallow.evaluate(model, plan, EVALUATION, **SHORT)


def test_an_engine_says_what_it_is(model: fallow.Model, plan: fallow.Plan, tmp_path: Path) -> None:
    """Its parameters are those of transformers, without what packing adds."""
    path = tmp_path / "packed.gguf"
    fallow.pack(model, path, quant="bf16")
    engine = fallow.Engine(path, threads=1, context=64)
    assert engine.n_parameters == sum(p.numel() for p in model.module.parameters())
    begin = f"<Engine of {engine.name}: {engine.n_parameters / 1e6:.4g} million parameters in "
    assert repr(engine).startswith(begin)
    assert repr(engine).endswith(" MB (bf16), 1 threads, context of 64 tokens, dense>")
    engine.use_plan(plan)
    assert repr(engine).endswith(", plan topk at 0.5>")
    several = fallow.Engine(path, threads=1, context=64, slots=2, memory="8GB")
    assert repr(several).endswith(", 2 slots of 64 tokens, within 8000 MB, dense>")


def test_an_engine_that_was_not_loaded_says_so(model: fallow.Model, tmp_path: Path) -> None:
    """As debuggers and logs ask for it, of one whose file was refused."""
    path = tmp_path / "packed.gguf"
    fallow.pack(model, path, quant="bf16")
    for arguments in ({"path": tmp_path / "none.gguf"}, {"path": path, "context": 1 << 40}):
        engine = object.__new__(fallow.Engine)
        assert repr(engine) == "<Engine of None, which was not loaded>"
        with pytest.raises(fallow.FallowError):
            engine.__init__(**arguments)  # type: ignore[misc]
        assert repr(engine) == f"<Engine of {arguments['path']}, which was not loaded>"


def test_the_public_api_is_what_dir_lists() -> None:
    assert dir(fallow) == sorted([*fallow.__all__, "__version__"])
    assert all(getattr(fallow, name) is not None for name in dir(fallow))


def test_every_result_says_what_it_is(
    model: fallow.Model, plan: fallow.Plan, evaluation: fallow.Evaluation, folder: Path
) -> None:
    assert repr(model) == f"<Model {folder}: llama, 2 layers of 37 neurons, float32 on cpu>"
    assert repr(plan) == (
        f"<Plan of topk at 0.5 for {folder}: Cut of inter by topk 0.5 in 2 layers, times "
        "column_norm>"
    )
    change = f"{evaluation.ppl_change_percent:+.2f} ± {evaluation.ppl_change_se:.2f} % against"
    assert repr(evaluation).startswith(f"<Evaluation of {folder} (float32) under topk at 0.5: PPL ")
    assert change in repr(evaluation)
    assert repr(evaluation).endswith("; 2 windows of 32 tokens of other>")
    assert repr(CALIBRATION) == "Text(name='one')"
    assert repr(fallow.Cut("inter", "threshold", [0.25, 0.5])) == (
        "<Cut of inter by threshold 0.25 to 0.5 in 2 layers>"
    )
    profile = fallow.profile(model, EVALUATION, **SHORT)
    assert repr(profile).endswith("in 2 layers of 37 neurons; 64 tokens of other>")
    assert "0.0 tok/s" in repr(fallow.Stats())


def test_frames_have_a_row_per_layer_run_or_rule(
    model: fallow.Model, plan: fallow.Plan, evaluation: fallow.Evaluation
) -> None:
    pandas = pytest.importorskip("pandas")
    one = evaluation.to_frame()
    assert len(pandas.concat([one, one])) == 2
    assert one["kl_to_dense.mean"][0] == evaluation.kl_to_dense["mean"]
    assert one["rule"][0] == "topk"
    np.testing.assert_array_equal(plan.to_frame()["inter.topk"], plan.cuts[0].value)
    layers = evaluation.layers.to_frame()
    assert layers["inter.mean"].mean() == pytest.approx(evaluation.sparsity_ratio["inter"])
    assert fallow.profile(model, EVALUATION, **SHORT).to_frame().shape[0] == 2
    assert fallow.Stats(new_tokens=3).to_frame()["new_tokens"][0] == 3


def test_tables_in_notebooks(plan: fallow.Plan, evaluation: fallow.Evaluation) -> None:
    table = fallow.Table([{"rule": "<cats>", "ppl": 12.345678}, {"rule": "topk", "kl": None}])
    assert repr(table) == "<Table of 2 rows: rule, ppl, kl>"
    assert table._repr_html_() == (
        "<table><tr><th>rule</th><th>ppl</th><th>kl</th></tr>"
        "<tr><td>&lt;cats&gt;</td><td>12.35</td><td></td></tr>"
        "<tr><td>topk</td><td></td><td></td></tr></table>"
    )
    assert plan._repr_html_().count("<tr>") == 3
    assert f"<td>{evaluation.ppl:.4g}</td>" in evaluation._repr_html_()


def test_without_pandas_one_line_says_so(
    plan: fallow.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(fallow.FallowError, match="to_frame needs pandas: pip install pandas"):
        plan.to_frame()


def test_a_text_is_no_path(model: fallow.Model, plan: fallow.Plan) -> None:
    with pytest.raises(fallow.UsageError, match=r"there is no file neuron 0 .*fallow.Text\(NAME"):
        fallow.evaluate(model, plan, TEXT)
    with pytest.raises(fallow.FallowError, match=r"cannot read text my novel.txt: No such file"):
        fallow.evaluate(model, plan, "my novel.txt")


def test_who_watches_is_told_every_step(
    model: fallow.Model, plan: fallow.Plan, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done: list[tuple[str, int, int | None]] = []
    logged: list[tuple[dict[str, float], int]] = []
    with fallow.watch(lambda *step: done.append(step), lambda *row: logged.append(row)):
        found = fallow.evaluate(model, plan, EVALUATION, **SHORT)
        assert done == [("evaluate", n, 2) for n in (0, 1, 2)]
        assert [step for _, step in logged] == [0, 1]
        losses = [figures["evaluate/loss"] for figures, _ in logged]
        assert np.exp(np.mean(losses)) == pytest.approx(found.ppl)
        with fallow.watch(log=lambda *_: None):  # inside, another takes the log; progress stays
            fallow.evaluate(model, plan, EVALUATION, **SHORT)
        assert (len(done), len(logged)) == (6, 2)
        rows = [fallow.Row("topk", sparsity=0.5)]
        how: dict[str, Any] = {"calibration_windows": 2, "validation_windows": 1, **SHORT}
        table = fallow.tradeoff(
            model, rows, tmp_path, calibration_text=CALIBRATION, text=EVALUATION, **how
        )
        assert logged[-1][1] == 1
        losses = [f["tradeoff topk-0.5/loss"] for f, _ in logged[2:]]
        assert np.exp(np.mean(losses)) == pytest.approx(table[1]["ppl"])
        assert repr(table).startswith("<Table of 2 rows: rule, ppl, ")
    assert "evaluate" not in capsys.readouterr().err  # no bar beside the caller's own
    fallow.evaluate(model, plan, EVALUATION, **SHORT)
    assert "evaluate: 2/2" in capsys.readouterr().err
    assert len(done) > 6


def test_a_training_is_logged(folder: Path, tmp_path: Path) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    settings = fallow.AdaptSettings(
        tokens=1024, context=32, batch=8, learning_rate=3e-4, budgets="even"
    )
    with fallow.watch(log=lambda *row: logged.append(row)):
        report = fallow.adapt(
            folder, tmp_path / "adapted", settings, text=[fallow.Text("long", 4 * TEXT)]
        )
    trained = [step for figures, step in logged if "adapt/kl" in figures]
    assert trained == list(range(1, settings.steps + 1))
    held_out = [figures["adapt/held_out_kl"] for figures, _ in logged if "adapt/kl" not in figures]
    assert held_out == [check.kl for check in report.checks]
    assert len(report.to_table()) == len(report.checks)
    assert "adapted: gate_topk at 50%, 1024 tokens, " in repr(report)
