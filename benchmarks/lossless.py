"""The lossless mode against the engine's own dense decoding: speed, guesses that held, passes.

Continuations of WikiText-2 test text and of code, greedy and sampled, the two modes in turn; that
both say the same is checked. Also what a pass of several tokens costs, and what drafts of the
model's own sparse plan would give at that:

    python benchmarks/lossless.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/lossless.py --report    # writes docs/results/lossless.md
"""

import json
import statistics
import time
from typing import Any

from engine import OPTIMIZED, TEST, THREADS
from tradeoff import DATA, ROOT, machine_line, record_machine, run_and_report

RESULTS = ROOT / "benchmarks" / "results" / "lossless"
TEXTS = {"WikiText-2": TEST, "code": DATA / "calibration" / "code.txt"}
TEMPERATURES = (0.0, 0.8)
PROMPT, NEW, PROMPTS, PASSES = 256, 128, 8, 9


def run(name: str) -> None:
    import fallow
    from fallow.checkpoints.text import load_text

    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    packed = folder / "packed.gguf"
    if not packed.exists():
        fallow.pack(name, packed)
    engine = fallow.Engine(packed, threads=THREADS, context=PROMPT + NEW)
    result: dict[str, Any] = {"pass_cost": pass_costs(engine)}
    for label, path in TEXTS.items():
        windows = engine.windows(load_text(path, "evaluation"), PROMPT + NEW, PROMPTS)
        for temperature in TEMPERATURES:
            runs = [compare(engine, window[:PROMPT], temperature) for window in windows]
            result[f"{label}, temperature {temperature:g}"] = runs
            (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def pass_costs(engine: Any) -> dict[int, float]:
    """Time of a pass of 1 to FEW tokens over that of one token, medians."""
    from fallow import _core
    from fallow.checkpoints.text import load_text

    ids = engine.windows(load_text(TEST, "evaluation"), PROMPT + NEW, 1)[0]
    engine.reset()
    engine.forward(ids[:PROMPT])
    seconds: dict[int, list[float]] = {n: [] for n in range(1, _core.FEW + 1)}
    for _ in range(PASSES):
        for n, found in seconds.items():
            engine.reset(keep=PROMPT)
            start = time.perf_counter()
            engine.forward(ids[PROMPT : PROMPT + n], every=True)
            found.append(time.perf_counter() - start)
    return {n: statistics.median(s) / statistics.median(seconds[1]) for n, s in seconds.items()}


def compare(engine: Any, prompt: Any, temperature: float) -> dict[str, float]:
    """One prompt's continuation in both modes."""
    found, texts = {}, []
    for lossless in (False, True):
        pieces = engine.generate(prompt, NEW, temperature, lossless=lossless)
        texts.append("".join(pieces))
        found["lossless" if lossless else "dense"] = engine.stats.decode_tps
    if texts[0] != texts[1]:
        raise RuntimeError("the lossless mode said something else")
    return {
        "ratio": found["lossless"] / found["dense"],
        "drafted": engine.stats.drafted,
        "accepted": engine.stats.accepted,
        "new_tokens": engine.stats.new_tokens,
    }


INTRODUCTION = f"""# Lossless mode

`fallow generate --lossless` gives the dense model's own text, bit for bit (checked here for every
prompt), and reads ahead what the text so far lets guess: the tokens that followed the last
occurrence of its longest suffix (at most 4 tokens; prompt lookup). A pass of several tokens costs
less than as many passes, but more than one: guesses that do not hold cost that, and sampled text
can be slower than without. How many are guessed follows from how often such guesses held in this
text. `benchmarks/lossless.py` does it: {PROMPTS} prompts of {PROMPT} tokens and {NEW} new ones
each, {THREADS} threads, both modes in turn, once; the ratio's median (quartiles) over prompts. A
prompt was timed once, so that the spread over prompts is the only one known. The engine's kernels
have changed since the commit named below, for one token and for several: the ratios may be others
now, and were not measured again.
"""


def report() -> str:
    lines = [
        INTRODUCTION,
        "| model | text | lossless / dense | guesses that held | guesses per token |",
        "|---|---|---|---|---|",
    ]
    drafted_lines, wheres = [DRAFTS], []
    costs = ["\nTime of a pass of n tokens over that of one:\n"]
    for path in sorted(RESULTS.glob("*/result.json")):
        result, name = json.loads(path.read_text()), path.parent.name
        wheres.append(json.loads((path.parent / "machine.json").read_text()))
        passes = result.pop("pass_cost")
        costs.append(f"- {name}: " + ", ".join(f"{n}: {c:.2f}" for n, c in passes.items()))
        drafted_lines += drafts(name, passes)
        for label, runs in result.items():
            ratios = [r["ratio"] for r in runs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            drafted, accepted, new = (
                sum(r[key] for r in runs) for key in ("drafted", "accepted", "new_tokens")
            )
            lines.append(
                f"| {name} | {label} | **{middle:.2f}** ({low:.2f} to {high:.2f}) "
                f"| {accepted / max(1, drafted):.0%} | {drafted / new:.2f} |"
            )
    costs.append(f"\n{machine_line(*wheres)}.")
    return "\n".join([*lines, *costs, *drafted_lines]) + "\n"


DRAFTS = """
## Drafts by the sparse model

Computed, not run. The usual self-speculation lets the sparse model draft. With drafts that take d
of a dense pass and hold with probability a, and passes of n tokens that cost c(n), k drafts give
(1 + a + ... + a^k) / (k d + c(k + 1)) of the dense speed. For the plans of [optimize](optimize.md):
d from the timing by which the plan was chosen, maybe on another processor than c; a the plan's
agreement with the source's first choice; and the best k:

| plan | d | a | k | lossless / dense |
|---|---|---|---|---|"""


def drafts(name: str, passes: dict[str, float]) -> list[str]:
    """What the measured plans of a model would give as drafts."""
    lines = []
    for path in sorted(OPTIMIZED.glob(f"{name}*/*/result.json")):
        result = json.loads(path.read_text())
        if "quality" not in result:
            continue
        d = 1 / result["optimize"]["decode_ratio_dense"]
        a = result["quality"]["top1_agreement"]
        speed, k = max(
            (sum(a**i for i in range(k + 1)) / (k * d + passes[str(k + 1)]), k)
            for k in range(1, len(passes))
        )
        lines.append(f"| {', '.join(path.parts[-3:-1])} | {d:.2f} | {a:.3f} | {k} | {speed:.2f} |")
    return lines


if __name__ == "__main__":
    run_and_report(__doc__, run, report, "lossless.md")
