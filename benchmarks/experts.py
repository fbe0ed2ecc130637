"""Experts under memory limits: decode of ours and of llama.cpp, both in a cgroup.

On random weights of Qwen3-30B-A3B's shape (benchmarks/thirty_billion.py), 17 GB packed, and as much
again for llama.cpp's GGUF. As benchmarks/memory.py does it, and with what that needs:

    python benchmarks/experts.py                 # writes benchmarks/results/experts
    python benchmarks/experts.py --one-at-a-time # where the disk has no room for both files
    python benchmarks/experts.py --small         # a minute, to try it
    python benchmarks/experts.py --report        # writes docs/results/experts.md
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from memory import LLAMA, OURS, SHORT_LLAMA_FED, SHORT_PROMPT, in_cgroup
from thirty_billion import SMALL, WHOLE, Shape, make
from tradeoff import ROOT, machine_line, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "experts"
LIMITS_MB = {WHOLE.name: (4000, 6000, 8000), SMALL.name: (150, 140)}
ROUNDS, FED = 3, 96  # tokens, one by one, after SHORT_PROMPT; of llama.cpp SHORT_LLAMA_FED
LLAMA_KIND = LLAMA[1]  # of a copy in anonymous memory nothing could stay


def run(shape: Shape, one_at_a_time: bool) -> None:
    folder = RESULTS / shape.name
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def step(kind: str, limit: int, i: int) -> None:
        key = f"{limit} MB, {kind}, {i}"
        if key in result:
            return
        tokens = FED if kind == OURS else SHORT_LLAMA_FED
        sizes = [str(n) for n in (limit, SHORT_PROMPT + FED, SHORT_PROMPT, tokens)]
        result[key] = in_cgroup(limit, [kind, str(file(shape, folder, kind)), *sizes])
        path.write_text(json.dumps(result, indent=1) + "\n")

    kinds = (OURS, LLAMA_KIND)
    # In turn, since disks are shared, unless the disk has no room for both.
    for some in [(kind,) for kind in kinds] if one_at_a_time else [kinds]:
        for limit in LIMITS_MB[shape.name]:
            for i in range(ROUNDS):
                for kind in some:
                    step(kind, limit, i)
        if one_at_a_time:
            for written in folder.glob("*.gguf"):
                written.unlink()


def file(shape: Shape, folder: Path, kind: str) -> Path:
    """The model for one of the two, written if it is not there."""
    what = "packed" if kind == OURS else "source"
    path = folder / f"{what}.gguf"
    if not path.exists():
        make(shape, path, what)
    return path


INTRODUCTION = f"""# Experts under a memory limit

Decode of a mixture of experts with `--memory`, and of llama.cpp with its file mapped, each in a
cgroup (v1) that is limited to the budget and 5 %, page cache included. `benchmarks/experts.py` does
it, on random weights of Qwen3-30B-A3B's shape (benchmarks/thirty_billion.py), for speed alone:
{WHOLE.layers} layers of {WHOLE.experts} experts, of which a token uses {WHOLE.used}, 4 bits.

- {FED} tokens of the WikiText-2 raw test text one by one after {SHORT_PROMPT} of prefill; of
  llama.cpp {SHORT_LLAMA_FED}, in which its cache has less time to settle. Median (range) of
  {ROUNDS} rounds.
- **kept**: the share of experts that there is room for. **hits**: of the bytes that a token needs
  the share that was in memory. Were all experts chosen equally often, hits of experts would be what
  is kept; here some are liked more, as in trained models, but those of successive tokens are not
  more alike, which of real text they are.
- **waiting**: for the disk, of one thread.

| model | budget MB | kept | tok/s | llama.cpp | **/ llama.cpp** | MB/token from disk | hits \
| waiting ms/token | prefill tok/s | llama.cpp's |
|---|---|---|---|---|---|---|---|---|---|---|"""


def report() -> str:
    lines, wheres = [INTRODUCTION], []
    for shape in (WHOLE,):
        path = RESULTS / shape.name / "result.json"
        result = json.loads(path.read_text())
        wheres.append(json.loads((path.parent / "machine.json").read_text()))
        lines += [_row(shape, result, limit) for limit in LIMITS_MB[shape.name]]
        quarter = result[f"{LIMITS_MB[shape.name][0]} MB, {OURS}, 0"]["hottest_quarter"]
        lines.append(f"\nA quarter of each layer's experts has {quarter:.0%} of the choices.")
    lines.append(f"{machine_line(*wheres)}; llama-cpp-python 0.3.36.")
    return "\n".join(lines) + "\n"


def _row(shape: Shape, result: dict[str, Any], limit: int) -> str:
    ours = [result[f"{limit} MB, {OURS}, {i}"] for i in range(ROUNDS)]
    theirs = [result[f"{limit} MB, {LLAMA_KIND}, {i}"] for i in range(ROUNDS)]
    fed = [r["fed"] for r in ours]

    def middle(key: str, scale: float = 1) -> float:
        return scale * median(r[key] for r in fed)

    kept = ours[0]["expert_room"] / (shape.layers * shape.experts)
    tps = [r["decode_tps"] for r in fed]
    works = [r for r in theirs if "failed" not in r]
    ratio = their_tps = their_prefill = "-"
    if len(works) == len(theirs):
        ratios = [a / b["decode_tps"] for a, b in zip(tps, theirs, strict=True)]
        ratio = f"**{median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})"
        their_tps = f"{median(r['decode_tps'] for r in works):.2f}"
        their_prefill = f"{median(r['prefill_tps'] for r in works):.1f}"
    return (
        f"| {shape.name} | {limit} | {kept:.1%} | {middle('decode_tps'):.2f} "
        f"({min(tps):.2f} to {max(tps):.2f}) | {their_tps} | {ratio} "
        f"| {middle('disk_bytes_per_token', 1e-6):.0f} | {middle('hit_rate'):.1%} "
        f"| {middle('stall_ms_per_token'):.0f} | {middle('prefill_tps'):.1f} | {their_prefill} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.report:
        (ROOT / "docs" / "results" / "experts.md").write_text(report())
    else:
        run(SMALL if arguments.small else WHOLE, arguments.one_at_a_time)


if __name__ == "__main__":
    main()
