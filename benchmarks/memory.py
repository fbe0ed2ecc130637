"""Decode under a memory limit, ours and llama.cpp's on the GGUF that was packed, both in a cgroup.

For each limit: the model that `fallow optimize` packed, with its plan and `--memory`, and
llama.cpp with its weights mapped, with and without repacking (a copy in anonymous memory), of which
the faster one counts. Page caches are dropped before each. One limit leaves half of the FFN in
memory. Needs root, cgroup v1, llama-cpp-python==0.3.36, and packed models of
benchmarks/optimize.py:

    python benchmarks/memory.py qwen2.5-1.5b    # writes benchmarks/results/memory
    python benchmarks/memory.py --report        # writes docs/results/memory.md
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import optimize
from engine import TEST, THREADS
from tradeoff import ROOT, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "memory"
CGROUP = Path("/sys/fs/cgroup/memory/fallow-benchmark")
LIMITS_MB = {"qwen2.5-1.5b": (1000, 800, 600), "gemma3": (300, 250), "smollm2": (200, 150)}
ENOUGH_MB = 8000  # nothing comes from the disk
# Tokens of a prompt; fed after it one by one, by us and by llama.cpp; and answered.
PROMPT, FED, LLAMA_FED, NEW = 256, 512, 24, 96
PROMPTS, ROUNDS = 3, 5
OURS, LLAMA = "fallow", ("llama.cpp", "llama.cpp without repacking")


def run(name: str) -> None:
    from fallow.catalog import ALIASES, resolve

    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    packed, source = optimize.RESULTS / name / "packed.gguf", resolve(ALIASES[name])
    if not packed.exists():
        raise SystemExit(f"run first: python benchmarks/optimize.py {name}")
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def step(key: str, kind: str, file: Path, limit: int) -> None:
        if key not in result:
            result[key] = in_cgroup(limit, [kind, str(file), str(limit)])
            path.write_text(json.dumps(result, indent=1) + "\n")

    step("cost", "cost", packed, ENOUGH_MB)
    step("enough", OURS, packed, ENOUGH_MB)
    enough = result["enough"]
    half = int(enough["fed"]["peak_rss_mb"] - enough["resident_ffn_mb"] / 2)
    for limit in (half, *LIMITS_MB[name]):
        step(f"{limit} MB, {OURS}", OURS, packed, limit)
        for kind in LLAMA:
            step(f"{limit} MB, {kind}", kind, source, limit)
    result["half_mb"] = half
    path.write_text(json.dumps(result, indent=1) + "\n")


def in_cgroup(limit_mb: int, arguments: list[str]) -> dict[str, Any]:
    """What a child that may not take more than the limit and 5 % prints last."""
    CGROUP.mkdir(exist_ok=True)
    (CGROUP / "memory.limit_in_bytes").write_text(str(int(limit_mb * 1.05e6)))
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")

    def enter() -> None:
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def child(kind: str, path: str, limit: str) -> dict[str, Any]:
    if kind in LLAMA:
        return llama(path, repack=kind == LLAMA[0])
    return cost(path, limit) if kind == "cost" else ours(path, limit)


def text_ids(tokenizer: Any, tokens: int) -> np.ndarray:
    from fallow.text import cut_windows, load_text

    return cut_windows(load_text(TEST, "evaluation"), tokenizer, tokens, 1)[0]


def ours(path: str, limit: str) -> dict[str, Any]:
    """A text fed token by token, then answers to prompts with guesses checked on the way."""
    from fallow import Engine
    from fallow.bench import run_once
    from fallow.engine import peak_rss_mb
    from fallow.memory import STREAMED

    start = time.perf_counter()
    engine = Engine(path, threads=THREADS, context=PROMPT + FED, memory=f"{limit}MB")
    started = time.perf_counter() - start
    ids = text_ids(engine.tokenizer, PROMPT + FED)
    fed = run_once(engine, ids, PROMPT)
    answers = []
    for prompt in np.split(ids, len(ids) // PROMPT)[:PROMPTS]:
        for _ in engine.generate(prompt, NEW):
            pass
        answers.append(engine.stats.to_json())
    assert engine.residency is not None
    ffn = [p.size for p in engine.residency.resident if p.matrix in STREAMED]
    return {
        "fed": fed | {"peak_rss_mb": peak_rss_mb()},
        "answers": [{k: v for k, v in r.items() if k != "sparsity_per_layer"} for r in answers],
        "start_seconds": started,
        "pass_bytes": engine.residency.pass_bytes,
        "head_rows": engine.residency.head.room if engine.residency.head else None,
        "disk_gbps": engine.disk_gbps,
        "resident_ffn_mb": sum(ffn) / 1e6,
    }


def cost(path: str, limit: str) -> dict[str, Any]:
    """Decode of the mapped file and, alternating, with a budget that holds all of it."""
    from fallow import Engine
    from fallow.bench import run_once

    engines = [
        Engine(path, threads=THREADS, context=2 * PROMPT, memory=memory)
        for memory in (None, f"{limit}MB")
    ]
    ids = text_ids(engines[0].tokenizer, PROMPT + PROMPT // 2)
    runs = [[run_once(e, ids, PROMPT)["decode_tps"] for e in engines] for _ in range(ROUNDS)]
    return {"decode_tps": runs}


def llama(path: str, repack: bool) -> dict[str, Any]:
    import llama_cpp

    from fallow.baselines import LlamaCpp

    usual = llama_cpp.llama_model_default_params

    def parameters() -> Any:
        found = usual()
        found.use_extra_bufts = repack
        return found

    llama_cpp.llama_cpp.llama_model_default_params = parameters
    engine = LlamaCpp(path, THREADS, PROMPT + FED)
    text = TEST.read_text(encoding="utf-8")[: 16 * PROMPT].encode()
    ids = engine.model.tokenize(text, add_bos=False)[: PROMPT + LLAMA_FED]
    return engine.run(ids, PROMPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    for name in arguments.models:
        run(name)
    if arguments.report:
        (ROOT / "docs" / "results" / "memory.md").write_text(report())


INTRODUCTION = f"""# Under a memory limit

Decode of the model that `fallow optimize --max-ppl-increase 1` packed ([quality](optimize.md)) with
`--memory`, and of llama.cpp on the source GGUF, each in a cgroup (v1) that is limited to the budget
and 5 %, page cache included. `benchmarks/memory.py` does it.

- **fed**: {FED} tokens of the WikiText-2 raw test text one by one, after {PROMPT} of prefill; of
  llama.cpp {LLAMA_FED}. **/ llama.cpp** is over the faster of llama.cpp with and without repacking.
- **answers**: median over {PROMPTS} greedy answers of {NEW} tokens, in which several tokens are
  guessed from earlier text and checked in one pass; the same text to the bit.
- **peak**: VmHWM of the whole process, MB of 1e6 bytes. **half** is the budget that leaves half of
  the FFN's bytes in memory.
- **hits**: of the bytes that a token needs the share that was in memory.

| model | budget MB | peak MB | fed tok/s | llama.cpp | **/ llama.cpp** | answers tok/s | MB/token \
from disk | hits | waiting ms/token | first token s | llama.cpp's |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
COST = """
## Without a limit

Decode with a budget that holds all over decode of the mapped file, {rounds} alternating runs.

| model | ratio | range |
|---|---|---|"""


def report() -> str:
    lines, costs = [INTRODUCTION], [COST.format(rounds=ROUNDS)]
    for path in sorted(RESULTS.glob("*/result.json")):
        name, result = path.parent.name, json.loads(path.read_text())
        where = json.loads((path.parent / "machine.json").read_text())
        ratios = [budget / mapped for mapped, budget in result["cost"]["decode_tps"]]
        costs.append(f"| {name} | {median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")
        limits = [None, result["half_mb"], *LIMITS_MB[name]]
        lines += [_row(name, result, limit) for limit in limits]
    lines += costs
    lines.append(
        f"\n{where['cpu']}, {where['threads']} threads, commits {', '.join(where['commits'])}."
    )
    return "\n".join(lines) + "\n"


def _row(name: str, result: dict[str, Any], limit: int | None) -> str:
    found = result["enough" if limit is None else f"{limit} MB, {OURS}"]
    fed = found["fed"]
    answers = median(a["decode_tps"] for a in found["answers"])
    theirs = [result.get(f"{limit} MB, {kind}", {}) for kind in LLAMA]
    best = max(theirs, key=lambda r: r.get("decode_tps", 0.0))
    tps, first = best.get("decode_tps"), PROMPT / best.get("prefill_tps", np.nan)
    budget = "enough" if limit is None else f"{limit}"
    return (
        f"| {name} | {budget}{' (half)' if limit == result['half_mb'] else ''} "
        f"| {fed['peak_rss_mb']:.0f} | {fed['decode_tps']:.2f} "
        f"| {f'{tps:.2f}' if tps else '-'} "
        f"| {'**' + format(fed['decode_tps'] / tps, '.1f') + '**' if tps else '-'} | {answers:.2f} "
        f"| {fed['disk_bytes_per_token'] / 1e6:.0f} | {fed['hit_rate']:.1%} "
        f"| {fed['stall_ms_per_token']:.1f} | {fed['ttft_ms'] / 1e3:.1f} "
        f"| {f'{first:.1f}' if tps else '-'} |"
    )


if __name__ == "__main__":
    main()
