"""Whether one measured threshold of a layer says what its others cost, as `optimize` has it.

Of some layers, KL(dense || cut) per unit of the energy that a threshold leaves out, over the same
of the threshold that is measured; thresholds are fitted on the beginning of the WikiText-2
validation text, and KL is measured on another part of it. Minutes:

    python benchmarks/layer_costs.py smollm2            # every layer
    python benchmarks/layer_costs.py qwen2.5-1.5b 9     # every ninth
    python benchmarks/layer_costs.py --report           # writes docs/results/layer_costs.md
"""

import argparse
import json
from typing import Any

import numpy as np

from engine import THREADS, VALIDATION, machine
from tradeoff import ROOT, machine_line, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "layer_costs"
SPARSITIES = {"gate_act": (0.25, 0.4), "inter": (0.3, 0.5, 0.7, 0.85)}
CONTEXT, WINDOWS = 256, 6  # of which the first WINDOWS - 2 are fitted on


def run(name: str, step: int) -> None:
    import fallow
    from fallow.checkpoints.text import load_text
    from fallow.optimization.candidates import GRID, PROBED, Candidates
    from fallow.optimization.costs import Dense

    folder = RESULTS / name / machine()
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    packed = folder / "packed.gguf"
    if not packed.exists():
        fallow.pack(name, packed)
    model = fallow.load(name, "float32")
    engine = fallow.Engine(packed, plan=False, threads=THREADS, context=CONTEXT)
    text = load_text(VALIDATION, "calibration")
    windows = model.windows(text, CONTEXT, WINDOWS)
    candidates = Candidates(model, windows[:-2], text, engine, "bytes")
    dense = [Dense(engine.logits(window)) for window in windows[-2:]]

    def cost(stage: str, layer: int, index: int) -> tuple[float, float]:
        """KL in nats, and that per unit of energy."""
        choice = candidates.nothing()
        choice[stage][layer] = index
        engine.use_plan(candidates.plan(choice, 0.0))
        pairs = zip(dense, windows[-2:], strict=True)
        kl = float(np.mean([d.divergence(engine.logits(window)) for d, window in pairs]))
        return kl, kl / float(candidates.energies[stage][layer, index])

    rows: list[dict[str, Any]] = []
    for layer in range(0, candidates.n_layers, step):
        _, measured = cost("inter", layer, PROBED)
        for stage, sparsities in SPARSITIES.items():
            for sparsity in sparsities:
                kl, per_energy = cost(stage, layer, int(np.abs(GRID - sparsity).argmin()))
                rows.append({"layer": layer, "stage": stage, "sparsity": sparsity, "kl": kl})
                rows[-1]["ratio"] = per_energy / measured
    (folder / "result.json").write_text(json.dumps(rows, indent=1) + "\n")


INTRODUCTION = """# What layers cost

`fallow optimize` measures one threshold of each layer, 70 % of `inter`, and takes its others to
cost as much more or less as they leave out energy ([how](../methods.md)). How well that holds: KL
to dense over energy, over the same of the measured threshold; mean over layers and standard
deviation. Thresholds and KL come from different parts of the WikiText-2 validation text. Where KL
is about 1e-4 nats it is the rounding of prefill.
"""


def report() -> str:
    lines = [
        INTRODUCTION,
        "| model | stage | sparsity | KL, nats, mean over layers | ratio | layers |",
        "|---|---|---|---|---|---|",
    ]
    wheres = []
    for path in sorted(RESULTS.glob("*/*/result.json")):
        rows = json.loads(path.read_text())
        wheres.append(json.loads((path.parent / "machine.json").read_text()))
        for stage, sparsities in SPARSITIES.items():
            for sparsity in sparsities:
                here = [r for r in rows if (r["stage"], r["sparsity"]) == (stage, sparsity)]
                ratios, kl = ([r[key] for r in here] for key in ("ratio", "kl"))
                lines.append(
                    f"| {path.parts[-3]} | {stage} | {sparsity:.0%} | {np.mean(kl):.1e} "
                    f"| {np.mean(ratios):.2f} ± {np.std(ratios):.2f} | {len(here)} |"
                )
    lines.append(f"\n{machine_line(*wheres)}." if wheres else "\nNo results yet.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("step", nargs="?", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if arguments.model:
        run(arguments.model, arguments.step)
    if arguments.report:
        (ROOT / "docs" / "results" / "layer_costs.md").write_text(report())


if __name__ == "__main__":
    main()
