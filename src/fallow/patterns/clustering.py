"""Codebooks of patterns: per layer, at an equal budget of active neurons, by Lloyd's algorithm.

A codebook has K centroids, sets of exactly B neurons each. A row x belongs to the centroid c that
covers most of it, and the objective is the sum over rows of w · (x and c), with w = 1 or a weight
per neuron: over the sum of w · x it is the recall of docs/methods.md. Both steps raise it or
leave it: the nearest centroid is the best for a row, and the B neurons with the largest w times
count are the best for a cluster. With |x| = |c| = B it is k-means on the rows, whose squared
distance is then 2 (B - |x and c|).
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fallow import _core
from fallow.common.errors import UsageError
from fallow.common.progress import progress
from fallow.common.workers import results
from fallow.patterns.store import MappedRows, chunks, pack_bits, row_sizes, unpack_bits

ROWS_AT_ONCE = 65536
# k-means++ sees this many rows per centroid: seeding takes as long as one pass then.
SEED_ROWS = 16
MAX_PASSES = 100
# A pass that raises the objective by less than this share of it is the last: behind it recall
# gains less than 0.001 (docs/results/patterns.md).
TOLERANCE = 1e-4
LARGEST_WEIGHT = 2**_core.WEIGHT_PLANES - 1
MAX_CLUSTERS = 2**20


@dataclass
class Codebook:
    """Centroids of one layer and what they were fitted on."""

    centroids: np.ndarray  # (K, words) uint64
    width: int
    # Sum of overlaps after every pass, those of the assignment that the pass made.
    history: list[int] = field(default_factory=list)
    weights: np.ndarray | None = None  # (width,) uint8, 0 to 15

    @property
    def n_clusters(self) -> int:
        return len(self.centroids)

    def nearest(self, rows: np.ndarray, n_threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Labels (n,) int32 of rows (n, words), and their (weighted) overlaps, int32.

        The lowest label among equals.
        """
        return nearest(rows, self.centroids, self.weights, n_threads=n_threads)


AfterPass = Callable[[Codebook], None]


def nearest(
    rows: np.ndarray,
    centroids: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    symmetric: bool = False,
    n_threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """For rows (n, words) the centroid (K, words) of largest overlap; the lowest among equals.

    `symmetric`: the smallest number of differing bits instead. Returns labels and overlaps, int32.
    """
    labels, overlaps = (np.empty(len(rows), dtype=np.int32) for _ in range(2))
    offset = np.zeros(len(centroids), dtype=np.int32)
    if symmetric:
        offset[:] = row_sizes(centroids)
    codebook, planes = centroids, 1
    if weights is not None:
        planes = _core.WEIGHT_PLANES
        masks = pack_bits((weights >> np.arange(planes)[:, None] & 1).astype(bool))
        codebook = (centroids[:, None] & masks).reshape(-1, centroids.shape[1])
    _core.nearest_rows(
        np.ascontiguousarray(rows), codebook, offset, planes, labels, overlaps, n_threads
    )
    return labels, overlaps


@dataclass
class Pass:
    """What one pass over some rows gives; passes over parts add up."""

    overlap: int
    counts: np.ndarray  # (K, 64 words) uint32: how often each neuron was active in a cluster
    sizes: np.ndarray  # (K,) int64: rows of a cluster
    worst: list[tuple[int, bytes]]  # overlap and bits of the rows that fit worst, ascending

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(
            self.overlap + other.overlap,
            self.counts + other.counts,
            self.sizes + other.sizes,
            sorted(self.worst + other.worst)[: len(self.sizes)],
        )


def one_pass(
    rows: np.ndarray | MappedRows,
    centroids: np.ndarray,
    weights: np.ndarray | None = None,
    n_threads: int = 1,
) -> Pass:
    """Assigns all rows (n, words), mapped or in memory, and counts; memory does not depend on n."""
    rows = _opened(rows)
    k, words = centroids.shape
    total = Pass(0, np.zeros((k, 64 * words), dtype=np.uint32), np.zeros(k, dtype=np.int64), [])
    for part in chunks(len(rows), ROWS_AT_ONCE):
        some = np.ascontiguousarray(rows[part])
        labels, overlaps = nearest(some, centroids, weights, n_threads=n_threads)
        _core.add_rows(some, labels, total.counts, n_threads)
        total.sizes += np.bincount(labels, minlength=k)
        total.overlap += int(overlaps.sum(dtype=np.int64))
        empty = int((total.sizes == 0).sum())
        if empty:  # equals are ordered by their bits, so that parts add up to the whole
            last = np.partition(overlaps, min(empty, len(overlaps)) - 1)[:empty].max()
            worst = [
                (int(overlaps[i]), some[i].tobytes()) for i in np.flatnonzero(overlaps <= last)
            ]
            total.worst = sorted(total.worst + worst)
        total.worst = total.worst[:empty]
    return total


def pass_over(
    rows: np.ndarray | MappedRows,
    centroids: np.ndarray,
    weights: np.ndarray | None = None,
    n_threads: int = 1,
    workers: int = 1,
) -> Pass:
    """A pass over all rows, of mapped ones in several workers; whole numbers, so all the same."""
    if workers == 1 or isinstance(rows, np.ndarray):
        return one_pass(rows, centroids, weights, n_threads)
    parts = [(part, centroids, weights, n_threads) for part in rows.split(workers)]
    found = [result for _, result in results(one_pass, parts, workers)]
    return functools.reduce(operator.add, found)


def _opened(rows: np.ndarray | MappedRows) -> np.ndarray:
    return rows.open() if isinstance(rows, MappedRows) else rows


def fit(
    rows: np.ndarray | MappedRows,
    width: int,
    n_clusters: int,
    budget: float,
    *,
    seed: int = 0,
    restarts: int = 1,
    max_passes: int = MAX_PASSES,
    tolerance: float = TOLERANCE,
    weights: np.ndarray | None = None,
    n_threads: int = 1,
    workers: int = 1,
    batch: int | None = None,
    start: Codebook | None = None,
    after_pass: AfterPass | None = None,
) -> Codebook:
    """A codebook for rows (n, words) of `width` neurons; the best of `restarts`.

    Ends when a pass raises the objective by no more than a share of `tolerance`: with 0, when it
    no longer does. Clusters that lose all their rows are given the rows that fit worst.

    Args:
        budget: share of the neurons that every centroid has, in (0, 1).
        weights: of neurons, whole numbers 0 to 15, (width,); None: all count alike.
        workers: processes that share each pass, if rows are mapped.
        batch: rows of a mini-batch: a first run over the rows, in which centroids are updated
            after every batch, saves whole passes where rows are many.
        start: a codebook to go on from, in place of k-means++ (one restart).
        after_pass: called with the codebook after each pass, to keep it.

    Raises:
        UsageError: a budget outside (0, 1), or K above the number of rows.
    """
    size, opened = budget_size(budget, width), _opened(rows)
    count = len(opened)
    check_clusters(n_clusters, count, batch)
    if weights is not None:
        weights = np.ascontiguousarray(weights, dtype=np.uint8)
        if weights.shape != (width,) or weights.max(initial=0) > LARGEST_WEIGHT:
            raise UsageError(f"weights must be {width} numbers from 0 to {LARGEST_WEIGHT}")
    best: Codebook | None = None
    for i in range(restarts if start is None else 1):
        rng = np.random.default_rng((seed, i))
        if start is None:
            seeds = unpack_bits(plus_plus(opened, n_clusters, rng, n_threads), width)
            each = Pass(0, seeds, np.ones(n_clusters, dtype=np.int64), [])  # a cluster of its own
            made = Codebook(update(each, width, size, weights), width, [], weights)
            if batch is not None:
                _mini_batches(opened, made, size, batch, n_threads)
        else:
            made = Codebook(start.centroids, width, list(start.history), weights)
        _lloyd(rows, made, size, max_passes, tolerance, n_threads, workers, after_pass)
        if best is None or made.history[-1] > best.history[-1]:
            best = made
    assert best is not None
    return best


def check_clusters(n_clusters: int, n_rows: int, batch: int | None) -> None:
    """Raises UsageError for more clusters than rows, none, or batches of none."""
    if not 1 <= n_clusters <= min(n_rows, MAX_CLUSTERS):
        raise UsageError(f"{n_clusters} clusters of {n_rows} rows; give 1 to the number of rows")
    if batch is not None and batch < 1:
        raise UsageError(f"batches of {batch} rows; give at least 1")


def _mini_batches(
    rows: np.ndarray, codebook: Codebook, size: int, batch: int, n_threads: int
) -> None:
    """One run over the rows, in place: centroids follow the counts so far (Sculley, WWW 2010)."""
    total: Pass | None = None
    with progress("mini-batches", -(-len(rows) // batch)) as ticker:
        for part in chunks(len(rows), batch):
            found = one_pass(rows[part], codebook.centroids, codebook.weights, n_threads)
            total = found if total is None else total + found
            codebook.centroids = update(total, codebook.width, size, codebook.weights)
            ticker.advance()


def _lloyd(
    rows: np.ndarray | MappedRows,
    codebook: Codebook,
    size: int,
    max_passes: int,
    tolerance: float,
    n_threads: int,
    workers: int,
    after_pass: AfterPass | None,
) -> None:
    """Passes until the objective hardly rises, in place."""
    with progress(f"clustering into {codebook.n_clusters}") as ticker:
        while len(codebook.history) < max_passes:
            found = pass_over(rows, codebook.centroids, codebook.weights, n_threads, workers)
            before = codebook.history[-1:]
            stays = bool(before) and found.overlap <= before[0] * (1 + tolerance)
            codebook.history.append(found.overlap)
            if stays:
                return
            codebook.centroids = update(found, codebook.width, size, codebook.weights)
            if after_pass is not None:
                after_pass(codebook)
            ticker.advance()


def budget_size(budget: float, width: int) -> int:
    """Neurons of a centroid. Raises UsageError unless 0 < budget < 1 leaves some and drops some."""
    size = round(budget * width) if 0 < budget < 1 else 0
    if not 0 < size < width:
        raise UsageError(f"budget {budget:g} is outside (0, 1); give a fraction such as 0.5")
    return size


def update(found: Pass, width: int, size: int, weights: np.ndarray | None = None) -> np.ndarray:
    """The best centroids (K, words) of `size` neurons for a pass's clusters.

    Neurons that a cluster has equally often are ordered by how frequent they are in all clusters,
    then by number. Empty clusters take the rows that fit worst.
    """
    counts = found.counts[:, :width].copy()
    empty = np.flatnonzero(found.sizes == 0)
    for k, (_, row) in zip(empty, found.worst, strict=False):
        counts[k] = unpack_bits(np.frombuffer(row, dtype="<u8")[None], width)[0]
    score = counts * (1.0 if weights is None else weights.astype(np.float64))
    total = score[found.sizes > 0].sum(axis=0)
    # Below half of the smallest difference between scores, and ranked without equals.
    rank = np.empty(width)
    rank[np.lexsort((np.arange(width), -total))] = np.arange(width)
    return pack_bits(largest(score - rank / (4 * width), size))


def energy_weights(energy: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weights 1 to 15 of neurons, (width,) uint8, by their energy where they are active.

    Energies are sums over tokens, `counts` how many of them a neuron was active for. The square
    root, since the loudest neurons are hundreds of times as loud as most, which shall not all be
    0.
    """
    mean = energy / np.maximum(counts, 1)
    scaled = np.sqrt(mean / max(float(np.quantile(mean, 0.99)), 1e-30))
    return np.clip(np.round(LARGEST_WEIGHT * scaled), 1, LARGEST_WEIGHT).astype(np.uint8)


def largest(score: np.ndarray, size: int) -> np.ndarray:
    """Where the `size` largest of each row of scores (n, width) are, bool; no two are equal."""
    threshold = np.partition(score, score.shape[1] - size, axis=1)[:, -size]
    return score >= threshold[:, None]


def plus_plus(
    rows: np.ndarray, n_clusters: int, rng: np.random.Generator, n_threads: int = 1
) -> np.ndarray:
    """k-means++ (Arthur, Vassilvitskii, 2007) on a sample: rows as first centroids, (K, words).

    Each next one is drawn with a chance in proportion to how many of its neurons no earlier one
    covers.
    """
    count = min(len(rows), max(SEED_ROWS * n_clusters, 1024))
    sample = np.ascontiguousarray(rows[np.sort(rng.choice(len(rows), count, replace=False))])
    uncovered = row_sizes(sample)
    overlaps = np.empty((count, 1), dtype=np.uint32)
    sizes, chosen = uncovered.copy(), [int(rng.integers(count))]
    while len(chosen) < n_clusters:
        _core.row_overlaps(sample, sample[chosen[-1] :][:1], overlaps, n_threads)
        np.minimum(uncovered, sizes - overlaps[:, 0], out=uncovered)
        total = np.cumsum(uncovered)
        if total[-1] == 0:  # fewer different rows than centroids
            chosen.append(int(rng.integers(count)))
        else:
            chosen.append(int(np.searchsorted(total, rng.integers(total[-1]), side="right")))
    return sample[chosen]
