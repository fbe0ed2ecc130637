"""Patterns: bits, the store, and clustering, each against a plain version of itself."""

import errno
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fallow
from fallow import _core
from fallow.calibration.calibrator import Calibrator
from fallow.checkpoints.text import Text, load_text
from fallow.common import workers
from fallow.common.errors import FallowError, UsageError
from fallow.models.taps import attach
from fallow.patterns import clustering, published
from fallow.patterns.clustering import budget_size, fit, nearest, one_pass
from fallow.patterns.codebooks import cluster_store, frequencies, load_codebooks
from fallow.patterns.collect import PUBLISHED_TAPS, collect
from fallow.patterns.prediction import predict_clusters
from fallow.patterns.store import (
    Header,
    PatternStore,
    StoreWriter,
    n_words,
    pack_bits,
    row_sizes,
    unpack_bits,
    write_window,
)
from fallow.plan import Plan

Texts = tuple[Path, Path]


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


# The store ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def topk_plan(calibrators: dict[str, Calibrator]) -> Plan:
    return calibrators["llama"].plan("topk", sparsity=0.5, measure=False)


@pytest.fixture(scope="session")
def store(
    tiny: dict[str, fallow.Model],
    topk_plan: Plan,
    texts: Texts,
    tmp_path_factory: pytest.TempPathFactory,
) -> PatternStore:
    folder = tmp_path_factory.mktemp("store") / "s"
    return collect(
        tiny["llama"], topk_plan, folder, texts[0], context=32, windows=12, magnitudes=True
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "opt"])
def test_store_holds_what_the_plan_leaves(
    name: str,
    tiny: dict[str, fallow.Model],
    calibrators: dict[str, Calibrator],
    texts: Texts,
    tmp_path: Path,
) -> None:
    model = tiny[name]
    plan = calibrators[name].plan("percentile", sparsity=0.5, measure=False)
    taps = tuple(t for t in ("inter", *PUBLISHED_TAPS) if t in model.layers[0].ffn_taps)
    store = collect(model, plan, tmp_path / "s", texts[1], taps=taps, context=32, windows=2)
    np.testing.assert_array_equal(
        store.tokens,
        model.windows(load_text(texts[1], "evaluation"), 32, 2),
    )
    seen: dict[tuple[str, int], np.ndarray] = {}

    def keep(tap: str):
        return lambda layer, value: seen.__setitem__((tap, layer), value.numpy() != 0)

    with model.sparse(plan), attach(model.layers, {tap: keep(tap) for tap in taps}):
        model.hidden(store.tokens[1][None].astype(np.int64))
    for (tap, layer), active in seen.items():
        rows = unpack_bits(store.rows(layer, tap)[32:], active.shape[1])
        np.testing.assert_array_equal(rows, active)
    assert 0.3 < unpack_bits(store.rows(0, "gate_pre"), 37).mean() < 0.7


def test_magnitudes_are_shares_of_the_norm(
    store: PatternStore, tiny: dict[str, fallow.Model], topk_plan: Plan
) -> None:
    model, found = tiny["llama"], store.magnitudes(1)
    np.testing.assert_allclose(np.square(found.astype(float)).sum(axis=1), 1, rtol=5e-3)
    np.testing.assert_array_equal(found > 0, unpack_bits(store.rows(1), 37))
    seen = []

    def keep(layer: int, inter: torch.Tensor) -> None:
        if layer == 1:
            seen.append(inter.abs() * model.layers[1].down_norm)

    with model.sparse(topk_plan), attach(model.layers, {"inter": keep}):
        model.hidden(store.tokens[0][None].astype(np.int64))
    expected = (seen[0] / seen[0].norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(found[:32], expected, atol=1e-3)


def test_collecting_goes_on_where_it_stopped(
    store: PatternStore,
    tiny: dict[str, fallow.Model],
    topk_plan: Plan,
    texts: Texts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def again() -> PatternStore:
        return collect(
            tiny["llama"], topk_plan, tmp_path / "s", texts[0],
            context=32, windows=12, magnitudes=True,
        )  # fmt: skip

    calls, pwrite = 0, os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 10:  # amid the third window
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(FallowError, match=r"No space left.*make room and run the same"):
            again()
    with pytest.raises(FallowError, match="lacks 10 of 12 windows"):
        PatternStore(tmp_path / "s")
    hidden, windows = tiny["llama"].hidden, []
    monkeypatch.setattr(
        tiny["llama"], "hidden", lambda ids: windows.append(ids) or hidden(ids), raising=True
    )
    finished = again()
    assert len(windows) == 10
    for layer in range(2):
        np.testing.assert_array_equal(finished.rows(layer), store.rows(layer))
        np.testing.assert_array_equal(finished.magnitudes(layer), store.magnitudes(layer))


def test_bad_stores(
    store: PatternStore,
    tiny: dict[str, fallow.Model],
    calibrators: dict[str, Calibrator],
    topk_plan: Plan,
    texts: Texts,
    tmp_path: Path,
) -> None:
    with pytest.raises(FallowError, match=r"no pattern store.*fallow patterns collect"):
        PatternStore(tmp_path)
    with pytest.raises(UsageError, match="has no 'up'; it has inter"):
        store.rows(0, "up")
    with pytest.raises(UsageError, match="layer 2 is outside 0 to 1"):
        store.rows(2)
    with pytest.raises(FallowError, match=r"is of .*llama .*, not of other"):
        store.check_model("0" * 16, "other")
    copy = tmp_path / "copy"
    shutil.copytree(store.folder, copy)
    path = copy / "inter.001"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FallowError, match=r"inter\.001 has \d+ bytes, not \d+"):
        PatternStore(copy)
    (copy / "store.json").write_text('{"format": 1}')
    with pytest.raises(FallowError, match="damaged"):
        PatternStore(copy)
    (copy / "store.json").write_text('{"format": 9}')
    with pytest.raises(FallowError, match="another format"):
        PatternStore(copy)
    with pytest.raises(FallowError, match=r"holds patterns of .*choose another folder"):
        collect(tiny["llama"], topk_plan, store.folder, texts[1], context=32, windows=12)
    with pytest.raises(FallowError, match="calibrate a plan for"):
        collect(tiny["qwen2"], topk_plan, tmp_path / "q", texts[1], context=32)
    other = calibrators["llama"].plan("topk", sparsity=0.4, measure=False)
    with pytest.raises(FallowError, match=r"knob 0\.5, not 0\.6"):
        collect(
            tiny["llama"], other, store.folder, texts[0], context=32, windows=12, magnitudes=True
        )


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


def test_parts_of_mapped_rows(store: PatternStore) -> None:
    mapped = store.mapped(1, first=2, end=9)
    np.testing.assert_array_equal(mapped.open(), store.rows(1)[64:288])
    parts = mapped.split(5)
    np.testing.assert_array_equal(np.concatenate([p.open() for p in parts]), mapped.open())
    assert len(mapped.split(1000)) == 224


def test_bad_requests() -> None:
    rows = pack_bits(random_rows(10, 40))
    with pytest.raises(UsageError, match="11 clusters of 10 rows"):
        fit(rows, 40, 11, 0.5)
    for budget in (0.0, 1.0, -1.0, float("nan"), 0.001):
        with pytest.raises(UsageError, match=r"outside \(0, 1\)"):
            budget_size(budget, 40)


# From a store ------------------------------------------------------------------------------------


def test_scores_of_a_store(store: PatternStore, tmp_path: Path) -> None:
    report = cluster_store(store, tmp_path / "c", 8, 0.5)
    made, metadata = load_codebooks(tmp_path / "c")
    assert list(made) == [0, 1]
    assert (report.train_rows, report.test_rows) == (9 * 32, 3 * 32)
    assert metadata["algorithm"] == '"lloyd"'
    for result in report.layers:
        active = unpack_bits(store.rows(result.layer), 37)
        train, held = active[: 9 * 32], active[9 * 32 :]
        energy = np.square(store.magnitudes(result.layer)[9 * 32 :].astype(float))
        centroids = unpack_bits(made[result.layer].centroids, 37)
        assert (centroids.sum(axis=1) == 18).all()
        best = (held.astype(int) @ centroids.T).argmax(axis=1)
        static = np.zeros(37, dtype=bool)
        static[np.argsort(-train.sum(axis=0), kind="stable")[:18]] = True
        for name, mask in (("cluster", centroids[best]), ("static", static[None])):
            scores = result.scores[name]
            assert scores["recall"] == pytest.approx((held & mask).sum() / held.sum())
            assert scores["precision"] == pytest.approx((held & mask).sum() / (18 * len(held)))
            shares = (energy * mask).sum(axis=1) / energy.sum(axis=1)  # no token is silent
            assert scores["energy_recall"] == pytest.approx(shares.mean(), rel=1e-6)
        follows = np.arange(len(held)) % 32 > 0
        both = held[1:] & held[:-1] & follows[1:, None]
        assert result.scores["previous"]["recall"] == pytest.approx(
            both.sum() / held[follows].sum()
        )
        assert result.scores["random"]["recall"] == pytest.approx(18 / 37, abs=0.1)
        assert result.scores["cluster"]["recall"] > result.scores["static"]["recall"]


def test_stopped_clustering_goes_on(
    store: PatternStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_store(store, tmp_path / "whole", 12, 0.5)
    update, passes, limit = clustering.update, 0, 0

    def stop(*arguments: object) -> np.ndarray:
        nonlocal passes
        passes += 1
        if passes == limit:
            raise KeyboardInterrupt
        return update(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(clustering, "update", stop)
    for limit in (3, 9):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            cluster_store(store, tmp_path / "c", 12, 0.5)
        assert not (tmp_path / "c").exists()
        with pytest.raises(FallowError, match="other settings"):
            cluster_store(store, tmp_path / "c", 13, 0.5)
    limit, before = 0, passes
    cluster_store(store, tmp_path / "c", 12, 0.5)
    for layer, codebook in load_codebooks(tmp_path / "whole")[0].items():
        found = load_codebooks(tmp_path / "c")[0][layer]
        np.testing.assert_array_equal(found.centroids, codebook.centroids)
    passes_of_all, passes = passes - before, 0
    cluster_store(store, tmp_path / "again", 12, 0.5)
    assert passes_of_all < passes  # some were done before it was stopped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "c", "whole"]


def test_bad_codebook_requests(
    store: PatternStore,
    tiny: dict[str, fallow.Model],
    calibrators: dict[str, Calibrator],
    texts: Texts,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="unknown algorithm 'k'; known: lloyd"):
        cluster_store(store, tmp_path / "c", 4, algorithm="k")
    with pytest.raises(UsageError, match="outside \\(0, 1\\)"):
        cluster_store(store, tmp_path / "c", 4, 1.0)
    with pytest.raises(UsageError, match="cannot be split"):
        cluster_store(store, tmp_path / "c", 4, held_out=0.0)
    with pytest.raises(UsageError, match="1000 clusters of 288 rows"):
        cluster_store(store, tmp_path / "d", 1000)
    plan = calibrators["llama"].plan("topk", sparsity=0.25, measure=False)
    other = collect(tiny["llama"], plan, tmp_path / "s", texts[1], context=32, windows=2)
    with pytest.raises(FallowError, match=r"of rule topk at 0\.75, not of topk at 0\.5"):
        cluster_store(store, tmp_path / "c", 4, test=other)
    plan = calibrators["llama"].plan("topk", sparsity=0.5, measure=False)
    copy = Text("copy", "so, " + texts[0].read_text())
    same = collect(tiny["llama"], plan, tmp_path / "same", copy, context=48, windows=8)
    with pytest.raises(
        UsageError, match=r"same has \d+% of its text in common with .*, which is f"
    ):
        cluster_store(store, tmp_path / "c", 4, test=same)
    with pytest.raises(UsageError, match="--magnitudes"):
        cluster_store(other, tmp_path / "e", 4, 0.5, held_out=0.5, energy=True)
    (tmp_path / "junk").write_bytes(b"no codebooks")
    with pytest.raises(FallowError, match="no file of codebooks"):
        load_codebooks(tmp_path / "junk")
    assert not (tmp_path / "c").exists()


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


def test_published_on_a_store(store: PatternStore, tmp_path: Path) -> None:
    for algorithm in ("published", "binary"):
        report = cluster_store(store, tmp_path / algorithm, 6, 0.6, algorithm=algorithm)
        made, _ = load_codebooks(tmp_path / algorithm)
        np.testing.assert_array_equal(made[0].centroids, made[1].centroids)  # pooled
        assert 0 < report.layers[0].scores["cluster"]["recall"] <= 1
    assert report.codebook_bytes == 6 * 64


# Prediction --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_store(tmp_path_factory: pytest.TempPathFactory) -> PatternStore:
    """Layer 0's cluster follows that of the token before, layer 1's that of layer 0, and layer 2's
    is the token's own."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, (40, 32))
    folder = tmp_path_factory.mktemp("planted") / "s"
    header = Header(
        "m", "f", "topk", 0.5, "k", "text", "sha", n_layers=3, context=32, n_windows=40,
        widths={"inter": 60},
    )  # fmt: skip
    writer = StoreWriter(folder, header, tokens)
    prototypes = rng.random((3, 4, 60))
    chain = (np.arange(32) + rng.integers(0, 4, (40, 1))) % 4
    for window in range(40):
        labels = (chain[window], (chain[window] * 3 + 1) % 4, tokens[window] % 4)
        rows = [
            clustering.largest(p[i] + 0.2 * rng.random((32, 60)), 30)
            for p, i in zip(prototypes, labels, strict=True)
        ]
        write_window(folder, window, {"inter": rows})
    writer.finish(range(40))
    return PatternStore(folder)


def test_prediction_finds_what_a_feature_tells(planted_store: PatternStore, tmp_path: Path) -> None:
    cluster_store(planted_store, tmp_path / "c", 4, 0.5, restarts=3)
    tells = {"previous": {0, 1}, "below": {1}, "token": {2}}
    for feature, layers in tells.items():
        found = predict_clusters(
            planted_store, tmp_path / "c", features=[feature], hidden=32, epochs=60
        )
        assert (found.train_rows, found.test_rows) == (30 * 32, 10 * 32)
        for layer, result in enumerate(found.layers):
            recalls = {name: score["recall"] for name, score in result.scores.items()}
            assert recalls["static"] < recalls["cluster"]
            if layer in layers:
                assert found.accuracy[layer] > 0.9, feature
                assert recalls["predicted"] > 0.97 * recalls["cluster"]
            else:
                assert found.accuracy[layer] < 0.6, feature
    together = predict_clusters(planted_store, tmp_path / "c", hidden=32, epochs=60)
    assert min(together.accuracy) > 0.85
    again = predict_clusters(planted_store, tmp_path / "c", hidden=32, epochs=60)
    assert again.to_json() == together.to_json()


def test_bad_prediction_requests(
    store: PatternStore, planted_store: PatternStore, tmp_path: Path
) -> None:
    cluster_store(planted_store, tmp_path / "c", 4, layers=[1])
    with pytest.raises(UsageError, match="unknown features \\['x'\\]; known: token"):
        predict_clusters(planted_store, tmp_path / "c", features=["x"])
    with pytest.raises(UsageError, match="no codebook of layer 0"):
        predict_clusters(planted_store, tmp_path / "c", layers=[0])
    with pytest.raises(FallowError, match="is of model m, pattern store"):
        predict_clusters(store, tmp_path / "c")
    with pytest.raises(FallowError, match="no file of codebooks"):
        predict_clusters(store, tmp_path / "none")


# Workers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_workers() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.usefixtures("ray_workers")
def test_workers_find_the_same_centroids(store: PatternStore, tmp_path: Path) -> None:
    reports = [cluster_store(store, tmp_path / f"{n}", 12, 0.5, workers=n) for n in (1, 2)]
    alone, shared = (load_codebooks(tmp_path / f"{n}")[0] for n in (1, 2))
    for layer in alone:
        np.testing.assert_array_equal(alone[layer].centroids, shared[layer].centroids)
    first, second = ([r.train_recall for r in report.layers] for report in reports)
    assert first == second


@pytest.mark.usefixtures("ray_workers")
def test_workers_collect_the_same_rows(
    store: PatternStore,
    tiny: dict[str, fallow.Model],
    topk_plan: Plan,
    texts: Texts,
    tmp_path: Path,
) -> None:
    shared = collect(
        tiny["llama"], topk_plan, tmp_path / "s", texts[0],
        context=32, windows=12, magnitudes=True, workers=2,
    )  # fmt: skip
    for layer in range(2):
        np.testing.assert_array_equal(shared.rows(layer), store.rows(layer))
        np.testing.assert_array_equal(shared.magnitudes(layer), store.magnitudes(layer))


@pytest.mark.usefixtures("ray_workers")
def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    def dies_once(flag: str, number: int) -> int:  # inside, so that it travels with its code
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return number
        os.kill(os.getpid(), signal.SIGKILL)
        return -1

    parts = [(str(tmp_path / "flag"), i) for i in range(5)]
    assert sorted(workers.results(dies_once, parts, 2)) == [(i, i) for i in range(5)]


def test_no_worker() -> None:
    with pytest.raises(UsageError, match="--workers 0 is too few"):
        list(workers.results(print, [], 0))
