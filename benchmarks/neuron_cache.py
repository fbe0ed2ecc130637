"""Would a cache of single neurons pay? Hit rates of policies, and bundles ordered by co-activation.

Traces are the half of each layer's neurons that matter most to a token, by |inter|
||down_proj[:, i]||, the exact choice, on the WikiText-2 raw test text; orders and frequencies come
from the validation text. Reads are timed on this disk, O_DIRECT, four threads. Minutes per model:

    python benchmarks/neuron_cache.py qwen2.5-1.5b gemma3 smollm2
    python benchmarks/neuron_cache.py --report    # writes docs/results/neuron_cache.md
"""

import json
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tradeoff import DATA, ROOT, machine_line, record_machine, run_and_report

RESULTS = ROOT / "benchmarks" / "results" / "neuron_cache"
KEPT = 0.5
LAYERS = 4  # evenly spread
SIZES = (0.25, 0.5, 0.75)  # of a layer's neurons, in memory
BUNDLES = (1, 4, 16, 64)  # neurons
WARM = 256  # tokens before hits count
DECAY = 0.98  # of a use's weight per token
READERS, READ_BYTES, READ_RUNS = 4, 1 << 27, 3

Policy = Callable[[np.ndarray, np.ndarray, int], float]
"""Hit rate on a trace (T, d_ff), given frequencies (d_ff,) of another text, for so many places."""


def keep_best(used: np.ndarray, held: np.ndarray, worth: np.ndarray, room: int) -> np.ndarray:
    """Of what was held or just read, the most worth; (d_ff,) bool."""
    candidates = np.flatnonzero(used | held)
    best = candidates[np.argsort(-worth[candidates], kind="stable")[:room]]
    found = np.zeros_like(held)
    found[best] = True
    return found


def replay(trace: np.ndarray, keep: Callable[[int, np.ndarray, np.ndarray], np.ndarray]) -> float:
    """Hit rate if `keep(t, used, held)` says what is held after token t; (d_ff,) bool each."""
    held, hits, wanted = np.zeros(trace.shape[1], dtype=bool), 0, 0
    for t, used in enumerate(trace):
        if t >= WARM:
            hits, wanted = hits + int((used & held).sum()), wanted + int(used.sum())
        held = keep(t, used, held)
    return hits / wanted


def replay_best(trace: np.ndarray, room: int, worth_at: Callable[[int], np.ndarray]) -> float:
    return replay(trace, lambda t, used, held: keep_best(used, held, worth_at(t), room))


def lru(trace: np.ndarray, frequency: np.ndarray, room: int) -> float:
    last = np.full(trace.shape[1], -1.0)

    def worth(t: int) -> np.ndarray:
        last[trace[t]] = t
        return last + 1e-6 * frequency  # of one token's neurons the frequent ones

    return replay_best(trace, room, worth)


def lfu(trace: np.ndarray, frequency: np.ndarray, room: int) -> float:
    counts = np.zeros(trace.shape[1])

    def worth(t: int) -> np.ndarray:
        counts[:] = DECAY * counts + trace[t]
        return counts.copy()

    return replay_best(trace, room, worth)


def tiny_lfu(trace: np.ndarray, frequency: np.ndarray, room: int) -> float:
    """LRU, but what is read takes a place only from what was used less (arXiv:1512.00727)."""
    d_ff = trace.shape[1]
    counts, last = np.zeros(d_ff), np.full(d_ff, -1.0)

    def keep(t: int, used: np.ndarray, held: np.ndarray) -> np.ndarray:
        held = held.copy()
        counts[:] = DECAY * counts + used
        new = np.flatnonzero(used & ~held)
        last[used] = t
        free = room - int(held.sum())
        held[new[:free]] = True
        new = new[free:]
        victims = np.flatnonzero(held)
        victims = victims[np.argsort(last[victims], kind="stable")][: len(new)]
        better = counts[new[: len(victims)]] > counts[victims]
        held[victims[better]] = False
        held[new[: len(victims)][better]] = True
        return held

    return replay(trace, keep)


def pinned(trace: np.ndarray, frequency: np.ndarray, room: int) -> float:
    held = np.zeros(trace.shape[1], dtype=bool)
    held[np.argsort(-frequency)[:room]] = True
    return float((trace[WARM:] & held).sum() / trace[WARM:].sum())


def optimal(trace: np.ndarray, frequency: np.ndarray, room: int) -> float:
    """What leaves is what is needed last again (Belady)."""
    tokens, d_ff = trace.shape
    ahead = np.full((tokens, d_ff), tokens, dtype=np.int32)
    for t in range(tokens - 2, -1, -1):
        ahead[t] = np.where(trace[t + 1], t + 1, ahead[t + 1])
    return replay_best(trace, room, lambda t: -ahead[t].astype(float))


POLICIES: dict[str, Policy] = {
    "pinned by frequency": pinned,
    "LRU": lru,
    "LFU, ageing": lfu,
    "TinyLFU": tiny_lfu,
    "Belady (knows the future)": optimal,
}


def by_co_activation(trace: np.ndarray) -> np.ndarray:
    """Neurons (d_ff,) ordered so that those used together are near: spectral bisection.

    Each part is cut in two at the median of its leading component.
    """

    def order(neurons: np.ndarray) -> list[int]:
        if len(neurons) <= min(n for n in BUNDLES if n > 1):
            return neurons.tolist()
        part = trace[:, neurons].astype(np.float32)
        part -= part.mean(axis=0)
        component = np.random.default_rng(0).standard_normal(len(neurons)).astype(np.float32)
        for _ in range(20):
            component = part.T @ (part @ component)
            component /= np.linalg.norm(component) + 1e-30
        ranks = neurons[np.argsort(component, kind="stable")]
        half = len(ranks) // 2
        return order(ranks[:half]) + order(ranks[half:])

    return np.array(order(np.arange(trace.shape[1])))


def bundles_read(trace: np.ndarray, order: np.ndarray, size: int) -> float:
    """Share of the bundles of so many neurons of which a token needs one or more."""
    whole = trace.shape[1] // size * size
    return float(trace[:, order[:whole]].reshape(len(trace), -1, size).any(axis=2).mean())


def read_gbps(path: Path, size: int, share: float) -> float:
    """Of reads of so many bytes, a share of all there are, ascending; median of some runs."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    total = min(READ_BYTES, os.fstat(file).st_size // size * size)
    chosen = np.flatnonzero(np.random.default_rng(0).random(total // size) < share)

    def work(parts: np.ndarray) -> None:
        buffer = mmap.mmap(-1, size)
        for part in parts:
            os.preadv(file, [buffer], int(part) * size)

    rates = []
    try:
        for _ in range(READ_RUNS):
            start = time.perf_counter()
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(work, np.array_split(chosen, READERS)))
            rates.append(len(chosen) * size / (time.perf_counter() - start) / 1e9)
    finally:
        os.close(file)
    return median(rates)


def traces(model: Any, text: Path, windows: int) -> dict[int, np.ndarray]:
    """Which neurons a token needs, (T, d_ff) bool, by layer."""
    import torch

    from fallow.checkpoints.text import load_text
    from fallow.models.taps import attach
    from fallow.rules._base import per_token_topk

    chosen = np.linspace(0, len(model.layers) - 1, LAYERS).astype(int).tolist()
    found: dict[int, list[np.ndarray]] = {i: [] for i in chosen}

    def add(layer: int, value: torch.Tensor) -> None:
        if layer in found:
            score = value.abs().float() * model.layers[layer].down_norm
            found[layer].append((score > per_token_topk(score, KEPT)).numpy())

    with attach(model.layers, {"inter": add}):
        for window in model.windows(load_text(text, "evaluation"), 1024, windows):
            model.hidden(window[None])
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def run(name: str) -> None:
    import fallow
    from fallow.checkpoints.catalog import ALIASES, resolve

    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    model = fallow.load(name)
    fitted = traces(model, DATA / "wikitext2" / "wiki.valid.detok.txt", 4)
    seen = traces(model, DATA / "wikitext2" / "wiki.test.raw", 1)
    d_ff, neuron = model.layers[0].d_ff, _neuron_bytes(model)
    hits: dict[str, list[list[float]]] = {name: [] for name in POLICIES}
    shares: dict[str, list[list[float]]] = {"natural": [], "frequency": [], "co-activation": []}
    for layer, trace in seen.items():
        frequency = fitted[layer].mean(axis=0)
        for policy, rate in POLICIES.items():
            hits[policy].append([rate(trace, frequency, int(s * d_ff)) for s in SIZES])
        orders = {
            "natural": np.arange(d_ff),
            "frequency": np.argsort(-frequency),
            "co-activation": by_co_activation(fitted[layer]),
        }
        for order, neurons in orders.items():
            shares[order].append([bundles_read(trace, neurons, size) for size in BUNDLES])
        print(f"{name}: layer {layer} done", flush=True)
    source = resolve(ALIASES[name])
    speeds = []
    for i, size in enumerate(BUNDLES):
        share = float(np.mean(shares["co-activation"], axis=0)[i])
        sectors = max(4096, -(-size * neuron // 4096) * 4096)
        speeds.append({"bytes": sectors, "gbps": read_gbps(source, sectors, share)})
    result = {
        "hits": {p: np.mean(rows, axis=0).tolist() for p, rows in hits.items()},
        "bundles": {o: np.mean(rows, axis=0).tolist() for o, rows in shares.items()},
        "neuron_bytes": neuron,
        "reads": speeds,
        "sequential_gbps": read_gbps(source, 1 << 20, 1.0),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def _neuron_bytes(model: Any) -> int:
    """Of a row of up_proj (4.5 bits) and one of down_proj_t (5.5)."""
    return int(model.module.config.hidden_size * 10 / 8)


INTRODUCTION = f"""# A cache of single neurons

What if, under a memory budget, single neurons were kept and fetched in place of whole matrices?
Traces: the half of the neurons that matter most to each token, exactly chosen, in {LAYERS} layers,
on the first 1024 tokens of the WikiText-2 raw test text ({WARM} of them to warm up). Frequencies
and orders are fitted on the validation text. `benchmarks/neuron_cache.py` does it.

- **Hits**: share of the needed neurons that are in memory, for a cache of 25, 50 and 75 % of them.
  What was needed before says little of what is needed next: the best policy is one to three points
  above a fixed part, the most frequent ones, and LRU is within one point of that; one that knows
  the future would still miss a fifth of them at half. One text, one run each.
- **Bundles**: a disk reads few bytes at a time slowly, so that neurons (their rows of `up_proj` and
  `down_proj`) have to be read in bundles. The table gives the share of bundles of which a token
  needs at least one neuron. Ordered by co-activation (spectral bisection) hardly fewer are needed
  than in the order of the checkpoint: of 16 neurons one or more nearly always.
- **Time**: of reading the needed bundles, ordered by co-activation, over that of reading everything
  in order, at the speeds measured here. Above 1 it is faster to read everything.

So `--memory` keeps a fixed set of whole matrices and streams the rest in order
(`src/fallow/engine/memory.py`). A mode that prefers cached neurons would have to live on the static
choice, which costs most of the model (`static` in [selectors](selectors.md)), and is not there.
"""


def report() -> str:
    parts = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*/result.json")):
        r = json.loads(path.read_text())
        where = json.loads((path.parent / "machine.json").read_text())
        lines = [f"## {path.parent.name}\n", f"{machine_line(where)}.\n"]
        lines += ["| hits with a cache of | 25 % | 50 % | 75 % |", "|---|---|---|---|"]
        lines += [f"| {p} | {_cells(rates)} |" for p, rates in r["hits"].items()]
        heads = " | ".join(str(size) for size in BUNDLES)
        lines += [f"\n| bundles needed, of neurons | {heads} |", "|---" * (len(BUNDLES) + 1) + "|"]
        lines += [f"| order: {o} | {_cells(rates)} |" for o, rates in r["bundles"].items()]
        kib = " | ".join(f"{x['bytes'] // 1024} KiB" for x in r["reads"])
        speeds = " | ".join(f"{x['gbps']:.2f}" for x in r["reads"])
        neuron, whole = r["neuron_bytes"], r["sequential_gbps"]
        times = [
            share * x["bytes"] / size / x["gbps"] / (neuron / whole)
            for share, x, size in zip(
                r["bundles"]["co-activation"], r["reads"], BUNDLES, strict=True
            )
        ]
        lines += [f"| bytes of a read | {kib} |", f"| GB/s (in order: {whole:.2f}) | {speeds} |"]
        lines.append(f"| **time / all in order** | {' | '.join(f'{t:.2f}' for t in times)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _cells(rates: list[float]) -> str:
    return " | ".join(f"{rate:.1%}" for rate in rates)


if __name__ == "__main__":
    run_and_report(__doc__, run, report, "neuron_cache.md")
