"""How patterns depend on the text: after edits, as the published test, and firing frequencies.

Patterns are those of rule `topk` at 50 % in the loop, and of `percentile` for the published test,
with plans fitted on the WikiText-2 validation text. Finished steps are kept. Per model 5 to 20
minutes:

    python benchmarks/similarity.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/similarity.py --report    # writes docs/results/similarity.md
"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from engine import TEST, VALIDATION
from neuron_cache import lru
from tradeoff import DATA, ROOT, keeper, machine_line, run_and_report

RESULTS = ROOT / "benchmarks" / "results" / "similarity"
TEXTS = {
    "wiki": TEST,
    **{name: DATA / "calibration" / f"{name}.txt" for name in ("c4", "code", "multilingual")},
}
CONTEXT, WINDOWS = 1024, 8
LAGS = (1, 4, 16, 64)
SIZES = (0.25, 0.5, 0.75)  # of a layer's neurons, in the cache
BUNDLE = 16  # neurons
SAMPLED, COMPONENTS = 1024, 16  # neurons whose correlations are looked at
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def run(name: str) -> None:
    import fallow
    from fallow.calibration.calibrator import calibrate
    from fallow.patterns.similarity import draw, draw_variants, edit_test, published_test

    folder = RESULTS / name
    keep = keeper(folder)
    model = fallow.load(name)
    plan = calibrate(model, "topk", sparsity=0.5, text=VALIDATION, measure=False)

    def edits() -> Any:
        report = edit_test(model, plan, TEST)
        draw(report, folder / "edits.png")
        return rounded(report.to_json())

    def as_published() -> Any:
        shares = calibrate(model, "percentile", sparsity=0.5, text=VALIDATION, measure=False)
        variants = published_test(model, shares, DATA / "similarity")
        draw_variants(variants, folder / "published.png")
        return rounded([v.to_json() for v in variants])

    keep("edits", edits)
    for kind in ("insert", "delete"):
        keep(
            kind,
            lambda k=kind: rounded(edit_test(model, plan, TEST, shares=(0.1,), kind=k).to_json()),
        )
    keep("published", as_published)
    keep("firing", lambda: rounded(firing(model, plan, folder)))


def rounded(value: Any) -> Any:
    """To five digits, for a file that can be read."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


# Firing frequencies ------------------------------------------------------------------------------


def firing(model: Any, plan: Any, folder: Path) -> dict[str, Any]:
    """By text and layer (first, middle, last): rates, what they tell elsewhere, reuse."""
    from fallow.patterns.collect import collect
    from fallow.patterns.store import unpack_bits

    layers = {"first": 0, "middle": len(model.layers) // 2, "last": len(model.layers) - 1}
    stores = {
        name: collect(model, plan, folder / f"{name}.store", text, context=CONTEXT, windows=WINDOWS)
        for name, text in TEXTS.items()
    }
    width = stores["wiki"].header.widths["inter"]
    found: dict[str, Any] = {name: {} for name in TEXTS}
    for place, layer in layers.items():
        active = {n: unpack_bits(store.rows(layer), width) for n, store in stores.items()}
        # Half of each text says what is frequent, the other half is what is scored.
        half = WINDOWS // 2 * CONTEXT
        rates = {n: a[:half].mean(axis=0) for n, a in active.items()}
        for name, a in active.items():
            found[name][place] = of_layer(a[half:], rates[name]) | {
                "static_of": {n: static_recall(a[half:], rates[n]) for n in TEXTS},
                "correlation_with": {
                    n: float(np.corrcoef(rates[name], rates[n])[0, 1]) for n in TEXTS
                },
            }
    draw_rates(found, folder / "firing.png", model.name)
    return found


def static_recall(active: np.ndarray, rate: np.ndarray) -> float:
    """Share of the active neurons among as many of the most frequent ones."""
    size = round(active.sum() / len(active))
    best = np.argsort(-rate, kind="stable")[:size]
    return float(active[:, best].sum() / active.sum())


def of_layer(active: np.ndarray, rate: np.ndarray) -> dict[str, Any]:
    """Of active sets (T, width) of whole windows, and rates of other windows of that text."""
    own = active.mean(axis=0)
    windows = active.reshape(-1, CONTEXT, active.shape[1])
    reuse = {
        lag: float((windows[:, lag:] & windows[:, :-lag]).sum() / windows[:, lag:].sum())
        for lag in LAGS
    }
    trace, width = windows[0], active.shape[1] // BUNDLE * BUNDLE
    bundles = trace[:, :width].reshape(CONTEXT, -1, BUNDLE).any(axis=2)
    of_bundles = rate[:width].reshape(-1, BUNDLE).max(axis=1)
    return {
        "quantiles": np.quantile(own, QUANTILES).tolist(),
        "seldom": float((own < 0.1).mean()),
        "often": float((own > 0.9).mean()),
        "dead": float((own == 0).mean()),
        "reuse": reuse,
        "lru": {s: lru(trace, rate, round(s * active.shape[1])) for s in SIZES},
        "bundles_needed": float(bundles.mean()),
        "lru_bundles": {s: lru(bundles, of_bundles, round(s * bundles.shape[1])) for s in SIZES},
        "components": components(active),
        "sorted": np.sort(own)[:: max(len(own) // 100, 1)].tolist(),
    }


def components(active: np.ndarray) -> dict[str, float]:
    """Share of the correlation that few components hold, and so for neurons shuffled in time."""
    rng = np.random.default_rng(0)
    changing = np.flatnonzero(active.any(axis=0) & ~active.all(axis=0))
    some = active[:, rng.choice(changing, min(SAMPLED, len(changing)), replace=False)]

    def share(values: np.ndarray) -> float:
        powers = np.linalg.eigvalsh(np.corrcoef(values.T.astype(np.float32)))
        return float(powers[-COMPONENTS:].sum() / powers.sum())

    return {"together": share(some), "shuffled": share(rng.permuted(some, axis=0))}


def draw_rates(found: dict[str, Any], path: Path, name: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", sharey=True)
    for axis, place in zip(axes, ("first", "middle", "last"), strict=True):
        for text, by_place in found.items():
            rates = by_place[place]["sorted"]
            axis.plot(np.linspace(0, 1, len(rates)), rates, label=text)
        axis.set_title(f"{place} layer")
        axis.set_xlabel("share of the neurons")
    axes[0].set_ylabel("share of the tokens they are active for")
    axes[0].legend()
    figure.suptitle(f"{name}: firing frequencies, half of the neurons per token")
    figure.savefig(path)
    plt.close(figure)


def draw_correlations(found: dict[str, Any], path: Path, name: str) -> None:
    """Heat maps of what `firing` found: how the neurons' rates on one text go with another's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, place in zip(axes, ("first", "middle", "last"), strict=True):
        of = [[found[a][place]["correlation_with"][b] for b in found] for a in found]
        axis.imshow(of, vmin=0, vmax=1, cmap="viridis")
        axis.set_xticks(range(len(found)), found)
        axis.set_yticks(range(len(found)), found)
        axis.set_title(f"{place} layer")
        for i, row in enumerate(of):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.2f}", ha="center", color="black" if value > 0.6 else "w")
    figure.suptitle(f"{name}: correlation of firing frequencies, texts by texts")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


# Report ------------------------------------------------------------------------------------------


INTRODUCTION = f"""# Patterns and text

`benchmarks/similarity.py` does it; [patterns](../patterns.md) says what is what. Figures are means
over layers unless a layer is named.

- **Edits**: windows of the WikiText-2 raw test text, some tokens replaced by others drawn from it.
  Unedited tokens behind the first edit are compared with themselves in the original; intervals are
  1.96 standard errors over documents. kappa is the agreement beyond what tokens that have nothing
  to do with each other share (unrelated), or beyond what the neurons' frequencies give (frequency).
- **As published** (arXiv:2412.12178): agreement of the thresholded gate with the original's, over
  twelve samples. In the shared prefix it is 1 by construction (0.999 in bfloat16, Qwen's, as
  texts of other lengths round differently). Row by row behind it mixes edited tokens, and tokens
  that an inserted or lost one has moved: *aligned* pairs equal tokens.
- **Firing**: {WINDOWS} windows of {CONTEXT} tokens of each text, one half to rank the neurons, the
  other to score. *static from* a text: share of the active neurons among the most frequent half.

**What edits change.** The more tokens are replaced, the less of the others' active sets stays; by
kappa the first layer changes least. A replaced token shares hardly more with its predecessor than
any two tokens do (kappa 0.02 to 0.07). So a mask made for one prompt holds for a similar one mostly
where the tokens are the same.

**What the published test measures.** Its 95 % variant agrees well because 71 % of it is the
shared prefix, which agrees by construction. Behind that, row by row, agreement is 0.62 to 0.66, and
0.75 to 0.79 when equal tokens are compared with each other. What unrelated tokens share of these
patterns was not measured; figures of unrelated tokens below are of the edits' patterns.

**Firing.** With half of the neurons per token none was dead in 4096 tokens, and up to a tenth
fire for more than nine tokens in ten; on most texts the first layer is the most uniform and the
last the most uneven. Frequencies carry over between texts in part: the neurons that are frequent
on another text cover up to 11 points less than the text's own, of code 1 to 11 points. Frequencies
on WikiText correlate least with those on code in eight of nine layers; the middle layer's correlate
more between texts than the first and the last one's. One draw of {WINDOWS // 2} windows ranks and
one scores, so that none of this has an error. The next token has 52 to 67 % of the same neurons,
about what the most frequent ones cover, so that LRU holds little more than its share, in neurons;
of bundles of {BUNDLE} all are needed. Neurons do go together ({COMPONENTS} components hold several
times what they would by chance), but too weakly for bundles."""


def report() -> str:
    lines = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*/result.json")):
        name, result = path.parent.name, json.loads(path.read_text())
        lines += [f"\n## {name}", f"\n{machine_line(json.loads(_beside(path)))}."]
        if "edits" in result:
            lines += _edit_lines(result, path.parent)
        if "published" in result:
            lines += _published_lines(result["published"], path.parent)
        if "firing" in result:
            lines += _firing_lines(result["firing"], path.parent)
    return "\n".join(lines) + "\n"


def _beside(path: Path) -> str:
    return path.with_name("machine.json").read_text()


def _figure(path: Path, title: str) -> str:
    return f"\n![{title}](../../{path.relative_to(ROOT)})"


def _edit_lines(result: dict[str, Any], folder: Path) -> list[str]:
    r, mean = result["edits"], np.mean
    lines = [
        f"\nUnrelated tokens agree {mean(r['unrelated_agreement']):.3f} (Jaccard "
        f"{mean(r['unrelated_jaccard']):.3f}), by frequency {mean(r['frequency_agreement']):.3f}; "
        f"with the static mask {mean(r['static_agreement']):.3f}. {r['documents']} documents of "
        f"{r['context']} tokens.\n\n"
        "| edits | tokens | agreement | Jaccard | kappa over unrelated | over frequency "
        "| kappa by layer: first, middle, last |\n|---|---|---|---|---|---|---|"
    ]
    rows = [("substitute", row) for row in r["rows"]]
    rows += [(kind, row) for kind in ("insert", "delete") for row in result[kind]["rows"]]
    for kind, row in rows:
        kappa = row["kappa_frequency"]
        lines.append(
            f"| {kind} {row['edited']:.0%} | {row['stratum']} "
            f"| {mean(row['agreement']):.3f} ± {mean(row['agreement_interval']):.3f} "
            f"| {mean(row['jaccard']):.3f} ± {mean(row['jaccard_interval']):.3f} "
            f"| **{mean(row['kappa_unrelated']):.3f}** | {mean(kappa):.3f} "
            f"| {kappa[0]:.3f}, {kappa[len(kappa) // 2]:.3f}, {kappa[-1]:.3f} |"
        )
    return [*lines, _figure(folder / "edits.png", "Agreement by layer and share of edits")]


def _published_lines(variants: list[dict[str, Any]], folder: Path) -> list[str]:
    columns = ("row_by_row", "prefix", "behind", "aligned", "shifted")
    lines = [
        "\nAs published:\n\n| variant | shared prefix | row by row | in the prefix | behind it "
        "| aligned behind it | best shift |\n|---|---|---|---|---|---|---|"
    ]
    for name in sorted({v["variant"] for v in variants}, reverse=True):
        some = [v for v in variants if v["variant"] == name]
        share = np.mean([v["prefix_tokens"] / v["tokens"] for v in some])
        cells = []
        for column in columns:
            values = [np.mean(v[column]) for v in some if v[column] is not None]
            cells.append(
                f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"
            )
        lines.append(f"| {name} | {share:.0%} | {' | '.join(cells)} |")
    return [*lines, _figure(folder / "published.png", "Agreement by layer and variant")]


def _firing_lines(found: dict[str, Any], folder: Path) -> list[str]:
    lines = [
        "\n| text | layer | rate at 1, 10, 50, 90, 99 % of the neurons | < 10 % | > 90 % "
        f"| static from {', '.join(found)} | same neuron 1, 4, 16, 64 tokens later "
        "| LRU of 25, 50, 75 % | bundles needed | 16 components (shuffled) |\n" + "|---" * 10 + "|"
    ]
    for text, by_place in found.items():
        for place, r in by_place.items():
            rates = [r["quantiles"][i] for i in (0, 1, 3, 5, 6)]
            parts = r["components"]
            lines.append(
                f"| {text} | {place} | {_list(rates)} | {r['seldom']:.1%} | {r['often']:.1%} "
                f"| {_list(r['static_of'].values(), 3)} | {_list(r['reuse'].values(), 3)} "
                f"| {_list(r['lru'].values())} | {r['bundles_needed']:.3f} "
                f"| {parts['together']:.2f} ({parts['shuffled']:.2f}) |"
            )
    between = {
        place: np.mean([found[a][place]["correlation_with"][b] for a, b in combinations(found, 2)])
        for place in next(iter(found.values()))
    }
    draw_correlations(found, folder / "correlations.png", folder.name)
    return [
        *lines,
        f"\nFrequencies on two texts correlate by, mean of pairs: {_list(between.values(), 3)} "
        f"({', '.join(between)} layer).",
        _figure(folder / "firing.png", "Firing frequencies"),
        _figure(folder / "correlations.png", "Correlation of firing frequencies between texts"),
    ]


def _list(values: Any, digits: int = 2) -> str:
    return ", ".join(f"{v:.{digits}f}" for v in values)


if __name__ == "__main__":
    run_and_report(__doc__, run, report, "similarity.md")
