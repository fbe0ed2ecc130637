"""Requests that commands refuse: by name, with the reason, before the work, and nothing written."""

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

import fallow
from conftest import OTHER_TEXT, TEXT, Result, engine_plan
from fallow import cli
from fallow.cli._shared import print_table
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.plan import Cut, Plan

Texts = tuple[Path, Path]


def error(result: Result, code: int) -> str:
    """The one line of stderr that is the error, whatever notes come before it."""
    assert (result.code, result.out) == (code, ""), result.err
    assert "Traceback" not in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def strict(text: str) -> Any:
    """JSON as RFC 8259 has it, which knows no NaN and no Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text.splitlines()[-1], parse_constant=refuse)


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A text of ten windows of 32."""
    (tmp_path / "short.txt").write_text(OTHER_TEXT[:400])
    return tmp_path / "short.txt"


# Plans that the engine cannot run ---------------------------------------------------------------


def test_what_no_plan_can_hold_is_refused_by_calibrate(
    run: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "x.plan"
    command = ("calibrate", folders["llama"], "-o", path, "--sparsity", 0.5, "--rule")
    monkeypatch.setattr("fallow.cli._shared.load_model", lambda *_: pytest.fail("work was begun"))
    assert "which no plan can hold; judge it with: fallow select compare" in error(
        run(*command, "lowbit"), 2
    )
    assert not path.exists()


def test_a_plan_that_does_not_fit_is_not_packed(
    run: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    command = ("pack", folders["llama"], "--quant", "f32", "-o", tmp_path / "x.gguf", "--plan")
    path, mark = tmp_path / "x.plan", fallow.load(folders["llama"]).fingerprint

    def save(fingerprint: str, n_layers: int) -> None:
        cut = Cut("inter", "topk", np.full(n_layers, 0.5))
        Plan("m", fingerprint, "topk", 0.5, "", (cut,)).save(path)

    save(mark, 3)
    assert "the plan's topk of inter is for 3 layers" in error(run(*command, path), 1)
    monkeypatch.setattr("fallow.packing.packer.Reference", lambda *_: pytest.fail("work was begun"))
    save("another", 2)
    assert "this plan is for m (fingerprint another)" in error(run(*command, path), 1)
    assert not (tmp_path / "x.gguf").exists()


# Models of the other kind -----------------------------------------------------------------------


def test_models_that_are_not_packed(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Commands pack them, see test_run.py; in Python that is said."""
    for name in ("smollm2", folders["llama"], "HuggingFaceTB/SmolLM2-135M"):
        with pytest.raises(FallowError) as refused:
            fallow.Engine(name)
        assert str(refused.value) == (
            f"{name} is not a packed model; make one with: fallow pack {name} -o packed.gguf"
        )
    for command in (("run", "-m"), ("generate", "-m"), ("serve",), ("bench",)):
        for name in (tmp_path / "none.gguf", "none"):
            more = ("-p", "hi") if "-m" in command else ()
            assert f"model {name} not found: no such file" in error(run(*command, name, *more), 1)


@pytest.mark.parametrize(
    "words",
    [
        "pack {} -o {out}",
        "optimize {} -o {out}",
        "profile {} -o {out}",
        "calibrate {} --rule topk --sparsity 0.5 -o {out}",
        "neurons {} --layer 0 --neuron 0",
        "patterns collect {} -o {out}",
        "generate {} neuron --dtype auto",
    ],
)
def test_models_that_are_packed_already(
    words: str, run: Any, talking: Path, tmp_path: Path
) -> None:
    result = run(*words.format(talking, out=tmp_path / "out").split())
    source = Engine(talking, threads=1).name
    assert error(result, 1) == (
        f"{talking} is packed already; give the model that it was packed from, {source}"
    )


# Prompts and answers ----------------------------------------------------------------------------


def test_a_prompt_from_standard_input(run: Any, talking: Path, monkeypatch: Any) -> None:
    """POSIX, Utility Syntax Guidelines 13: "-" is standard input. llama.cpp's --file drops one
    newline at the end, which editors add (common/arg.cpp)."""
    expected = run("generate", talking, "neuron 3\n", "--max-new-tokens", 4, "--json").json
    monkeypatch.setattr("sys.stdin", io.StringIO("neuron 3\n\n"))
    found = run("generate", talking, "-", "--max-new-tokens", 4, "--json").json
    assert (found["prompt"], found["text"]) == ("neuron 3\n", expected["text"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8"))
    message = error(run("generate", talking, "-"), 1)
    assert message.startswith("standard input is not UTF-8 (byte 2)")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "give some text" in error(run("generate", talking, "-"), 1)


def interrupt_after(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the pass after so many."""
    read, left = Engine._read, [passes]

    def counted(self: Engine, *args: Any, **options: Any) -> np.ndarray:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read(self, *args, **options)

    monkeypatch.setattr(Engine, "_read", counted)


@pytest.mark.parametrize("command", ["generate", "generate --json", "run --stats"])
def test_ctrl_c_keeps_what_was_said(
    command: str, run: Any, talking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_chat = command.startswith("run")
    whole = "".join(Engine(talking, threads=1).generate("neuron 3", 40, chat=is_chat))
    interrupt_after(9, monkeypatch)
    result = run(*command.split(), talking, "neuron 3", "-n", 40, "--temp", 0)
    assert result.code == 130
    if command.endswith("--json"):
        found = strict(result.out)
        text = found["text"]
        assert (found["stats"]["new_tokens"], found["stats"]["finish"]) == (9, "")
    else:
        text = result.out.removesuffix("\n")
        assert result.out.endswith("\n")
        assert "9 tokens, " in result.err
    assert len(text) > 4
    assert whole.startswith(text)
    assert result.err.endswith("error: interrupted\n")


def test_figures_of_one_token_tell_nothing_of_decoding(run: Any, talking: Path) -> None:
    err = run("generate", talking, "neuron 3", "--max-new-tokens", 1).err
    assert re.fullmatch(r"1 token, first after \d+ ms\n", err)
    stats = run("generate", talking, "neuron 3", "--max-new-tokens", 1, "--json").json["stats"]
    assert [stats[k] for k in ("decode_tps", "bytes_per_token", "gbps")] == [None] * 3
    assert "of neurons inactive" in run("generate", talking, "neuron 3", "--max-new-tokens", 2).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stop", ""], "a stop text is empty"),
        (["--seed", "-1"], "--seed"),
        (["--memory", "200"], "--memory 200 has no unit; give 200MB"),
    ],
)
def test_options_of_generate(options: list[str], message: str, run: Any, talking: Path) -> None:
    assert message in error(run("generate", talking, "neuron", *options), 2)


def test_options_that_transformers_have_not(run: Any, folders: dict[str, Path]) -> None:
    command = ("generate", folders["llama"], "neuron", "--max-new-tokens", 2, "--dtype", "auto")
    message = error(run(*command, "--threads", 2, "--lossless"), 2)
    assert message == "--lossless, --threads is the engine's; leave out --dtype"
    for temperature in ("nan", "inf", "-1"):
        message = error(run(*command, "--temperature", temperature), 2)
        assert message.startswith(f"temperature {temperature} ")
    coldest = run(*command, "--temperature", "1e-300")  # the limit is the most likely token
    assert (coldest.code, coldest.out) == (0, run(*command).out)
    assert "--threads" in error(run("evaluate", folders["llama"], "--threads", 2), 2)


def test_answers_of_no_token(run: Any, talking: Path) -> None:
    for command in (("run", talking, "-p", "neuron"), ("generate", talking, "neuron")):
        message = error(run(*command, "--max-new-tokens", 0), 2)
        assert message == "--max-new-tokens must be at least 1"


# As many as were asked for ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "evaluate {model} --windows 400",
        "evaluate {packed} --windows 400",
        "profile {model} --windows 400 -o {out}",
        "neurons {model} --layer 0 --neuron 0 --windows 400",
        "tradeoff {model} --windows 400 --calibration-text {fit} -o {out}",
        "select compare {model} --windows 400 --calibration-text {fit} -o {out}",
        "patterns collect {model} --windows 400 --calibration-text {fit} -o {out}",
        "patterns similarity {model} --documents 400 --calibration-text {fit} -o {out}",
        "report {model} --windows 400 --calibration-text {fit} -o {out}/r.html",
    ],
)
def test_more_windows_than_the_text_gives(
    words: str, run: Any, folders: dict[str, Path], talking: Path, texts: Texts, short: Path
) -> None:
    out = short.parent / "out"
    names = {"model": folders["llama"], "packed": talking, "fit": texts[0], "out": out}
    result = run(*words.format(**names).split(), "--text", short, "--context", 32)
    assert error(result, 1) == (
        f"text {short} gives 10 windows of 32 tokens, 400 are asked for; give a longer text, "
        "fewer windows or a smaller --context"
    )
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_fewer_windows_than_the_default(
    run: Any, folders: dict[str, Path], talking: Path, short: Path, tmp_path: Path
) -> None:
    note = f"note: text {short} gives 5 windows of 64 tokens, not 8"
    text = ("--text", short, "--context", 64, "--json")
    result = run("profile", folders["llama"], *text, "-o", tmp_path / "p")
    assert result.json["tokens"] == 5 * 64
    assert note in result.err.splitlines()
    found = run("neurons", folders["llama"], "--layer", 0, "--neuron", 0, *text)
    assert found.json["rates"][0]["tokens"] == 5 * 64
    assert note in found.err.splitlines()
    everything = run("evaluate", talking, *text)  # whose default is all that there are
    assert (everything.json["windows"], "note" in everything.err) == (5, False)


def test_more_items_than_the_task_has(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"query": "neuron", "choices": ["a", "b"], "gold": 0}\n')
    items = ("--task-items", 2)
    assert error(run("evaluate", folders["llama"], "--task", path, *items), 1) == (
        f"task {path} has 1 items, 2 are asked for"
    )
    assert error(run("evaluate", folders["llama"], *items), 2) == "--task-items goes with --task"


def test_what_is_given_twice_counts_once(
    run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    sizes = ("--context", 32, "--windows", 2)
    twice = ("--text", texts[1], "--text", texts[1])
    found = run("neurons", folders["llama"], "--layer", 0, "--neuron", 0, *twice, *sizes, "--json")
    assert [rate["tokens"] for rate in found.json["rates"]] == [64]
    found = run(
        *("tradeoff", folders["llama"], "--rules", "topk,topk", "--sparsities", "0.5,0.5"),
        *("--text", texts[1], "--calibration-text", texts[0], "--calibration-windows", 1),
        *("--validation-windows", 1, *sizes, "-o", tmp_path / "t", "--json"),
    )
    assert [row["rule"] for row in found.json["rows"]] == ["dense", "topk"]


# Outputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "pack {gguf} -o {gguf}",
        "pack {gguf} --text {text} -o {text}",
        "pack {gguf} --plan {plan} -o {plan}",
        "optimize {gguf} --text {text} -o {text}",
        "optimize {gguf} --calibration-text {text} -o {text}",
        "calibrate {gguf} --rule topk --sparsity 0.5 --text {text} -o {text}",
        "select train {gguf} --text {text} -o {text}",
        "plan import {text} {gguf} -o {text}",
        "report {gguf} --sample {text} -o {text}",
        "report {gguf} --results {text} -o {text}",
    ],
)
def test_an_output_that_is_an_input(words: str, run: Any, tmp_path: Path) -> None:
    names = {"gguf": "m.gguf", "text": "t.txt", "plan": "p.plan"}
    paths = {key: tmp_path / name for key, name in names.items()}
    for path in paths.values():
        path.write_text("what the user made")
    words = words.format(**paths)
    output = words.split()[-1]
    assert error(run(*words.split()), 2) == (
        f"--output {output} is also to be read; choose another name"
    )
    (tmp_path / "link").symlink_to(output)
    result = run(*words.split()[:-1], tmp_path / "link")
    assert "is also to be read" in error(result, 2)
    assert all(path.read_text() == "what the user made" for path in paths.values())


@pytest.mark.parametrize(
    "words",
    [
        "pack x -o -",
        "optimize x -o -",
        "calibrate x --rule topk --sparsity 0.5 -o -",
        "select train x -o -",
        "plan import x y -o -",
        "report x -o -",
        "patterns cluster x -o -",
    ],
)
def test_no_result_goes_to_standard_output(
    words: str, run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error(run(*words.split()), 2) == "--output - would be a file of that name; give another"
    assert not list(tmp_path.iterdir())


# Numbers and names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("evaluate x --context 1", 2, "--context"),
        ("select train x -o o.plan --context 0", 2, "--context"),
        ("tradeoff x --sparsities nan", 2, "--sparsities 'nan' is not a list of numbers"),
        ("tradeoff x --sparsities 0.5,inf", 2, "--sparsities '0.5,inf' is not a list of numbers"),
        ("tradeoff x --max-ppl-increases 0", 2, "--max-ppl-increase 0.0 is not a positive"),
        ("calibrate x --rule topk --max-ppl-increase -1 -o p.plan", 2, "-1.0 is not a positive"),
        ("law fit {curve} --at 0", 2, "--at 0 is not all positive"),
        ("law fit {curve} --at -1e9", 2, "--at -1e9 is not all positive"),
        ("law fit {curve} --tokens-for nan", 2, "--tokens-for 'nan' is not a list of numbers"),
        ("law fit {curve} --seed -1", 2, "--seed"),
        ("law train --text {text} -o o --tokens nan", 2, "--tokens nan is no number of tokens"),
        ("law train --text {text} -o o --tokens inf", 2, "--tokens inf is no number of tokens"),
        ("law train --text {text} -o o --learning-rate inf", 2, "--learning-rate inf is too large"),
        ("patterns cluster x -o o --layers 0.5", 2, "--layers '0.5' is not a list of layers"),
        ("patterns cluster x -o o --layers nan", 2, "--layers 'nan' is not a list"),
        ("patterns cluster x -o o --layers ,", 2, "--layers ',' is not a list of layers"),
        ("patterns cluster x -o o --threads 0", 2, "--threads 0 is outside 1 to 1024"),
        ("patterns predict x y --threads -1", 2, "--threads -1 is outside 1 to 1024"),
        ("patterns similarity x --published y --kind insert", 2, "--kind is of our test"),
        ("patterns collect x -o o --plan {plan} --rule topk", 2, "--rule makes a plan"),
        ("bench x --memory ,", 2, "',' is not a size"),
        ("bench x --memory 1GB,2GB --figure f.xyz", 2, "--figure f.xyz ends in neither"),
        ("serve x --max-body 1", 2, "--max-body 1 has no unit; give 1MB, or 1B for bytes"),
        ("plan show {folder}", 1, "Is a directory"),
    ],
)
def test_refused_before_anything_is_read(
    words: str, code: int, message: str, run: Any, tmp_path: Path, talking: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    engine_plan(Engine(talking, threads=1), Cut("inter", "topk", 0.5)).save("a.plan")
    Path("text.txt").write_text(TEXT)
    curve = {"token_passed": [1e9 * n for n in range(1, 13)], "activation_ratio": [0.3] * 12}
    Path("curve.json").write_text(json.dumps(curve))
    names = {"plan": "a.plan", "text": "text.txt", "curve": "curve.json", "folder": tmp_path}
    before = sorted(tmp_path.rglob("*"))
    assert message in error(run(*words.format(**names).split()), code)
    assert [p for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [
        p for p in before if p.is_file()
    ]


def test_an_empty_name_is_not_the_current_folder(
    run: Any, folders: dict[str, Path], monkeypatch: Any
) -> None:
    monkeypatch.chdir(folders["llama"])
    assert error(run("generate", "", "x"), 1).startswith("model '' not found")
    assert run("generate", ".", "neuron", "--max-new-tokens", 1, "--dtype", "auto").code == 0


def test_settings_that_cannot_work_leave_nothing_behind(
    run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    """A run that was refused must not claim the folder of the next one."""
    store, made = tmp_path / "s", tmp_path / "c"
    text = ("--text", texts[1], "--calibration-text", texts[0], "--context", 32, "--windows", 8)
    assert run("patterns", "collect", folders["llama"], "-o", store, *text).code == 0
    cluster = ("patterns", "cluster", store, "-o", made, "--clusters")
    for words, message in (
        ((0,), "0 clusters of 192 rows"),
        ((4, "--batch", 0), "batches of 0 rows"),
        ((4, "--held-out", "nan"), "--held-out nan is outside [0, 1)"),
        ((4, "--held-out", 1), "--held-out 1 is outside [0, 1)"),
        ((4, "--energy"), "energy weights need magnitudes"),
        ((4, "--test", store), "is of the text that is fitted on"),
    ):
        assert message in error(run(*cluster, *words), 2)
    assert run(*cluster, 4).code == 0
    no_taps = ("patterns", "collect", folders["llama"], "-o", tmp_path / "n", "--taps", "", *text)
    assert "no tap is asked for" in error(run(*no_taps), 2)
    assert not (tmp_path / "n").exists()
    compare = ("select", "compare", folders["llama"], *text, "-o", tmp_path / "t")
    message = error(run(*compare, "--calibration-windows", 0), 2)
    assert message == "--calibration-windows 0 is too few; give at least 1"
    assert not list((tmp_path / "t").glob("*"))


def test_numbers_that_json_has_no_word_for(
    run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    """RFC 8259, section 6: "Numeric values that cannot be represented ... are not permitted"."""
    result = run(
        *("select", "compare", folders["llama"], "--selectors", "", "--sparsities", "0.99999"),
        *("--text", texts[1], "--calibration-text", texts[0], "--context", 32, "--windows", 1),
        *("--calibration-windows", 1, "-o", tmp_path / "t", "--json"),
    )  # of no neuron at all there is no recall
    assert result.code == 0, result.err
    assert strict(result.out)["rows"][1]["sparsity_inter"] == 1
    for path in ("table.json", "run.json"):
        strict((tmp_path / "t" / path).read_text().replace("\n", ""))
    flat = {"token_passed": [1e9 * n for n in range(1, 13)], "activation_ratio": [0.3] * 12}
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    fitted = run(
        "law", "fit", tmp_path / "flat.json", "--draws", 20, "-o", tmp_path / "l", "--json"
    )
    assert fitted.code == 0, fitted.err
    strict(fitted.out)


# What is shown ----------------------------------------------------------------------------------


def commands(group: Any, path: tuple[str, ...] = ()) -> Any:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_help_shows_every_word(run: Any, monkeypatch: Any) -> None:
    """rich takes what is in brackets for markup, and leaves out what it does not know."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    for path, command in commands(typer.main.get_command(cli.app)):
        shown = " ".join(re.sub("[│╭╰─╮╯]", " ", run(*path, "--help").out).split())
        helps = [command.help, *(getattr(p, "help", None) for p in command.params)]
        for text in filter(None, helps):
            for part in " ".join(text.replace("\\[", "[").split()).split("\n"):
                assert part in shown, path


def test_errors_name_the_command_whose_help_helps(run: Any) -> None:
    for words, command in (
        ("patterns cluster", "fallow patterns cluster"),
        ("patterns dance", "fallow patterns"),
        ("law fit", "fallow law fit"),
        ("evaluate x --colour", "fallow evaluate"),
        ("serve x --port 99999", "fallow serve"),
        ("dance", "fallow"),
    ):
        assert error(run(*words.split()), 2).endswith(f"; see: {command} --help")


def test_names_that_look_like_markup(
    folders: dict[str, Path], texts: Texts, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(folders["llama"], "a[bold]:cat:")
    sizes = ("--text", texts[1], "--context", 32, "--windows", 1)
    assert "loading a[bold]:cat:\n" in run("evaluate", "a[bold]:cat:", *sizes).err
    Path("x.jsonl").write_text('{"query": "neuron", "choices": ["a", "b"], "gold": 0}\n')
    os.symlink("x.jsonl", "t[red]:cat:.jsonl")
    out = run("evaluate", "a[bold]:cat:", *sizes, "--task", "t[red]:cat:.jsonl").out
    assert "t[red]:cat:: " in out


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("runs", ["run"], [["a[bold]:cat:"]])
    assert "a[bold]:cat:" in capsys.readouterr().out
