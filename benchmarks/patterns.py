"""Clustering of patterns: its speed at the published scale, and what clusters tell.

Steps that are done are kept, and a stopped run continues with the next. Needs a C compiler,
scikit-learn for the comparison, 20 GB of disk for `scale`, and for a model half an hour:

    python benchmarks/patterns.py scale           # 10.68 M synthetic rows, and the kernel's limit
    python benchmarks/patterns.py as-published    # the published patterns, of SmolLM2
    python benchmarks/patterns.py qwen2.5-1.5b    # stores, one layer against scikit-learn, recall
    python benchmarks/patterns.py --report        # writes docs/results/patterns.md
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from engine import TEST, THREADS, VALIDATION
from patterns_scale import KERNEL_RUNS, kernel, published_scale
from tradeoff import ROOT, keeper, machine_line, run_and_report

RESULTS = ROOT / "benchmarks" / "results" / "patterns"
RULE, SPARSITY, CONTEXT = "topk", 0.5, 1024
TRAIN_WINDOWS, TEST_WINDOWS = 195, 16  # 200,000 tokens
CLUSTERS = (1, 16, 128, 512, 2048)
MANY_CLUSTERS = 16384  # in the first, middle and last layer alone
# The published algorithm and its baseline: clusters and density. Minutes each, most on Qwen.
PUBLISHED = [("published", 2048, 0.5), ("binary", 2048, 0.5)]
MORE_PUBLISHED = [("published", 512, 0.5), *(("published", 2048, d) for d in (0.6, 0.7, 0.8))]
ALL_OF_IT = ("smollm2",)  # and codebooks weighted by energy: magnitudes of others are too large
# The patterns that the published algorithm is for: what `percentile` leaves of three outputs.
PUBLISHED_MODEL, PUBLISHED_RULE = "smollm2", "percentile"
PUBLISHED_WINDOWS = {"train": 8, "test": 4}  # 8192 tokens of 30 layers are 245,760 rows
PUBLISHED_CELLS = ((2048, 0.6), (512, 0.6))  # clusters, density
# arXiv:2412.12178 V-A: a network with one hidden layer, from an early layer's gates to later ones.
FAR_FROM, FAR_LAYERS, FAR_HIDDEN, FAR_EPOCHS = 1, (2, 15, 20, 25, 29), 256, 8
AFAR = "from afar"
PREDICTED_CLUSTERS = 512
FEATURES = (("token",), ("previous",), ("token", "previous"), ("token", "previous", "below"))
PREDICTED_EPOCHS = 3
SCIKIT_BATCH, SCIKIT_SECONDS = 16384, 600.0
# In the loop: clusters and what they are compared with, at the shares of neurons that stay.
PPL_WINDOWS, PPL_CALIBRATION, PPL_CLUSTERS = 4, 24, 512
_CLUSTER = f"cluster:k={PPL_CLUSTERS}"
PPL_RULES = (
    *(
        "oracle",
        f"{_CLUSTER}:oracle=1",
        f"{_CLUSTER}:oracle=1:and=1",
        _CLUSTER,
        f"{_CLUSTER}:and=1",
    ),
    *("static", "random", "gate", "lowbit:gate=3:up=3"),
)
PPL_BUDGETS = (0.6, 0.7, 0.8, 0.9)  # of the predicted cluster and static; of all, a half
PPL_CELLS = [
    *((rule, 0.5) for rule in PPL_RULES),
    *((rule, kept) for kept in PPL_BUDGETS for rule in (_CLUSTER, "static")),
]


def run(name: str) -> None:
    folder = RESULTS / name
    keep = keeper(folder)
    if name == "scale":
        keep("kernel", kernel)
        keep("pass", published_scale)
        return
    if name == "as-published":
        as_published(folder, keep)
        return
    stores = {part: stored(name, folder, part) for part in ("train", "test")}
    keep("layer", lambda: one_layer(stores["train"]))
    for k in CLUSTERS:
        keep(f"lloyd {k}", lambda k=k: clustered(stores, folder, k, "lloyd"))
    keep("oracle lloyd", lambda: oracles(name, folder, [("lloyd", k, 0.5) for k in CLUSTERS]))
    if name in ALL_OF_IT:
        weighted = [("energy", k, 0.5) for k in (128, 2048)]
        for _, k, _ in weighted:
            keep(f"energy {k}", lambda k=k: clustered(stores, folder, k, "energy"))
        keep("oracle energy", lambda: oracles(name, folder, weighted))
    last = stores["train"].header.n_layers - 1
    some = [0, last // 2 + 1, last]
    keep(f"lloyd {MANY_CLUSTERS}", lambda: clustered(stores, folder, MANY_CLUSTERS, layers=some))
    keep("predicted", lambda: predicted(stores, folder, [1, *some[1:]]))
    keep("ppl", lambda: perplexity(name, PPL_CELLS))
    keep("ppl near all", lambda: perplexity(name, [(_CLUSTER, kept) for kept in (0.95, 0.98)]))
    made = PUBLISHED + (MORE_PUBLISHED if name in ALL_OF_IT else [])
    for algorithm, k, density in made:
        key = f"{algorithm} {k} {density:g}"
        keep(key, lambda a=algorithm, k=k, d=density: clustered(stores, folder, k, a, d))
    keep("oracle published", lambda: oracles(name, folder, made))
    if name not in ALL_OF_IT:
        # In a process of its own: the floats of Qwen are 7 GB, and a model's memory stays taken.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            path = folder / "train.store"
            keep("scikit-learn", lambda: pool.submit(scikit_learn, path).result())


# Speed -------------------------------------------------------------------------------------------


def one_layer(store: Any) -> dict[str, Any]:
    """The middle layer until no pass raises the objective at all."""
    from fallow.patterns.clustering import TOLERANCE, fit

    layer, width = store.header.n_layers // 2, store.header.widths["inter"]
    rows = store.rows(layer)
    start, passes = time.perf_counter(), []
    fit(
        rows, width, 2048, 0.5, n_threads=THREADS, tolerance=0, max_passes=1000,
        after_pass=lambda made: passes.append((time.perf_counter() - start, made.history[-1])),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    bits = int(np.bitwise_count(rows).sum(dtype=np.int64))
    recalls = [overlap / bits for _, overlap in passes]
    stops = [b <= a * (1 + TOLERANCE) for a, b in pairwise(recalls)]
    by_default = stops.index(True) + 1 if True in stops else len(stops)
    return {
        "layer": layer,
        "rows": len(rows),
        "seconds": seconds,
        "passes": len(passes) + 1,
        "recall": recalls[-1],
        "default_seconds": passes[by_default][0],
        "default_passes": by_default + 1,
        "default_recall": recalls[by_default],
    }


def scikit_learn(folder: Path) -> dict[str, Any]:
    """The same layer as 0/1 floats; quality by the same measure, masks of the same size."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    from fallow.patterns.clustering import fit, largest, nearest
    from fallow.patterns.store import PatternStore, pack_bits, unpack_bits

    store = PatternStore(folder)
    layer, width = store.header.n_layers // 2, store.header.widths["inter"]
    rows = np.ascontiguousarray(store.rows(layer))
    bits = int(np.bitwise_count(rows).sum(dtype=np.int64))
    active = unpack_bits(rows, width).astype(np.float32)
    # Seeding from three rows per cluster, as by default with its smallest batches.
    model = MiniBatchKMeans(2048, init_size=3 * 2048, random_state=0, n_init=1)
    rng = np.random.default_rng(0)
    seconds, theirs = 0.0, []
    while seconds < SCIKIT_SECONDS:
        order = rng.permutation(len(active))
        for first in range(0, len(active), SCIKIT_BATCH):
            batch = active[order[first : first + SCIKIT_BATCH]]
            start = time.perf_counter()
            with threadpool_limits(THREADS):
                model.partial_fit(batch)
            seconds += time.perf_counter() - start
        score = model.cluster_centers_ - np.arange(width) * 1e-9
        centroids = pack_bits(largest(score.astype(np.float64), width // 2))
        overlap = int(nearest(rows, centroids, n_threads=THREADS)[1].sum(dtype=np.int64))
        theirs.append((seconds, overlap / bits))
        print(f"scikit-learn: {seconds:.0f} s, recall {theirs[-1][1]:.4f}", flush=True)
    del active
    start, ours = time.perf_counter(), []
    fit(
        rows, width, 2048, 0.5, n_threads=THREADS,
        after_pass=lambda made: ours.append((time.perf_counter() - start, made.history[-1] / bits)),
    )  # fmt: skip
    return {"theirs": theirs, "ours": ours}


# What clusters tell ------------------------------------------------------------------------------


def stored(name: str, folder: Path, part: str) -> Any:
    windows = {"train": TRAIN_WINDOWS, "test": TEST_WINDOWS}[part]
    magnitudes = part == "test" or name in ALL_OF_IT
    return collected(name, folder, part, RULE, windows=windows, magnitudes=magnitudes)


def collected(name: str, folder: Path, part: str, rule: str, **options: Any) -> Any:
    """The patterns of a part's text under a rule, from the disk if they are there."""
    import fallow
    from fallow.calibration.calibrator import calibrate
    from fallow.patterns.collect import collect
    from fallow.patterns.store import PatternStore

    path = folder / f"{part}.store"
    try:
        return PatternStore(path)
    except fallow.FallowError:
        pass
    model = fallow.load(name)
    plan = calibrate(model, rule, sparsity=SPARSITY, text=VALIDATION, measure=False)
    text = VALIDATION if part == "train" else TEST
    return collect(model, plan, path, text, context=CONTEXT, **options)


def as_published(folder: Path, keep: Callable[[str, Callable[[], Any]], None]) -> None:
    """The published algorithm on zeros of gate, up and FFN output, 50 % of each."""
    from fallow.patterns.collect import PUBLISHED_TAPS

    stores = {
        part: collected(
            PUBLISHED_MODEL, folder, part, PUBLISHED_RULE, taps=PUBLISHED_TAPS, windows=windows
        )
        for part, windows in PUBLISHED_WINDOWS.items()
    }
    for k, density in PUBLISHED_CELLS:
        for tap in PUBLISHED_TAPS:
            keep(
                f"{tap} {k} {density:g}",
                lambda k=k, d=density, tap=tap: clustered(
                    stores, folder, k, "published", d, tap=tap
                ),
            )
    keep(AFAR, lambda: from_afar(stores))


def from_afar(stores: dict[str, Any]) -> dict[str, Any]:
    """Which gates are active, predicted from those of an early layer: recall of a half, by layer.

    Networks have one hidden layer, and are those of the epoch that is best on the last quarter of
    the training tokens, which they are not fitted to; `static`: gates that are active most often.
    """
    import torch
    from torch import nn

    from fallow.patterns.store import unpack_bits

    tap = "gate_pre"
    width = stores["train"].header.widths[tap]

    def active(part: str, layer: int) -> torch.Tensor:
        return torch.from_numpy(unpack_bits(stores[part].rows(layer, tap), width)).float()

    def recall(scores: torch.Tensor, truth: torch.Tensor) -> float:
        chosen = torch.zeros_like(truth).scatter_(1, scores.topk(width // 2, dim=1).indices, 1.0)
        return float((chosen * truth).sum() / truth.sum())

    early = {part: active(part, FAR_FROM) for part in stores}
    fitted = len(early["train"]) * 3 // 4
    found: dict[str, Any] = {}
    for layer in FAR_LAYERS:
        torch.manual_seed(0)
        train, test = active("train", layer), active("test", layer)
        network = nn.Sequential(
            nn.Linear(width, FAR_HIDDEN), nn.ReLU(), nn.Linear(FAR_HIDDEN, width)
        )
        steps = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-5)
        scores = []
        for _ in range(FAR_EPOCHS):
            for rows in torch.randperm(fitted).split(256):
                loss = nn.functional.binary_cross_entropy_with_logits(
                    network(early["train"][rows]), train[rows]
                )
                steps.zero_grad()
                loss.backward()
                steps.step()
            with torch.inference_mode():
                held_out = recall(network(early["train"][fitted:]), train[fitted:])
                scores.append((held_out, recall(network(early["test"]), test)))
        static = train.mean(dim=0).expand_as(test)
        found[str(layer)] = {"network": max(scores)[1], "static": recall(static, test)}
        print(layer, found[str(layer)], flush=True)
    return found


def clustered(
    stores: dict[str, Any],
    folder: Path,
    k: int,
    algorithm: str = "lloyd",
    density: float = 0.5,
    layers: list[int] | None = None,
    tap: str = "inter",
) -> dict[str, Any]:
    from fallow.patterns.codebooks import cluster_store

    name = algorithm if tap == "inter" else f"{algorithm}-{tap}"
    output = codebooks(folder, name, k, density)
    start = time.perf_counter()
    report = cluster_store(
        stores["train"],
        output,
        k,
        density,
        algorithm="lloyd" if algorithm == "energy" else algorithm,
        energy=algorithm == "energy",
        tap=tap,
        layers=layers,
        test=stores["test"],
        n_threads=THREADS,
    )
    seconds = time.perf_counter() - start
    names = {"path": output.name, "test_text": TEST.name, "algorithm": algorithm}
    return report.to_json() | names | {"seconds": seconds}


def codebooks(folder: Path, algorithm: str, k: int, density: float) -> Path:
    return folder / f"{algorithm}-{k}-{density:g}.codebooks"


def oracles(name: str, folder: Path, made: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """PPL with each codebook's nearest centroid, chosen from the true active set in the loop.

    `alone`: all neurons of the centroid; else, as published, those of them that are truly active.
    """
    import fallow
    from fallow.checkpoints.text import load_text
    from fallow.common.metrics import ppl_change_percent
    from fallow.measure.evaluation import window_losses
    from fallow.models.taps import attach
    from fallow.patterns.codebooks import load_codebooks

    model = fallow.load(name)
    windows = model.windows(load_text(TEST, "evaluation"), CONTEXT, PPL_WINDOWS)
    dense = window_losses(model, windows, None)
    rows = []
    for algorithm, k, density in made:
        books, _ = load_codebooks(codebooks(folder, algorithm, k, density))
        for alone in (False, True):
            with attach(model.layers, {"inter": masked_by(books, model.layers, alone)}):
                losses = window_losses(model, windows, None)
            change, error = ppl_change_percent(losses, dense)
            rows.append(
                {"algorithm": algorithm, "n_clusters": k, "density": density, "alone": alone}
                | {"ppl_change_percent": change, "ppl_change_se": error}
            )
            print(rows[-1], flush=True)
    return rows


def masked_by(books: dict[int, Any], layers: list[Any], alone: bool) -> Any:
    import torch

    from fallow.patterns.store import pack_bits, unpack_bits
    from fallow.rules._base import per_token_topk

    def mask(index: int, inter: Any) -> Any:
        out_norm = inter.abs().float() * layers[index].down_norm
        active = (out_norm > per_token_topk(out_norm, SPARSITY)).numpy()
        labels, _ = books[index].nearest(pack_bits(active), THREADS)
        kept = unpack_bits(books[index].centroids[labels], active.shape[1])
        return inter * torch.from_numpy(kept if alone else kept & active)

    return mask


def predicted(stores: dict[str, Any], folder: Path, layers: list[int]) -> list[dict[str, Any]]:
    """Recall with clusters predicted before the layer runs, from several features."""
    from fallow.patterns.prediction import predict_clusters

    books = codebooks(folder, "lloyd", PREDICTED_CLUSTERS, 0.5)
    reports = [
        predict_clusters(
            stores["train"], books, features=features, test=stores["test"], layers=layers,
            epochs=PREDICTED_EPOCHS, n_threads=THREADS,
        )
        for features in FEATURES
    ]  # fmt: skip
    return [r.to_json() | {"test_text": TEST.name} for r in reports]


def perplexity(name: str, cells: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """PPL changes with each rule's neurons in the loop, on windows of the test text."""
    import fallow
    from fallow.calibration.calibrator import Calibrator
    from fallow.checkpoints.text import load_text
    from fallow.common.metrics import ppl_change_percent
    from fallow.measure.evaluation import run_window
    from fallow.selectors import find

    model = fallow.load(name)
    calibrator = Calibrator(
        model, VALIDATION, context=CONTEXT, windows=PPL_CALIBRATION, validation_windows=1
    )
    plans = [calibrator.applied(calibrator.fit(rule, sparsity=1 - kept)) for rule, kept in cells]
    windows = model.windows(load_text(TEST, "evaluation"), CONTEXT, PPL_WINDOWS)
    results = [run_window(model, window, plans) for window in windows]
    dense = np.array([d.loss for d, _ in results])
    rows = []
    for i, (rule, kept) in enumerate(cells):
        found = [r[i] for _, r in results]
        change, error = ppl_change_percent(np.array([r.loss for r in found]), dense)
        cost = getattr(find(rule), "ffn_bytes", lambda *_: None)
        rows.append(
            {
                "rule": rule,
                "kept": kept,
                "ppl_change_percent": change,
                "ppl_change_se": error,
                "recall": float(np.mean([r.recall for r in found])),
                "energy_recall": float(np.mean([r.energy_recall for r in found])),
                "ffn_bytes": cost(kept, model.layers[0]),
            }
        )
    return rows


INTRODUCTION = f"""# Patterns

`benchmarks/patterns.py` does it. Patterns are those of rule `{RULE}` at {SPARSITY:.0%} in the loop;
codebooks are fitted on the WikiText-2 validation text and scored on the raw test text."""


ANSWER = """
## Is clustering a useful predictor?

**For choosing neurons: no.** The patterns of tokens hardly fall into clusters. Of Qwen's active
neurons an oracle's choice among 2048 typical sets of half of them covers 64.5 %, the most frequent
ones 58.1 %, chance 50 %; with 16384 clusters, of a dozen tokens each, the middle layer covers no
more of new text (62.8 %, with 2048 63.1). Half of the neurons, truly the largest, cost 0.7 % of
PPL; 2048 clusters double PPL even if an oracle chooses, with or without the truly inactive neurons.
PPL is of 4 windows, and of one codebook each.

**The choice is not what is missing.** A linear map of the FFN's input finds clusters as good in the
loop as the oracle's (+132 % against +142 %), and before the layer runs the token's id with the
cluster of the token before give two thirds of the recall that the oracle of 512 has over static,
with the active set of the layer below 89 to 93 % of it. What is missing is in the clusters:
hundreds of tokens share one, and hardly their neurons.

**What it is worth.** On Qwen a predicted cluster loses less than the static mask of more bytes: at
50 % +132 ± 13 % with 0.532 of the FFN's, where static has +334 ± 68 % with 0.600. On SmolLM2 it
does not: +212 ± 36 % with 0.685, where static has +177 ± 27 % with 0.700, which 4 windows do not
tell apart. But 3-bit copies of `gate_proj` and `up_proj`, which tell neurons one by one, read 74 %
of the FFN's bytes at +1.9 ± 0.5 % on Qwen, and a cluster that reads 93 % still costs +11.9 ± 1.0 %;
it costs +3.0 ± 0.4 % only where 98 % are kept, and choosing reads more than is spared. Hence there
is no engine mode. As a prefetch hint a cluster names 66 % of the needed neurons, where the most
frequent ones, pinned, are 60 % in the same layers. That was not tried on a disk, for which six
points are few ([neuron_cache](neuron_cache.md)).

**K.** For analysis 128 clusters per layer give three fifths of what 2048 give over static, in 4 MB
in place of 66. Counting neurons by their energy, as the selector does, may be worth four times as
many clusters on SmolLM2: 128 of them lose in the loop as much as 512 plain ones, to within errors
of a sixth (+214 ± 33 and +213 ± 26 %), and 2048 less than 2048 plain ones (+129 ± 9 and +157 ± 7
%), one fit each.

**The published algorithm** covers less than the static mask of half of the neurons, 2.4 points on
Qwen and 0.2 on SmolLM2 (one fit each), and 1.2 to 2.3 points more than that of 60 to 80 %: on
SmolLM2 68 % at 60 %, where its headline, of a density that is not published, is 79 %, with the
cluster chosen from the truth in both. In the loop that is +546 ± 70 % of PPL, and at 80 % still +74
± 2 %, with static at +87 ± 11 %, which 4 windows hardly tell apart. Its centroids freeze at their
first rows (in its update a one never loses to a zero), and are shared by layers whose neurons have
nothing in common. On the patterns that it is for, zeros of three outputs, its 2048 centroids cover
72 % (gate), 67 % (up) and 70 % (FFN output) of what is active, with 55 to 57 % of ones, where the
most frequent outputs, 60 %, cover 72, 65 and 66 %. That is of 8,192 tokens, a fortieth of the
published ones, and of new text; one fit each."""


def report() -> str:
    lines = [INTRODUCTION]
    scale = _load("scale")
    if "kernel" in scale:
        lines.append(
            "\n## Speed\n\nThe kernel is one thread's assignment of 4096 rows to 2048 centroids; "
            "the limit is benchmarks/popcount.c, "
            f"which needs no memory. Medians of {KERNEL_RUNS} runs in turn.\n\n"
            "| neurons | 1e9 words/s | of the limit |\n|---|---|---|"
        )
        for width, runs in scale["kernel"].items():
            speed, shares = median(r[0] for r in runs), [r[0] / r[1] for r in runs]
            lines.append(
                f"| {width} | {speed / 1e9:.1f} | **{median(shares):.0%}** "
                f"({min(shares):.0%} to {max(shares):.0%}) |"
            )
    if "pass" in scale:
        p = scale["pass"]
        lines.append(
            f"\nOne pass (assignment and update) over {p['rows'] / 1e6:.2f} M rows of {p['width']} "
            f"neurons and {p['clusters']} centroids, read from the disk: {p['seconds']:.0f} s with "
            f"{THREADS} threads, of which the update {p['update_seconds']:.1f}; "
            f"{p['private_mb']:.0f} MB of memory besides the mapped file's cached pages. One run."
        )
    for path in sorted(RESULTS.glob("*/result.json")):
        name, result = path.parent.name, json.loads(path.read_text())
        if name == "as-published":
            lines += _published_lines(result)
        elif name != "scale":
            lines += _model_lines(name, result)
    lines.append(ANSWER)
    wheres = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/machine.json"))]
    lines += [f"\n{line}." for line in dict.fromkeys(map(machine_line, wheres))]
    return "\n".join(lines) + "\n"


def _model_lines(name: str, result: dict[str, Any]) -> list[str]:
    lines = [f"\n## {name}"]
    if "layer" in result:
        r = result["layer"]
        lines.append(
            f"\nLayer {r['layer']}, {r['rows']} tokens, 2048 clusters, until no pass gains: "
            f"**{r['seconds']:.0f} s**, {r['passes']} passes, recall {r['recall']:.4f} on these "
            f"tokens; until one gains less than 1e-4, as by default: {r['default_seconds']:.0f} s, "
            f"{r['default_passes']} passes, {r['default_recall']:.4f}."
        )
    if "scikit-learn" in result:
        lines.append(_scikit_line(**result["scikit-learn"]))
    lines += _codebook_lines(result)
    lines += _oracle_lines(result)
    if "predicted" in result:
        lines += _prediction_lines(result["predicted"])
    return lines + _loop_lines(result)


def _codebook_lines(result: dict[str, Any]) -> list[str]:
    """Recall of every codebook beside the baselines'."""
    columns = ("cluster", "static", "previous", "random")
    lines = [
        "\nRecall of held-out tokens, mean of layers; `cluster` is an oracle's choice, and energy "
        "its energy recall, a share of each token, then the mean. One fit each; seconds are beside "
        "other work, more of it for SmolLM2.\n\n"
        "| codebook | K | density | cluster | energy | static | previous | random | MB | s |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    ]
    for r in result.values():
        if "codebook_bytes" not in r:
            continue
        means = [f"{r['mean'][c]['recall']:.4f}" for c in columns]
        energy = r["mean"]["cluster"].get("energy_recall")
        density = np.mean([layer["density"] for layer in r["layers"]])
        lines.append(
            f"| {r['algorithm']}{_only(r)} | {r['n_clusters']} | {density:.2f} | **{means[0]}** "
            f"| {'-' if energy is None else f'{energy:.4f}'} | {' | '.join(means[1:])} "
            f"| {r['codebook_bytes'] / 1e6:.1f} | {r['seconds']:.0f} |"
        )
    return lines


PUBLISHED_PATTERNS = f"""
## The published patterns

{PUBLISHED_MODEL}: zeros of three outputs, each cut at the layer's own {SPARSITY:.0%} percentile of
magnitudes, all in the loop; 0/1 rows of all layers in one codebook per output, from
{PUBLISHED_WINDOWS["train"]} windows of {CONTEXT} tokens, scored on {PUBLISHED_WINDOWS["test"]} of
the test text by the nearest centroid of the true row. The paper's "precision" is the **recall**; a
random mask's recall is its density. static: the layer's own most frequent outputs, as many as were
asked for, which is more than the centroids that are chosen have (density). Mean of layers, one fit
each. Not tried: as many tokens as published (333,842), raw values in place of 0/1, and the other
initialisation of its code.

| output | K | asked for | density | recall | precision | static: recall | precision | active |
|---|---|---|---|---|---|---|---|---|"""


FROM_AFAR = f"""
Which gates are active, predicted from those of layer {FAR_FROM} (counted from 0) by a network with
one hidden layer of {FAR_HIDDEN}, one per layer, fitted on three quarters of those tokens, the epoch
chosen on the rest: recall of half of the gates, on the test text. static: those that are active
most often. One fit each.

| layer | network | static |
|---|---|---|"""


def _published_lines(result: dict[str, Any]) -> list[str]:
    """Recall and precision of the published algorithm on its own kind of patterns."""
    lines = [PUBLISHED_PATTERNS]
    far = result.pop(AFAR, {})
    for r in result.values():
        whose = [r["mean"][who] for who in ("cluster", "static")]
        means = [scores[what] for scores in whose for what in ("recall", "precision")]
        density, active = (np.mean([x[key] for x in r["layers"]]) for key in ("density", "active"))
        lines.append(
            f"| {r['tap']} | {r['n_clusters']} | {r['budget']:.2f} | {density:.2f} "
            f"| **{means[0]:.4f}** | {' | '.join(f'{m:.4f}' for m in means[1:])} | {active:.3f} |"
        )
    lines += [FROM_AFAR] if far else []
    lines += [f"| {i} | **{r['network']:.4f}** | {r['static']:.4f} |" for i, r in far.items()]
    return lines


def _oracle_lines(result: dict[str, Any]) -> list[str]:
    """The loss with centroids that an oracle chooses."""
    lines = []
    oracle = [
        row for what in ("lloyd", "energy", "published") for row in result.get(f"oracle {what}", [])
    ]
    if oracle:
        lines.append(
            f"\nPPL change in the loop, {PPL_WINDOWS} windows of {CONTEXT}, with the centroid "
            "nearest to the true active set (an oracle): of it the truly active neurons, as "
            "published, or all.\n\n"
            "| codebook | K | density | and truly active | all |\n|---|---|---|---|---|"
        )
    for both, alone in zip(oracle[::2], oracle[1::2], strict=True):
        cells = [
            f"{r['ppl_change_percent']:+.1f} ± {r['ppl_change_se']:.1f} %" for r in (both, alone)
        ]
        lines.append(
            f"| {both['algorithm']} | {both['n_clusters']} | {both['density']:.2f} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def _prediction_lines(predicted: list[dict[str, Any]]) -> list[str]:
    """How well clusters are foretold."""
    first = predicted[0]
    layers = ", ".join(str(r["layer"]) for r in first["layers"])
    lines = [
        f"\nOf {first['n_clusters']} clusters the one predicted before the layer runs, layers "
        f"{layers}: one hidden layer of {first['hidden']}. `token`: its id, `previous`: the "
        "cluster of the token before, `below`: the active set of the layer below.\n\n"
        "| known | right | recall | energy | static | oracle |\n|---|---|---|---|---|---|"
    ]
    for r in predicted:
        mean = r["mean"]
        lines.append(
            f"| {', '.join(r['features'])} | {np.mean(r['accuracy']):.1%} "
            f"| **{mean['predicted']['recall']:.4f}** "
            f"| {mean['predicted']['energy_recall']:.4f} | {mean['static']['recall']:.4f} "
            f"| {mean['cluster']['recall']:.4f} |"
        )
    return lines


def _loop_lines(result: dict[str, Any]) -> list[str]:
    """The loss with rules that choose by cluster."""
    lines = []
    if "ppl" in result:
        lines.append(
            f"\nIn the loop, {PPL_WINDOWS} windows of {CONTEXT}; {PPL_CLUSTERS} clusters and all "
            f"else from {PPL_CALIBRATION} windows. `oracle=1`: the cluster that the true active "
            "set is nearest to, else the one predicted from the FFN's input, neurons weighted by "
            "their energy; `and=1`: of it the truly active neurons alone; for both the truth is "
            "read. **FFN bytes** as in [selectors.md](selectors.md).\n\n"
            "| rule | kept | PPL change % | recall | FFN bytes |\n"
            "|---|---|---|---|---|"
        )
    for r in result.get("ppl", []) + result.get("ppl near all", []):
        lines.append(
            f"| `{r['rule']}` | {r['kept']:.0%} "
            f"| {r['ppl_change_percent']:+.1f} ± {r['ppl_change_se']:.1f} | {r['recall']:.3f} "
            f"| {r['ffn_bytes']:.3f} |"
        )
    return lines


def _scikit_line(theirs: list[tuple[float, float]], ours: list[tuple[float, float]]) -> str:
    """At the best that theirs comes to: the first pass of ours that is as good."""
    best_seconds, recall = max(theirs, key=lambda found: found[1])
    seconds, last = theirs[-1]
    equal = next((t for t, r in ours if r >= recall), None)
    our_seconds, our_recall = ours[-1]
    line = (
        f"\nscikit-learn's MiniBatchKMeans on 0/1 floats, batches of {SCIKIT_BATCH}: recall "
        f"{theirs[0][1]:.4f} after an epoch ({theirs[0][0]:.0f} s), {last:.4f} after "
        f"{len(theirs)} ({seconds:.0f} s); one run of each. "
    )
    if equal is None:
        return line + "Ours never is as good."
    line += (
        f"Ours is as good as its best after {equal:.1f} s, **{best_seconds / equal:.0f}** times "
        "sooner"
    )
    if our_recall > recall:
        line += (
            f", and ends at {our_recall:.4f} after {our_seconds:.0f} s, where theirs does not get "
            f"in {seconds / our_seconds:.0f} times as long"
        )
    return line + "."


def _only(r: dict[str, Any]) -> str:
    """Which layers, if not all."""
    layers = [layer["layer"] for layer in r["layers"]]
    whole = layers == list(range(len(layers))) and len(layers) > 3
    return "" if whole else f", layers {', '.join(map(str, layers))}"


def _load(name: str) -> dict[str, Any]:
    path = RESULTS / name / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    run_and_report(__doc__, run, report, "patterns.md")
