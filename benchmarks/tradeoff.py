"""Quality against sparsity of every rule on the three real models.

Produces docs/results/tradeoff.md. Thresholds come from the WikiText-2 validation text, all figures
from the WikiText-2 raw test text, in windows of 1024 tokens. The run can be stopped and continued:

    python benchmarks/tradeoff.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/tradeoff.py --report
"""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("FALLOW_DATA", ROOT / "../shared/data"))
RESULTS = ROOT / "benchmarks" / "results" / "tradeoff"
RULES = ("percentile", "cats", "fat", "topk", "tail", "cett", "teal", "wina")
SETTINGS: dict[str, dict[str, Any]] = {
    "smollm2": {"sparsities": (0.3, 0.4, 0.5, 0.6, 0.7), "ppl": (1.0,), "windows": 40},
    "gemma3": {"sparsities": (0.3, 0.4, 0.5, 0.6, 0.7), "ppl": (), "windows": 40},
    "qwen2.5-1.5b": {"sparsities": (0.3, 0.5, 0.7), "ppl": (1.0,), "windows": 12},
}


def run(name: str) -> None:
    import fallow
    from fallow.sweep import make_rows, tradeoff

    settings = SETTINGS[name]
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    model = fallow.load(name)
    (folder / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
    tradeoff(
        model,
        make_rows(RULES, settings["sparsities"], settings["ppl"]),
        folder,
        calibration_text=DATA / "wikitext2" / "wiki.valid.detok.txt",
        text=DATA / "wikitext2" / "wiki.test.raw",
        windows=settings["windows"],
    )


def machine() -> dict[str, Any]:
    import torch

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or "uncommitted",
    }


def report() -> str:
    """The tables as Markdown, from the results on disk."""
    parts = []
    for name in SETTINGS:
        path = RESULTS / name / "table.json"
        if not path.exists():
            continue
        table, where = (
            json.loads(path.read_text()),
            json.loads((RESULTS / name / "machine.json").read_text()),
        )
        settings = json.loads((RESULTS / name / "run.json").read_text())
        dense = table[0]
        parts.append(
            f"## {name}\n\nDense PPL {dense['ppl']:.2f} ± {dense['ppl_se']:.2f}, "
            f"{dense['windows']} windows of {settings['context']} tokens, {settings['dtype']}; "
            f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, "
            f"commit {where['commit']}.\n\n{markdown(table[1:])}\n"
        )
    return "\n".join(parts)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rule | target | knob | achieved | S(x) | S(gate_act) | S(up) | S(inter) "
        "| PPL change % | KL nats/token | top-1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = (
            f"{row['target_sparsity']:.0%}"
            if row["target_sparsity"] is not None
            else f"+{row['target_ppl_increase']:g} % PPL"
        )
        sparsity = " | ".join(
            f"{row.get(f'sparsity_{tap}', 0):.3f}" for tap in ("x", "gate_act", "up", "inter")
        )
        lines.append(
            f"| {row['rule']} | {target} | {row['knob']:.4g} | {row['achieved_sparsity']:.3f} "
            f"| {sparsity} | {row['ppl_change_percent']:+.2f} ± {row['ppl_change_se']:.2f} "
            f"| {row['kl_to_dense']:.4f} ± {row['kl_se']:.4f} | {row['top1_agreement']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*SETTINGS, []])
    parser.add_argument("--report", action="store_true", help="print the tables and stop")
    arguments = parser.parse_args()
    for model_name in arguments.models:
        run(model_name)
    if arguments.report or not arguments.models:
        print(report())
