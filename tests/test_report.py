"""Reports: made in parts, and looked at in a browser at the width of a phone and of a desk."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fallow
from fallow.common.errors import FallowError, UsageError
from fallow.models.taps import attach
from fallow.reporting import measure, page
from fallow.reporting.figures import plain
from fallow.reporting.measure import align, octaves, pick_neurons, ranked, stored_bytes
from fallow.reporting.results import read_results
from looks import cut_texts, faint, small_controls

Texts = tuple[Path, Path]
WIDTHS = {"phone": (390, 844), "desk": (1440, 900)}
SCREENSHOTS = Path(__file__).parent.parent / "build" / "screenshots"
HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> {{ 7 * 7 }} é🙂\n"
COMPARED = ("the <b>old</b> gate rests", "the <i>new</i> gate rests")
BENCH = {
    "decode_tps": 20.0,
    "prefill_tps": 100.0,
    "bytes_per_token": 5e6,
    "peak_rss_mb": 50.0,
    "file_mb": 10.0,
    "baseline": "llama.cpp",
    "baseline_decode_tps": 10.0,
    "baseline_prefill_tps": 80.0,
    "all": {
        "engine": [{"decode_tps": 18.0}, {"decode_tps": 23.0}],
        "baseline": [{"decode_tps": 9.0}, {"decode_tps": 10.0}],
    },
}
OPTIMIZED = {"decode_tps": 30.0, "decode_ratio_dense": 1.2, "ppl_change_percent": 0.9}
BUDGETS = {"budgets": [{"memory_mb": 800, "decode_tps": 5.0}, {"memory_mb": 9, "error": "small"}]}


@dataclass
class Setting:
    """What reports of this file have in common."""

    models: list[str]
    options: dict[str, Any]

    def make(self, output: Path, **changes: Any) -> list[dict[str, Any]]:
        return page.report(self.models, output, **(self.options | changes))


@pytest.fixture(scope="module")
def setting(
    folders: dict[str, Path], texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    root = tmp_path_factory.mktemp("report")
    (root / "sample.txt").write_text(HOSTILE)
    results = []
    for name, result in (("bench", BENCH), ("optimize", OPTIMIZED), ("budgets", BUDGETS)):
        results.append(root / f"{name}.json")
        results[-1].write_text(f"a line before\n{json.dumps(result)}\n")
    options = {
        "text": texts[1], "calibration_text": texts[0], "context": 32, "windows": 2,
        "rules": ("topk", "teal"), "sparsities": (0.3, 0.6), "sample": root / "sample.txt",
        "compare": COMPARED, "results": results,
    }  # fmt: skip
    return Setting([str(folders["llama"])], options)


@pytest.fixture(scope="module")
def made(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "report.html"
    setting.make(output)
    return output


# Parts -------------------------------------------------------------------------------------------


def parts_of(output: Path) -> dict[str, Any]:
    (folder,) = Path(f"{output}.work").iterdir()
    return {
        path.stem: json.loads(path.read_text())["value"]
        for path in folder.glob("*.json")
        if path.stem != "run"
    }


def test_a_stopped_report_goes_on(
    setting: Setting, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def counted(name: str, fails: bool = False) -> Callable[..., Any]:
        real = getattr(measure, name)

        def call(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            if fails:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return call

    names = ("profile", "tradeoff", "calibrate", "evaluate", "examine")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(measure, name, counted(name, fails=name == "evaluate"))
        with pytest.raises(KeyboardInterrupt):
            setting.make(tmp_path / "report.html")
    assert called == ["profile", "tradeoff", "calibrate", "evaluate"]
    assert not (tmp_path / "report.html").exists()
    called.clear()
    for name in names:
        monkeypatch.setattr(measure, name, counted(name))
    setting.make(tmp_path / "report.html")
    assert called == ["evaluate", "examine"]
    again = (tmp_path / "report.html").read_text()
    # The same as one made at a stroke, but for the name of the file in its commands.
    assert again.replace(str(tmp_path), str(made.parent)) == made.read_text()
    called.clear()
    setting.make(tmp_path / "report.html")
    assert called == []
    assert (tmp_path / "report.html").read_text() == again


def test_parts_of_other_settings_are_refused(
    setting: Setting, made: Path, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(f"{made}.work", work)
    (own,) = work.iterdir()
    (tmp_path / "other.txt").write_text("other words")
    for changes, message in (
        ({"context": 16}, f"{own} holds parts of a report with another context; remove it, or "),
        ({"windows": 1}, "another windows"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"text": tmp_path / "long.txt"}, "another text_sha256"),
        ({"sparsities": (0.5,)}, f"{own}/tradeoff.json was made with another sparsities; remove"),
        ({"sample": tmp_path / "other.txt"}, "sample.json was made with another sample"),
        ({"compare": ("a b", "a c")}, "comparison.json was made with another compare"),
    ):
        (tmp_path / "long.txt").write_text("some other text " * 200)
        with pytest.raises(UsageError, match=message):
            setting.make(tmp_path / "r.html", work=work, **changes)
    # Another model under the same name.
    shutil.copytree(setting.models[0], tmp_path / "model")
    first = Setting([str(tmp_path / "model")], setting.options)
    first.make(tmp_path / "m.html")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UsageError, match="another fingerprint"):
        first.make(tmp_path / "m.html")
    card = (own / "card.json").read_text()
    for damaged in ("{", "[]", "{}", card.replace('"layers": 2', '"layers": 3')):
        (own / "card.json").write_text(damaged)
        with pytest.raises(FallowError, match=r"card\.json is damaged; remove it"):
            setting.make(tmp_path / "r.html", work=work)
    (own / "card.json").unlink()
    setting.make(tmp_path / "r.html", work=work)  # what was removed is made again
    assert (own / "card.json").exists()


def test_parts_say_what_the_functions_behind_them_say(
    made: Path, tiny: dict[str, fallow.Model], texts: Texts
) -> None:
    model, parts = tiny["llama"], parts_of(made)
    card = parts["card"]
    ffn = 2 * 3 * 24 * 37
    assert (card["ffn_weights"], card["ffn_bytes"]) == (ffn, 4 * ffn)
    assert card["weights"] == sum(p.numel() for p in model.module.parameters())
    assert card["file_bytes"] == 4 * card["weights"]
    dense = fallow.evaluate(model, None, texts[1], context=32, windows=2)
    assert parts["tradeoff"][0]["ppl"] == pytest.approx(dense.ppl)
    plan = fallow.Plan.load(next(Path(f"{made}.work").glob("*/example.plan")))
    assert (plan.rule, plan.target_ppl_increase) == ("tail", 1.0)
    with_plan = fallow.evaluate(model, plan, texts[1], context=32, windows=2)
    assert parts["plan"]["ppl_change_percent"] == pytest.approx(with_plan.ppl_change_percent)
    for row, found in zip(
        parts["plan"]["per_layer"]["inter"], with_plan.sparsity_per_layer["inter"], strict=True
    ):
        assert row["mean"] == pytest.approx(found["mean"], rel=1e-3)
    sample = parts["sample"]
    assert "".join(sample["tokens"]) == HOSTILE[: len("".join(sample["tokens"]))]
    ids = model.tokenizer.prompt(HOSTILE)[:32]
    kept: list[np.ndarray] = []
    keep = {"inter": lambda _, v: kept.append((v != 0).float().mean(dim=1).numpy())}
    with model.sparse(plan), attach(model.layers, keep):
        model.hidden(ids[None])
    np.testing.assert_allclose(sample["active"], np.stack(kept, axis=1), atol=6e-4)


def test_comparison(made: Path, tiny: dict[str, fallow.Model]) -> None:
    found = parts_of(made)["comparison"]
    model = tiny["llama"]
    plan = fallow.Plan.load(next(Path(f"{made}.work").glob("*/example.plan")))
    kept: list[list[np.ndarray]] = []
    for text in COMPARED:
        layers: list[np.ndarray] = []
        keep = {"inter": lambda _, v, layers=layers: layers.append((v != 0).numpy())}
        with model.sparse(plan), attach(model.layers, keep):
            model.hidden(model.tokenizer.prompt(text)[:32][None])
        kept.append(layers)
    pairs = np.array(found["pairs"])
    for layer, (a, b) in enumerate(zip(*kept, strict=True)):
        x, y = a[pairs[:, 0]], b[pairs[:, 1]]
        np.testing.assert_allclose(found["agreement"][layer], (x == y).mean(axis=1), atol=1e-4)
        both, either = (x & y).sum(axis=1), (x | y).sum(axis=1)
        np.testing.assert_allclose(found["jaccard"][layer], both / either, atol=1e-4)
        groups = np.array_split(a, 32, axis=1)
        expected = [100 * group.mean(axis=1) for group in groups]
        np.testing.assert_allclose(found["groups"][0][layer], expected, atol=0.5)
    first = found["same"].index(False)
    assert first > 0
    assert (np.array(found["agreement"])[:, :first] == 1).all()  # attention looks back only
    assert min(found["agreement"][1][first:]) < 1


def test_stored_bytes_of_gguf(tmp_path: Path, folders: dict[str, Path]) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, rows in (("token_embd", 8), ("blk.0.ffn_up", 4), ("blk.1.ffn_down", 2)):
        writer.add_tensor(f"{name}.weight", np.zeros((rows, 32), dtype=np.float16))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    model = fallow.load(folders["llama"])
    model.name = str(tmp_path / "m.gguf")
    assert stored_bytes(model) == (6 * 64, 14 * 64)


def test_octaves() -> None:
    from fallow.common.metrics import bin_edges
    from fallow.measure.profiling import _group
    from fallow.models.capture import Histograms

    histogram = Histograms("x", 2)
    import torch

    histogram.add(0, torch.tensor([0, 0, 0.3, 0.4, 0.6, 1.5, 1.9, -1.0]))
    histogram.add(1, torch.tensor([0.0, 5.0]))
    counts = histogram.counts.reshape(2, -1, _group()).sum(axis=2)
    found = octaves(counts, bin_edges()[:: _group()])
    assert found["low"] == [0.25, 0.5, 1, 2, 4]
    assert found["share"] == [[0.25, 0.125, 0.375, 0, 0], [0, 0, 0, 0, 0.5]]
    assert found["below"] == [0.25, 0.5]
    assert octaves(counts * 0 + np.eye(1, counts.shape[1], dtype=int), bin_edges()[:: _group()])[
        "below"
    ] == [1, 1]


def test_small_things() -> None:
    assert align(np.array([1, 2, 3, 4]), np.array([1, 9, 3, 4])).tolist() == [
        [0, 0], [1, 1], [2, 2], [3, 3]
    ]  # fmt: skip
    assert align(np.array([1, 2, 3]), np.array([1, 8, 9, 3])).tolist() == [[0, 0], [2, 3]]
    assert align(np.array([1]), np.array([2, 3])).tolist() == []
    assert ranked(np.array([0.1, 0.9, 0.5])) == {"rank": [0, 0.5, 1], "value": [0.9, 0.5, 0.1]}
    assert len(ranked(np.arange(1000) / 1000)["rank"]) == 200
    picks = pick_neurons(3, np.array([0.2, 0.9, 0.1, 0.5, 0.4]))
    assert [(p["what"], p["layer"], p["neuron"]) for p in picks] == [
        ("most frequent", 3, 1), ("middle", 3, 4), ("rarest", 3, 2)
    ]  # fmt: skip
    assert plain("<b>&\n") == "&lt;b>&amp;⏎"
    assert page.shares([0.5] * 4) == [0] * 4
    assert page.shares([0, 1, 2, 3, 100])[:2] == [0, pytest.approx(0.01, abs=0.01)]
    assert page.visible("") == "▯"
    assert page.visible("a\n") == "a⏎\n"


def test_results(setting: Setting, tmp_path: Path) -> None:
    found = read_results(setting.options["results"])
    assert found.timings == []  # none of them says what it is of
    found = found.bars
    assert [(bar["label"], bar["value"]) for bar in found["decode, tokens/s"]] == [
        ("bench", 20), ("bench: llama.cpp", 10), ("optimize", 30), ("budgets, 800 MB", 5)
    ]  # fmt: skip
    first = found["decode, tokens/s"][0]
    assert (first["low"], first["high"]) == (18, 23)
    assert found["read per decoded token, MB"] == [{"label": "bench", "value": 5}]
    assert found["PPL change against the source, %"] == [{"label": "optimize", "value": 0.9}]
    bad = tmp_path / "bad.json"
    for text in (
        "", "no json", "[1]", "{}", '{"decode_tps": "fast"}', '{"decode_tps": NaN}', "3",
        '{"decode_tps": 1, "plan_sha256": "a"}',
        '{"decode_tps": 1, "plan_sha256": 1, "fingerprint": "a"}',
        '{"decode_tps": 1, "plan_sha256": "a", "fingerprint": "a", "ppl_change_percent": 1}',
        '{"decode_tps": 1, "all": [1]}', '{"budgets": [1]}', '{"budgets": 1}', "[" * 100_000,
    ):  # fmt: skip
        bad.write_text(text)
        with pytest.raises(FallowError, match=r"bad\.json is no result of fallow bench --json"):
            read_results([bad])
    bad.write_bytes(b"\xff")
    for path in (bad, tmp_path / "none.json"):
        with pytest.raises(FallowError, match=f"cannot read {path}.*check --results"):
            read_results([path])


# Several plans, and their speeds ------------------------------------------------------------------


@dataclass
class Planned:
    """A report on two plans, with speeds of one of them, of a row of the trade-off and others."""

    html: Path
    plans: list[Path]
    timings: dict[str, dict[str, Any]]
    found: list[dict[str, Any]]


@pytest.fixture(scope="module")
def planned(
    setting: Setting, tiny: dict[str, fallow.Model], texts: Texts,
    tmp_path_factory: pytest.TempPathFactory,
) -> Planned:  # fmt: skip
    root = tmp_path_factory.mktemp("planned")
    plans = [root / f"{rule}.plan" for rule in ("topk", "cats")]
    for path in plans:
        fallow.calibrate(
            tiny["llama"], path.stem, sparsity=0.4, text=texts[0], context=32, windows=2,
            validation_windows=1,
        ).save(path)  # fmt: skip
    output, changes = root / "report.html", {"plans": plans, "rules": ("topk",), "results": ()}
    setting.make(output, **changes)  # whose folder has the plans of the trade-off
    row = fallow.Plan.load(next(root.glob("*.work/*/tradeoff/plans/topk-0.6.plan")))
    fingerprint = tiny["llama"].fingerprint
    optimized = {"ppl_change_percent": 0.5, "ppl_change_se": 0.1, "kl_to_dense": 0.01,
                 "sparsity_ratio": 0.2, "selector": "two_stage", "windows": 8, "text": "novels",
                 "bytes_per_token": 4e6}  # fmt: skip
    timings: dict[str, dict[str, Any]] = {
        "a-plan": {"decode_tps": 21, "plan_sha256": fallow.Plan.load(plans[0]).sha256},
        "a-row": {"decode_tps": 22, "plan_sha256": row.sha256},
        "dense": {"decode_tps": 23, "plan_sha256": None},
        "best": {"decode_tps": 24, "plan_sha256": "of another file"} | optimized,
        "another-model": {"decode_tps": 25, "plan_sha256": row.sha256, "fingerprint": "x"},
        "another-plan": {"decode_tps": 26, "plan_sha256": "of no file"},
    }
    results = [root / f"{name}.json" for name in timings]
    for path in results:
        path.write_text(json.dumps({"fingerprint": fingerprint} | timings[path.stem]))
    found = setting.make(output, **(changes | {"results": results}))
    return Planned(output, plans, timings, found)


def figure_of(html: Path, title: str) -> dict[str, Any]:
    """What a report embeds of a figure."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', html.read_text(), re.S)
    (one,) = (content for each in found if (content := json.loads(each))["title"] == title)
    return one


def test_plans_stand_side_by_side(
    planned: Planned, tiny: dict[str, fallow.Model], texts: Texts
) -> None:
    plans, layers = figure_of(planned.html, "Plans"), figure_of(planned.html, "Layer by layer")
    (place,) = plans["variants"]["neuron sparsity"]
    of_layers = layers["variants"]["inter"][0]["data"]
    for i, path in enumerate(planned.plans):
        expected = fallow.evaluate(
            tiny["llama"], fallow.Plan.load(path), texts[1], context=32, windows=2
        )
        row = plans["data"][i]
        assert (row["plan"], row["rule"]) == (path.name, path.stem)
        assert row["inactive"] == f"{expected.achieved_sparsity:.1%}"
        assert row["PPL change, %"].startswith(f"{expected.ppl_change_percent:+.2f} ± ")
        point = place["data"][i + 1]  # after the trade-off's line
        assert point["name"] == of_layers[i]["name"] == path.name
        assert point["x"] == [pytest.approx(100 * expected.achieved_sparsity, abs=1e-3)]
        assert point["y"] == [pytest.approx(expected.ppl_change_percent, rel=1e-4)]
        budgets = [100 * layer["mean"] for layer in expected.sparsity_per_layer["inter"]]
        assert of_layers[i]["y"] == pytest.approx(budgets, rel=1e-3)
        assert planned.found[i]["plan"] == path.name
        assert f"by rule {path.stem} of {path.name}.</p>" in planned.html.read_text()
    assert [row["speed"] for row in plans["data"]] == [
        "21.0 tokens/s (a-plan)", "no speed was measured"
    ]  # fmt: skip
    # In grey: no two lines have the same marker.
    symbols = [trace["marker"]["symbol"] for trace in place["data"]]
    assert len(set(symbols)) == len(symbols) == 3
    assert len({trace["line"]["dash"] for trace in of_layers}) == 2


def test_the_slider_tells_measured_speeds_and_invents_none(planned: Planned) -> None:
    figure = figure_of(planned.html, "Sparsity against quality")
    rows = figure["data"]["PPL change up to +10 %"]
    assert [row["x"] for row in rows] == sorted(row["x"] for row in rows)
    told = {name: [row for row in rows if f"({name})" in row["text"]] for name in planned.timings}
    for name in ("a-plan", "a-row", "dense", "best"):
        (row,) = told[name]
        assert f"; {planned.timings[name]['decode_tps']:.1f} tokens/s" in row["text"]
    assert told["another-model"] == told["another-plan"] == []
    assert told["a-row"][0]["text"].startswith("topk at 60%: ")
    assert told["a-plan"][0]["text"].startswith("topk.plan: ")
    assert (told["dense"][0]["x"], told["dense"][0]["change"]) == (0, 0)
    assert told["best"][0]["text"] == (
        "optimized, two_stage: 20.0% inactive, PPL +0.50 ± 0.10 %, KL 0.01 nats on 8 windows of "
        "novels; 24.0 tokens/s, 4.0 MB read per token (best)"
    )
    rest = [row["text"] for row in rows if not any(row in found for found in told.values())]
    assert rest
    assert all(text.endswith("; no speed was measured") for text in rest)
    assert not any("cats" in text for text in rest)  # a plan that was not timed is no row of these
    (plot,) = figure["variants"]["PPL change up to +10 %"]
    stars = next(trace for trace in plot["data"] if trace["name"] == "timed")
    assert sorted(stars["x"]) == sorted(found[0]["x"] for found in told.values() if found)


@pytest.mark.parametrize("kind", ["phone", "desk"])
def test_plans_fit_the_screen(browser: Any, planned: Planned, kind: str) -> None:
    width, height = WIDTHS[kind]
    context = browser.new_context(viewport={"width": width, "height": height})
    view = context.new_page()
    view.goto(planned.html.as_uri(), wait_until="load")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    view.add_style_tag(content="html { filter: grayscale(1) }")
    for title in ("Sparsity against quality", "Plans", "Layer by layer"):
        figure = view.locator(".figure", has=view.get_by_role("heading", name=title, exact=True))
        for place in figure.locator(".drawing").all():
            place.scroll_into_view_if_needed()
            place.locator(".main-svg").first.wait_for()
        name = f"{title.lower().replace(' ', '-')}-{kind}.png"
        figure.screenshot(path=SCREENSHOTS / name)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


# The command -------------------------------------------------------------------------------------


@pytest.fixture
def command(folders: dict[str, Path], texts: Texts, tmp_path: Path) -> list[object]:
    """Of a small report on two models."""
    models = ["report", folders["llama"], folders["opt"], "--text", texts[1], "--context", 32]
    return [
        *models, "--calibration-text", texts[0], "--windows", 2, "--rules", "topk",
        "--sparsities", 0.5, "-o", tmp_path / "out" / "report.html",
    ]  # fmt: skip


def test_command_on_two_models(
    run: Any, command: list[object], folders: dict[str, Path], tmp_path: Path
) -> None:
    code, out, _ = run(*command, "--compare", "a gate", "the gate", "--json")
    found = json.loads(out.splitlines()[-1])
    html = (tmp_path / "out" / "report.html").read_text()
    assert code == 0
    assert found["bytes"] == len(html.encode()) < 8e6
    assert [m["model"] for m in found["models"]] == [str(folders[n]) for n in ("llama", "opt")]
    assert found["models"][1]["natural_sparsity"] > 0.2
    assert html.count("<h2") == 3
    cells = re.findall(r"<td>([^<]*)</td>", html)
    assert [cells[0], cells[6]] == [str(folders[n]) for n in ("llama", "opt")]
    assert cells[8] == f"{found['models'][1]['natural_sparsity']:.1%}"
    assert "Speed and memory" not in html
    assert "--compare &#39;a gate&#39; &#39;the gate&#39;" in html
    text = run(*command, "--compare", "a gate", "the gate")[1]
    assert text.splitlines()[-1].startswith("written: ")
    assert "rule tail at sparsity" in text


def test_command_with_a_plan(
    run: Any, command: list[object], folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    plan = tmp_path / "p.plan"
    made = run(
        "calibrate", folders["llama"], "--rule", "cats", "--sparsity", 0.4, "--text", texts[0],
        "--context", 32, "--windows", 2, "--validation-windows", 1, "-o", plan,
    )  # fmt: skip
    assert made[0] == 0
    del command[2]  # opt
    found = json.loads(run(*command, "--plan", plan, "--json")[1].splitlines()[-1])
    assert found["models"][0]["rule"] == "cats"
    html = (tmp_path / "out" / "report.html").read_text()
    assert "The plan that was given: rule cats" in html
    assert not list(tmp_path.glob("out/*.work/*/example.plan"))
    code, _, err = run(*command)
    assert (code, "plan.json was made with another plan" in err) == (2, True)


def test_command_errors(
    run: Any, command: list[object], folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    plan, empty = tmp_path / "p.plan", tmp_path / "empty.txt"
    run(
        "calibrate", folders["opt"], "--rule", "relu", "--knob", 0, "--text", texts[0],
        "--context", 32, "--windows", 1, "--validation-windows", 1, "-o", plan,
    )  # fmt: skip
    empty.write_text(" \n")
    one = [part for part in command if part != folders["opt"]]
    for arguments, code, message in (
        ([*one, "--sample", empty], 1, "empty.txt is empty"),
        ([*one, "--sample", tmp_path / "none"], 1, "none not found; give a text file"),
        ([*one, "--results", empty], 1, "is no result of fallow bench"),
        ([*one, "--plan", plan], 1, "this plan is for"),
        ([*command, "--plan", plan], 2, "--plan is for one model"),
        ([*one, "--compare", "a", " "], 2, "--compare has an empty text"),
        ([*one, "--rules", "none"], 2, "unknown rule"),
        ([*one, "--sparsities", "x"], 2, "--sparsities"),
        ([*one, "--calibration-text", texts[1]], 2, "is the text the plan was calibrated on"),
        ([*one, "--context", 4096], 2, "--context 4096 is longer"),
        (["report", "-o", tmp_path / "r.html"], 2, "MODEL"),
    ):
        found = run(*arguments)
        assert found[0] == code, found
        assert message in found[2]
        assert "Traceback" not in found[2]
        assert not (tmp_path / "out" / "report.html").exists()


# In a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*WIDTHS])
def opened(browser: Any, made: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The report, every figure drawn; `faults` has what a page must not do."""
    width, height = WIDTHS[request.param]
    touch = request.param == "phone"
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=touch, is_mobile=touch
    )
    context.set_default_timeout(120_000)  # of a machine that has other things to do
    view = context.new_page()
    view.faults, view.kind = [], request.param
    view.on("console", lambda message: view.faults.append(message.text))
    view.on("pageerror", lambda error: view.faults.append(str(error)))
    view.on("dialog", lambda dialog: (view.faults.append("a dialog"), dialog.dismiss()))
    view.on("request", lambda r: r.url[:5] in ("file:", "data:", "blob:") or view.faults.append(r))
    measure = context.new_cdp_session(view)
    measure.send("Performance.enable")
    view.goto(made.as_uri(), wait_until="load")
    metrics = measure.send("Performance.getMetrics")["metrics"]
    view.seconds = next(m["value"] for m in metrics if m["name"] == "ProcessTime")
    draw_all(view)
    yield view
    context.close()


def draw_all(view: Any) -> None:
    for place in view.locator(".drawing").all():
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for()


def test_every_figure_is_drawn(opened: Any) -> None:
    assert 0 < opened.seconds < 3  # of the processor, until the page has loaded
    plots = opened.locator(".js-plotly-plot .main-svg")
    places = opened.locator(".drawing")
    assert places.count() == 12  # of 14 figures, one of which has two
    for place in places.all():
        box = place.locator(".main-svg").first.bounding_box()
        assert box["width"] > 100
        assert box["height"] > 80
        # Something is in it: a line, a bar or a map.
        assert place.locator(".trace, .barlayer .point, .heatmaplayer image").count() > 0
    assert plots.count() >= places.count()
    assert opened.faults == []


def test_it_fits_the_screen(opened: Any) -> None:
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    outside = opened.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("svg"))
            .map((e) => e.outerHTML.slice(0, 99))"""
    )
    assert outside == []
    assert faint(opened) == cut_texts(opened) == []
    if opened.kind == "phone":
        assert small_controls(opened) == []
    # Every menu works and redraws; commands unfold without widening the page.
    for menu in opened.locator("select").all():
        menu.scroll_into_view_if_needed()
        menu.select_option(index=menu.locator("option").count() - 1)
    for summary in opened.locator("summary").all():
        summary.click()
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.evaluate("scrollTo(0, 0)")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    opened.screenshot(path=SCREENSHOTS / f"report-{opened.kind}.png", full_page=True)
    assert opened.faults == []


def test_the_slider_goes_through_the_rows_that_no_other_beats(opened: Any, made: Path) -> None:
    figure = opened.locator(".figure", has_text="Sparsity against quality")
    rows = [row for row in parts_of(made)["tradeoff"][1:] if row["where"] == "inter"]
    best = [
        a
        for a in sorted(rows, key=lambda row: row["achieved_sparsity"])
        if not any(
            b["achieved_sparsity"] >= a["achieved_sparsity"]
            and b["ppl_change_percent"] < a["ppl_change_percent"]
            for b in rows
        )
    ]
    slider, told = figure.locator("input[type=range]"), figure.locator(".detail")
    figure.locator("select").select_option(index=0)
    assert slider.get_attribute("max") == str(len(best) - 1)
    for i, row in enumerate(best):
        slider.fill(str(i))
        assert f"{row['achieved_sparsity']:.1%} inactive" in told.inner_text()
        shapes = figure.locator(".drawing").evaluate("(plot) => plot.layout.shapes")
        assert shapes[-1]["x0"] == pytest.approx(100 * row["achieved_sparsity"], abs=1e-3)
    assert opened.locator(".modebar-btn").count() == 0
    assert opened.faults == []


def test_lines_differ_without_colours(made: Path) -> None:
    shown = made.read_text()
    assert '"dash":"solid"' in shown
    assert '"symbol":"circle"' in shown
    for (plot,) in figure_of(made, "Zeros by layer")["variants"].values():
        assert plot["layout"]["yaxis"]["rangemode"] == "nonnegative"  # of shares and counts
    for title in ("Zeros by layer", "Firing frequency", "Histogram"):
        (plot,) = next(iter(figure_of(made, title)["variants"].values()))
        looks = [
            json.dumps([trace["line"].get(key) for key in ("dash", "width")])
            for trace in plot["data"]
        ]
        assert len(looks) > 1
        assert len(set(looks)) == min(len(looks), 5)


def test_headlines_tell_what_the_data_hold(made: Path) -> None:
    html = made.read_text()
    plan = parts_of(made)["plan"]
    change = f"{plan['ppl_change_percent']:+.2f} ± {plan['ppl_change_se']:.2f} % PPL"
    assert f"{plan['sparsity']:.0%} inactive at {change}, by rule tail.</p>" in html
    told = re.findall(r'<p class="headline">(.*)</p>', html)[1:]
    assert told == [
        "bench: 20.0 tokens/s, 5.0 MB read per token, against 10.0 of llama.cpp.",
        "optimize: 30.0 tokens/s.",
        "budgets, 800 MB: 5.0 tokens/s.",
    ]


def test_a_menu_changes_the_figure(opened: Any) -> None:
    figure = opened.locator(".figure", has_text="Quantiles by layer")
    menu, place = figure.locator("select"), figure.locator(".drawing")
    before = place.evaluate("(plot) => JSON.stringify(plot.data[0].z)")
    assert menu.locator("option").count() == 15
    menu.select_option("weight up_proj")
    assert place.evaluate("(plot) => JSON.stringify(plot.data[0].z)") != before


def test_a_token_shows_its_layers(opened: Any, made: Path) -> None:
    sample = parts_of(made)["sample"]
    figure = opened.locator(".figure.tokens")
    tokens = figure.locator(".text span")
    assert tokens.count() == len(sample["tokens"])
    token = tokens.nth(3)
    token.tap() if opened.kind == "phone" else token.hover()
    mean = 100 * np.mean(sample["active"][3])
    detail = figure.locator(".detail").inner_text()
    assert detail == f"{json.dumps(sample['tokens'][3])}, token 3: {mean:.1f} % of neurons active"
    shown = figure.locator(".drawing").evaluate("(plot) => plot.data[0].y")
    assert shown == pytest.approx([100 * ratio for ratio in sample["active"][3]])
    if opened.kind == "desk":
        figure.locator(".text").press("ArrowRight")
        assert ", token 4:" in figure.locator(".detail").inner_text()
    figure.screenshot(path=SCREENSHOTS / f"tokens-{opened.kind}.png")
    assert opened.faults == []


def test_downloads(opened: Any, made: Path, tmp_path: Path) -> None:
    found, count = {}, opened.locator("a.data").count()
    for i in range(count):
        if i % 8 == 0:  # of more than ten in a row, Chromium asks whether one wants them
            view = opened.context.new_page()
            view.goto(made.as_uri())
        with view.expect_download() as download:
            view.locator("a.data").nth(i).click()
        assert download.value.suggested_filename.endswith(".json")
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        content = json.loads(path.read_text())
        assert content["command"].startswith("fallow ")
        assert content["series"] or content["data"]
        found[content["title"]] = content
    assert len(found) == count == opened.locator(".figure").count() == 13
    parts = parts_of(made)
    (bars,) = (s for s in found["Sparsity by layer"]["series"] if s["show"] == "inter")
    means = [100 * row["mean"] for row in parts["plan"]["per_layer"]["inter"]]
    assert bars["y"] == pytest.approx(means, abs=1e-3)
    assert found["Activation ratio by token"]["data"]["tokens"] == parts["sample"]["tokens"]
    assert opened.faults == []


def test_hostile_text_runs_nothing(opened: Any, made: Path) -> None:
    html = made.read_text()
    assert "<script>alert" not in html
    assert "<img src" not in html
    figure = opened.locator(".figure.tokens")
    shown = "".join(figure.locator(".text span").all_inner_texts())
    assert shown.startswith("</script><script>a")
    assert opened.locator("main img").count() == 0
    assert opened.locator("script:not([type])").count() == 2
    # Nor in the figures' labels, where Plotly reads some HTML.
    labels = opened.locator(".figure", has_text="Patterns side by side").locator(".xtick text")
    assert "<" in "".join(labels.all_text_contents())
    assert labels.locator("tspan, a").count() == 0
    assert opened.faults == []
