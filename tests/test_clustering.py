"""Bits and clustering of active sets, each against a plain version of itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow import _core
from fallow.common.errors import UsageError
from fallow.patterns import clustering, published
from fallow.patterns.clustering import budget_size, fit, nearest, one_pass
from fallow.patterns.codebooks import frequencies
from fallow.patterns.store import (
    n_words,
    pack_bits,
    row_sizes,
    unpack_bits,
)


def random_rows(n: int, width: int, seed: int = 0, active: float = 0.5) -> np.ndarray:
    """Active sets (n, width) bool, all of the same size."""
    rng = np.random.default_rng(seed)
    return clustering.largest(rng.random((n, width)), round(active * width))


def planted_rows(n: int, width: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows near one of k prototypes, and which."""
    rng = np.random.default_rng(seed)
    prototypes = rng.random((k, width))
    labels = rng.integers(0, k, n)
    score = prototypes[labels] + 0.15 * rng.standard_normal((n, width))
    return clustering.largest(score, width // 2), labels


# Bits --------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 1100), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_bits_round_trip(n: int, width: int, seed: int) -> None:
    active = np.random.default_rng(seed).random((n, width)) < 0.5
    rows = pack_bits(active)
    assert rows.shape == (n, n_words(width))
    assert rows.shape[1] % _core.LINE_WORDS == 0
    np.testing.assert_array_equal(unpack_bits(rows, width), active)
    np.testing.assert_array_equal(row_sizes(rows), active.sum(axis=1))
    # As docs/patterns.md says, with no help from numpy's packing.
    for i, j in np.argwhere(active)[:20]:
        assert int(rows[i, j // 64]) >> int(j % 64) & 1


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("words", [8, 24, 136, 1032])  # the last ones pass 255 per byte
@pytest.mark.parametrize("threads", [1, 3])
def test_overlaps_and_nearest(kernels: str, words: int, threads: int) -> None:
    rng = np.random.default_rng(words)
    rows, others = (rng.integers(0, 2**64, (n, words), dtype=np.uint64) for n in (131, 9))
    rows[3], others[2] = ~np.uint64(0), ~np.uint64(0)  # all bits
    others[5] = others[4]  # equals: the lower label wins
    truth = unpack_bits(rows, 64 * words).astype(int) @ unpack_bits(others, 64 * words).T
    counts = np.empty((131, 9), dtype=np.uint32)
    _core.row_overlaps(rows, others, counts, threads, kernels)
    np.testing.assert_array_equal(counts, truth)
    labels, found = np.empty(131, dtype=np.int32), np.empty(131, dtype=np.int32)
    for offset in (np.zeros(9, dtype=np.int32), row_sizes(others).astype(np.int32)):
        _core.nearest_rows(rows, others, offset, 1, labels, found, threads, kernels)
        best = (2 * truth - offset).argmax(axis=1)  # the first of equals
        np.testing.assert_array_equal(labels, best)
        np.testing.assert_array_equal(found, truth[np.arange(131), best])


@pytest.mark.parametrize("kernels", _core.KERNELS)
def test_weighted_nearest(kernels: str) -> None:
    rows, centroids = random_rows(70, 100, 1), random_rows(7, 100, 2, 0.3)
    weights = np.random.default_rng(3).integers(0, 16, 100).astype(np.uint8)
    truth = (rows * weights).astype(int) @ centroids.T
    labels, found = nearest(pack_bits(rows), pack_bits(centroids), weights)
    np.testing.assert_array_equal(labels, truth.argmax(axis=1))
    np.testing.assert_array_equal(found, truth.max(axis=1))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_are_counted_by_label(threads: int) -> None:
    active = np.random.default_rng(0).random((900, 70)) < 0.9  # over 255 rows of one label
    labels = np.random.default_rng(1).choice([-1, 0, 2, 3], 900, p=[0.1, 0.7, 0.1, 0.1])
    counts = np.full((4, 512), 7, dtype=np.uint32)
    _core.add_rows(pack_bits(active), labels.astype(np.int32), counts, threads)
    for label in range(4):
        expected = active[labels == label].sum(axis=0)
        np.testing.assert_array_equal(counts[label, :70] - 7, expected)
    assert (counts[:, 70:] == 7).all()


def test_wrong_arrays_are_refused() -> None:
    rows, counts = pack_bits(random_rows(4, 30)), np.zeros((2, 512), dtype=np.uint32)
    with pytest.raises(ValueError, match="whole lines"):
        _core.row_overlaps(rows[:, :3].copy(), rows[:, :3].copy(), counts, 1)
    with pytest.raises(ValueError, match="sizes"):
        _core.row_overlaps(rows, rows, counts, 1)
    with pytest.raises(ValueError, match="outside"):
        _core.add_rows(rows, np.array([0, 1, 2, 0], dtype=np.int32), counts, 1)


# Clustering --------------------------------------------------------------------------------------


def plain_lloyd(active: np.ndarray, centroids: np.ndarray, size: int) -> tuple[np.ndarray, list]:
    """The algorithm of fallow.patterns.clustering in a few lines of numpy; no empty clusters."""
    history: list[int] = []
    while True:
        overlap = active.astype(int) @ centroids.T
        labels = overlap.argmax(axis=1)
        history.append(int(overlap.max(axis=1).sum()))
        if len(history) > 1 and history[-1] <= history[-2]:
            return centroids, history
        counts = np.stack([active[labels == k].sum(axis=0) for k in range(len(centroids))])
        keys = [(-c, -active.sum(axis=0), np.arange(active.shape[1])) for c in counts]
        order = np.stack([np.lexsort(key[::-1]) for key in keys])
        centroids = np.zeros_like(centroids)
        np.put_along_axis(centroids, order[:, :size], True, axis=1)


@pytest.mark.parametrize("threads", [1, 2])
def test_lloyd_equals_a_plain_one(threads: int) -> None:
    active, _ = planted_rows(600, 90, 6)
    first = unpack_bits(
        clustering.plus_plus(pack_bits(active), 5, np.random.default_rng((0, 0))), 90
    )
    expected, history = plain_lloyd(active, first, 45)
    found = fit(pack_bits(active), 90, 5, 0.5, n_threads=threads)
    assert found.history == history
    np.testing.assert_array_equal(unpack_bits(found.centroids, 90), expected)


def test_objective_never_falls() -> None:
    for seed in range(5):
        rows = pack_bits(random_rows(700, 130, seed))
        found = fit(rows, 130, 40, 0.3, seed=seed, tolerance=0)
        assert (np.diff(found.history[:-1]) > 0).all()  # and the last pass changed nothing
        assert found.history[-1] == found.history[-2]
        assert (row_sizes(found.centroids) == 39).all()


def test_planted_clusters_are_found() -> None:
    active, labels = planted_rows(2000, 256, 8, seed=3)
    found = fit(pack_bits(active), 256, 8, 0.5, restarts=4)
    mine, _ = found.nearest(pack_bits(active))
    pairs = {(int(a), int(b)) for a, b in zip(mine, labels, strict=True)}
    assert len(pairs) == 8


def test_one_cluster_is_the_static_mask() -> None:
    active = random_rows(500, 64, 1)
    found = fit(pack_bits(active), 64, 1, 0.25)
    chosen = unpack_bits(found.centroids, 64)[0]
    count = active.sum(axis=0)
    assert count[chosen].min() >= count[~chosen].max()
    np.testing.assert_array_equal(frequencies(pack_bits(active), 64), count)


def test_as_many_clusters_as_rows_cover_all() -> None:
    active = random_rows(60, 128, 2)
    found = fit(pack_bits(active), 128, 60, 0.5)
    assert found.history[-1] == active.sum()


def test_empty_clusters_take_the_worst_rows() -> None:
    rows = pack_bits(random_rows(50, 128, 5))
    centroids = np.concatenate([rows[:1], rows[:1], rows[:1]])  # equals: two stay empty
    found = one_pass(rows, centroids)
    assert list(found.sizes) == [50, 0, 0]
    made = clustering.update(found, 128, 64)
    overlap = row_sizes(rows & rows[0])
    worst = sorted((int(overlap[i]), rows[i].tobytes()) for i in range(50))[:2]
    assert [row.tobytes() for row in made[1:]] == [bits for _, bits in worst]
    assert one_pass(rows, made).overlap > found.overlap


def test_passes_over_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pack_bits(random_rows(500, 96, 7))
    centroids = np.concatenate([rows[:5], rows[:2]])
    whole = one_pass(rows, centroids)
    monkeypatch.setattr(clustering, "ROWS_AT_ONCE", 64)
    parts = one_pass(rows, centroids)
    added = one_pass(rows[:130], centroids) + one_pass(rows[130:], centroids)
    for other in (parts, added):
        assert other.overlap == whole.overlap
        np.testing.assert_array_equal(other.counts, whole.counts)
        np.testing.assert_array_equal(other.sizes, whole.sizes)
        assert other.worst[:2] == whole.worst[:2]


def test_weights_make_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    active = random_rows(400, 80, 11)
    weights = np.random.default_rng(0).integers(1, 16, 80).astype(np.uint8)
    found = fit(pack_bits(active), 80, 6, 0.5, weights=weights)
    assert (np.diff(found.history[:-1]) > 0).all()
    chosen = unpack_bits(found.centroids, 80)
    covered = (active * weights).astype(int) @ chosen.T
    assert covered.max(axis=1).sum() == found.history[-1]
    # No other set of 40 neurons covers more of a cluster.
    for k in range(6):
        gain = (active[covered.argmax(axis=1) == k] * weights).sum(axis=0)
        assert gain[chosen[k]].min() >= gain[~chosen[k]].max()


def test_mini_batches_come_first() -> None:
    active, _ = planted_rows(3000, 200, 30, seed=1)
    rows = pack_bits(active)
    whole = fit(rows, 200, 30, 0.5)
    found = fit(rows, 200, 30, 0.5, batch=200)
    assert (np.diff(found.history[:-1]) > 0).all()
    assert found.history[0] > whole.history[0]  # the first whole pass begins from better ones
    assert found.history[-1] > 0.97 * whole.history[-1]
    with pytest.raises(UsageError, match="batches of 0 rows"):
        fit(rows, 200, 30, 0.5, batch=0)


def test_bad_requests() -> None:
    rows = pack_bits(random_rows(10, 40))
    with pytest.raises(UsageError, match="11 clusters of 10 rows"):
        fit(rows, 40, 11, 0.5)
    for budget in (0.0, 1.0, -1.0, float("nan"), 0.001):
        with pytest.raises(UsageError, match=r"outside \(0, 1\)"):
            budget_size(budget, 40)


# As published ------------------------------------------------------------------------------------


def plain_published(
    chunks: list[np.ndarray], first: np.ndarray, passes: int, workers: int, q: float = 0.4
) -> tuple[np.ndarray, int]:
    """The published clustering from its formulas, with loops."""
    centroids, k = first.copy(), len(first)
    capacity, before = len(chunks[0]) // k, None
    for number in range(1, passes + 1):
        assigned = []
        for batch in range(1, -(-len(chunks) // workers) + 1):
            made = []
            for x in chunks[(batch - 1) * workers : batch * workers]:
                labels, mine = np.full(len(x), -1), centroids.copy()
                for i in range(k):
                    free = np.flatnonzero(labels < 0)
                    distance = [(int((x[r] & ~centroids[i]).sum()), r) for r in free]
                    members = [r for _, r in sorted(distance)[:capacity]]
                    labels[members] = i
                    mean, history = x[members].mean(axis=0), number * batch * capacity
                    beta = (centroids[i] * history + mean * capacity) / (history + capacity)
                    mine[i] = beta > np.quantile(beta, q)
                assigned.append(labels)
                made.append(mine)
            centroids = np.mean(made, axis=0) >= 0.5
        if before is not None and all(map(np.array_equal, assigned, before)):
            return centroids, number
        before = assigned
    return centroids, passes


@pytest.mark.parametrize("workers", [1, 3])
def test_published_algorithm_follows_its_formulas(workers: int) -> None:
    chunks = [planted_rows(61, 50, 4, seed)[0] for seed in range(5)]
    readers = [lambda c=c: pack_bits(c) for c in chunks]
    first = published.first_centroids(readers, 61, 50, 7, 0.4, 42)
    assert len(first) == 7
    expected, passes = plain_published(chunks, unpack_bits(first, 50), 6, workers)
    found = published.cluster(readers, 50, 7, passes=6, workers=workers)
    np.testing.assert_array_equal(unpack_bits(found.centroids, 50), expected)
    assert found.passes == passes


def test_published_updates_freeze() -> None:
    """A one never loses to a zero once the history has weight."""
    chunks = [planted_rows(64, 100, 8, seed)[0] for seed in range(6)]
    found = published.cluster([lambda c=c: pack_bits(c) for c in chunks], 100, 8, workers=2)
    assert found.converged
    assert found.changed_bits[-1] == 0
    assert found.changed_bits[0] > 0
    assert found.passes <= 4


def test_first_centroids_have_zeros() -> None:
    dense, sparse = random_rows(200, 50, 0, 0.9), random_rows(200, 50, 1, 0.5)
    mixed = np.where((np.arange(200) % 150 == 149)[:, None], sparse, dense)
    found = published.first_centroids([lambda: pack_bits(mixed)], 200, 50, 60, 0.4, 0)
    assert 0 < len(found) < 60  # behind the last sparse row none follows
    assert set(map(bytes, found)) == {bytes(pack_bits(mixed[149:150]))}
    with pytest.raises(UsageError, match="too dense"):
        published.first_centroids([lambda: pack_bits(dense)], 200, 50, 60, 0.4, 0)


def test_baseline_is_k_means_with_rounded_centroids() -> None:
    active = planted_rows(120, 40, 5)[0]
    rows = pack_bits(active)
    found = unpack_bits(published.binary_k_means(rows, 40, 9, passes=8), 40)
    drawn = np.sort(np.random.default_rng(42).choice(120, 9, replace=False))
    centroids, before = active[drawn].astype(float), None
    for _ in range(8):
        distance = ((active[:, None] - centroids[None]) ** 2).sum(axis=2)
        labels = distance.argmin(axis=1)
        if before is not None and (labels == before).all():
            break
        before = labels
        for k in range(9):
            if (labels == k).any():
                centroids[k] = active[labels == k].mean(axis=0) > 0.5
    np.testing.assert_array_equal(found, centroids)
