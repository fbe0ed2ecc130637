"""Selectors at equal budget on the three real models: recall, quality and bytes.

Fitted on the WikiText-2 validation text, measured on the WikiText-2 raw test text in windows of
1024 tokens, the whole model in the loop. A stopped run continues where it was:

    python benchmarks/selector.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/selector.py --trained smollm2     # trains the selector `learned` too
    python benchmarks/selector.py --inputs smollm2      # input sparsity at low levels
    python benchmarks/selector.py --report    # writes docs/results/selectors.md

(Not selectors.py: scripts here would import it instead of the standard library's module.)
"""

import argparse
import json
from typing import Any

from tradeoff import DATA, ROOT, machine_line, measure

RESULTS = ROOT / "benchmarks" / "results" / "selectors"
SPARSITY = 0.5
FRAME = ("oracle", "oracle:cett=1", "random", "static")
ALL = (
    *FRAME,
    *("previous", "gate", "gate_bucket", "gate:compensation=64"),
    *("lowbit:up=1", "lowbit", "lowbit:up=3", "lowbit:gate=3:up=3", "lowbit:gate=2"),
    *("lowbit:gate=2:compensation=64", "lowbit:gate=3:up=3:compensation=64"),
    *("lowbit:gate=2:rank=16", "lowbit:rank=16", "lowbit:gate=3:up=3:rank=16"),
    *("lowbit:cett=1", "lowbit:gate=3:up=3:cett=1", "lowbit:gate=3:up=3:rank=16:cett=1"),
    *("lowbit:up=3:cett=1", "lowrank", "lowrank:rank=256", "lowrank:gate=1", "blend"),
    *("blend:gate=1", "ahead"),
)
# A window takes twelve seconds per selector on Qwen, so that only the best have many.
BEST = ("lowbit:gate=3:up=3", "lowbit:gate=3:up=3:cett=1", "lowbit:up=3:cett=1")
WINDOWS = 40
WINDOWS_OF_ALL = {"smollm2": 12, "gemma3": 7, "qwen2.5-1.5b": 4}
INPUTS, INPUT_SPARSITIES = ("teal_relative", "wina_uniform"), (0.05, 0.1, 0.2)
TRAINED = ("learned:rank=64", "learned:rank=64:gate=1")
# Where those lie that lost, and what compensates the others.
RESEARCH = {
    "ahead": "fallow.research.ahead:Ahead",
    "blend": "fallow.research.blend:Blend",
    "gate": "fallow.research.compensation:Gate",
    "gate_bucket": "fallow.research.gate_bucket:GateBucket",
    "learned": "fallow.research.learned:Learned",
    "lowbit": "fallow.research.compensation:LowBit",
    "lowrank": "fallow.research.lowrank:LowRank",
    "previous": "fallow.research.previous:Previous",
}


INTRODUCTION = f"""# Selectors

Half of the neurons are inactive ({SPARSITY:.0%}), chosen by what each selector predicts of
|inter| ||down_proj[:, i]||, the whole model in the loop: a selector's mistakes feed the layers
behind. Fitted on the WikiText-2 validation text (8 windows; `learned` on 300,000 tokens of C4),
measured on the raw test text, windows of 1024 tokens: the best on {WINDOWS}, all on fewer,
whose figures are less certain. `benchmarks/selector.py` does it; the result of every window is in
`benchmarks/results/selectors`.

- **recall**: of the k neurons that matter most, the share that was kept. Rows with cett=1 have no
  k: layers and tokens share the budget by the thresholds of `cett`. There is no energy recall:
  these windows have only its sum over tokens, which is that of attention sinks.
- **FFN bytes** per decoded token, what is read to choose included, over the dense FFN's; gate and
  up in 4.5 bits, down in 5.5. Included are corrections of `rank` and `compensation` and the tables
  of `gate_bucket` in 16 bits, and of `previous` and `blend` what is kept of the tokens before: they
  need what all neurons put out, and read gate and up whole for it. Not included is one factor per
  neuron, such as ||down_proj[:, i]||, which nearly every score has: at most 0.2 % of the dense FFN.
- Changes are against the dense model on the same windows, ± one *paired* standard error, here
  s / √n: where windows are 40 it may be 1.2 times as large ([errors](../methods.md#errors)).
  Differences between selectors below are paired by window too; those of 4 to 12 windows are rough.

Why they fail, or do not:

- `random`, `static`, `previous`: which neurons matter changes from token to token.
- `gate`, `gate_bucket`: much of what matters is in `up_proj`, and knowing the gate does not tell
  it. Buckets of the gate's value find no more neurons than the mean does, though their loss is
  smaller on SmolLM2 and Gemma-3-270M; on Qwen2.5-Coder it is larger.
- `lowbit`: errors of the bits hardly depend on the neuron's size, so that they should harm the
  choice only around the threshold (not measured). Two bits of each cost five to eight times what
  the exact score does, three bits 1.7 to 2.4 times (on 40 windows). At equal bytes three bits of
  both choose better than the whole gate with two bits of up.
- `lowrank`: the weights are not of low rank, even on the inputs that occur. On SmolLM2, whose
  d_model is 576, a product of rank 256 costs more bytes than three bits of gate and up and loses
  nearly four times as much.
- `ahead`: a linear map knows a layer's input from the one before it only so far that all bits of
  gate and up choose worse than two bits on the true input. To fetch neurons from a disk in time, of
  which it misses a quarter, it was not tried.
- `blend`: the last token's magnitudes and the static prior take about a third off the loss of a
  product of low rank on Qwen2.5-Coder and Gemma-3-270M, little on SmolLM2; once the gate is exact,
  0.62 ± 0.05 % of PPL on Qwen2.5-Coder (4 windows) and nothing on the others.
- `learned`: networks of rank 64 start from the product of low rank and learn the choice from
  300,000 tokens of C4; one training each, on SmolLM2. Its own figures, which are not kept: from
  +155 % to +43 % of PPL on held-out C4, with the exact gate to +15 %, where training stops early.
  On WikiText both stay behind products that were fitted on WikiText (`lowrank`), and these behind
  as many bits of the weights, which know of any text.
- `teal_relative`, `wina_uniform` (below, on SmolLM2): inputs of all seven projections set to zero.
  Of the first's, 10 % cost +0.04 ± 0.06 %, which is no change that 12 windows can tell, but 0.0016
  ± 0.0001 nats; 20 % cost +1.38 ± 0.25 %. An input is a column of a matrix that lies by rows, one
  per neuron, but for `down_proj`, whose inputs the selectors already cut; only attention's weights
  could lie otherwise, and a tenth of these is 1 to 2 % of a model's bytes: not in the engine.
- `compensation`: an affine map of the input takes a third to a half off the loss of SmolLM2 and
  Gemma-3-270M where the choice is bad (`gate`): what the dropped neurons would have added is mostly
  not a linear function of the input. Where it is good, it takes off 0.4 ± 0.4 % of PPL on either,
  which 7 and 12 windows do not tell from nothing, though KL falls. On Qwen2.5-Coder, on 4 windows,
  it lowers the divergence of `gate` and does not lower its loss, and raises the loss of three bits.
- `rank`: on SmolLM2 and Gemma-3-270M a correction of rank 16 of two bits' error is worth half to
  three quarters of the third bit, and costs more bytes than that; on Qwen2.5-Coder it is worth
  little.
- `cett=1`: on Qwen2.5-Coder budgets that differ by layer and token halve what selection costs (40
  windows). On the other two a shared threshold costs more than k per token; why was not measured.
"""


def full(name: str) -> str:
    """The name by which fallow finds a selector of this file."""
    bare, colon, options = name.partition(":")
    if bare in ("gate", "lowbit") and "compensation=" not in options:
        return name
    return RESEARCH.get(bare, bare) + colon + options


def short(name: str) -> str:
    """The name in this file of what fallow finds by another."""
    found = (bare for bare, long in RESEARCH.items() if f"{name}:".startswith(f"{long}:"))
    bare = next(found, None)
    return name if bare is None else bare + name.removeprefix(RESEARCH[bare])


def train_all(name: str) -> list[Any]:
    """The networks of TRAINED, on C4; those that are there are not trained again."""
    import fallow
    from fallow.research.learned import Trained
    from fallow.research.training import train

    folder = RESULTS / "trained" / name / "plans"
    folder.mkdir(parents=True, exist_ok=True)
    model = fallow.load(name)
    for rule in TRAINED:
        path = folder / f"{rule}.trained"
        if not path.exists():
            text = DATA / "calibration" / "c4.txt"
            train(model, path, rank=64, gate="gate=1" in rule, text=text, sparsity=SPARSITY)
    return [Trained.load(folder / f"{rule}.trained") for rule in TRAINED]


def report() -> str:
    parts = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*/*/table.json")):
        table = json.loads(path.read_text())
        where = json.loads((path.parent / "machine.json").read_text())
        lines = [
            f"## {path.parent.name}, {path.parent.parent.name}\n",
            f"Dense PPL {table[0]['ppl']:.2f} ± {table[0]['ppl_se']:.2f}, {table[0]['windows']} "
            f"windows; {machine_line(where)}.\n",
            "| selector | S(inter) | recall | FFN bytes | PPL change % | KL nats/token |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in table[1:]]
        figure = path.with_name("pareto.svg")
        if figure.exists():
            lines.append(f"\n![Bytes against PPL](../../{figure.relative_to(ROOT)})")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(row: dict[str, Any]) -> str:
    recall, read = (f"{row[k]:.3f}" if k in row else "" for k in ("recall", "ffn_bytes"))
    return (
        f"| `{short(row['rule'])}` | {row['achieved_sparsity']:.3f} | {recall} "
        f"| {read} | {row['ppl_change_percent']:+.2f} ± {row['ppl_change_se']:.2f} "
        f"| {row['kl_to_dense']:.4f} ± {row['kl_se']:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--inputs", action="store_true")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        if arguments.inputs:
            windows = WINDOWS_OF_ALL[name]
            measure(name, RESULTS / "inputs", INPUTS, INPUT_SPARSITIES, (), windows)
            continue
        measure(name, RESULTS / "best", (*FRAME[:2], *BEST), (SPARSITY,), (), WINDOWS)
        trained = train_all(name) if arguments.trained else ()
        rules = [*map(full, ALL), *(each.selector for each in trained)]
        windows = WINDOWS_OF_ALL.get(name, WINDOWS)
        measure(name, RESULTS / "all", rules, (SPARSITY,), (), windows, trained)
    if arguments.report:
        (ROOT / "docs" / "results" / "selectors.md").write_text(report())


if __name__ == "__main__":
    main()
