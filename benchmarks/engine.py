"""Speed of the engine against llama.cpp, ik_llama.cpp and OpenVINO, of skipping, and of kernels.

Everything is compared inside one run, alternating; ratios and medians are reported. Each timed
configuration comes with its PPL and KL on WikiText-2 raw test text; plans are fitted on the
validation text. Needs llama-cpp-python==0.3.36, and for their rows openvino-genai and
ik-llama-cpp-python==0.1.5, whose wheel is an AVX2 build (IK_LLAMA_CPP_LIB_PATH names a native one):

    python benchmarks/engine.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/engine.py qwen2.5-1.5b --kernels avx2   # as on processors without AVX-512
    python benchmarks/engine.py --report      # writes docs/results/engine.md
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tradeoff import DATA, ROOT, machine_line, processor, record_machine, update_readme

RESULTS = ROOT / "benchmarks" / "results" / "engine"
TEST, VALIDATION = DATA / "wikitext2" / "wiki.test.raw", DATA / "wikitext2" / "wiki.valid.detok.txt"
RULES = {"gate_topk": 0.5, "topk": 0.5}
THREADS, PROMPT, NEW, RUNS, WINDOWS = 2, 512, 128, 5, 4
PROMPTS = [
    "The capital of France is",
    "def quicksort(values):",
    "Water boils at a lower temperature on a mountain because",
    "Once upon a time, in a village by the sea,",
]
CONTINUATION = 64  # greedy tokens after each prompt
KERNELS = [("Q4_K", 1536), ("Q5_K", 1536), ("Q6_K", 1536), ("Q4_K", 8960), ("Q6_K", 8960)]
MATRIX_BYTES = 400e6


def machine(kernels: str) -> str:
    """A folder for the results of this processor and kernels, beside those of others."""
    return re.sub(r"\W+", "-", f"{processor()} {kernels}").strip("-").lower()


def run(name: str, kernels: str) -> None:
    import fallow
    from fallow.checkpoints.catalog import ALIASES, resolve
    from fallow.measure.quality import evaluate_engine

    folder = RESULTS / name / machine(kernels)
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    packed, source = folder / "packed.gguf", resolve(ALIASES[name])
    check = fallow.pack(name, packed)
    plans = {rule: make_plan(name, rule, s, folder) for rule, s in RULES.items()}
    result: dict[str, Any] = {"self_check": vars(check), "file_mb": packed.stat().st_size / 1e6}
    result["source_mb"] = source.stat().st_size / 1e6
    result["dense"] = bench(packed, RUNS, "llama.cpp", source, kernels)
    for peer in ("ik_llama.cpp", "ik_llama.cpp-rtr", "openvino"):
        try:
            result[peer] = bench(packed, RUNS if peer != "openvino" else 3, peer, source, kernels)
        except RuntimeError as error:
            result[peer] = str(error)
    result["greedy"] = greedy(packed, source, kernels)
    result["sparse"] = skipping(packed, plans, kernels)
    engine = fallow.Engine(packed, threads=THREADS, context=1024, kernels=kernels)
    quality = {
        rule: evaluate_engine(engine, plan, TEST, context=1024, windows=WINDOWS).to_json()
        for rule, plan in ({"dense": None} | plans).items()
    }
    keys = ("ppl", "ppl_se", "ppl_change_percent", "ppl_change_se", "kl_to_dense")
    result["quality"] = {rule: {k: q[k] for k in keys} for rule, q in quality.items()}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    packed.unlink()


def bench(packed: Path, runs: int, against: str, source: Path, kernels: str) -> dict[str, Any]:
    """`fallow bench` in a process of its own, whose memory is the engine's alone."""
    command = [sys.executable, "-m", "fallow", "bench", packed, "--json", "--text", TEST]
    command += ["--threads", THREADS, "-p", PROMPT, "-n", NEW, "--runs", runs]
    command += ["--against", against, "--source", source, "--kernels", kernels]
    # The baseline's threads as it would have them: told to wait passively, llama.cpp's are slow.
    own = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=own)
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


def skipping(packed: Path, plans: dict[str, Any], kernels: str) -> dict[str, Any]:
    """Decode with each plan and without, in turn."""
    from fallow import Engine
    from fallow.checkpoints.text import load_text
    from fallow.measure.speed import run_in_turn

    engine = Engine(packed, threads=THREADS, context=PROMPT + NEW, kernels=kernels)
    ids = engine.tokenizer.with_bos(engine.tokenizer.encode(load_text(TEST, "evaluation").content))
    ids = ids[: PROMPT + NEW]
    runs = run_in_turn(engine, {"dense": None} | plans, ids, PROMPT, RUNS)
    result = {}
    for rule, found in runs.items():
        ratios = [
            a["decode_tps"] / b["decode_tps"] for a, b in zip(found, runs["dense"], strict=True)
        ]
        medians = {k: statistics.median(r[k] for r in found) for k in found[0]}
        result[rule] = medians | {"ratio": statistics.median(ratios), "ratios": ratios}
    return result


def time_kernels(kernels: str) -> list[dict[str, Any]]:
    """Products over matrices far larger than the caches, whole and at 50 % random rows."""
    from fallow import _core

    rng, rows = np.random.default_rng(0), []
    for kind, width in KERNELS:
        block, n_bytes = _core.FORMATS[kind]
        n = int(MATRIX_BYTES // (width // block * n_bytes))
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

Two threads; prefill of 512 tokens, decode of the 128 after them, the same text on both sides.
Ratios are medians over alternating runs in one process pair; absolute figures move with the
machine's other tenants. Peers read the GGUF that was packed: llama-cpp-python 0.3.36 and
ik-llama-cpp-python 0.1.5, the latter built for this processor, without and with its run-time
repacking (`-rtr`). `python benchmarks/engine.py` does it; every run is in
`benchmarks/results/engine`, a folder per processor. Where a processor is "not recorded" it was
probably Zen 5, and the kernels were those of before; compare nothing across processors.
"""


SKIPPING = """## What makes skipping save time

A scattered row costs no more than its bytes if it is asked for early enough, and into the second
cache. On Zen 4 half of the rows of a matrix of Qwen2.5-Coder's width at random took as long as all
of them while rows were asked for into the first cache (commit beef481: 1.00 to 1.06 of the time),
and take 0.6 to 0.7 now, two threads; of rows of 5 KB 0.52. Rows go through the products 16 at a
time, a row per lane of a register, so that 16 of them are on their way at once; sums over rows
(`axpy`) stay integers for 16 rows. Contiguous rows gain too: sums came at 11 GB/s where reading ran
at 27, and come at 26 to 28.

The weights lie in huge pages, into which they are read when there is room: decode takes 0.87 to
0.95 of its time with mapped files, loading 0.1 to 0.4 s per GB, more where a virtual machine has to
be given the memory first.
"""


def report() -> str:
    parts = [INTRODUCTION]
    found = sorted(RESULTS.glob("*/*/result.json"))
    parts += [_model(path) for path in found if path.parent.parent.name != "kernels"]
    for path in sorted(RESULTS.glob("kernels/*/result.json")):
        parts.append(_kernels(path))
    parts.append(SKIPPING)
    return "\n".join(parts)


def _model(path: Path) -> str:
    """A model's section."""
    r, where = (
        json.loads(path.read_text()),
        json.loads((path.parent / "machine.json").read_text()),
    )
    d, g = r["dense"], r["greedy"]
    lines = [
        f"## {path.parent.parent.name}, {path.parent.name}\n",
        f"{machine_line(where)}; "
        f"{d['kernels']} kernels. Packed {r['file_mb']:.0f} MB from {r['source_mb']:.0f} MB; "
        f"self-check KL {r['self_check']['kl']:.5f} nats, "
        f"PPL {r['self_check']['ppl_change_percent']:+.3f} %.\n",
        *_against_others(r),
        f"\nDecode reads {d['bytes_per_token'] / 1e6:.0f} MB per token at "
        f"{d['gbps']:.1f} GB/s, {d['mbu']:.0%} of what two threads read here; outside the "
        f"products with weights it spends {d['overhead']:.1%}; peak RSS "
        f"{d['peak_rss_mb']:.0f} MB.\n",
        f"Greedy continuations of {len(PROMPTS)} prompts by {CONTINUATION} tokens: the engine "
        f"chooses {g['agreement']:.1%} of llama.cpp's tokens; the first {g['same']:.0f} on "
        "average are the same.\n",
        *_of_plans(r["sparse"], r["quality"]),
    ]
    return "\n".join(lines) + "\n"


PEERS = {"dense": "llama.cpp"} | {
    name: name for name in ("ik_llama.cpp", "ik_llama.cpp-rtr", "openvino")
}  # keys of a result


def _against_others(result: dict[str, Any]) -> list[str]:
    """The dense model's speed beside every peer's, or why one has none; "-rtr" repacks."""
    lines = [
        "| dense / peer | prefill (lowest to highest) | decode | peer, tok/s | ours, tok/s |",
        "|---|---|---|---|---|",
    ]
    for key, peer in PEERS.items():
        found = result.get(key, "not measured")
        if isinstance(found, str):
            lines.append(f"| {peer} | {found} | | | |")
            continue
        cells = []
        for phase in ("prefill", "decode"):
            low, high = found[f"{phase}_ratio_range"]
            cells.append(f"**{found[f'{phase}_ratio']:.2f}** ({low:.2f} to {high:.2f})")
        theirs, ours = (
            f"{found[f'{side}prefill_tps']:.0f}, {found[f'{side}decode_tps']:.1f}"
            for side in ("baseline_", "")
        )
        lines.append(f"| {peer} | {' | '.join(cells)} | {theirs} | {ours} |")
    return lines


def _of_plans(sparse: dict[str, Any], quality: dict[str, Any]) -> list[str]:
    """Decoding with each plan: what it saves and costs, and where the time goes."""
    lines = [
        "| decode | tok/s | / dense | MB/token | neurons inactive | PPL | change % | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rule, s in sparse.items():
        x = quality[rule]
        error = f" ± {x['ppl_change_se']:.2f}" if x["ppl_change_se"] else ""
        lines.append(
            f"| {rule} | {s['decode_tps']:.1f} | {s['ratio']:.2f} "
            f"({min(s['ratios']):.2f} to {max(s['ratios']):.2f}) | "
            f"{s['bytes_per_token'] / 1e6:.0f} | {s['sparsity']:.1%} | {x['ppl']:.2f} | "
            f"{x['ppl_change_percent']:+.2f}{error} | {x['kl_to_dense']['mean']:.4f} |"
        )
    kinds = ("attention_proj", "attention", "ffn", "select", "head", "other")
    lines += [f"\n| ms per token | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for rule, s in sparse.items():
        times = " | ".join(f"{s['ms_' + kind]:.2f}" for kind in kinds)
        lines.append(f"| {rule} | {times} |")
    return lines


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
    """The README's table: what plans give over dense."""
    lines = ["| decode / dense | `gate_topk` 50 % | `topk` 50 % |", "|---|---|---|"]
    wheres = []
    for path in sorted(RESULTS.glob("*/*/result.json")):
        if path.parent.parent.name == "kernels":
            continue
        r, where = (
            json.loads(path.read_text()),
            json.loads((path.parent / "machine.json").read_text()),
        )
        wheres.append(where)
        cells = []
        for rule in RULES:
            change = r["quality"][rule]
            cells.append(
                f"{r['sparse'][rule]['ratio']:.2f} at {change['ppl_change_percent']:+.1f} "
                f"± {change['ppl_change_se']:.1f} % PPL"
            )
        lines.append(f"| {path.parent.parent.name}, {path.parent.name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{machine_line(*wheres)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--kernels", default="")
    arguments = parser.parse_args()
    for name in arguments.models:
        run(name, arguments.kernels)
    if arguments.models:
        path = RESULTS / "kernels" / machine(arguments.kernels)
        path.mkdir(parents=True, exist_ok=True)
        (path / "result.json").write_text(
            json.dumps(time_kernels(arguments.kernels), indent=1) + "\n"
        )
    (ROOT / "docs" / "results" / "engine.md").write_text(report())
    update_readme("engine", summary())


if __name__ == "__main__":
    main()
