"""Laws: the eleven published curves fitted anew, whether intervals cover, and models of our own.

Published curves and coverage take some ten minutes of one core; each model of ours forty minutes of
two, the large ones hours, minutes with a GPU. A stopped training goes on:

    python benchmarks/laws.py published coverage
    python benchmarks/laws.py train     # all of own(), one after another; `train relu` for one
    python benchmarks/laws.py fitted    # the law of each, and their figure
    python benchmarks/laws.py keep     # the ReLU model in bfloat16, as tests/data/relu has it
    python benchmarks/laws.py engine   # decode of the ReLU model, sparse against dense
    python benchmarks/laws.py --report    # writes docs/results/laws.md
"""

import argparse
import hashlib
import itertools
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
LAST_POINTS = 3  # of a curve, for what it came to
TRIALS, POINTS, SPAN = 150, 32, (3.0, 250.0)
FEW_DRAWS = 20  # of the bootstrap, whose intervals no page has
NOISES = (0.0, 0.5)  # lag-1 autocorrelation, AR(1)


def steps() -> dict[str, Any]:
    return {
        "published": published,
        "coverage": coverage,
        "fitted": fitted,
        "keep": keep,
        "engine": engine,
    }


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
                "fit": fit_law(curve, law.activation, drop_first=drop, draws=FEW_DRAWS).to_json(),
                "all_points": fit_law(curve, law.activation, draws=FEW_DRAWS).to_json(),
            }
        )
        print(law.name, drop, flush=True)
    return rows


def coverage() -> dict[str, Any]:
    """How often the test that 95 % intervals come of accepts the truth, on curves that have one."""
    from fallow.laws.curves import TOKENS, Curve
    from fallow.laws.fitting import autocorrelation, rejection
    from fallow.laws.forms import FORMS, fit

    x = np.geomspace(*SPAN, POINTS)
    found: dict[str, Any] = {}
    for name, correlation in itertools.product(TRUE, NOISES):
        form, (params, size) = FORMS[name], TRUE[name]
        covered = dict.fromkeys(params, 0)
        for seed in range(TRIALS):
            noise = size * correlated(np.random.default_rng(seed), POINTS, correlation)
            curve = Curve(name, TOKENS, x, form.values(params, x) + noise)
            best = fit(form, x, curve.ratio)
            rho = autocorrelation(curve.ratio - best(x), len(params))
            for parameter, value in params.items():
                fixed = fit(form, x, curve.ratio, {parameter: value})
                covered[parameter] += rejection(best, fixed, curve, rho) <= 0
        shares = {p: count / TRIALS for p, count in covered.items()}
        found.setdefault(name, {})[f"{correlation:g}"] = shares
        print(name, correlation, shares, flush=True)
    return found


def correlated(rng: np.random.Generator, n: int, correlation: float) -> np.ndarray:
    """AR(1) noise of variance 1, (n,)."""
    fresh = rng.standard_normal(n)
    fresh[1:] *= np.sqrt(1 - correlation**2)
    return np.array(list(itertools.accumulate(fresh, lambda last, e: correlation * last + e)))


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
    from fallow.calibration.calibrator import calibrate
    from fallow.checkpoints.text import load_text
    from fallow.engine.engine import Engine
    from fallow.laws.training import prepare
    from fallow.measure.speed import run_in_turn

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
profile likelihood; published values outside are marked. The drop favours the published values:
the last column has those outside the intervals of a fit to all points. Errors are mean absolute
ones, points."""


NOTES = """
- **SiLU 0.8B**: 13 of the last 14 points, from 119e9 tokens on, lie above the published law, which
  seems to be of fewer points than are public: points 8 to 19 alone give 0.99, 0.55 and 0.383.
- **ReLU 2.4B**: the published law is of up to 800e9 tokens, the public curve ends at 291e9, which
  does not tell the limit. A fit without the first 3 points is that of the authors' data repository
  (2.11, -3.82, 9.05e-6, 0.0712).
- **ReLU 0.2B**: the refit is the published one to three digits. Its mean error is larger by 0.0004
  points since parameters were rounded, its mean square, which both minimise, is smaller.
- Where the limit is not identified, A0 may be anything down to 0 (ReLU 0.4B, 2.4B) or up to 1
  (SiLU 0.1B): "the limit" of these models is a property of the form that was fitted, not of the
  data. Only a handful of the curves' parameters are known to better than a factor of two.
- No form extrapolates best. The published one does in 2 of 11 curves; a plain or shifted power law
  in 5, an exponential, which has no tail at all, in 3. What comes after another two thirds of the
  training is predicted to some 0.03 to 0.2 points by any of the better ones."""

# Of runs whose every checkpoint had a CETT of its own.
READING = """
What these runs say of arXiv:2411.02335, with a fiftieth to a thousandth of its parameters and less
than a thousandth of its tokens:

- **Whether the ratio falls with ReLU or rises with SiLU, and to which limit, they do not say**, nor
  how it depends on scale or on width over depth: those laws are of one CETT for all checkpoints,
  and are not fitted to these ratios.
- **ReLU needs less than SiLU** at equal size and data: at the last checkpoint, where each model
  loses the same 1 %, 0.06 to 0.08 against 0.39 to 0.44 (three seeds each), and 0.025 against 0.19
  in the large pair, of one seed.
- **The share of exact zeros grows** in every ReLU model, from two thirds to 81 to 92 %; of the
  large model's neurons a fifth is dead."""


def report() -> str:
    lines = [INTRODUCTION]
    if (RESULTS / "published.json").exists():
        lines += _published_lines(json.loads((RESULTS / "published.json").read_text()))
        lines.append(NOTES)
    if (RESULTS / "coverage.json").exists():
        lines += _coverage_lines(json.loads((RESULTS / "coverage.json").read_text()))
    if found := found_models():
        lines += _own_lines(found)
        if any(own_cett(r["curve"]) for r in found.values()):
            lines.append(READING)
    if (RESULTS / "fitted.json").exists():
        lines += _fitted_lines(json.loads((RESULTS / "fitted.json").read_text()))
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
        "\n| curve | drop | parameter | published | refit | 95 % | limit identified "
        "| of all points |\n|---|---|---|---|---|---|---|---|"
    ]
    for row in rows:
        law, whole = checked(row["fit"]), checked(row["all_points"])
        for i, (name, value) in enumerate(row["published"].items()):
            low, high = law["intervals"][name]
            mark = "" if low <= value <= high else " **outside**"
            head = (row["name"], law["dropped"]) if i == 0 else ("", "")
            said = ("yes" if law["identified"] else "no") if i == 0 else ""
            least, most = whole["intervals"][name]
            of_all = "" if least <= value <= most else f"**outside** {least:.4g} to {most:.4g}"
            lines.append(
                f"| {head[0]} | {head[1]} | {name} | {value:g}{mark} | {law['params'][name]:.4g} "
                f"| {low:.4g} to {high:.4g} | {said} | {of_all} |"
            )
    reasons = {row["name"]: row["fit"]["warning"] for row in rows}
    lines.append("\nWhy a limit is not identified:\n")
    for name, why in reasons.items():
        if why:
            lines.append(f"- {name}: {why.split(': ')[1].split(';')[0]}.")
    rivals = [r["form"] for r in rows[0]["fit"]["rivals"] if r["form"] not in ("relu", "silu")]
    lines.append(
        "\nMean errors: of the published parameters and of the refit on the points used (and the "
        "root of the mean square, which the refit minimises); then of forms fitted to the first "
        "60 % of the points on the other 40 %, the best in bold, and with a * where it is better "
        "than the law by AICc too.\n\n"
        f"| curve | published | refit | law | {' | '.join(rivals)} |\n"
        + "|---" * (4 + len(rivals))
        + "|"
    )
    for row in rows:
        law = row["fit"]
        errors = {r["form"]: 100 * r["extrapolation_mae"] for r in law["rivals"]}
        best = min(errors.values())
        cells = ["same" if name not in errors else "" for name in (law["form"], *rivals)]
        for i, name in enumerate((law["form"], *rivals)):
            if name in errors:
                mark = "**" if errors[name] == best else ""
                star = "\\*" if name in law["better"] else ""
                cells[i] = f"{mark}{errors[name]:.3f}{mark}{star}"
        theirs = f"{100 * row['published_mae']:.4f} ({100 * row['published_rmse']:.4f})"
        lines.append(
            f"| {row['name']} | {theirs} | {100 * law['mae']:.4f} ({100 * law['rmse']:.4f}) "
            f"| {' | '.join(cells)} |"
        )
    return lines


def _coverage_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"\n## Do the intervals cover?\n\n{TRIALS} curves of {POINTS} points with known parameters "
        "and noise as large as the published curves have, independent or AR(1): how often the test "
        "that 95 % profile intervals come of accepts the truth.\n\n"
        "| form | parameters | correlation of the noise | covered |\n|---|---|---|---|"
    ]
    for name, shares in found.items():
        params = ", ".join(f"{p} {v:g}" for p, v in TRUE[name][0].items())
        for rho, found_shares in shares.items():
            covered = ", ".join(f"{p} {share:.1%}" for p, share in found_shares.items())
            lines.append(f"| {name} | {params} | {rho} | {covered} |")
    return lines


def found_models() -> dict[str, dict[str, Any]]:
    """Trainings by name: finished ones, and the curves of those that were stopped."""
    found = {}
    for name in own():
        whole, part = (RESULTS / "own" / f"{name}{end}" for end in (".json", ".curve.json"))
        if whole.exists():
            found[name] = json.loads(whole.read_text())
        elif part.exists():
            found[name] = {"curve": json.loads(part.read_text())}
    return found


def own_cett(curve: dict[str, Any]) -> bool:
    """Whether every checkpoint was measured at a CETT of its own: not CETT-PPL-1 %."""
    return isinstance(curve["cett"], list)


def checked(law: dict[str, Any]) -> dict[str, Any]:
    """A kept law; FallowError for parameters outside their bounds."""
    from fallow.laws.forms import FORMS

    FORMS[law["form"]].check(law["params"], law["curve"])
    return law


def seeds_of(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Curves of the trainings that differ from this one in the seed alone."""
    settings = own()
    same = [n for n in found if replace(settings[n], seed=0) == replace(settings[name], seed=0)]
    return [found[n]["curve"] for n in same]


def fitted() -> dict[str, Any]:
    """The laws of our own curves at CETT-PPL-1 %, the mean of those that differ in the seed."""
    from fallow.laws.curves import RATIO, TOKENS, Curve
    from fallow.laws.fitting import fit_law

    found, laws = found_models(), {}
    for name in ("relu", "silu", "relu-large", "silu-large"):
        curves = [c for c in seeds_of(name, found) if not own_cett(c)]
        if not curves:
            continue
        x = np.array(curves[0][TOKENS]) / 1e9
        ratio = np.mean([curve[RATIO] for curve in curves], axis=0)
        law = fit_law(Curve(name, TOKENS, x, ratio), own()[name].activation).to_json()
        laws[name] = law | {"seeds": len(curves), "ratio": ratio.tolist()}
    _draw(found)
    return laws


def _draw(found: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    from fallow.laws.curves import RATIO, TOKENS

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, activation in ((left, "relu"), (middle, "silu")):
        for name, r in found.items():
            if name.startswith(activation):
                line = "--" if name.endswith("large") else "-"
                axes.semilogx(r["curve"][TOKENS], r["curve"][RATIO], f"o{line}", label=name, ms=3)
        axes.set(title=f"{activation}, -large has 24 M parameters", xlabel="tokens", ylim=0)
        axes.legend(fontsize=7)
    each = any(own_cett(r["curve"]) for r in found.values())
    left.set_ylabel(f"activation ratio at +1 % PPL{', each at a CETT of its own' if each else ''}")
    for name, r in found.items():
        s = own()[name]
        if s.activation == "relu" and "large" not in name:
            last = r["curve"][RATIO][-LAST_POINTS:]
            x = s.hidden_size / s.layers
            right.errorbar(
                x, np.mean(last), np.ptp(last) / 2, fmt="o", capsize=3, color="tab:blue", ms=4
            )
    right.set(title="relu, 2.1 to 2.4 M parameters", xlabel="d_model / layers", ylim=0)
    figure.savefig(RESULTS / "own.png", dpi=110)


def _own_lines(found: dict[str, Any]) -> list[str]:
    settings = own()
    lines = [
        "\n## Models of our own\n\nTrained on English novels (ELTeC, 19.6 M tokens), vocabulary "
        "2048, windows of 256, with `fallow law train`; -1 and -2 are other seeds. A is the "
        "activation ratio at +1 % PPL, from the first checkpoint (0.7 M tokens) to the last one "
        "before the learning rate decays; zeros are those of `inter`.\n\n"
        f"{_metric_note(found)}\n\n"
        "| model | d / layers / d_ff | M parameters | M tokens | A by checkpoint "
        "| zeros: first, last | dead: first, last | loss, last | after the decay: A, loss |\n"
        + "|---" * 9
        + "|"
    ]
    for name, r in found.items():
        s, curve = settings[name], r["curve"]
        ratios = ", ".join(f"{v:.3f}" for v in curve["activation_ratio"])
        zeros, dead = curve["zero_ratio"], curve["dead"]
        done = "tokens" in r
        tokens = r["tokens"] if done else curve["token_passed"][-1]
        end = f"{r['activation_ratio']:.3f}, {r['validation_loss']:.3f}" if done else "stopped"
        lines.append(
            f"| {name} | {s.hidden_size} / {s.layers} / {s.intermediate_size} "
            f"| {curve['parameters'] / 1e6:.2f} | {tokens / 1e6:.0f} | {ratios} "
            f"| {zeros[0]:.3f}, {zeros[-1]:.3f} | {dead[0]:.1%}, {dead[-1]:.1%} "
            f"| {curve['validation_loss'][-1]:.3f} | {end} |"
        )
    where = [json.loads(p.read_text()) for p in (RESULTS / "own").glob("*.machine.json")]
    gpus = sorted({w["gpu"] for w in where if "gpu" in w})
    lines += [
        f"\n`relu` was trained on two cores, the others on an {', '.join(gpus)}, seven at a time; "
        "the large ones were stopped there when the time on it was up. SHA-256 of the weights: "
        + ", ".join(f"{n} `{r['sha256'][:16]}`" for n, r in found.items() if "sha256" in r)
        + ".\n\n![A by tokens, and by width over depth](../../benchmarks/results/laws/own.png)"
    ]
    return lines


def _metric_note(found: dict[str, dict[str, Any]]) -> str:
    """At which CETT the kept runs were measured."""
    others = {name: r["curve"] for name, r in found.items() if own_cett(r["curve"])}
    if not others:
        return "It is CETT-PPL-1 %: one CETT, found jointly on the last five checkpoints."
    falls = [curve["cett"][0] / curve["cett"][-1] for curve in others.values()]
    error = median(e for curve in others.values() for e in curve["ppl_change_se"])
    which = "all of these runs" if len(others) == len(found) else ", ".join(others)
    return (
        f"**Not CETT-PPL-1 %**: {which} had a CETT searched anew at every checkpoint, which from "
        f"the first to the last falls by {min(falls):.1f} to {max(falls):.1f} times. Early ratios "
        "are of deeper cuts than late ones, and too low beside them. They were measured on the "
        f"text of that search; the 1 % is known to ±{error:.1f} (standard error over windows)."
    )


def _fitted_lines(laws: dict[str, Any]) -> list[str]:
    lines = [
        "\nThe published form fitted to the mean over seeds; 95 % by profile likelihood, errors in "
        "points, extrapolation as above.\n\n| curve | seeds | A: first, last | alpha | A0 "
        "| limit identified | error | extrapolation error, law | best rival |\n" + "|---" * 9 + "|"
    ]
    for name, law in laws.items():
        checked(law)
        (a, b), (c, d) = law["intervals"]["alpha"], law["intervals"]["A0"]
        errors = {r["form"]: 100 * r["extrapolation_mae"] for r in law["rivals"]}
        mine = errors.pop(law["form"])
        best = min(errors, key=errors.__getitem__)
        also = ", better by AICc too" if best in law["better"] else ""
        lines.append(
            f"| {name} | {law['seeds']} | {law['ratio'][0]:.3f}, {law['ratio'][-1]:.3f} "
            f"| {law['params']['alpha']:.2f} ({a:.2f} to {b:.2f}) "
            f"| {law['params']['A0']:.3f} ({c:.3f} to {d:.3f}) "
            f"| {'yes' if law['identified'] else 'no'} | {100 * law['mae']:.2f} | {mine:.2f} "
            f"| {best} {errors[best]:.2f}{also} |"
        )
    return lines


def _engine_lines(r: dict[str, Any]) -> list[str]:
    pairs = list(zip(r["runs"]["relu"], r["runs"]["dense"], strict=True))
    ratios = [a["decode_tps"] / b["decode_tps"] for a, b in pairs]
    read = median(a["bytes_per_token"] / b["bytes_per_token"] for a, b in pairs)
    return [
        f"\n## The ReLU model in the engine\n\n{r['file_mb']:.1f} MB packed, {THREADS} thread(s), "
        f"decode with rule `relu` over dense, {ENGINE_RUNS} alternating runs: "
        f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}); inactive neurons "
        f"{median(a['sparsity'] for a, _ in pairs):.1%}, bytes read per token {read:.2f} of dense."
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", help="see above")
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
