"""The published clustering of activation patterns and its baseline, as their code does it.

arXiv:2507.14179; docs/methods.md, "Pattern clustering". Rows of all layers are pooled. A chunk is
what one window of every layer gives; one chunk goes to each of several workers, which the paper's
were GPUs. What the code leaves to chance or to its library is fixed here: ties go to the lower row
and the draw is numpy's.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from fallow import _core
from fallow.common.errors import UsageError
from fallow.common.progress import progress
from fallow.patterns.clustering import nearest
from fallow.patterns.store import pack_bits, row_sizes, unpack_bits

Chunk = Callable[[], np.ndarray]
"""Reads a chunk of rows (R, words) when it is its turn."""

ZERO_FRACTION = 0.4  # q: the least share of zeros in a first centroid, and in every later one
TRIED_ROWS = 100
PASSES, BASELINE_PASSES = 10, 100
WORKERS = 8
SEED = 42
_CENTROIDS_AT_ONCE = 64


@dataclass
class Published:
    """Centroids (K', words), and what each pass did."""

    centroids: np.ndarray
    changed_bits: list[float]  # by batch: share of the centroids' bits that changed
    passes: int
    converged: bool


def cluster(
    chunks: Sequence[Chunk],
    width: int,
    n_clusters: int,
    *,
    zero_fraction: float = ZERO_FRACTION,
    passes: int = PASSES,
    workers: int = WORKERS,
    seed: int = SEED,
    n_threads: int = 1,
) -> Published:
    """Capacity-limited greedy assignment and history-weighted updates; chunks are of equal size.

    Raises:
        UsageError: more clusters than rows in a chunk.
    """
    n_rows = len(chunks[0]())
    capacity = n_rows // n_clusters
    if capacity < 1:
        raise UsageError(f"{n_clusters} clusters are more than the {n_rows} rows of a chunk")
    centroids = first_centroids(chunks, n_rows, width, n_clusters, zero_fraction, seed)
    before: list[np.ndarray] = []
    changes: list[float] = []
    batches = range(0, len(chunks), workers)

    def learn(chunk: Chunk, history: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.ascontiguousarray(chunk())
        labels = assign(rows, centroids, capacity)
        return labels, update(rows, labels, centroids, width, history, capacity, zero_fraction)

    with (
        ThreadPoolExecutor(n_threads) as pool,  # of the workers, as many at a time
        progress("published clustering", passes * len(batches)) as ticker,
    ):
        for number in range(1, passes + 1):
            assigned = []
            for batch, first in enumerate(batches, 1):
                some = chunks[first : first + workers]
                ones = np.zeros((len(centroids), width), dtype=np.int32)
                for labels, new in pool.map(
                    partial(learn, history=number * batch * capacity), some
                ):
                    assigned.append(labels)
                    ones += new
                merged = pack_bits(2 * ones >= len(some))
                changed = int(row_sizes(merged ^ centroids).sum())
                changes.append(changed / (len(centroids) * width))
                centroids = merged
                ticker.advance()
            if before and all(map(np.array_equal, assigned, before)):
                return Published(centroids, changes, number, True)
            before = assigned
    return Published(centroids, changes, passes, False)


def first_centroids(
    chunks: Sequence[Chunk],
    n_rows: int,
    width: int,
    n_clusters: int,
    zero_fraction: float,
    seed: int,
) -> np.ndarray:
    """Random rows with enough zeros, or the next such of 100; a row without one is passed over."""
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(len(chunks) * n_rows, n_clusters, replace=False))
    most = (1 - zero_fraction) * width
    found = []
    for number in np.unique(drawn // n_rows):
        rows = chunks[number]()
        fits = row_sizes(rows) <= most
        for start in drawn[drawn // n_rows == number] % n_rows:
            passing = np.flatnonzero(fits[start : start + 1 + TRIED_ROWS])
            if len(passing):
                found.append(np.array(rows[start + passing[0]]))
    if not found:
        raise UsageError(f"no row has {zero_fraction:.0%} zeros; the patterns are too dense")
    return np.stack(found)


def assign(rows: np.ndarray, centroids: np.ndarray, capacity: int) -> np.ndarray:
    """Labels (R,): in turn each centroid takes its nearest free rows; -1 for those left over.

    The distance is one-sided, |x| - |x and c|: neurons of x that c misses.
    """
    n_rows = len(rows)
    labels = np.full(n_rows, -1, dtype=np.int32)
    sizes = row_sizes(rows)
    free = np.arange(n_rows)
    for start in range(0, len(centroids), _CENTROIDS_AT_ONCE):
        some = centroids[start : start + _CENTROIDS_AT_ONCE]
        overlaps = np.empty((len(free), len(some)), dtype=np.uint32)
        _core.row_overlaps(np.ascontiguousarray(rows[free]), some, overlaps, 1)
        distances = sizes[free][:, None] - overlaps.astype(np.int64)
        left = np.arange(len(free))
        for i in range(len(some)):
            if len(left) == 0:
                break
            key = distances[left, i] * n_rows + free[left]  # no two are equal
            take = np.argpartition(key, min(capacity, len(key)) - 1)[:capacity]
            labels[free[left[take]]] = start + i
            left = np.delete(left, take)
        free = free[left]
    return labels


def update(
    rows: np.ndarray,
    labels: np.ndarray,
    centroids: np.ndarray,
    width: int,
    history: int,
    capacity: int,
    zero_fraction: float,
) -> np.ndarray:
    """New centroids (K, width) bool from one chunk: beta = (c H + mu w) / (H + w) above its
    quantile. An empty cluster keeps its own."""
    k = len(centroids)
    counts = np.zeros((k, 64 * rows.shape[1]), dtype=np.uint32)
    _core.add_rows(rows, labels, counts, 1)
    sizes = np.bincount(labels[labels >= 0], minlength=k)
    old = unpack_bits(centroids, width)
    # beta times the cluster's size times (H + w), which orders a centroid's neurons as beta does.
    beta = old * (history * np.maximum(sizes, 1))[:, None] + counts[:, :width] * np.int64(capacity)
    # What is above the quantile, interpolated or not, is above the order statistic below it.
    below = int(zero_fraction * (width - 1))
    new = beta > np.partition(beta, below, axis=1)[:, below, None]
    new[sizes == 0] = old[sizes == 0]
    return new


def binary_k_means(
    rows: np.ndarray,
    width: int,
    n_clusters: int,
    *,
    passes: int = BASELINE_PASSES,
    seed: int = SEED,
    n_threads: int = 1,
) -> np.ndarray:
    """The baseline, BRB-KMeans: k-means on the rows whose centroids are rounded in every pass.

    On one chunk, as published. A mean of exactly a half becomes 0, and an empty cluster keeps its
    centroid. Returns centroids (K, words).

    Raises:
        UsageError: more clusters than rows.
    """
    if n_clusters > len(rows):
        raise UsageError(f"{n_clusters} clusters are more than the {len(rows)} rows of a chunk")
    rng = np.random.default_rng(seed)
    rows = np.ascontiguousarray(rows)
    centroids = rows[np.sort(rng.choice(len(rows), n_clusters, replace=False))]
    before = None
    with progress("binary k-means", passes) as ticker:
        for _ in range(passes):
            labels, _ = nearest(rows, centroids, symmetric=True, n_threads=n_threads)
            if before is not None and np.array_equal(labels, before):
                break
            before = labels
            counts = np.zeros((n_clusters, 64 * rows.shape[1]), dtype=np.uint32)
            _core.add_rows(rows, labels, counts, n_threads)
            sizes = np.bincount(labels, minlength=n_clusters)
            rounded = pack_bits(2 * counts[:, :width] > sizes[:, None])
            centroids = np.where((sizes > 0)[:, None], rounded, centroids)
            ticker.advance()
    return centroids
