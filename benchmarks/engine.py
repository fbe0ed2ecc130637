"""Speed of the engine beside llama.cpp, ik_llama.cpp and OpenVINO, with plans and without.

One run per model and machine, from which all tables take their speeds: every peer, the dense
engine, the shortlist alone, the plan of `fallow optimize` and two rules, each in turn. With what
each costs: PPL and KL on the WikiText-2 raw test text, in blocks as prefill reads and token by
token as decode does; plans come from the validation text. Times the file of
benchmarks/optimize.py, which goes first. Needs llama-cpp-python==0.3.36, and for their rows
openvino-genai and ik-llama-cpp-python==0.1.5, whose wheel is an AVX2 build (IK_LLAMA_CPP_LIB_PATH
names a native one):

    python benchmarks/optimize.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/engine.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/engine.py mistral-7b-shape              # random weights: for speed alone
    python benchmarks/engine.py qwen2.5-1.5b --kernels avx2   # as on processors without AVX-512
    python benchmarks/engine.py qwen2.5-1.5b --speed   # times again what was measured before
    python benchmarks/engine.py qwen2.5-1.5b --speed --dense   # against peers, without rules
    python benchmarks/engine.py --report      # writes docs/results/engine.md, the README's table
    python benchmarks/first_screen.py         # and the README's picture
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tradeoff import DATA, ROOT, machine_line, processor, record_machine, update_readme

RESULTS = ROOT / "benchmarks" / "results" / "engine"
OPTIMIZED = ROOT / "benchmarks" / "results" / "optimize"  # benchmarks/optimize.py
TEST, VALIDATION = DATA / "wikitext2" / "wiki.test.raw", DATA / "wikitext2" / "wiki.valid.detok.txt"
RULES = {"gate_topk": 0.5, "topk": 0.5}
PEERS = ("llama.cpp", "ik_llama.cpp", "ik_llama.cpp-rtr", "openvino")
# Built for this processor, whatever kernels ours are told to use.
NATIVE_PEERS = ("llama.cpp", "openvino")
THREADS, PROMPT, NEW, RUNS = 2, 512, 128, 5
# Of quality: windows and their tokens, in blocks and token by token.
WINDOWS, CONTEXT, DECODED_WINDOWS, DECODED_CONTEXT = 4, 1024, 8, 128
STREAM_BYTES = 1 << 28  # far beyond any cache here
PROMPTS = [
    "The capital of France is",
    "def quicksort(values):",
    "Water boils at a lower temperature on a mountain because",
    "Once upon a time, in a village by the sea,",
]
CONTINUATION = 64  # greedy tokens after each prompt
KERNELS = [("Q4_K", 1536), ("Q5_K", 1536), ("Q6_K", 1536), ("Q4_K", 8960), ("Q6_K", 8960)]
MATRIX_BYTES = 400e6
SHAPE_PROMPT, SHAPE_NEW = 32, 32  # tokens, of the model of random weights


def machine(kernels: str = "") -> str:
    """A folder for the results of this processor and kernels, beside those of others."""
    return re.sub(r"\W+", "-", f"{processor()} {kernels}").strip("-").lower()


def run(name: str, kernels: str, speed: bool, dense: bool) -> None:
    """With `speed` times, and a prompt's products: quality stays that of a run before, if any.

    With `dense` no plans but the packed one: those of rules take half an hour to calibrate.
    """
    from fallow import Engine
    from fallow.checkpoints.catalog import ALIASES, resolve

    packed, source = OPTIMIZED / name / machine() / "packed.gguf", resolve(ALIASES[name])
    if not packed.exists():
        raise SystemExit(f"{packed} not found; first: python benchmarks/optimize.py {name}")
    folder = RESULTS / name / machine(kernels)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    before = json.loads(path.read_text()) if speed and path.exists() else {}
    if not before:
        (folder / "machine.json").unlink(missing_ok=True)  # a run is never continued
    record_machine(folder / "machine.json")
    context = max(CONTEXT, PROMPT + NEW)
    engine = Engine(packed, threads=THREADS, context=context, kernels=kernels)
    plans = {"dense": None} | parts(engine.plan)
    if not dense:
        plans |= {rule: make_plan(name, rule, s, folder) for rule, s in RULES.items()}
    result: dict[str, Any] = {"threads": THREADS, "kernels": engine.kernels}
    result["file_mb"], result["source_mb"] = (p.stat().st_size / 1e6 for p in (packed, source))
    result |= in_turn(engine, plans, source, native=kernels != "avx2")
    result["prompt_kl"] = prompt_kl(engine)
    if speed:
        result = before | result
    else:
        result["greedy"] = greedy(packed, source, kernels)
        result["quality"] = {name: quality(engine, plan) for name, plan in plans.items()}
        result["peak_rss_mb"] = bench(packed, kernels)["peak_rss_mb"]
    path.write_text(json.dumps(result, indent=1) + "\n")


def parts(plan: Any) -> dict[str, Any]:
    """A plan, and if it has more than a shortlist that alone; nothing of no plan."""
    if plan is None:
        return {}
    alone = plan.head_margin > 0 and plan.cuts
    return ({"shortlist": replace(plan, cuts=())} if alone else {}) | {"plan": plan}


def in_turn(engine: Any, plans: dict[str, Any], source: Path, native: bool) -> dict[str, Any]:
    """Runs of every peer and with every plan, why a peer has none, and what memory gives.

    Args:
        native: whether peers that are built for this processor are compared.
    """
    from fallow import _core
    from fallow.checkpoints.text import load_text
    from fallow.common.errors import FallowError
    from fallow.measure.speed import run_in_turn

    ids = engine.windows(load_text(TEST, "evaluation"), PROMPT + NEW, 1)[0]
    missing = {}
    for peer in PEERS:
        if peer in NATIVE_PEERS and not native:
            missing[peer] = "not run: no build for AVX2 alone"
            continue
        try:
            run_in_turn(engine, {}, ids, PROMPT, 0, source, [peer])
        except FallowError as error:
            missing[peer] = str(error)
    peers = [peer for peer in PEERS if peer not in missing]
    runs = run_in_turn(engine, plans, ids, PROMPT, RUNS, source, peers)
    stream = [_core.read_bandwidth(STREAM_BYTES, THREADS) / 1e9 for _ in range(RUNS)]
    return {"runs": runs, "missing": missing, "stream_gbps": statistics.median(stream)}


def quality(engine: Any, plan: Any) -> dict[str, Any]:
    """Against the dense engine, in blocks of tokens and token by token."""
    from fallow.measure.quality import evaluate_engine

    sizes = {
        "blocks": {"context": CONTEXT, "windows": WINDOWS},
        "decode": {"context": DECODED_CONTEXT, "windows": DECODED_WINDOWS, "decode": True},
    }
    keys = ("ppl", "ppl_se", "ppl_change_percent", "ppl_change_se", "kl_to_dense", "tokens")
    found = {k: evaluate_engine(engine, plan, TEST, **s).to_json() for k, s in sizes.items()}
    return {k: {key: q[key] for key in keys} for k, q in found.items()}


def prompt_kl(engine: Any) -> float:
    """Nats per token from what measures quality to a prompt that is read as `generate` does."""
    from fallow.checkpoints.text import load_text
    from fallow.optimization.costs import Dense

    engine.use_plan(None)
    found = []
    for window in engine.windows(load_text(TEST, "evaluation"), CONTEXT, 2):
        exact, fast = (engine.logits(window, exact=e) for e in (True, False))
        found.append(Dense(exact).divergence(fast))
    return float(np.mean(found))


def run_shape(kernels: str) -> None:
    """Decode of a 7B model of random weights: dense, and half of the neurons by their gates."""
    import tempfile

    import seven_billion
    from fallow import Engine
    from fallow.measure.speed import run_in_turn
    from fallow.plan import Cut, Plan

    folder = RESULTS / seven_billion.NAME / machine(kernels)
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    plan = Plan(
        model=seven_billion.NAME,
        fingerprint=seven_billion.FINGERPRINT,
        rule="gate_topk",
        knob=0.5,
        knob_name="sparsity",
        cuts=(Cut("gate_act", "topk", 0.5).of_layers(seven_billion.LAYERS),),
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        packed = Path(scratch) / "packed.gguf"
        seven_billion.make(packed)
        size = SHAPE_PROMPT + SHAPE_NEW
        engine = Engine(packed, plan=False, threads=THREADS, context=size, kernels=kernels)
        ids = np.random.default_rng(0).integers(1000, 30000, size)
        runs = run_in_turn(engine, {"dense": None, "gate_topk": plan}, ids, SHAPE_PROMPT, RUNS)
        found = {"threads": THREADS, "kernels": engine.kernels, "runs": runs}
    (folder / "shape.json").write_text(json.dumps(found, indent=1) + "\n")


def bench(packed: Path, kernels: str) -> dict[str, Any]:
    """`fallow bench` in a process of its own, whose memory is the engine's alone."""
    command = [sys.executable, "-m", "fallow", "bench", packed, "--json", "--text", TEST]
    command += ["--threads", THREADS, "-p", PROMPT, "-n", NEW, "--runs", 1, "--kernels", kernels]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


def make_plan(name: str, rule: str, sparsity: float, folder: Path) -> Any:
    import fallow

    path = folder / f"{rule}.plan"
    if not path.exists():
        plan = fallow.calibrate(fallow.load(name), rule, sparsity=sparsity, text=VALIDATION)
        plan.save(path)
    return fallow.Plan.load(path)


def greedy(packed: Path, source: Path, kernels: str) -> dict[str, float]:
    """The dense engine's greedy continuations beside llama.cpp's on the source.

    `agreement`: share of llama.cpp's tokens that the engine, having read those before, would have
    chosen too. `same`: tokens before the first one that differs, mean over prompts.
    """
    from llama_cpp import Llama

    from fallow import Engine

    engine = Engine(packed, plan=False, threads=THREADS, context=1024, kernels=kernels)
    llama = Llama(str(source), n_ctx=1024, n_threads=THREADS, verbose=False)
    agree: list[bool] = []
    lengths = []
    for prompt in PROMPTS:
        ids = engine.tokenizer.with_bos(engine.tokenizer.encode(prompt)).tolist()
        theirs = [t for t, _ in zip(llama.generate(ids, temp=0.0), range(CONTINUATION))]  # noqa: B905
        ours = engine.logits(ids + theirs[:-1])[len(ids) - 1 :].argmax(axis=1)
        same = ours == np.array(theirs)
        agree += same.tolist()
        lengths.append(len(same) if same.all() else int(same.argmin()))
    return {"agreement": float(np.mean(agree)), "same": float(np.mean(lengths))}


def time_kernels(kernels: str) -> list[dict[str, Any]]:
    """Products over matrices far larger than the caches, whole and at 50 % random rows."""
    from fallow import _core

    rng, rows = np.random.default_rng(0), []
    for kind, width in KERNELS:
        block, n_bytes = _core.FORMATS[kind]
        n = int(MATRIX_BYTES // (width // block * n_bytes)) // _core.TILE_ROWS * _core.TILE_ROWS
        half = np.sort(rng.permutation(n)[: n // 2]).astype(np.int32)
        runs = [_core.time_rows(kind, n, width, half, THREADS, kernels) for _ in range(9)]
        ratio = {
            "gemv / read": ("read", "gemv"),
            "axpy / read": ("read", "axpy"),
            "gemv_rows / gemv": ("gemv_rows", "gemv"),
            "axpy_rows / axpy": ("axpy_rows", "axpy"),
        }
        rows.append(
            {
                "type": kind,
                "width": width,
                "gbps": statistics.median(r["bytes"] / r["read"] / 1e9 for r in runs),
            }
            | {k: statistics.median(r[a] / r[b] for r in runs) for k, (a, b) in ratio.items()}
        )
    return rows


INTRODUCTION = """# The engine's speed

Two threads; prefill of 512 tokens, decode of the 128 after them, the same text everywhere. Of each
model and processor everything was timed in one run, each in turn: ratios are medians over its
turns, with the lowest and the highest; absolute figures move with the machine's other tenants.
Peers read the GGUF that was packed: llama-cpp-python 0.3.36 and ik-llama-cpp-python 0.1.5, the
latter built for this processor, without and with its run-time repacking (`-rtr`). Beside AVX2
kernels of ours stand its wheels, which are AVX2 builds.
`python benchmarks/engine.py` does it; every run is in `benchmarks/results/engine`, a folder per
processor. Compare nothing across processors.

`plan` is what `fallow optimize --max-ppl-increase 1` chose ([more](optimize.md)), `shortlist` that
plan without inactive neurons; the rules leave out half of the neurons. PPL changes are against the
dense engine on the WikiText-2 raw test text, ± one paired standard error: in blocks of tokens, and
on fewer tokens one by one, as decode reads. Where there is no `plan`, the file is `fallow pack`'s.
"""


HOW = """## What makes it fast

Figures of this section that are not in a table above are of single trials while it was made, and
not kept.

**Tiles.** Weights are read into memory of huge pages and laid out anew there, 16 rows side by side,
in the order in which products meet them (`csrc/engine/tiles.h`): nothing is transposed, and memory
is read in one stream. AVX-512 kernels leave it to the processor, which sees it coming: on Zen 4
hints cost a quarter of the speed. AVX2 kernels have more to do for each byte, so that too little of
the stream is under way at once, and ask for it 1 KB ahead (`csrc/kernels/avx2_lanes.h`). Of Q4_K
the products then run at 0.9 to 1.0 of plain reading on Zen 4, where rows one by one reached 0.6 to
0.8, and at 0.75 to 0.9 on Zen 3. Long kernels of it go half a block or two pieces at a time:
whole blocks unrolled are more instructions than a core keeps decoded, and of Q6_K ran at two thirds
of the speed. Sums of rows of Q8_0 have tiles of bytes too, each block of which begins with its 16
scales, and coefficients of eight blocks are rounded together, since of one block each step waits
for the last: on Zen 3, two threads, such sums went from 0.45 of plain reading (rows) to 0.87
(tiles), half of which is asking for the scales of the next blocks before they are read. Of sums of
Q4_K tiles that rounding is 40 % of the time there (Zen 3), and the next thing to shorten. Tiles
take 0.3 s per GB when a model is loaded, and when a plan takes the place of another. Where a file
is mapped, or the kernels are NEON's, rows stay rows; results are the same to the bit.

**Rows that a plan leaves out** must be rows, and stay so: up_proj's only in layers whose neurons
are chosen by their gates, of others it lies in tiles and is read whole. A scattered row is asked
for early, into the second cache, and in step with the work: asked for all at once, rows took 1.3
times as long (Zen 4, one thread). It still costs more than its bytes: half of the rows take 0.39 to
0.77 of the time of all on Zen 4, 0.50 to 0.96 on Zen 3 (above, each one run). 16 go through the
products together, a row per lane of a register or, where they are summed, in integers. Skipping
gains over the dense engine what it saves in bytes, less what rows cost more than tiles.

**The most active neurons** are found by bisection over the bits of their scores, which leaves
behind what lies outside the bounds. In portable code that and the list of those neurons took
0.67 ms of a token of SmolLM2 under `topk` at 50 %; with AVX2 they take 0.19, and the token 0.9
of the time (Zen 3, one run).

**Attention** of a token is cut into positions, a part for each thread, which reads its keys and
values once for all heads. They lie in huge pages too: with both, SmolLM2's attention at 800 tokens
takes 0.65 of the time that it took by heads, in small pages (Zen 4). AVX2 kernels keep the sums of
three queries in registers and ask for the cache 1 KB ahead.

**Prefill** of a prompt multiplies the FFN in bytes where a processor has VNNI or AVX2, and where
the rest would be floats also what attention does with q_proj, k_proj and o_proj: 1.18 to 1.25
times as fast (three models, Zen 3) for 0.0001 to 0.0004 nats. AVX2 adds up products in 16 bits,
which hold eight of a four-bit weight and one of seven bits: down_proj is rounded to seven there,
to eight with VNNI; six bits would take prompts of SmolLM2 from 0.0029 to 0.0055 nats. The sums of
a block were zeroed by one instruction that takes as long as two of its groups; stores and columns
cut into equal parts made SmolLM2's prefill 1.06 times as fast (Zen 3). Quality (`evaluate`,
`Engine.logits`) is always measured in floats or bfloat16, which are nearer to decode; how far
bytes are from them stands with each model.
"""


def report() -> str:
    found = [_model(*where) for where in results()]
    kernels = [_kernels(path) for path in sorted(RESULTS.glob("kernels/*/result.json"))]
    shapes = [_shape(path) for path in sorted(RESULTS.glob("*/*/shape.json"))]
    return "\n".join([INTRODUCTION, *(found or ["No results yet.\n"]), *shapes, *kernels, HOW])


def results() -> list[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Model, processor, what was measured and what `record_machine` wrote, of every run."""
    return [
        (*path.parts[-3:-1], json.loads(path.read_text()), _where(path))
        for path in sorted(RESULTS.glob("*/*/result.json"))
        if path.parts[-3] != "kernels"
    ]


def _where(path: Path) -> dict[str, Any]:
    return json.loads((path.parent / "machine.json").read_text())


def _shape(path: Path) -> str:
    r = json.loads(path.read_text())
    speeds = {n: statistics.median(x["decode_tps"] for x in runs) for n, runs in r["runs"].items()}
    read = {n: runs[0]["bytes_per_token"] / 1e6 for n, runs in r["runs"].items()}
    return (
        f"## {path.parts[-3]}, {path.parts[-2]}\n\n"
        f"{machine_line(_where(path))}; {r['kernels']} kernels. Random weights in Q4_K, "
        f"{SHAPE_PROMPT} tokens and {SHAPE_NEW} after them: speed alone. `gate_topk` at 50 % over "
        f"dense: {ratio(r['runs'], 'gate_topk', 'dense')}, {speeds['gate_topk']:.2f} against "
        f"{speeds['dense']:.2f} tok/s, {read['gate_topk']:.0f} against {read['dense']:.0f} "
        "MB/token.\n"
    )


def ratios(runs: dict[str, Any], ours: str, other: str, key: str = "decode_tps") -> list[float]:
    """Of two of a run's speeds, turn by turn."""
    return [a[key] / b[key] for a, b in zip(runs[ours], runs[other], strict=True)]


def ratio(runs: dict[str, Any], ours: str, other: str, key: str = "decode_tps") -> str:
    found = ratios(runs, ours, other, key)
    return f"**{statistics.median(found):.2f}** ({min(found):.2f} to {max(found):.2f})"


def fastest_peer(runs: dict[str, Any], key: str = "decode_tps") -> str | None:
    """Of those that were timed."""
    return max(
        (peer for peer in PEERS if peer in runs),
        key=lambda peer: statistics.median(r[key] for r in runs[peer]),
        default=None,
    )


def _model(name: str, where: str, r: dict[str, Any], machine: dict[str, Any]) -> str:
    """A model's section."""
    runs = r["runs"]
    dense = {k: statistics.median(run[k] for run in runs["dense"]) for k in runs["dense"][0]}
    lines = [
        f"## {name}, {where}\n",
        f"{machine_line(machine)}; {r['kernels']} kernels. Packed {r['file_mb']:.0f} MB from "
        f"{r['source_mb']:.0f} MB.\n",
        *_against_others(r),
        f"\nDecode reads {dense['bytes_per_token'] / 1e6:.0f} MB per token at "
        f"{dense['gbps']:.1f} GB/s; two threads read {r['stream_gbps']:.1f} GB/s here. Outside the "
        f"products with weights it spends {dense['overhead']:.1%}. {_energy(runs)}\n",
        _answers(r),
        *_of_plans(runs, r.get("quality")),
    ]
    return "\n".join(lines) + "\n"


def _answers(r: dict[str, Any]) -> str:
    """What the engine says beside llama.cpp, and how near a prompt's products are to decode's."""
    found = ["Its answers and quality were not measured here."]
    if "quality" in r:
        found = [
            f"Greedy continuations of {len(PROMPTS)} prompts by {CONTINUATION} tokens: the engine "
            f"chooses {r['greedy']['agreement']:.1%} of llama.cpp's tokens; the first "
            f"{r['greedy']['same']:.0f} on average are the same.",
            f"Peak RSS {r['peak_rss_mb']:.0f} MB.",
        ]
    if "prompt_kl" in r:
        found.append(
            f"A prompt is read in products that are {r['prompt_kl']:.4f} nats per token from those "
            "that quality is measured in."
        )
    return " ".join(found) + "\n"


def _energy(runs: dict[str, Any]) -> str:
    """Joules per decoded token of each plan, where the machine told them."""
    joules = {
        name: statistics.median(r["joules_per_token"] for r in found)
        for name, found in runs.items()
        if "joules_per_token" in found[0]
    }
    if not joules:
        return "The machine does not tell energy."
    told = ", ".join(f"{name} {value:.3g}" for name, value in joules.items())
    return f"Joules per decoded token, of the whole processor: {told}."


def _against_others(result: dict[str, Any]) -> list[str]:
    """The dense model's speed beside every peer's, or why one has none; "-rtr" repacks."""
    runs = result["runs"]
    lines = [
        "| dense / peer | prefill | decode | peer, tok/s | ours, tok/s |",
        "|---|---|---|---|---|",
    ]
    for peer in PEERS:
        if peer not in runs:
            lines.append(f"| {peer} | {result['missing'][peer]} | | | |")
            continue
        keys = ("prefill_tps", "decode_tps")
        cells = [ratio(runs, "dense", peer, key) for key in keys]
        for side in (peer, "dense"):
            prefill, decode = (statistics.median(r[key] for r in runs[side]) for key in keys)
            cells.append(f"{prefill:.0f}, {decode:.1f}")
        lines.append(f"| {peer} | {' | '.join(cells)} |")
    return lines


def _of_plans(runs: dict[str, Any], quality: dict[str, Any] | None) -> list[str]:
    """Decoding with each plan: what it saves and costs, and where the time goes."""
    lines = [
        "| decode | tok/s | / dense | MB/token | neurons inactive | change %, blocks "
        "| token by token | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    medians = {
        name: {k: statistics.median(r[k] for r in runs[name]) for k in runs[name][0]}
        for name in runs
        if name not in PEERS
    }
    for name, s in medians.items():
        costs = "| |"
        if quality:
            blocks, decode = quality[name]["blocks"], quality[name]["decode"]
            kl = blocks["kl_to_dense"]["mean"]
            costs = f"{change(blocks)} | {change(decode)} | {kl:.4f}"
        lines.append(
            f"| {name} | {s['decode_tps']:.1f} | {ratio(runs, name, 'dense')} | "
            f"{s['bytes_per_token'] / 1e6:.0f} | {s['sparsity']:.1%} | {costs} |"
        )
    kinds = ("attention_proj", "attention", "ffn", "select", "head", "other")
    lines += [f"\n| ms per token | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name, s in medians.items():
        times = " | ".join(f"{s['ms_' + kind]:.2f}" for kind in kinds)
        lines.append(f"| {name} | {times} |")
    return lines


def change(quality: dict[str, Any]) -> str:
    return f"{quality['ppl_change_percent']:+.2f} ± {quality['ppl_change_se'] or 0:.2f}"


def _kernels(path: Path) -> str:
    rows = json.loads(path.read_text())
    columns = ("gemv / read", "axpy / read", "gemv_rows / gemv", "axpy_rows / axpy")
    return (
        f"## Kernels, {path.parent.name}\n\n"
        "A matrix of 400 MB; speed as a share of plain reading by the same threads, and the time "
        "of a random half of the rows against all.\n\n"
        f"| type | row width | read, GB/s | {' | '.join(columns)} |\n"
        "|---|---|---|---|---|---|---|\n"
        + "\n".join(
            f"| {k['type']} | {k['width']} | {k['gbps']:.1f} | {k[columns[0]]:.0%} | "
            f"{k[columns[1]]:.0%} | {k[columns[2]]:.2f} | {k[columns[3]]:.2f} |"
            for k in rows
        )
        + "\n"
    )


def summary() -> str:
    """The README's table: the dense engine beside its peers."""
    found = results()
    if not found:
        return "No results yet."
    lines = [
        f"| dense, decode (prefill) / | {' | '.join(PEERS)} |",
        "|---" * (1 + len(PEERS)) + "|",
    ]
    for name, where, r, _ in found:
        cells = []
        for peer in PEERS:
            if peer not in r["runs"]:
                cells.append("not run")
                continue
            prefill = statistics.median(ratios(r["runs"], "dense", peer, "prefill_tps"))
            cells.append(f"{ratio(r['runs'], 'dense', peer)}; {prefill:.2f}")
        lines.append(f"| {name}, {where} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{machine_line(*(machine for *_, machine in found))}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--kernels", default="")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        if name == "mistral-7b-shape":
            run_shape(arguments.kernels)
        else:
            run(name, arguments.kernels, arguments.speed, arguments.dense)
    if arguments.models and not arguments.speed:
        path = RESULTS / "kernels" / machine(arguments.kernels)
        path.mkdir(parents=True, exist_ok=True)
        timed = time_kernels(arguments.kernels)
        (path / "result.json").write_text(json.dumps(timed, indent=1) + "\n")
    if arguments.report:
        (ROOT / "docs" / "results" / "engine.md").write_text(report())
        update_readme("engine", summary())


if __name__ == "__main__":
    main()
