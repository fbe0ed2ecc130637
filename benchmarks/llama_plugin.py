"""llama.cpp with our plugin beside llama.cpp without, on the same file.

Everything of a model in one run: stock llama.cpp (which repacks weights by itself), the plugin
dense, and with the plan that benchmarks/optimize.py found; the latter's PPL is judged there. Then
both in a cgroup, the plugin with a budget for its FFNs (root, cgroup v1). `stablelm-shape` has an
architecture that fallow's engine does not know, and random weights: for speed alone. Needs
llama-cpp-python==0.3.36 and `fallow llama build`:

    python benchmarks/optimize.py qwen2.5-1.5b
    python benchmarks/llama_plugin.py smollm2 gemma3 qwen2.5-1.5b stablelm-shape
    python benchmarks/llama_plugin.py --report      # writes docs/results/llama_plugin.md
    python benchmarks/llama_plugin.py --small --results /tmp/try smollm2   # whether it runs through
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import memory
import seven_billion
from engine import NEW, OPTIMIZED, PROMPT, RUNS, TEST, THREADS, machine
from fallow.plan import Cut, Plan
from tradeoff import ROOT, machine_line, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "llama_plugin"
PAGE = ROOT / "docs" / "results" / "llama_plugin.md"
UNKNOWN = "stablelm-shape"
LIMITS_MB = {"qwen2.5-1.5b": 800, "gemma3": 300, "smollm2": 200}  # of a whole process
FOR_FFNS = 0.5  # of that, the rest is llama.cpp's, Python's and the cache
# Tokens of a prompt in the cgroup, and fed after it to us and to stock, which may be slow.
MEMORY_PROMPT, FED, STOCK_FED = 128, 64, 16
STOCK, OURS = memory.LLAMA, "plugin"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompt: int = PROMPT
    new: int = NEW
    runs: int = RUNS
    tokens: int = 512  # that logits are compared on
    layers: int = 24  # of UNKNOWN
    fed: tuple[int, int, int] = (MEMORY_PROMPT, FED, STOCK_FED)
    rounds: int = 3  # in the cgroup


SMALL = Sizes(prompt=16, new=4, runs=1, tokens=16, layers=2, fed=(16, 4, 2), rounds=1)
LOAD = """
import sys, time
source, threads, plugin, plan = sys.argv[1:5]
if plugin:
    import fallow.llama_cpp
    fallow.llama_cpp.load(plan or None)
from llama_cpp import Llama
start = time.perf_counter()
model = Llama(source, n_ctx=64, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
model.eval([1])
print(time.perf_counter() - start)
"""
HEAD = """# In llama.cpp

[`fallow llama`](../how-to/llama-cpp.md) beside stock llama.cpp (llama-cpp-python 0.3.36, which lays
weights out anew by itself) in one run, each in turn: ratios are medians over the turns with the
lowest and the highest, two threads, prefill of {prompt} tokens, decode of the {new} after them.
`dense` reads the GGUF alone; `plan` is what `fallow optimize --max-ppl-increase 1` chose for the
engine, without its shortlist, since llama.cpp computes its own head, or where it chose none half of
the neurons by `topk`. KL is, in decode and in a prompt, on {tokens} tokens of the WikiText-2 raw
test text, from the model itself in float32, of which stock llama.cpp falls short too, since it
rounds activations to 8 bits; PPL is against stock. Loading includes a first token, and is of a file
that was read before. `{unknown}` is a model of random weights with the sizes of StableLM-2-1.6B, an
architecture that fallow's engine does not know: of it there is speed alone.

**In memory**: the whole process in a cgroup (v1) of that size and 5 %, page cache included, which
is dropped before; the plugin with half of it as `FALLOW_MEMORY`, the FFNs beyond that read from the
packed file, and stock llama.cpp with its weights mapped, with and without repacking, of which the
faster one counts. {fed[1]} tokens one by one after a prompt of {fed[0]}, of stock {fed[2]}.
`python benchmarks/llama_plugin.py` does it; compare nothing across processors.
"""


def run(name: str, results: Path, sizes: Sizes) -> None:
    from fallow.measure.llama_cpp import bench

    folder = results / name / machine()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").unlink(missing_ok=True)  # a run is never continued
    record_machine(folder / "machine.json")
    start = time.perf_counter()
    source, file, plan = unknown(folder, sizes.layers) if name == UNKNOWN else known(name, folder)
    result: dict[str, Any] = {"pack_s": time.perf_counter() - start, "plan": plan}
    result["file_mb"] = file.stat().st_size / 1e6
    result["bench"] = bench(
        source, file, threads=THREADS, prompt_tokens=sizes.prompt, new_tokens=sizes.new,
        runs=sizes.runs, text=TEST,
    )  # fmt: skip
    result["load"] = load_times(source, file, sizes.runs)
    if name != UNKNOWN:
        result["quality"] = quality(source, file, sizes.tokens)
        result["memory"] = in_little_memory(source, file, LIMITS_MB[name], sizes)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def known(name: str, folder: Path) -> tuple[Path, Path, str]:
    """A model, what it is packed as with a plan, and which plan that is."""
    import fallow
    from fallow.checkpoints.catalog import ALIASES, resolve
    from fallow.checkpoints.weights import read_gguf

    source, packed = resolve(ALIASES[name]), OPTIMIZED / name / machine() / "packed.gguf"
    if not packed.exists():
        raise SystemExit(f"{packed} not found; first: python benchmarks/optimize.py {name}")
    lender = read_gguf(packed)
    stored = lender.tensors.get("plan")
    plan = None if stored is None else Plan.from_bytes(stored.data.tobytes(), str(packed))
    has_cuts = plan is not None and bool(plan.cuts)
    if has_cuts and "fallow.ffn.version" in lender.metadata:
        return source, packed, "that of optimize"
    if plan is None or not has_cuts:
        mark = str(lender.get("fallow.fingerprint"))
        plan = half_of(name, mark, lender.get("fallow.n_layers"))
    own, down = folder / "packed.gguf", lender.tensors["layers.0.down_proj_t.weight"].type
    fallow.pack(source, own, plan=plan, down=down)
    return source, own, "that of optimize" if has_cuts else plan.rule


def unknown(folder: Path, layers: int) -> tuple[Path, Path, str]:
    """The same of a model of StableLM-2-1.6B's sizes."""
    from fallow.packing.ffn_file import pack_ffns

    source, file = folder / "source.gguf", folder / "ffn.gguf"
    write_stablelm(source, layers)
    plan = half_of(UNKNOWN, "random", layers)
    pack_ffns(source, file, plan=plan)
    return source, file, plan.rule


def write_stablelm(path: Path, layers: int, hidden: int = 2048, d_ff: int = 5632) -> None:
    import gguf

    from fallow.checkpoints.catalog import ALIASES, resolve
    from fallow.checkpoints.weights import read_gguf

    small, pool = read_gguf(resolve(ALIASES["smollm2"])), seven_billion.RowPool()
    vocabulary = len(small.get("tokenizer.ggml.tokens"))
    writer = gguf.GGUFWriter(path, "stablelm")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(32)
    writer.add_head_count_kv(32)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_eps(1e-5)
    writer.add_parallel_residual(False)
    seven_billion.add_tokenizer(writer, small, vocabulary)

    def add(name: str, rows: int, width: int, kind: str = "Q4_K") -> None:
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", pool.matrix(kind, rows, width), raw_dtype=raw)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(hidden, dtype=np.float32))

    add("token_embd", vocabulary, hidden)
    add("output", vocabulary, hidden, "Q6_K")
    add_norm("output_norm")
    for i in range(layers):
        for part in ("attn_norm", "ffn_norm"):
            add_norm(f"blk.{i}.{part}")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{part}", hidden, hidden)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{i}.{part}", d_ff, hidden)
        add(f"blk.{i}.ffn_down", hidden, d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_little_memory(source: Path, file: Path, limit: int, sizes: Sizes) -> dict[str, Any]:
    """Runs of the plugin and of stock llama.cpp in a cgroup of `limit` MB, in turn."""
    prompt, fed, stock_fed = sizes.fed
    found: dict[str, Any] = {"limit_mb": limit, "fed": fed, OURS: []} | {kind: [] for kind in STOCK}
    if not os.access(memory.CGROUP.parent, os.W_OK):
        return found | {"failed": f"{memory.CGROUP.parent} cannot be written to"}
    for _ in range(sizes.rounds):
        given = [str(source), str(file), str(int(FOR_FFNS * limit)), str(prompt), str(fed)]
        found[OURS].append(memory.in_cgroup(limit, given, script=__file__))
        for kind in STOCK:
            if not any("failed" in one for one in found[kind]):
                context = str(prompt + stock_fed)
                given = [kind, str(source), str(limit), context, str(prompt), str(stock_fed)]
                found[kind].append(memory.in_cgroup(limit, given))
    return found


def child(source: str, file: str, budget: str, prompt: str, fed: str) -> dict[str, Any]:
    import fallow.llama_cpp
    from fallow.engine.process import peak_rss_mb

    fallow.llama_cpp.load(file, memory=f"{budget}MB")
    engine = memory.llama_engine(source, False, int(prompt) + int(fed))
    found = memory.feed(engine, int(prompt), int(fed))
    of = fallow.llama_cpp.statistics()[0]
    kept = {key: of[key] for key in ("plan", "inactive", "held", "disk_bytes")}
    return found | kept | {"peak_rss_mb": peak_rss_mb()}


def quality(source: Path, file: Path, tokens: int) -> dict[str, Any]:
    """Of stock, dense and plan, in a prompt and in decode: against the model in float32."""
    import torch

    import fallow
    from fallow.measure.llama_cpp import compare, model_logits

    logits = model_logits(source, file, text=TEST, tokens=tokens, threads=THREADS)
    ids = logits["stock"]["ids"]
    with torch.inference_mode():
        expected = fallow.load(source).module(torch.tensor(ids)[None]).logits[0].float().numpy()
    return {
        name: {
            way: compare(expected, own[way][:, : expected.shape[1]], ids)
            | {"to_stock": compare(logits["stock"][way], own[way], ids)}
            for way in ("decode", "prompt")
        }
        for name, own in logits.items()
    }


def half_of(name: str, mark: str, layers: int) -> Plan:
    """Where `fallow optimize` chose no plan: half of the neurons, as engine.py times it."""
    cut = Cut("inter", "topk", np.full(layers, 0.5), "column_norm")
    return Plan(name, mark, "`topk` at 50 %", 0.5, "sparsity", (cut,))


def load_times(source: Path, file: Path, runs: int) -> dict[str, list[float]]:
    """Seconds until a first token is read, in turn."""
    variants = {"stock": ("", ""), "dense": ("1", ""), "plan": ("1", str(file))}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(runs + 1):
        for name, options in variants.items():
            command = [sys.executable, "-c", LOAD, source, str(THREADS), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if turn > 0:  # the first reads the file
                found[name].append(float(done.stdout.splitlines()[-1]))
    return found


def report(results: Path, sizes: Sizes) -> str:
    head = HEAD.format(
        prompt=sizes.prompt, new=sizes.new, tokens=sizes.tokens, unknown=UNKNOWN, fed=sizes.fed
    )
    parts, limited = [head], []
    for path in sorted(results.glob("*/*/result.json")):
        result = json.loads(path.read_text())
        found, name = result["bench"], path.parents[1].name
        parts.append(f"## {name}, {path.parent.name}\n")
        parts.append(machine_line(json.loads((path.parent / "machine.json").read_text())) + "\n")
        parts.append(
            "| | prefill / stock | decode / stock | tok/s | KL, decode | KL, prompt | PPL % "
            "| load / stock |\n|---|---|---|---|---|---|---|---|"
        )
        rows = []
        for variant in ("stock", "dense", "plan"):
            ratio, of = found["ratios"].get(variant), result.get("quality", {}).get(variant)
            row = [variant, *(between(ratio[k]) if ratio else "1" for k in ("prefill", "decode"))]
            speeds = (
                statistics.median(r[f"{key}_tps"] for r in found["runs"][variant])
                for key in ("prefill", "decode")
            )
            row.append(", ".join(f"{speed:.1f}" for speed in speeds))
            row += [f"{of[way]['kl']:.4f}" if of else "-" for way in ("decode", "prompt")]
            row.append(f"{of['decode']['to_stock']['ppl_change_percent']:+.2f}" if of else "-")
            pairs = zip(result["load"][variant], result["load"]["stock"], strict=True)
            row.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
            rows.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(rows) + "\n")
        parts.append(
            f"The plan is {result['plan']}; the file beside the model has "
            f"{result['file_mb']:.0f} MB and was written in {result['pack_s']:.0f} s.\n"
        )
        if "memory" in result:
            limited.append(memory_row(f"{name}, {path.parent.name}", result["memory"]))
    if limited:
        parts.append(
            "## In memory\n\n| | MB | rounds | decode tok/s | stock | **/ stock** | FFNs hold MB "
            "| MB/token from disk | peak MB |\n|---|---|---|---|---|---|---|---|---|"
        )
        parts.append("\n".join(limited) + "\n")
    return "\n".join(parts)


def memory_row(name: str, found: dict[str, Any]) -> str:
    ours = [one for one in found[OURS] if "failed" not in one]
    if not ours:
        reason = found.get("failed") or found[OURS][0]["failed"]
        return f"| {name} | {found['limit_mb']} | 0 | {reason} | | | | | |"
    works = [kind for kind in STOCK if not any("failed" in one for one in found[kind])]
    decode = [one["decode_tps"] for one in ours]
    theirs = [
        max(found[kind][i]["decode_tps"] for kind in works) for i in range(len(ours)) if works
    ]
    ratios = sorted(a / b for a, b in zip(decode, theirs, strict=False))
    stock, ratio = "failed", "-"
    if ratios:
        stock = f"{statistics.median(theirs):.2f}"
        ratio = between([statistics.median(ratios), ratios[0], ratios[-1]])
    per_token = ours[0]["disk_bytes"] / 1e6 / (found["fed"] + 1)  # a prompt is one pass
    return (
        f"| {name} | {found['limit_mb']} | {len(ours)} | {statistics.median(decode):.2f} "
        f"| {stock} | {ratio} "
        f"| {ours[0]['held'] / 1e6:.0f} | {per_token:.0f} | {ours[0]['peak_rss_mb']:.0f} |"
    )


def between(ratio: list[float]) -> str:
    return "**{:.2f}** ({:.2f} to {:.2f})".format(*ratio)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--small", action="store_true", help="so little that figures mean nothing")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    is_own = arguments.results == RESULTS
    if arguments.small and is_own:
        parser.error("--small is for --results elsewhere")
    sizes = SMALL if arguments.small else Sizes()
    for name in arguments.models:
        run(name, arguments.results, sizes)
    if arguments.report:
        text = report(arguments.results, sizes)
        PAGE.write_text(text) if is_own else print(text)


if __name__ == "__main__":
    main()
