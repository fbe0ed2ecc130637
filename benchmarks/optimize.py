"""What `fallow optimize` makes of the three real models: bytes, speed and quality.

Plans are made on the WikiText-2 validation text, or on C4, and judged on the WikiText-2 raw test
text, on code and on zero-shot tasks, against the source model. Speeds beside other engines come
from benchmarks/engine.py, which times the files made here. A stopped run continues with the next
step:

    python benchmarks/optimize.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/engine.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/optimize.py qwen2.5-1.5b --prefer bytes
    python benchmarks/optimize.py qwen2.5-1.5b --prefer bytes --calibration c4
    python benchmarks/optimize.py --report    # writes docs/results/optimize.md, the README's table
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine import (
    NEW,
    OPTIMIZED,
    PROMPT,
    TEST,
    THREADS,
    VALIDATION,
    change,
    fastest_peer,
    machine,
    ratio,
)
from engine import RESULTS as TIMED
from tradeoff import DATA, ROOT, machine_line, record_machine, update_readme

LIMIT = 1.0  # percent
WINDOWS = 40
DECODED_WINDOWS, DECODED_TOKENS = 16, 128  # of those the first, read again token by token
BEFORE = "not-recorded"  # a folder for results whose processor is not known
CALIBRATION = {"wikitext2": VALIDATION, "c4": DATA / "calibration" / "c4.txt"}
CODE = DATA / "calibration" / "code.txt"
TASKS = ("arc_easy_test", "piqa_val", "winogrande_dev", "lambada_openai_test")
TASK_ITEMS = {"qwen2.5-1.5b": 300}  # the first of each task; of other models 1000
CODE_WINDOWS = 12


def run(name: str, prefer: str, calibration: str) -> None:
    from fallow.checkpoints.catalog import ALIASES, resolve

    options = ["--prefer", prefer]
    parts = [name, *([prefer] if prefer != "speed" else [])]
    parts += [calibration] if calibration != "wikitext2" else []
    folder = OPTIMIZED / "-".join(parts) / machine()
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    packed, source = folder / "packed.gguf", resolve(ALIASES[name])
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if not packed.exists():
        result = {}
    steps: dict[str, Callable[[], Any]] = {
        "optimize": lambda: optimize(name, packed, options, CALIBRATION[calibration]),
        "bytes": lambda: count_bytes(packed, source),
        "quality": lambda: quality(name, packed, TEST, WINDOWS),
        "decode": lambda: decode(packed),
        "code": lambda: quality(name, packed, CODE, CODE_WINDOWS),
    }
    if calibration == "wikitext2":  # C4's plan answers for its transfer between texts only
        steps["tasks"] = lambda: tasks(packed, TASK_ITEMS.get(name, 1000))
    for step, do in steps.items():
        if step not in result:
            result[step] = do()
            path.write_text(json.dumps(result, indent=1) + "\n")


def optimize(name: str, packed: Path, options: list[str], calibration: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "fallow", "optimize", name, "-o", packed, "--json"]
    command += ["--max-ppl-increase", LIMIT, "--threads", THREADS, *options]
    command += ["--calibration-text", calibration, "--text", TEST]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"fallow optimize {name} failed")
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {k: Path(found[k]).name for k in ("path", "text", "calibration_text")}


def count_bytes(packed: Path, source: Path) -> dict[str, float]:
    """Bytes of weights per decoded token: of the source, and with the plan or without."""
    from fallow import Engine
    from fallow.checkpoints.text import load_text
    from fallow.checkpoints.weights import read_gguf
    from fallow.measure.speed import run_in_turn

    engine = Engine(packed, threads=THREADS, context=PROMPT + NEW)
    plan = engine.plan
    only_neurons = plan and dataclasses.replace(plan, head_margin=0.0)
    ids = engine.windows(load_text(TEST, "evaluation"), PROMPT + NEW, 1)[0]
    plans = {"plan": plan, "neurons": only_neurons, "dense": None}
    runs = run_in_turn(engine, plans, ids, PROMPT, 1)
    read = {name: found[0]["bytes_per_token"] for name, found in runs.items()}
    tensors = engine.file.tensors
    ffn = sum(
        t.data.nbytes
        for n, t in tensors.items()
        if any(p in n for p in ("gate_proj.", "up_proj.", "down_proj_t.", "outliers."))
    )
    weights = _read_per_token({n: t.data.nbytes for n, t in tensors.items()}, "embed_tokens")
    cache = read["dense"] - weights
    stored = {n: t.data.nbytes for n, t in read_gguf(source).tensors.items()}
    source_bytes = _read_per_token(stored, "token_embd")
    return {
        "source": source_bytes,
        "dense": weights,
        "plan": read["plan"] - cache,
        "ffn_ratio": (ffn - (read["dense"] - read["neurons"])) / ffn,
        "ratio_to_source": (read["plan"] - cache) / source_bytes,
        "ratio_to_dense": (read["plan"] - cache) / weights,
    }


def _read_per_token(sizes: dict[str, int], embedding: str) -> float:
    """Bytes of the matrices that a token needs: all but an embedding that is not the head too."""
    untied = any(n.startswith(("lm_head.weight", "output.weight")) for n in sizes)
    skipped = ("lm_head_coarse", *([embedding] if untied else []))
    return float(
        sum(
            size
            for n, size in sizes.items()
            if not n.startswith(skipped)
            and not any(part in n for part in ("norm", "bias", "inv_freq", "rope"))
        )
    )


def quality(name: str, packed: Path, text: Path, windows: int) -> dict[str, Any]:
    """The packed model with its plan against the source model."""
    import fallow
    from fallow.measure.evaluation import dense_logits
    from fallow.measure.quality import evaluate_engine

    model = fallow.load(name, "float32")
    engine = fallow.Engine(packed, threads=THREADS, context=1024)
    found = evaluate_engine(
        engine,
        engine.plan,
        text,
        context=1024,
        windows=windows,
        against=lambda window: dense_logits(model, window),
    ).to_json()
    keys = ("ppl", "ppl_se", "ppl_change_percent", "ppl_change_se", "kl_to_dense", "windows")
    return {k: found[k] for k in (*keys, "top1_agreement", "achieved_sparsity")}


def decode(packed: Path) -> dict[str, Any]:
    """What reading token by token, as decode does, differs from reading in blocks, with the plan.

    PPL change in percent and its paired error, and divergence: of the plan in blocks, not of dense.
    """
    from fallow import Engine
    from fallow.checkpoints.text import load_text
    from fallow.measure.quality import evaluate_engine

    engine = Engine(packed, threads=THREADS, context=1024)
    plan, text = engine.plan, load_text(TEST, "evaluation")

    def blocks(window: np.ndarray) -> Any:
        engine.use_plan(plan)
        return engine.logits(window).__getitem__

    windows = engine.windows(text, 1024, DECODED_WINDOWS)[:, :DECODED_TOKENS]
    found = evaluate_engine(
        engine, plan, text, windows=windows, against=blocks, decode=True
    ).to_json()
    keys = ("ppl_change_percent", "ppl_change_se", "kl_to_dense", "tokens", "windows")
    return {k: found[k] for k in keys}


def tasks(packed: Path, items: int) -> list[dict[str, Any]]:
    """Accuracies with the plan and, on the same items, of the packed model run dense."""
    from fallow import Engine
    from fallow.measure.tasks import evaluate_task

    engine = Engine(packed, threads=THREADS, context=1024)
    plan = engine.plan
    paths = [DATA / "tasks" / f"{task}.jsonl" for task in TASKS]
    return [evaluate_task(engine, plan, path, items) for path in paths]


INTRODUCTION = f"""# What `fallow optimize` makes of a model

`fallow optimize --max-ppl-increase {LIMIT:g}`, thresholds and search on the WikiText-2 validation
text or, where a name ends in c4, on C4; every figure here on other text, the WikiText-2 raw test
text unless said. `benchmarks/optimize.py` does it, and `benchmarks/engine.py` the timing.

- **PPL**, **KL** are against the source model in float32, windows of 1024 tokens, ± one paired
  standard error, read in blocks of tokens. **token by token**: what PPL changes further when
  the beginnings of {DECODED_WINDOWS} of the windows are read as decode reads, which is what is
  timed.
- **bytes** are of the weights that decode reads per token, **of the source** over what the GGUF's
  own matrices hold (an embedding that is not the head is not read), **of FFN** over the packed
  model's FFN, what is read to choose included.
- Speed of decode, all of one run in turn ([all of it](engine.md)): **engine** is the packed model
  dense over the fastest other engine, **shortlist** the shortlist alone over dense, **neurons** the
  plan over the shortlist alone, **plan / dense** those two together. Of names with an option there
  is only the timing by which the plan was chosen, marked \\*.
- **minutes** are those of `fallow optimize`, two threads.

A plan is left out if decode does not gain 3 % in three of four timings: the lower quartile of nine
ratios in turn has to be 1.03, of a plan over dense, and of inactive neurons over the shortlist
alone.

Rows in two planes of bits, of which a plan read one or both (the row ending in planes), are taken
out: where bytes rule, they were not measurably faster. Qwen2.5-Coder dense in a
budget of 800 and 600 MB, over the same file without planes, five runs each in turn at commit
6760d16: 0.92 (0.71 to 1.09) and 1.04 (0.87 to 1.13), AMD EPYC (family 25, model 17), 2 threads,
beside other work. A pass reads whole matrices from the disk: coarse rows spare nothing there.

Rounding down_proj to Q4_K, with errors made up for by other
neurons (GPTQ on 8,000 tokens of WikiText), did not pay: 0.0063 nats on other text (trials on one
model, whose results are not kept). Nor did it on
12,000 tokens of the Python reference, with neurons in three groups: 0.0034 nats in place of 0.0060
on text of that kind; but on WikiText, with a head margin of 12 in place of 14, which is a part of
it, 1.3 ± 0.2 % of PPL more than Q5_K.
"""
STAGES = """
## Where the time goes

Seconds of each stage of `fallow optimize`; a search that the check does not confirm is repeated.
"""
OLD = """
## Before

Plans of before the limit was checked on another text than the search's, made on a processor that
was not recorded: no speeds.
"""

TRANSFER = """
## Other text

PPL change in percent, of the same plans; code is programs in many languages, on which nothing was
fitted.

| model | plan made on | WikiText-2 test | code |
|---|---|---|---|"""
ACCURACY = """
## Tasks

Accuracy with the plan and, in brackets, its change in points against the packed model run dense on
the same items, ± one paired standard error; the first items of each task, zero-shot.
"""


def report() -> str:
    now = [r for r in results() if r[1] != BEFORE]
    before = [r for r in results() if r[1] == BEFORE]
    header = ["model", "uses", "PPL change %", "token by token", "KL nats", "neurons inactive"]
    header += ["bytes of source", "of FFN", *GAINS, "minutes"]
    lines = [INTRODUCTION]
    if now:
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for name, where, r, _ in now:
            gained = " | ".join(gains(name, where, r).values())
            minutes = r["optimize"]["seconds"] / 60
            cells = [change(r["quality"]), change(r["decode"]), *_bytes(r)]
            lines.append(
                f"| {name}, {where} | {r['optimize']['selector']} | {' | '.join(cells)} "
                f"| {gained} | {minutes:.0f} |"
            )
        lines.append(f"\n{machine_line(*(machine for *_, machine in now))}.")
    else:
        lines.append("Not measured yet with what this version finds; what was is below.")
    found = now + before
    if now:
        lines += [STAGES, *_stages(now)]
    transfers = [
        f"| {name}, {where} | {Path(r['optimize']['calibration_text']).name} "
        f"| {change(r['quality'])} | {change(r['code'])} |"
        for name, where, r, _ in found
        if "code" in r
    ]
    if transfers:
        lines += [TRANSFER, *transfers]
    accuracies = []
    for name, where, r, _ in found:
        if "tasks" not in r:
            continue
        cells = [
            f"{100 * t['accuracy']:.1f} ({100 * t['change']:+.1f} ± {100 * t['change_se']:.1f})"
            for t in r["tasks"]
        ]
        mean = float(np.mean([t["change"] for t in r["tasks"]]))
        error = float(np.linalg.norm([t["change_se"] for t in r["tasks"]])) / len(r["tasks"])
        accuracies.append(
            f"| {name}, {where} | {r['tasks'][0]['items']} | {' | '.join(cells)} "
            f"| {100 * mean:+.2f} ± {100 * error:.2f} |"
        )
    if accuracies:
        header = " | ".join(["model", "items", *TASKS, "mean change"])
        lines += [ACCURACY, f"| {header} |", "|---" * (len(TASKS) + 3) + "|", *accuracies]
    if before:
        header = ["model", "uses", "PPL change %", "KL nats", "neurons inactive"]
        header += ["bytes of source", "of FFN"]
        lines += [OLD, f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [
            f"| {name} | {r['optimize']['selector']} | {change(r['quality'])} "
            f"| {' | '.join(_bytes(r))} |"
            for name, _, r, _ in before
        ]
        lines.append(f"\n{machine_line(*(machine for *_, machine in before))}.")
    return "\n".join(lines) + "\n"


GAINS = ("engine", "shortlist", "neurons", "plan / dense")


def gains(name: str, where: str, result: dict[str, Any]) -> dict[str, str]:
    """What the engine, its shortlist and its neurons gain, each alone, and the last two together.

    Of one run beside the peers or, where there is none, of the one that chose the plan.
    """
    path, own = TIMED / name / where / "result.json", result["optimize"]
    if not path.exists():
        found = [own[k] for k in ("shortlist_gain", "neuron_gain", "decode_ratio_dense")]
        return dict(zip(GAINS, ["", *(f"{gain:.2f}\\*" for gain in found)], strict=True))
    runs = json.loads(path.read_text())["runs"]
    peer = fastest_peer(runs)
    engine = f"{ratio(runs, 'dense', peer)}, {peer}" if peer else ""
    if "plan" not in runs:
        return dict(zip(GAINS, [engine, "none", "none", "1"], strict=True))
    lists = "shortlist" if "shortlist" in runs else "dense"
    if own["selector"] == "shortlist":  # there is nothing else in the plan
        lists = "plan"
    cells = [
        ratio(runs, lists, "dense") if lists != "dense" else "none",
        ratio(runs, "plan", lists) if lists != "plan" else "none",
        ratio(runs, "plan", "dense"),
    ]
    return dict(zip(GAINS, [engine, *cells], strict=True))


def _stages(found: list[tuple[str, str, dict[str, Any], dict[str, Any]]]) -> list[str]:
    names = list(found[0][2]["optimize"]["seconds_by_stage"])
    lines = [f"| model | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for name, where, r, _ in found:
        seconds = r["optimize"]["seconds_by_stage"]
        lines.append(f"| {name}, {where} | {' | '.join(f'{seconds[n]:.0f}' for n in names)} |")
    return lines


def _bytes(result: dict[str, Any]) -> list[str]:
    """KL, inactive neurons, and both shares of bytes."""
    quality, read = result["quality"], result["bytes"]
    return [
        f"{quality['kl_to_dense']['mean']:.4f}",
        f"{quality['achieved_sparsity']:.2f}",
        f"{read['ratio_to_source']:.3f}",
        f"{read['ffn_ratio']:.3f}",
    ]


def results() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Model with its options, processor, what was found and what `record_machine` wrote."""
    found = [
        (*path.parts[-3:-1], json.loads(path.read_text()), path.parent / "machine.json")
        for path in sorted(OPTIMIZED.glob("*/*/result.json"))
    ]
    return [
        (name, where, result, json.loads(machine.read_text()))
        for name, where, result, machine in found
        if "quality" in result
    ]


def summary() -> str:
    """The README's table."""
    found = [r for r in results() if r[1] != BEFORE]
    if not found:
        return "Not measured yet with what this version finds; the page has plans of before."
    lines = [
        f"| | PPL change % | {' | '.join(GAINS)} | weight bytes / dense | minutes |",
        "|---" * (4 + len(GAINS)) + "|",
    ]
    for name, where, r, _ in found:
        gained = " | ".join(gains(name, where, r).values())
        lines.append(
            f"| {name}, {where} | {change(r['quality'])} | {gained} "
            f"| {r['bytes']['ratio_to_dense']:.2f} | {r['optimize']['seconds'] / 60:.0f} |"
        )
    return "\n".join(lines) + f"\n\n{machine_line(*(machine for *_, machine in found))}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--prefer", default="speed", choices=("speed", "bytes"))
    parser.add_argument("--calibration", default="wikitext2", choices=tuple(CALIBRATION))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        run(name, arguments.prefer, arguments.calibration)
    if arguments.report:
        (ROOT / "docs" / "results" / "optimize.md").write_text(report())
        update_readme("optimize", summary())


if __name__ == "__main__":
    main()
