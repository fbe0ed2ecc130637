"""Patterns on disk: the store, codebooks made from it, prediction, and workers."""

import errno
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from fallow.calibration.calibrator import Calibrator
from fallow.checkpoints.text import Text, load_text
from fallow.common import workers
from fallow.common.errors import FallowError, UsageError
from fallow.models.taps import attach
from fallow.patterns import clustering
from fallow.patterns.codebooks import cluster_store, load_codebooks
from fallow.patterns.collect import PUBLISHED_TAPS, collect
from fallow.patterns.prediction import predict_clusters
from fallow.patterns.store import (
    Header,
    PatternStore,
    StoreWriter,
    unpack_bits,
    write_window,
)
from fallow.plan import Plan

Texts = tuple[Path, Path]


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


def test_parts_of_mapped_rows(store: PatternStore) -> None:
    mapped = store.mapped(1, first=2, end=9)
    np.testing.assert_array_equal(mapped.open(), store.rows(1)[64:288])
    parts = mapped.split(5)
    np.testing.assert_array_equal(np.concatenate([p.open() for p in parts]), mapped.open())
    assert len(mapped.split(1000)) == 224


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


# The commands ------------------------------------------------------------------------------------


def test_commands(folders: dict[str, Path], texts: Texts, tmp_path: Path, run: Any) -> None:
    """Collected, clustered and scored; and what goes wrong in one line."""
    store, made = tmp_path / "s", tmp_path / "c.safetensors"
    options = ["--context", 32, "--calibration-text", texts[0], "--text", texts[1]]
    collected = run(
        "patterns", "collect", folders["llama"], "-o", store, *options, "--windows", 8, "--json"
    )
    assert collected.code == 0
    assert collected.json["rows"] == 256
    assert (collected.json["rule"], collected.json["widths"]) == ("topk", {"inter": 37})
    clustered = run("patterns", "cluster", store, "-o", made, "--clusters", 9, "--json").json
    assert clustered["n_clusters"] == 9
    assert clustered["mean"]["cluster"]["recall"] > clustered["mean"]["random"]["recall"]
    table = run("patterns", "cluster", store, "-o", made, "--clusters", 9, "--layers", "1")
    assert "recall of 64 held-out tokens" in table.out
    run("patterns", "cluster", store, "-o", made, "--clusters", 9)
    predict = ["patterns", "predict", store, made, "--hidden", 8, "--epochs", 1]
    assert len(run(*predict, "--json").json["accuracy"]) == 2
    assert "from token, below" in run(*predict, "--features", "token,below").out
    for arguments, code, message in (
        (["collect", folders["llama"], "-o", store, *options], 1, "n windows 8, not"),
        (["collect", folders["llama"], "-o", tmp_path / "t", "--rule", "x"], 2, "unknown rule"),
        (
            ["collect", folders["llama"], "-o", tmp_path / "t", *options, "--taps", "x"],
            2,
            "unknown tap 'x'",
        ),
        (["cluster", tmp_path, "-o", made], 1, "no pattern store"),
        (["cluster", store, "-o", made, "--budget", 1.5], 2, "outside (0, 1)"),
        (["cluster", store, "-o", made, "--clusters", 300], 2, "300 clusters of 192 rows"),
        (["cluster", store, "-o", made, "--layers", "7"], 2, "layer 7 is outside 0 to 1"),
        (["cluster", store, "-o", made, "--layers", "a"], 2, "--layers"),
        (["cluster", store, "-o", made, "--tap", "up"], 2, "has no 'up'"),
        (["predict", store, made, "--features", "x"], 2, "known: token, previous, below"),
        (["predict", store, store / "store.json"], 1, "no file of codebooks"),
    ):
        result = run("patterns", *arguments)
        assert result.code == code, result.err
        assert message in result.err
        assert result.err.strip().splitlines()[-1].startswith("error: ")
