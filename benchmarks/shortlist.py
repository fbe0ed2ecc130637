"""The head's shortlist by margin: what it costs in quality and saves in bytes and time.

The packed model with the exact head against the same with the two-bit head and exact logits within
a margin; WikiText-2 raw test text, decode with the margins in turn:

    python benchmarks/shortlist.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/shortlist.py --report    # writes docs/results/shortlist.md
"""

import json
import statistics
from typing import Any

import numpy as np

from engine import TEST, THREADS
from tradeoff import ROOT, machine_line, record_machine, run_and_report

RESULTS = ROOT / "benchmarks" / "results" / "shortlist"
MARGINS = (10.0, 11.0, 12.0, 13.0, 14.0)
WINDOWS, CONTEXT = 8, 1024
PROMPT, RUNS = 64, 7


def run(name: str) -> None:
    import fallow
    from fallow.checkpoints.text import load_text
    from fallow.measure.speed import run_in_turn
    from fallow.plan import Plan

    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    packed = folder / "packed.gguf"
    if not packed.exists():
        fallow.pack(name, packed, shortlist=True)
    engine = fallow.Engine(packed, plan=False, threads=THREADS, context=CONTEXT)

    def plan(margin: float) -> Plan:
        return Plan(
            model=engine.name,
            fingerprint=engine.fingerprint,
            rule="two_stage",
            where="inter",
            knob=0.0,
            knob_name="",
            arrays={"head_margin": np.array([margin])},
        )

    plans = {margin: plan(margin) for margin in MARGINS}
    windows = engine.windows(load_text(TEST, "evaluation"), CONTEXT, WINDOWS)
    quality = _quality(engine, windows, plans)
    named = {"exact": None, **{str(margin): p for margin, p in plans.items()}}
    runs = run_in_turn(engine, named, windows[0][: 2 * PROMPT], PROMPT, RUNS)
    tensors = engine.file.tensors
    head = tensors["lm_head.weight" if "lm_head.weight" in tensors else "embed_tokens.weight"]
    size = head.data.nbytes
    coarse = tensors["lm_head_coarse.codes"].data.nbytes
    exact = runs["exact"]
    result: dict[str, Any] = {"head_bytes": size, "coarse_bytes": coarse, "margins": {}}
    for margin in MARGINS:
        found = runs[str(margin)]
        read = found[0]["bytes_per_token"] - exact[0]["bytes_per_token"] + size
        result["margins"][str(margin)] = {
            **quality[margin],
            "exact_rows": (read - coarse) / size,
            "head_bytes_ratio": read / size,
            "bytes_ratio": found[0]["bytes_per_token"] / exact[0]["bytes_per_token"],
            "decode_ratios": [
                a["decode_tps"] / b["decode_tps"] for a, b in zip(found, exact, strict=True)
            ],
        }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def _quality(engine: Any, windows: np.ndarray, plans: dict[float, Any]) -> dict[float, Any]:
    """By margin: KL(exact || shortlist), nats per token, and the PPL change in percent."""
    from fallow.common.metrics import ppl_change_percent
    from fallow.measure.quality import log_softmax, token_losses

    kl: dict[float, list[float]] = {margin: [] for margin in plans}
    losses: dict[float | None, list[float]] = {margin: [] for margin in (None, *plans)}
    for window in windows:
        exact = np.empty(0)
        for margin, plan in (None, None), *plans.items():
            engine.use_plan(plan)
            logits = engine.logits(window)
            losses[margin].append(float(token_losses(logits[:-1], window[1:]).mean()))
            other = log_softmax(logits)
            if margin is None:
                exact = other
            else:
                kl[margin].append(float(np.einsum("tv,tv->t", np.exp(exact), exact - other).mean()))
    found = {}
    for margin in plans:
        change, error = ppl_change_percent(np.array(losses[margin]), np.array(losses[None]))
        found[margin] = {
            "kl": float(np.mean(kl[margin])),
            "ppl_change_percent": change,
            "ppl_change_se": error,
        }
    return found


INTRODUCTION = f"""# The head's shortlist

Logits of the two-bit head, exact ones within a margin (nats) of its largest (docs/packed.md),
against the same packed model with its exact head: WikiText-2 raw test text, {WINDOWS} windows of
{CONTEXT} tokens, ± one paired standard error; decode ({PROMPT} tokens before, {PROMPT} timed,
{THREADS} threads) is the median of {RUNS} alternating runs (range). `benchmarks/shortlist.py` does
it.

| model | margin | KL nats | PPL change % | exact rows | bytes of head | bytes of model | decode |
|---|---|---|---|---|---|---|---|"""


def report() -> str:
    lines = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*/result.json")):
        result = json.loads(path.read_text())
        where = json.loads((path.parent / "machine.json").read_text())
        for margin, r in result["margins"].items():
            ratios = r["decode_ratios"]
            lines.append(
                f"| {path.parent.name} | {float(margin):g} | {r['kl']:.4f} "
                f"| {r['ppl_change_percent']:+.2f} ± {r['ppl_change_se']:.2f} "
                f"| {r['exact_rows']:.3f} | {r['head_bytes_ratio']:.2f} | {r['bytes_ratio']:.2f} "
                f"| **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"
            )
    lines.append(f"\n{machine_line(where)}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_and_report(__doc__, run, report, "shortlist.md")
