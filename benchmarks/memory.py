"""Decode under a memory limit, ours and llama.cpp's on the GGUF that was packed, both in a cgroup.

For each limit: the model that `fallow optimize` packed, with its plan and `--memory`, and
llama.cpp with its weights mapped, with and without repacking (a copy in anonymous memory), of which
the faster one counts; alternating, since disks are shared. Page caches are dropped before each. One
limit leaves half of the FFN in memory. Besides, llama.cpp guessing by prompt lookup where we guess,
and files of fewer bits that it makes and that fit the limit. Needs root, cgroup v1,
llama-cpp-python==0.3.36, and packed models of benchmarks/optimize.py:

    python benchmarks/memory.py qwen2.5-1.5b        # writes benchmarks/results/memory
    python benchmarks/memory.py mistral-7b-shape    # random weights, 8 GB of disk
    python benchmarks/memory.py --report            # writes docs/results/memory.md
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import optimize
import seven_billion
import smaller
from engine import OPTIMIZED, TEST, THREADS, machine
from tradeoff import ROOT, machine_line, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "memory"
CGROUP = Path("/sys/fs/cgroup/memory/fallow-benchmark")
LIMITS_MB = {
    "qwen2.5-1.5b": (1000, 800, 600),
    "gemma3": (300, 250),
    "smollm2": (200, 150),
    seven_billion.NAME: (2000,),
}
ENOUGH_MB = 8000  # nothing comes from the disk
# Tokens of a prompt, and fed after it one by one: to us in the first round and later, to llama.cpp.
USUAL = PROMPT, FED, LATER_FED, LLAMA_FED = 256, 512, 128, 24
# The same of random weights, whose answers say nothing.
SHORT = SHORT_PROMPT, SHORT_FED, _, SHORT_LLAMA_FED = 64, 48, 48, 8
NEW, PROMPTS, ROUNDS, COST_ROUNDS = 96, 3, 3, 5
QUALITY_WINDOWS = 20
LONGEST = 300  # seconds, of one child: a copy that does not fit is read again and again
OURS, LLAMA = "fallow", ("llama.cpp", "llama.cpp without repacking")
GUESSING = ", guessing"  # of llama.cpp; NEW tokens of it would take longer than LONGEST
LLAMA_NEW, GUESSED = 32, 2  # tokens guessed at a time: what its authors advise for CPUs


def run(name: str) -> None:
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    is_random = name == seven_billion.NAME
    packed, source = files(name, folder)
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    prompt, fed, later, llama_fed = SHORT if is_random else USUAL

    def keep(key: str, do: Callable[[], dict[str, Any]]) -> None:
        if key not in result:
            result[key] = do()
            path.write_text(json.dumps(result, indent=1) + "\n")

    def step(key: str, kind: str, file: Path, limit: int, tokens: int = 0) -> None:
        sizes = [str(n) for n in (limit, prompt + fed, prompt, tokens)]
        keep(key, lambda: in_cgroup(limit, [kind, str(file), *sizes]))

    limits = LIMITS_MB[name]
    if not is_random:
        step("cost", "cost", packed, ENOUGH_MB)
        step("enough", OURS, packed, ENOUGH_MB, fed)
        peak, ffn = result["enough"]["fed"]["peak_rss_mb"], result["enough"]["resident_ffn_mb"]
        limits = (*limits, result.setdefault("half_mb", int(peak - ffn / 2)))
    for limit in limits:
        for i in range(ROUNDS):
            step(f"{limit} MB, {OURS}, {i}", OURS, packed, limit, later if i else fed)
            for kind in LLAMA:
                if "failed" not in result.get(f"{limit} MB, {kind}, 0", {}):
                    step(f"{limit} MB, {kind}, {i}", kind, source, limit, llama_fed)
    if is_random:
        return
    keep("quality", lambda: optimize.quality(name, packed, TEST, QUALITY_WINDOWS))
    for limit in limits:
        first = {kind: result[f"{limit} MB, {kind}, 0"].get("decode_tps", 0.0) for kind in LLAMA}
        kind = max(first, key=lambda kind: first[kind]) + GUESSING
        step(f"{limit} MB, {kind}", kind, source, limit, LLAMA_NEW)
    made = smaller.make(name, source, folder)
    keep("smaller", lambda: smaller.quality(name, made, QUALITY_WINDOWS))
    for limit in limits:
        for bits, file in made.items():
            for i in range(ROUNDS) if file.stat().st_size < limit * 1e6 else ():
                for kind in LLAMA:
                    if "failed" not in result.get(f"{limit} MB, {bits}, {kind}, 0", {}):
                        step(f"{limit} MB, {bits}, {kind}, {i}", kind, file, limit, later)


def files(name: str, folder: Path) -> tuple[Path, Path]:
    """The packed model, and the GGUF that it was packed from."""
    from fallow.checkpoints.catalog import ALIASES, resolve

    if name == seven_billion.NAME:
        packed, source = folder / "packed.gguf", folder / "source.gguf"
        if not packed.exists():
            seven_billion.make(packed, source)
        return packed, source
    packed = OPTIMIZED / name / machine() / "packed.gguf"
    if not packed.exists():
        raise SystemExit(f"run first: python benchmarks/optimize.py {name}")
    return packed, resolve(ALIASES[name])


def in_cgroup(limit_mb: int, arguments: list[str], script: str = __file__) -> dict[str, Any]:
    """What a child of a script that may not take more than the limit and 5 % prints last."""
    CGROUP.mkdir(exist_ok=True)
    (CGROUP / "memory.limit_in_bytes").write_text(str(int(limit_mb * 1.05e6)))
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")

    def enter() -> None:
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, script, "--child", *arguments]
    try:
        done = subprocess.run(
            command, preexec_fn=enter, stdout=subprocess.PIPE, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LONGEST} s"}
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def child(kind: str, path: str, *sizes: str) -> dict[str, Any]:
    limit, context, prompt, tokens = map(int, sizes)
    if kind.removesuffix(GUESSING) in LLAMA:
        engine = llama_engine(path, not kind.startswith(LLAMA[1]), context)
        return (guess if kind.endswith(GUESSING) else feed)(engine, prompt, tokens)
    return cost(path, limit) if kind == "cost" else ours(path, limit, context, prompt, tokens)


def text_ids(tokenizer: Any, tokens: int) -> np.ndarray:
    # Not all of the text, whose tokens would count as the process's memory.
    part = TEST.read_text(encoding="utf-8")[: 16 * tokens]
    return np.array(tokenizer.with_bos(tokenizer.encode(part))[:tokens])


def ours(path: str, limit: int, context: int, prompt: int, tokens: int) -> dict[str, Any]:
    """A text fed token by token; if it has FED, then answers with guesses checked on the way."""
    from fallow import Engine
    from fallow.engine.memory import STREAMED
    from fallow.engine.process import peak_rss_mb
    from fallow.measure.speed import run_once

    start = time.perf_counter()
    engine = Engine(path, threads=THREADS, context=context, memory=f"{limit}MB")
    started = time.perf_counter() - start
    ids = text_ids(engine.tokenizer, prompt + tokens)
    fed = run_once(engine, ids, prompt)
    answers = []
    for part in np.split(ids, len(ids) // prompt)[:PROMPTS] if tokens == FED else []:
        for _ in engine.generate(part, NEW):
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
        "expert_room": engine.residency.experts.room if engine.residency.experts else None,
        "hottest_quarter": hottest_quarter(engine) if engine.n_experts else None,
        "disk_gbps": engine.disk_gbps,
        "resident_ffn_mb": sum(ffn) / 1e6,
    }


def hottest_quarter(engine: Any) -> float:
    """Share of choices that fall to each layer's most used experts, of the last tokens."""
    uses = np.sort(engine.expert_uses(), axis=1)
    return float(uses[:, -(engine.n_experts // 4) :].sum() / uses.sum())


def cost(path: str, limit: int) -> dict[str, Any]:
    """Decode of the mapped file and, alternating, with a budget that holds all of it."""
    from fallow import Engine
    from fallow.measure.speed import run_once

    engines = [
        Engine(path, threads=THREADS, context=2 * PROMPT, memory=memory)
        for memory in (None, f"{limit}MB")
    ]
    ids = text_ids(engines[0].tokenizer, PROMPT + PROMPT // 2)
    runs = [[run_once(e, ids, PROMPT)["decode_tps"] for e in engines] for _ in range(COST_ROUNDS)]
    return {"decode_tps": runs}


def llama_engine(path: str, repack: bool, context: int) -> Any:
    import llama_cpp

    from fallow.measure.baselines import LlamaCpp

    usual = llama_cpp.llama_model_default_params

    def parameters() -> Any:
        found = usual()
        found.use_extra_bufts = repack
        return found

    llama_cpp.llama_cpp.llama_model_default_params = parameters
    return LlamaCpp(path, THREADS, context)


def feed(engine: Any, prompt: int, tokens: int) -> dict[str, Any]:
    """llama.cpp's figures of the text, token by token after a prompt."""
    return engine.run(llama_ids(engine, prompt + tokens), prompt)


def llama_ids(engine: Any, tokens: int) -> list[int]:
    text = TEST.read_text(encoding="utf-8")[: 16 * tokens].encode()
    return engine.model.tokenize(text, add_bos=False)[:tokens]


def guess(engine: Any, prompt: int, new: int) -> dict[str, Any]:
    """llama.cpp's greedy answers to the prompts that ours has, with llama-cpp-python's guesses.

    Guesses are checked in one pass, as its own loop does it, which keeps logits of all tokens of a
    prompt besides: hundreds of MB, for which there is no room here.
    """
    ids = llama_ids(engine, PROMPTS * prompt)
    prompts = [ids[start : start + prompt] for start in range(0, len(ids), prompt)]
    return {"answers": [answer(engine.model, part, new) for part in prompts]}


def answer(model: Any, prompt: list[int], new: int) -> dict[str, float]:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=GUESSED)
    ids, passes = list(prompt), 0
    model.reset()
    model.eval(ids[:-1])
    start = time.perf_counter()
    while len(ids) < len(prompt) + new:
        read = [ids[-1], *draft(np.array(ids, dtype=np.intc)).tolist()]
        chosen = likeliest(model, read)
        held = [a == b for a, b in zip(read[1:], chosen, strict=False)]
        right = held.index(False) if False in held else len(held)
        model.n_tokens += right + 1
        ids += chosen[: right + 1]
        passes += 1
    made = len(ids) - len(prompt)
    return {
        "decode_tps": made / (time.perf_counter() - start), "new_tokens": made, "passes": passes,
    }  # fmt: skip


def likeliest(model: Any, tokens: list[int]) -> list[int]:
    """The token that is likeliest behind each of some, which are read where the model stands."""
    model._ctx.kv_cache_seq_rm(-1, model.n_tokens, -1)
    model._batch.set_batch(batch=tokens, n_past=model.n_tokens, logits_all=True)
    model._ctx.decode(model._batch)
    shape = (len(tokens) * model.n_vocab(),)
    logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=shape)
    return logits.reshape(len(tokens), -1).argmax(axis=1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--child", nargs=6)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    for name in arguments.models:
        run(name)
    if arguments.report:
        (ROOT / "docs" / "results" / "memory.md").write_text(report())


INTRODUCTION = f"""# Under a memory limit

Decode of the model that `fallow optimize --max-ppl-increase 1` packed with `--memory`, and of
llama.cpp on the source GGUF, each in a cgroup (v1) that is limited to the budget and 5 %, page
cache included. `benchmarks/memory.py` does it. `{seven_billion.NAME}` has random weights
(benchmarks/seven_billion.py), for speed alone. All of it is of the commits named at the end. The
engine's kernels, and how it lays weights out, have changed since, and `fallow optimize` finds other
plans: nothing here was measured again, so that today's figures may be others.

- **fed**: tokens of the WikiText-2 raw test text one by one, after {PROMPT} of prefill: {FED}, then
  {LATER_FED} in each further round; of llama.cpp {LLAMA_FED}. Of `{seven_billion.NAME}`
  {SHORT_FED} after {SHORT_PROMPT}, and {SHORT_LLAMA_FED}. **/ llama.cpp** is over the faster of
  llama.cpp with and without repacking in the same round: median (range) of up to
  {ROUNDS} rounds.
  What is not done after {LONGEST} s, as llama.cpp with repacking on `{seven_billion.NAME}`, counts
  as 0. With repacking qwen2.5-1.5b was killed in 600 MB, so that only the other one counts. Of
  `{seven_billion.NAME}` 60 % of 4 GB do not fit, and are read for every token. What is compared is
  a sparse plan here with the dense model there, and longer runs here than there.
- **answers**: median over {PROMPTS} greedy answers of {NEW} tokens, in which several tokens are
  guessed from earlier text and checked in one pass; the same text to the bit.
- **peak**: VmHWM of the whole process, MB of 1e6 bytes. **half** is the budget that leaves half of
  the FFN's bytes in memory.
- **hits**: of the bytes that a token needs the share that was in memory.

Of others that read weights as they go, neurostream 0.2.1 refuses both models ("unsupported
architecture: qwen2"), and airllm 4.0.0 needs a Hugging Face folder, which these are not.

| model | budget MB | peak MB | fed tok/s | llama.cpp | **/ llama.cpp** | answers tok/s | MB/token \
from disk | hits | waiting ms/token | first token s | llama.cpp's |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
COST = """
## Without a limit

Decode with a budget that holds all over decode of the mapped file, {rounds} alternating runs.

| model | ratio | range |
|---|---|---|"""

QUALITY = f"""
## Quality

Of the same files, whatever the budget, against the source GGUF on {QUALITY_WINDOWS} windows of 1024
tokens of the WikiText-2 raw test text.

| model | PPL change % | KL nats |
|---|---|---|"""


NOT_COMPARED = """
Not measured yet: llama.cpp with guesses of its own, which **answers** would have to be compared
with, and files of fewer bits that fit a budget whole, which may be faster in it, at a loss of their
own.
"""
GUESSES = f"""
## Guesses

Answers to the same {PROMPTS} prompts, {NEW} tokens of ours and {LLAMA_NEW} of llama.cpp's, one run
each; llama.cpp with llama-cpp-python's prompt lookup, {GUESSED} tokens at a time. Its text is not
checked against its own without guesses. Medians over prompts.

| model | budget MB | ours, tok/s | llama.cpp, tok/s | its tokens per pass | ratio |
|---|---|---|---|---|---|"""

SMALLER = f"""
## Smaller files

What llama.cpp makes of the same GGUF in fewer bits, with an importance matrix of
{smaller.IMPORTANCE_WINDOWS} windows of the validation text, and what it decodes of them in the
budgets that they fit: the median of {ROUNDS} rounds, the faster of with and without repacking.
PPL is of their weights in float32 against the source GGUF, on the windows of the quality above.
They are made of a file of 4 and more bits: of the original weights they may be better.

| model | file | MB | PPL change % | budget MB | llama.cpp of it, tok/s | ours fed, tok/s |
|---|---|---|---|---|---|---|"""


def guess_rows(name: str, result: dict[str, Any], limits: list[int]) -> list[str]:
    rows = []
    for limit in limits:
        found = [result.get(f"{limit} MB, {kind}{GUESSING}") for kind in LLAMA]
        for theirs in found:
            if theirs and "answers" in theirs:
                ours = median(a["decode_tps"] for a in result[f"{limit} MB, {OURS}, 0"]["answers"])
                tps = median(a["decode_tps"] for a in theirs["answers"])
                made = median(a["new_tokens"] / a["passes"] for a in theirs["answers"])
                rows.append(
                    f"| {name} | {limit} | {ours:.2f} | {tps:.2f} | {made:.2f} "
                    f"| **{ours / tps:.1f}** |"
                )
    return rows


def smaller_rows(name: str, result: dict[str, Any], limits: list[int]) -> list[str]:
    rows = []
    for bits, file in result.get("smaller", {}).items():
        start = f"| {name} | {bits} | {file['mb']:.0f} | {optimize.change(file)} "
        timed = []
        for limit in limits:
            rounds = [
                [result.get(f"{limit} MB, {bits}, {kind}, {i}", {}) for kind in LLAMA]
                for i in range(ROUNDS)
            ]
            best = [max(r.get("decode_tps", 0.0) for r in each) for each in rounds]
            if all(best):
                ours = [result[f"{limit} MB, {OURS}, {i}"]["fed"] for i in range(ROUNDS)]
                tps = median(r["decode_tps"] for r in ours)
                timed.append(f"{start}| {limit} | {median(best):.2f} | {tps:.2f} |")
        rows += timed or [f"{start}| fits none | - | - |"]
    return rows


def report() -> str:
    lines, costs, quality = [INTRODUCTION], [COST.format(rounds=COST_ROUNDS)], [QUALITY]
    guesses, files = [GUESSES], [SMALLER]
    wheres = []
    for path in sorted(RESULTS.glob("*/result.json")):
        name, result = path.parent.name, json.loads(path.read_text())
        wheres.append(json.loads((path.parent / "machine.json").read_text()))
        limits: list[int | None] = [*LIMITS_MB[name]]
        if "cost" in result:
            limits = [None, result["half_mb"], *limits]
            ratios = [budget / mapped for mapped, budget in result["cost"]["decode_tps"]]
            spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
            costs.append(f"| {name} | {median(ratios):.3f} | {spread} |")
        begun = [n for n in limits if n is None or f"{n} MB, {LLAMA[-1]}, 0" in result]
        lines += [_row(name, result, limit) for limit in begun]
        measured = [n for n in limits if n is not None]
        guesses += guess_rows(name, result, measured)
        files += smaller_rows(name, result, measured)
        if "quality" in result:
            q = result["quality"]
            quality.append(f"| {name} | {optimize.change(q)} | {q['kl_to_dense']['mean']:.4f} |")
    lines += costs
    for part in (quality, guesses, files):
        lines += part if len(part) > 1 else []
    if len(guesses) == len(files) == 1:
        lines.append(NOT_COMPARED.rstrip())
    lines.append(f"\n{machine_line(*wheres)}.")
    return "\n".join(lines) + "\n"


def _row(name: str, result: dict[str, Any], limit: int | None) -> str:
    rounds = [result["enough"]] if limit is None else []
    best = []
    for i in range(ROUNDS) if limit else ():
        first = {kind: result[f"{limit} MB, {kind}, 0"] for kind in LLAMA}
        works = [kind for kind in LLAMA if "failed" not in first[kind]]
        theirs = [result.get(f"{limit} MB, {kind}, {i}") for kind in works]
        if None in theirs:
            continue  # not finished
        rounds.append(result[f"{limit} MB, {OURS}, {i}"])
        if theirs:
            best.append(max(theirs, key=lambda r: r.get("decode_tps", 0.0)))
    fed = rounds[0]["fed"] | {"decode_tps": median(r["fed"]["decode_tps"] for r in rounds)}
    answered = [a["decode_tps"] for a in rounds[0]["answers"]]
    answers = f"{median(answered):.2f}" if answered else "-"
    prompt = SHORT_PROMPT if name == seven_billion.NAME else PROMPT
    theirs_tps = theirs_first = ratio = "-"
    if best:
        ratios = [
            r["fed"]["decode_tps"] / b["decode_tps"] for r, b in zip(rounds, best, strict=True)
        ]
        ratio = f"**{median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})"
        theirs_tps = f"{median(b['decode_tps'] for b in best):.2f}"
        theirs_first = f"{prompt / median(b['prefill_tps'] for b in best):.1f}"
    budget = "enough" if limit is None else f"{limit}"
    return (
        f"| {name} | {budget}{' (half)' if limit and limit == result.get('half_mb') else ''} "
        f"| {fed['peak_rss_mb']:.0f} | {fed['decode_tps']:.2f} "
        f"| {theirs_tps} | {ratio} | {answers} "
        f"| {fed['disk_bytes_per_token'] / 1e6:.0f} | {fed['hit_rate']:.1%} "
        f"| {fed['stall_ms_per_token']:.1f} | {fed['ttft_ms'] / 1e3:.1f} "
        f"| {theirs_first} |"
    )


if __name__ == "__main__":
    main()
