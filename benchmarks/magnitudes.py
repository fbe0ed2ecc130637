"""Weights and activations of unmodified models, as arXiv:2412.12178 looks at them (III).

How small they are, how many are exactly zero, how the layers differ in scale, and how much
thresholds depend on how much text they come from. Of the WikiText-2 raw test text, which is what
that paper looks at; nothing is fitted here. A minute per model, or some:

    python benchmarks/magnitudes.py relu smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/magnitudes.py --report    # writes docs/results/magnitudes.md
"""

import json
from typing import Any

import numpy as np

from engine import TEST
from tradeoff import ROOT, keeper, machine_line, run_and_report

RESULTS = ROOT / "benchmarks" / "results" / "magnitudes"
OWN = {"relu": ROOT / "tests" / "data" / "relu"}  # the model that laws.py trained
OWN_CONTEXT = 256
CONTEXT, WINDOWS, FEW = 1024, 8, 2  # thresholds of all windows against those of the first few
TAPS = ("gate_pre", "up", "ffn_out")  # what rule `percentile` cuts
TARGET = 0.5
NEARLY_ZERO = 1e-7
# Magnitudes of the gate that the paper's Figures 6 and 7 speak of: layer 0, and layers 1 to 3.
FIRST, NEXT = 0.1, 0.2
# Those of Figure 5, of gate and up together, and the second of Figure 7, of the gate.
FUSED_FIRST, FUSED_NEXT, GATE_NEXT = 0.05, 0.2, 0.25


def run(name: str) -> None:
    import fallow

    keep = keeper(RESULTS / name)
    model = fallow.load(OWN.get(name, name))
    keep("weights", lambda: weights(model))
    keep("activations", lambda: activations(model))
    keep("fused", lambda: fused(model))


def weights(model: Any) -> dict[str, Any]:
    """Shares of all weights in the layers' projections; the FFN's share of the model's weights."""
    from fallow.models.capture import Histograms

    counts, zeros, ffn = 0, 0, 0
    small = 0.0
    for layer in model.layers:
        for projection, module in layer.projections.items():
            found = Histograms(projection, 1)
            found.add(0, module.weight)
            counts += module.weight.numel()
            zeros += int(found.zeros[0])
            small += below(found.counts[0], NEARLY_ZERO) * module.weight.numel()
            if projection in (*layer.ffn_inputs, "down_proj"):
                ffn += module.weight.numel()
    everything = sum(p.numel() for p in model.module.parameters())  # tied ones once
    return {
        "zeros": zeros / counts,
        "below_1e-7": small / counts,
        "weights": everything,
        "ffn_share": ffn / everything,
    }


def activations(model: Any) -> dict[str, Any]:
    """Of the dense model; thresholds of FEW windows beside those of all."""
    from fallow.checkpoints.text import load_text
    from fallow.models.capture import Histograms
    from fallow.models.taps import attach

    cut = model.windows(load_text(TEST, "evaluation"), context(model), WINDOWS)
    histograms = {tap: Histograms(tap, len(model.layers)) for tap in (*TAPS, "inter")}
    thresholds: list[np.ndarray] = []
    for number, window in enumerate(cut, start=1):
        with attach(model.layers, {tap: h.add for tap, h in histograms.items()}):
            model.hidden(window[None])
        if number in (FEW, WINDOWS):
            thresholds.append(
                np.array(
                    [
                        [histograms[tap].quantile(i, TARGET) for i in range(len(model.layers))]
                        for tap in TAPS
                    ]
                )
            )
    few, all_of_them = thresholds
    gate, inter = histograms["gate_pre"], histograms["inter"]
    return {
        "dtype": model.dtype_name,
        "zeros": (inter.zeros / inter.counts.sum(axis=1)).tolist(),
        "thresholds": {tap: all_of_them[i].tolist() for i, tap in enumerate(TAPS)},
        "first_below": below(gate.counts[0], FIRST),
        "next_below": [below(gate.counts[i], NEXT) for i in (1, 2, 3)],
        "pooled_half": gate.pooled_quantile(0.5),
        "pooled_60": gate.pooled_quantile(0.6),
        "few_off": np.abs(few / all_of_them - 1).tolist(),  # (taps, layers)
    }


def fused(model: Any) -> dict[str, Any]:
    """Gate and up in one distribution, as a model with fused projections has them."""
    from fallow.checkpoints.text import load_text
    from fallow.models.capture import Histograms
    from fallow.models.taps import attach

    both, gate = (Histograms(name, len(model.layers)) for name in ("gate_pre and up", "gate_pre"))
    taps: list[dict[str, Any]] = [{"gate_pre": both.add, "up": both.add}, {"gate_pre": gate.add}]
    for window in model.windows(load_text(TEST, "evaluation"), context(model), WINDOWS):
        with attach(model.layers, taps[0]), attach(model.layers, taps[1]):
            model.hidden(window[None])
    return {
        "first_below": below(both.counts[0], FUSED_FIRST),
        "next_below": [below(both.counts[i], FUSED_NEXT) for i in (1, 2, 3)],
        "pooled_half": both.pooled_quantile(0.5),
        "gate_next_below": [below(gate.counts[i], GATE_NEXT) for i in (1, 2, 3)],
    }


def context(model: Any) -> int:
    """Windows no longer than what a model of our own was trained on."""
    return OWN_CONTEXT if model.name in map(str, OWN.values()) else CONTEXT


def below(counts: np.ndarray, value: float) -> float:
    """The share of magnitudes counted in bins that end at most at `value`."""
    from fallow.common.metrics import bin_edges

    return float(counts[bin_edges()[1:] <= value].sum() / counts.sum())


INTRODUCTION = f"""# Magnitudes

What arXiv:2412.12178 looks at in unmodified models (III), on ours: `benchmarks/magnitudes.py` does
it. Weights are those of all projections of the layers, dequantised from the GGUF (4 and more bits),
so that zeros are also those of its grid. Activations are of {WINDOWS} windows of {CONTEXT} tokens
of the WikiText-2 raw test text, |gate_pre| unless said; one text, no error. `relu` is the model of
2 million weights that [laws](laws.md) trained, in windows of {OWN_CONTEXT}.

- **zeros**: exact zeros of `inter`, the layer with the fewest and the one with the most.
- **half below**, **60 % below**: where one cut for all layers would have to be.
- **few windows**: how far the {TARGET:.0%} percentiles of {FEW} windows are from those of
  {WINDOWS}, relatively, over all layers and the three outputs that `percentile` cuts.
"""


def report() -> str:
    weight_rows = ["| model | weights, M | FFN | exactly 0 | below 1e-7 |", "|---|---|---|---|---|"]
    rows = [
        f"| model | zeros | below {FIRST} in layer 0 | below {NEXT} in layers 1, 2, 3 | half below "
        "| 60 % below | few windows: mean, most |",
        "|---|---|---|---|---|---|---|",
    ]
    medians = ["| model | 0 | 1 | 2 | 3 | middle | last |", "|---|---|---|---|---|---|---|"]
    together = [
        f"| model | below {FUSED_FIRST} in layer 0 | below {FUSED_NEXT} in layers 1, 2, 3 "
        f"| half below | gate alone, below {GATE_NEXT} in layers 1, 2, 3 |",
        "|---|---|---|---|---|",
    ]
    wheres = []
    for path in sorted(RESULTS.glob("*/result.json")):
        name, result = path.parent.name, json.loads(path.read_text())
        wheres.append(json.loads((path.parent / "machine.json").read_text()))
        w, a = result["weights"], result.get("activations")
        weight_rows.append(
            f"| {name} | {w['weights'] / 1e6:.0f} | {w['ffn_share']:.1%} | {w['zeros']:.2e} "
            f"| {w['below_1e-7']:.2e} |"
        )
        if a is None:
            continue  # not finished
        off, gate = np.array(a["few_off"]), a["thresholds"]["gate_pre"]
        nearby = ", ".join(f"{share:.1%}" for share in a["next_below"])
        rows.append(
            f"| {name}, {a['dtype']} | {min(a['zeros']):.1e} to {max(a['zeros']):.1e} "
            f"| {a['first_below']:.1%} | {nearby} | {a['pooled_half']:.3f} | {a['pooled_60']:.3f} "
            f"| {off.mean():.1%}, {off.max():.1%} |"
        )
        some = [gate[i] for i in (0, 1, 2, 3, len(gate) // 2, -1)]
        if "fused" in result:
            f = result["fused"]
            near, gates = (
                ", ".join(f"{share:.1%}" for share in f[key])
                for key in ("next_below", "gate_next_below")
            )
            together.append(
                f"| {name} | {f['first_below']:.1%} | {near} | {f['pooled_half']:.3f} | {gates} |"
            )
        medians.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in some)} |")
    return (
        "\n".join(
            [
                INTRODUCTION,
                "## Weights\n",
                *weight_rows,
                "\n## Activations\n",
                *rows,
                "\nMedian of |gate_pre| by layer, the 50 % threshold:\n",
                *medians,
                "\nGate and up in one distribution, as models with fused projections have them:\n",
                *together,
                f"\n{machine_line(*wheres)}.",
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    run_and_report(__doc__, run, report, "magnitudes.md")
