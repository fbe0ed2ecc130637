"""Laws: the eleven published curves fitted anew, whether intervals cover, and models of our own.

Published curves and coverage take some ten minutes of one core; each model of ours forty minutes of
two, the large ones hours, minutes with a GPU. A stopped training goes on:

    python benchmarks/laws.py published coverage
    python benchmarks/laws.py train    # all of OWN, one after another; `train relu` for one
    python benchmarks/laws.py keep     # the ReLU model in bfloat16, as tests/data/relu has it
    python benchmarks/laws.py engine   # decode of the ReLU model, sparse against dense
    python benchmarks/laws.py --report    # writes docs/results/laws.md
"""

import argparse
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tradeoff import DATA, ROOT, machine_line, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "laws"
MODELS = RESULTS / "models"
TEXT = DATA / "corpus" / "eltec-eng.txt.xz"
KEPT = ROOT / "tests" / "data" / "relu"
MOST_DROPPED = 12  # points of the warm-up that the published fit may have left out
# Curves of known parameters for coverage: as the published ones, with noise of their size.
TRUE = {
    "relu": ({"alpha": 0.9, "c": 0.02, "b": -3.2, "A0": 0.07}, 3e-4),
    "silu": ({"alpha": 0.8, "c": 0.25, "A0": 0.385}, 8e-4),
}
THREADS, PROMPT, NEW, ENGINE_RUNS = 1, 64, 256, 9
TRIALS, POINTS, SPAN = 250, 32, (3.0, 250.0)


def steps() -> dict[str, Any]:
    return {"published": published, "coverage": coverage, "keep": keep, "engine": engine}


def own() -> dict[str, Any]:
    """Trainings: pairs of equal size and data, and shapes of equal size."""
    from fallow.laws.training import Settings

    base = Settings(tokens=40_000_000)
    large = replace(
        base, hidden_size=512, layers=8, intermediate_size=1280, learning_rate=1.5e-3
    )  # 24 M parameters
    silu = {"activation": "silu"}
    return {
        "relu": base,
        "silu": replace(base, **silu),
        # How far does a seed move the curve?
        "relu-1": replace(base, seed=1),
        "silu-1": replace(base, seed=1, **silu),
        "relu-2": replace(base, seed=2),
        "silu-2": replace(base, seed=2, **silu),
        "relu-large": large,
        "silu-large": replace(large, **silu),
        # With "relu", d_model / L of 12, 38, 85 and 160; 2.1 to 2.4 M parameters.
        "deep": replace(base, hidden_size=128, layers=11, intermediate_size=320),
        "wide": replace(base, hidden_size=256, layers=3, intermediate_size=640),
        "widest": replace(base, hidden_size=320, layers=2, intermediate_size=800),
    }


def run(name: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    record_machine(RESULTS / "machine.json")
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(steps()[name](), indent=1) + "\n")


# Published curves --------------------------------------------------------------------------------


def published() -> list[dict[str, Any]]:
    """Each curve from where the refit comes closest to the published parameters."""
    from fallow.laws.advice import PUBLISHED
    from fallow.laws.curves import load_curve
    from fallow.laws.fitting import fit_law
    from fallow.laws.forms import FORMS, fit

    rows = []
    for law in PUBLISHED:
        form = FORMS[law.activation]
        curve = load_curve(DATA / "laws" / f"{law.name.split()[1].lower()}_{law.activation}.txt")

        def distance(drop: int, law: Any = law, curve: Any = curve, form: Any = form) -> float:
            used = curve.without_first(drop)
            found = fit(form, used.x, used.ratio).params
            return sum(abs(np.log(max(found[k], 1e-9) / law.params[k])) for k in ("alpha", "A0"))

        drop = min(range(MOST_DROPPED + 1), key=distance)
        used = curve.without_first(drop)
        theirs = form.values(law.params, used.x)
        rows.append(
            {
                "name": law.name,
                "published": law.params,
                "published_mae": float(np.abs(theirs - used.ratio).mean()),
                "published_rmse": float(np.sqrt(((theirs - used.ratio) ** 2).mean())),
                "fit": fit_law(curve, law.activation, drop_first=drop).to_json(),
            }
        )
        print(law.name, drop, flush=True)
    return rows


def coverage() -> dict[str, Any]:
    """How often 95 % intervals hold the truth, on curves of known parameters."""
    from fallow.laws.curves import TOKENS, Curve
    from fallow.laws.fitting import autocorrelation, profile
    from fallow.laws.forms import FORMS, fit

    x = np.geomspace(*SPAN, POINTS)
    found: dict[str, Any] = {}
    for name, (params, noise) in TRUE.items():
        form = FORMS[name]
        covered = dict.fromkeys(params, 0)
        for seed in range(TRIALS):
            rng = np.random.default_rng(seed)
            curve = Curve(
                name, TOKENS, x, form.values(params, x) + noise * rng.standard_normal(POINTS)
            )
            best = fit(form, x, curve.ratio)
            rho = autocorrelation(curve.ratio - best(x))
            for parameter, value in params.items():
                low, high = profile(best, curve, parameter, rho)
                covered[parameter] += low <= value <= high
        found[name] = {p: count / TRIALS for p, count in covered.items()}
        print(name, found[name], flush=True)
    return found


# Models of our own -------------------------------------------------------------------------------


def train_one(name: str) -> None:
    from fallow.laws.training import train

    report = train(MODELS / name, TEXT, own()[name])
    folder = RESULTS / "own"
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / f"{name}.machine.json")
    kept = report.to_json() | {
        "path": name,
        "curve": json.loads(Path(report.curve).read_text()),
        "frequencies": frequencies(MODELS / name),
    }
    (folder / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def frequencies(folder: Path) -> dict[str, list[float]]:
    """Sorted firing frequencies of the first, middle and last layer, at a hundred places."""
    checkpoint = max((folder / "checkpoints").iterdir(), key=lambda p: int(p.name))
    with np.load(checkpoint / "profile.npz") as file:
        rates = file["firing_frequency"]
    layers = {"first": 0, "middle": len(rates) // 2, "last": len(rates) - 1}
    places = np.linspace(0, rates.shape[1] - 1, 100).round().astype(int)
    return {name: np.sort(rates[i])[places].round(4).tolist() for name, i in layers.items()}


def keep() -> dict[str, Any]:
    """Writes the ReLU model where tests find it: the naturally sparse model, 5 MB."""
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(MODELS / "relu", dtype=torch.bfloat16)
    module.save_pretrained(KEPT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODELS / "relu" / name, KEPT / name)
    weights = (KEPT / "model.safetensors").read_bytes()
    return {"sha256": hashlib.sha256(weights).hexdigest(), "mb": len(weights) / 1e6}


def engine() -> dict[str, Any]:
    """Decode of the ReLU model under rule `relu` against its own dense decode, alternating."""
    import fallow
    from fallow.bench import run_in_turn
    from fallow.calibration import calibrate
    from fallow.engine import Engine
    from fallow.laws.training import prepare
    from fallow.text import load_text

    corpus = prepare(MODELS / "relu", load_text(TEXT, "calibration"), own()["relu"])
    plan = calibrate(fallow.load(str(KEPT)), "relu", knob=0.0, text=corpus.held_out, measure=False)
    packed = MODELS / "relu" / "packed.gguf"
    fallow.pack(str(KEPT), packed)
    engine = Engine(packed, threads=THREADS, context=PROMPT + NEW)
    ids = engine.tokenizer.encode(corpus.held_out.content)[: PROMPT + NEW]
    runs = run_in_turn(engine, {"dense": None, "relu": plan}, ids, PROMPT, ENGINE_RUNS)
    hashes = []
    for each in (None, plan):  # cutting zeros changes no logit
        engine.use_plan(each)
        engine.reset()
        logits = engine.forward(ids[:64])
        hashes.append(float(np.abs(logits).max()))
    return {"runs": runs, "largest_logit": hashes, "file_mb": packed.stat().st_size / 1e6}


# Report ------------------------------------------------------------------------------------------


INTRODUCTION = f"""# Laws

`benchmarks/laws.py` does it; [laws](../laws.md) says what is what. D is in 1e9 tokens.

## The published curves

Each curve of arXiv:2411.02335 from the point where the refit comes closest to the published
parameters (**drop**: points left out before it, at most {MOST_DROPPED}). Intervals are 95 %, by
profile likelihood; published values outside are marked. Errors are mean absolute ones, points."""


NOTES = """
- **SiLU 0.8B**: 13 of the last 14 points, from 119e9 tokens on, lie above the published law, which
  seems to be of fewer points than are public: points 8 to 19 alone give 0.99, 0.55 and 0.383.
- **ReLU 2.4B**: the published law is of up to 800e9 tokens, the public curve ends at 291e9, which
  does not tell the limit. A fit without the first 3 points is that of the authors' data repository
  (2.11, -3.82, 9.05e-6, 0.0712).
- **ReLU 0.2B**: the refit is the published one to three digits. Its mean error is larger by 0.0004
  points since parameters were rounded, its mean square, which both minimise, is smaller.
- Where the limit is not identified, A0 may be anything down to 0 (ReLU 0.4B, 2.4B) or up to 0.63
  (SiLU 0.1B): "the limit" of these models is a property of the form that was fitted, not of the
  data. Only a handful of the curves' parameters are known to better than a factor of two.
- No form extrapolates best. The published one does in 2 of 11 curves; a plain or shifted power law
  in 5, an exponential, which has no tail at all, in 3. What comes after another two thirds of the
  training is predicted to some 0.03 to 0.2 points by any of the better ones."""


def report() -> str:
    lines = [INTRODUCTION]
    if (RESULTS / "published.json").exists():
        lines += _published_lines(json.loads((RESULTS / "published.json").read_text()))
        lines.append(NOTES)
    if (RESULTS / "coverage.json").exists():
        lines += _coverage_lines(json.loads((RESULTS / "coverage.json").read_text()))
    made = {n: RESULTS / "own" / f"{n}.json" for n in own()}
    found = {n: json.loads(path.read_text()) for n, path in made.items() if path.exists()}
    if found:
        lines += _own_lines(found)
    if (RESULTS / "keep.json").exists():
        kept = json.loads((RESULTS / "keep.json").read_text())
        lines.append(
            f"\nThe model `relu` is kept in bfloat16, {kept['mb']:.1f} MB, as `tests/data/relu` "
            f"(SHA-256 `{kept['sha256'][:16]}`); `benchmarks/laws.py train relu` and then `keep` "
            "make it again in 40 minutes of two cores; the first five checkpoints came out the "
            "same with one thread as with two."
        )
    if (RESULTS / "engine.json").exists():
        lines += _engine_lines(json.loads((RESULTS / "engine.json").read_text()))
    lines.append(f"\n{machine_line(json.loads((RESULTS / 'machine.json').read_text()))}.")
    return "\n".join(lines) + "\n"


def _published_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "\n| curve | drop | parameter | published | refit | 95 % | limit identified |\n"
        "|---|---|---|---|---|---|---|"
    ]
    for row in rows:
        law = row["fit"]
        for i, (name, value) in enumerate(row["published"].items()):
            low, high = law["intervals"][name]
            mark = "" if low <= value <= high else " **outside**"
            head = (row["name"], law["dropped"]) if i == 0 else ("", "")
            said = ("yes" if law["identified"] else "no") if i == 0 else ""
            lines.append(
                f"| {head[0]} | {head[1]} | {name} | {value:g}{mark} | {law['params'][name]:.4g} "
                f"| {low:.4g} to {high:.4g} | {said} |"
            )
    rivals = [r["form"] for r in rows[0]["fit"]["rivals"] if r["form"] not in ("relu", "silu")]
    lines.append(
        "\nMean errors: of the published parameters and of the refit on the points used (and the "
        "root of the mean square, which the refit minimises); then of forms fitted to the first "
        "60 % of the points on the other 40 %, the best in bold.\n\n"
        f"| curve | published | refit | law | {' | '.join(rivals)} |\n"
        + "|---" * (4 + len(rivals))
        + "|"
    )
    for row in rows:
        law = row["fit"]
        errors = {r["form"]: 100 * r["extrapolation_mae"] for r in law["rivals"]}
        own_error = errors.pop(law["form"])
        ordered = [own_error, *(errors.get(name) for name in rivals)]
        best = min(e for e in ordered if e is not None)
        cells = [
            "same" if e is None else (f"**{e:.3f}**" if e == best else f"{e:.3f}") for e in ordered
        ]
        theirs = f"{100 * row['published_mae']:.4f} ({100 * row['published_rmse']:.4f})"
        lines.append(
            f"| {row['name']} | {theirs} | {100 * law['mae']:.4f} ({100 * law['rmse']:.4f}) "
            f"| {' | '.join(cells)} |"
        )
    return lines


def _coverage_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"\n## Do the intervals cover?\n\n{TRIALS} curves of {POINTS} points with known parameters "
        "and noise as large as the published curves have: how often the 95 % profile interval "
        "holds the truth.\n\n| form | parameters | covered |\n|---|---|---|"
    ]
    for name, shares in found.items():
        params = ", ".join(f"{p} {v:g}" for p, v in TRUE[name][0].items())
        covered = ", ".join(f"{p} {share:.1%}" for p, share in shares.items())
        lines.append(f"| {name} | {params} | {covered} |")
    return lines


def _own_lines(found: dict[str, Any]) -> list[str]:
    settings = own()
    lines = [
        "\n## Models of our own\n\nTrained on English novels (ELTeC), vocabulary 2048, windows of "
        "256; `fallow law train` with these settings and seed 0. A is the activation ratio at +1 % "
        "PPL (rule `cett`) before the learning rate decays, zeros are those of `inter`.\n\n"
        "| model | activation | d / layers / d_ff | M parameters | M tokens | epochs "
        "| A by checkpoint | zeros, last | dead, last | loss, last | after the decay: A, loss |\n"
        + "|---" * 11
        + "|"
    ]
    for name, r in found.items():
        s, curve = settings[name], r["curve"]
        ratios = ", ".join(f"{v:.3f}" for v in curve["activation_ratio"])
        lines.append(
            f"| {name} | {s.activation} | {s.hidden_size} / {s.layers} / {s.intermediate_size} "
            f"| {r['non_embedding_parameters'] / 1e6:.2f} | {r['tokens'] / 1e6:.0f} "
            f"| {r['epochs']:.2f} | {ratios} | {curve['zero_ratio'][-1]:.3f} "
            f"| {curve['dead'][-1]:.2%} | {curve['validation_loss'][-1]:.3f} "
            f"| {r['activation_ratio']:.3f}, {r['validation_loss']:.3f} |"
        )
    lines.append(
        "\nSHA-256 of the weights: "
        + ", ".join(f"{name} `{r['sha256'][:16]}`" for name, r in found.items())
        + "."
    )
    return lines


def _engine_lines(r: dict[str, Any]) -> list[str]:
    pairs = list(zip(r["runs"]["relu"], r["runs"]["dense"], strict=True))
    ratios = [a["decode_tps"] / b["decode_tps"] for a, b in pairs]
    read = median(a["bytes_per_token"] / b["bytes_per_token"] for a, b in pairs)
    return [
        f"\n## The ReLU model in the engine\n\n{r['file_mb']:.1f} MB packed, {THREADS} thread(s), "
        f"decode with rule `relu` over dense, {ENGINE_RUNS} alternating runs: "
        f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}); idle neurons "
        f"{median(a['sparsity'] for a, _ in pairs):.1%}, bytes read per token {read:.2f} of dense."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", help="published, coverage, train [NAMES], engine")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    wanted = arguments.steps
    if wanted[:1] == ["train"]:
        for name in wanted[1:] or own():
            train_one(name)
    else:
        for name in wanted:
            run(name)
    if arguments.report:
        (ROOT / "docs" / "results" / "laws.md").write_text(report())


if __name__ == "__main__":
    main()
