"""llama.cpp with our plugin beside llama.cpp without, on the same file.

Everything of a model in one run: stock llama.cpp (which repacks weights by itself), the plugin
dense, and with the plan that benchmarks/optimize.py found; the latter's PPL is judged there. Needs
llama-cpp-python==0.3.36 and `fallow llama build`:

    python benchmarks/optimize.py qwen2.5-1.5b
    python benchmarks/llama_plugin.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/llama_plugin.py --report      # writes docs/results/llama_plugin.md
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine import NEW, OPTIMIZED, PROMPT, RUNS, TEST, THREADS, machine
from fallow.plan import Cut, Plan
from tradeoff import ROOT, machine_line, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "llama_plugin"
PAGE = ROOT / "docs" / "results" / "llama_plugin.md"
TOKENS = 512  # that logits are compared on
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
lowest and the highest, two threads, prefill of 512 tokens, decode of the 128 after them. `dense`
reads the GGUF alone; `plan` is what `fallow optimize --max-ppl-increase 1` chose for the engine,
without its shortlist, since llama.cpp computes its own head, or where it chose none half of the
neurons by `topk`. KL is, in decode and in a prompt, on {tokens} tokens of the WikiText-2 raw test
text, from the model itself in float32, of which stock llama.cpp falls short too, since it rounds
activations to 8 bits; PPL is against stock. Loading includes a first token, and is of a file that
was read before. `python benchmarks/llama_plugin.py` does it; compare nothing across processors.
"""


def run(name: str) -> None:
    from fallow.checkpoints.catalog import ALIASES, resolve
    from fallow.checkpoints.weights import read_gguf
    from fallow.measure.llama_cpp import bench
    from fallow.packing.ffn_file import pack_ffns

    source, packed = resolve(ALIASES[name]), OPTIMIZED / name / machine() / "packed.gguf"
    if not packed.exists():
        raise SystemExit(f"{packed} not found; first: python benchmarks/optimize.py {name}")
    folder = RESULTS / name / machine()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").unlink(missing_ok=True)  # a run is never continued
    record_machine(folder / "machine.json")
    lender = read_gguf(packed)
    plan = None if "plan" in lender.tensors else half_of(name, lender.get("fallow.n_layers"))
    file, start = folder / "ffn.gguf", time.perf_counter()
    pack_ffns(source, file, packed=packed, plan=plan)
    result: dict[str, Any] = {"pack_s": time.perf_counter() - start}
    result["plan"] = "that of optimize" if plan is None else plan.rule
    result["file_mb"] = file.stat().st_size / 1e6
    result["bench"] = bench(
        source, file, threads=THREADS, prompt_tokens=PROMPT, new_tokens=NEW, runs=RUNS, text=TEST
    )
    result["quality"] = quality(source, file)
    result["load"] = load_times(source, file)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def quality(source: Path, file: Path) -> dict[str, Any]:
    """Of stock, dense and plan, in a prompt and in decode: against the model in float32."""
    import torch

    import fallow
    from fallow.measure.llama_cpp import compare, model_logits

    logits = model_logits(source, file, text=TEST, tokens=TOKENS, threads=THREADS)
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


def half_of(name: str, layers: int) -> Plan:
    """Where `fallow optimize` chose no plan: half of the neurons, as engine.py times it."""
    cut = Cut("inter", "topk", np.full(layers, 0.5), "column_norm")
    return Plan(name, "", "`topk` at 50 %", 0.5, "sparsity", (cut,))


def load_times(source: Path, file: Path) -> dict[str, list[float]]:
    """Seconds until a first token is read, in turn."""
    variants = {"stock": ("", ""), "dense": ("1", ""), "plan": ("1", str(file))}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(RUNS + 1):
        for name, options in variants.items():
            command = [sys.executable, "-c", LOAD, source, str(THREADS), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if turn > 0:  # the first reads the file
                found[name].append(float(done.stdout.splitlines()[-1]))
    return found


def report() -> None:
    parts = [HEAD.format(tokens=TOKENS)]
    for path in sorted(RESULTS.glob("*/*/result.json")):
        result = json.loads(path.read_text())
        found = result["bench"]
        parts.append(f"## {path.parents[1].name}, {path.parent.name}\n")
        parts.append(machine_line(json.loads((path.parent / "machine.json").read_text())) + "\n")
        parts.append(
            "| | prefill / stock | decode / stock | tok/s | KL, decode | KL, prompt | PPL % "
            "| load / stock |\n|---|---|---|---|---|---|---|---|"
        )
        rows = []
        for name in ("stock", "dense", "plan"):
            ratio, of = found["ratios"].get(name), result["quality"][name]
            row = [name, *(between(ratio[k]) if ratio else "1" for k in ("prefill", "decode"))]
            speeds = (
                statistics.median(r[f"{key}_tps"] for r in found["runs"][name])
                for key in ("prefill", "decode")
            )
            row.append(", ".join(f"{speed:.1f}" for speed in speeds))
            row += [f"{of[way]['kl']:.4f}" for way in ("decode", "prompt")]
            row.append(f"{of['decode']['to_stock']['ppl_change_percent']:+.2f}")
            pairs = zip(result["load"][name], result["load"]["stock"], strict=True)
            row.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
            rows.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(rows) + "\n")
        parts.append(
            f"The plan is {result['plan']}; the file beside the model has "
            f"{result['file_mb']:.0f} MB and was written in {result['pack_s']:.0f} s.\n"
        )
    PAGE.write_text("\n".join(parts))


def between(ratio: list[float]) -> str:
    return "**{:.2f}** ({:.2f} to {:.2f})".format(*ratio)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        run(name)
    if arguments.report:
        report()


if __name__ == "__main__":
    main()
