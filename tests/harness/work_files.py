"""Targets of damage: what commands write and go on from, and what they are given besides models."""

import contextlib
import json
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fallow.common.errors import FallowError
from harness.model_files import _reference
from harness.seeds import IDS, Seeds, Target


def _collected(seeds: Seeds, **options: Any) -> Callable[[Path], Any]:
    from fallow.patterns.collect import collect

    plan, text = seeds.plan("topk"), seeds.text()
    return lambda folder: collect(
        seeds.loaded(), plan, folder, text, context=8, windows=8, **options
    )


def store(seeds: Seeds) -> Target:
    """Pattern stores: tokens, rows, magnitudes, a step of clustering."""
    from fallow.patterns.clustering import one_pass
    from fallow.patterns.store import PatternStore, StoreWriter

    def use(folder: Path) -> None:
        store = PatternStore(folder)
        _ = np.unique(store.tokens)
        for tap in store.taps:
            for layer in range(store.header.n_layers):
                rows = store.rows(layer, tap)
                one_pass(rows, np.ascontiguousarray(rows[:2]))
        if store.header.magnitudes:
            store.magnitudes(0).sum()
        store.check_model(store.header.fingerprint, "m")
        StoreWriter(folder, store.header, store.tokens).finish([0])

    plain = seeds.made("stores/plain", _collected(seeds, taps=("inter", "gate_pre")))
    loud = seeds.made("stores/loud", _collected(seeds, magnitudes=True))
    return Target([plain, loud], use, writes=True)


def clusters(seeds: Seeds) -> Target:
    """`patterns cluster` of a damaged store, and with parts of a stopped run that are damaged."""
    from fallow.patterns import codebooks
    from fallow.patterns.store import PatternStore

    def run(folder: Path) -> None:
        store = PatternStore(folder / "store")
        codebooks.cluster_store(store, folder / "codebooks", 3, layers=[0, 1]).to_json()

    def stopped(folder: Path) -> None:
        _collected(seeds, magnitudes=True)(folder / "store")
        remove, codebooks._State.remove = codebooks._State.remove, lambda state: None
        try:
            run(folder)
        finally:
            codebooks._State.remove = remove

    found = [seeds.made("clusters/stopped", stopped)]
    return Target(found, run, files=("store/*", "codebooks.parts/*"), writes=True)


def _now_and_then(path: Path, one_of: int) -> bool:
    """For one in so many files, by their content: what takes longer."""
    return zlib.crc32(path.read_bytes()) % one_of == 0


def codebook(seeds: Seeds) -> Target:
    """Codebooks: their labels of a store's rows, now and then a whole prediction."""
    from fallow.patterns.codebooks import (
        check_store,
        cluster_store,
        load_codebooks,
        score_layer,
        split,
    )
    from fallow.patterns.prediction import predict_clusters
    from fallow.patterns.store import PatternStore

    def make(**options: Any) -> Callable[[Path], Any]:
        store = PatternStore(seeds.made("stores/loud", _collected(seeds, magnitudes=True)))
        return lambda folder: cluster_store(store, folder / "codebooks", 3, **options)

    store = PatternStore(seeds.made("stores/loud", _collected(seeds, magnitudes=True)))
    few = {"features": ["previous", "below"], "hidden": 2, "epochs": 1}

    def use(folder: Path) -> None:
        path = folder / "codebooks"
        if _now_and_then(path, 8):
            predict_clusters(store, path, **few).to_json()
            return
        made, metadata = load_codebooks(path)
        tap = check_store(store, made, metadata, path)
        train, held = split(store, tap, None, 0.25)
        for layer, book in made.items():
            score_layer(book, train, held, layer, 0, 1)

    found = [seeds.made("codebooks/plain", make()), seeds.made("codebooks/loud", make(energy=True))]
    return Target(found, use)


def curve(seeds: Seeds) -> Target:
    """Curves of laws: read, fitted now and then, and as a basis of advice."""
    from fallow.laws.advice import advise, own_basis
    from fallow.laws.curves import load_curve
    from fallow.laws.fitting import fit_law

    x = np.geomspace(1e9, 1e11, 8)
    ratio = np.exp(-((x / 1e10) ** 0.3)) * 0.2 + 0.1
    lists = {"token_passed": x.tolist(), "activation_ratio": ratio.tolist()}
    own = lists | {"activation": "relu", "parameters": 1e8}
    shapes = {"width_depth": [20.0, 40, 60, 80, 100], "activation_ratio": [0.5, 0.3, 0.2, 0.2, 0.2]}

    def make(content: Any) -> Callable[[Path], Any]:
        return lambda folder: (folder / "curve.json").write_text(json.dumps(content))

    def use(folder: Path) -> None:
        path = folder / "curve.json"
        found = load_curve(path)
        if _now_and_then(path, 8):
            json.dumps(fit_law(found, "auto", draws=20).to_json(), allow_nan=False)
        elif _now_and_then(path, 2):
            json.dumps(advise(1e9, 1e11, "relu", [own_basis(path)]).to_json(), allow_nan=False)

    contents = {"tokens": lists, "own": own, "shapes": shapes}
    return Target([seeds.made(f"curves/{k}", make(v)) for k, v in contents.items()], use)


def text(seeds: Seeds) -> Target:
    """Texts, plain and compressed, cut into windows."""
    import lzma

    from conftest import OTHER_TEXT
    from fallow.checkpoints.text import cut_windows, load_text

    tokenizer = seeds.loaded().tokenizer

    def make(name: str) -> Callable[[Path], Any]:
        data = OTHER_TEXT[:2000].encode()
        return lambda folder: (folder / name).write_bytes(
            lzma.compress(data) if name.endswith(".xz") else data
        )

    def use(folder: Path) -> None:
        path = next(folder.iterdir())
        text = load_text(path, "evaluation")
        _ = text.sha256
        cut_windows(text, tokenizer, 8)

    return Target([seeds.made(f"texts/{n}", make(n)) for n in ("a.txt", "b.txt.xz")], use)


def task(seeds: Seeds) -> Target:
    """Tasks, scored by the engine."""
    from fallow.measure.tasks import evaluate_task

    engine = seeds.engine()
    lines = [
        {"query": "the gate", "choices": ["rests", "works"], "gold": 1},
        {"context_options": ["a", "the"], "continuation": "neuron", "gold": 0},
        {"context": "neuron", "continuation": "rests"},
    ]

    def make(folder: Path) -> None:
        (folder / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def use(folder: Path) -> None:
        json.dumps(evaluate_task(engine, None, folder / "task.jsonl"), allow_nan=False)

    names = ("a task item", "the context")
    return Target([seeds.made("tasks", make)], use, names=names)


def thresholds(seeds: Seeds) -> Target:
    """Published thresholds as plans."""
    from fallow.calibration.imported import import_thresholds

    model = seeds.loaded()
    layers = {"layer_0": 0.1, "layer_1": 0.2}

    def make(folder: Path) -> None:
        content = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), layers)
        (folder / "m_50.json").write_text(json.dumps(content))

    def use(folder: Path) -> None:
        plan = import_thresholds(folder / "m_50.json", model)
        with tempfile.TemporaryDirectory() as scratch:
            plan.save(Path(scratch) / "a.plan")
            _reference(model, type(plan).load(Path(scratch) / "a.plan"))

    return Target([seeds.made("thresholds", make)], use)


def samples(seeds: Seeds) -> Target:
    """Texts of the published test of similarity."""
    from fallow.patterns.similarity import published_test

    model, plan = seeds.loaded(), seeds.plan("percentile")

    def make(folder: Path) -> None:
        text = '''paragraphMain = """the gate lets it through"""
paragraph95 = """the gate lets them through"""
'''
        (folder / "paragraph1.txt").write_text(text)

    def use(folder: Path) -> None:
        for variant in published_test(model, plan, folder, context=32):
            variant.to_json()

    return Target([seeds.made("samples", make)], use, names=("text ", "paragraph"))


def tradeoff(seeds: Seeds) -> Target:
    """`tradeoff` that goes on from damaged work."""
    from fallow.calibration import tradeoff as sweep
    from fallow.checkpoints.text import Text

    model, source = seeds.loaded(), seeds.text()
    calibration = Text("calibration", seeds.calibrator().text.content)
    rows = sweep.make_rows(["topk", "gate"], [0.5])
    sweep._draw = sweep._draw_bytes = lambda *_: None  # figures take the time of a hundred cases

    def run(folder: Path) -> None:
        options = {"context": 16, "windows": 2, "calibration_windows": 2, "validation_windows": 1}
        sweep.tradeoff(model, rows, folder, calibration_text=calibration, text=source, **options)

    found = seeds.made("tradeoff", run)
    files = ("run.json", "cells.jsonl", "plans/*")
    return Target([found], run, files=files, writes=True, names=("this plan",))


def selector(seeds: Seeds) -> Target:
    """`select train` that goes on from a damaged state."""
    from conftest import TEXT
    from fallow.checkpoints.text import Text
    from fallow.research import training

    model = seeds.loaded()

    def run(folder: Path) -> None:
        training.train(
            model, folder / "a.plan", rank=2, tokens=64, text=Text("t", TEXT), context=16,
            validation_windows=1, checks=1,
        )  # fmt: skip

    def stopped(folder: Path) -> None:
        with _interrupted(training.Trainer, "read"):
            run(folder)

    return Target([seeds.made("selector", stopped)], run, writes=True)


@contextlib.contextmanager
def _interrupted(owner: type, method: str) -> Iterator[None]:
    """Ctrl-C where the work comes to a method."""
    patched = mock.patch.object(owner, method, side_effect=KeyboardInterrupt)
    with patched, contextlib.suppress(KeyboardInterrupt):
        yield


def law(seeds: Seeds) -> Target:
    """`law train` that goes on from a damaged folder, unfinished or finished."""
    from fallow.checkpoints.text import Text
    from fallow.laws import training

    training.FIT_WINDOWS = training.SEARCH_WINDOWS = training.JUDGE_WINDOWS = 2
    settings = training.Settings(
        hidden_size=64, layers=1, intermediate_size=8, vocabulary=260, tokens=64, context=8,
        batch=2, checkpoints=1,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    words = ["the", "ship", "sailed", "at", "dawn", "and", "no", "one", "saw", "it", "return"]
    novel = Text("novel", "\n".join(" ".join(rng.choice(words, 12)) for _ in range(30)))
    measured = {training.OWN_RATIO: 0.5, "zero_ratio": 0.5, "validation_loss": 5.0}
    # These take the time of a hundred cases.
    training.measure = lambda *_: dict(measured)
    training.joint_cett = lambda *_: 0.1
    training.judge = lambda *_: {"activation_ratio": 0.5, "activation_ratio_se": 0.1}

    def run(folder: Path) -> None:
        training.train(folder, novel, settings, "cpu").to_json()

    def stopped(folder: Path) -> None:
        with _interrupted(training._Run, "_save_final"):
            run(folder)

    found = [seeds.made("law/stopped", stopped), seeds.made("law/finished", run)]
    files = ("training.json", "curve.json", "final.json", "tokenizer.json", "tokens.npy", "*.pt")
    return Target(found, run, files=files, writes=True)


def runs(seeds: Seeds) -> Target:
    """Configs of `law sweep`."""
    from fallow.laws.sweeping import read_config

    def make(folder: Path) -> None:
        (folder / "sweep.toml").write_text(
            '[base]\ntext = "a.txt"\ntokens = 4e7\nbatch = 8\n'
            '[grid]\nactivation = ["relu", "silu"]\nhidden_size = [64, 128]\n'
            "[[run]]\nlearning_rate = 0.1\nseed = 3\n"
        )

    def use(folder: Path) -> None:
        for run in read_config(folder / "sweep.toml"):
            _ = run.settings.checkpoint_steps(), run.name

    return Target([seeds.made("runs", make)], use, names=("--",))


def export(seeds: Seeds) -> Target:
    """Exported folders, loaded for transformers."""
    from fallow.reference.sparsified import export as write
    from fallow.reference.sparsified import load_sparse

    def make(folder: Path) -> None:
        write(seeds.loaded(), seeds.plan("topk"), folder / "m")

    def use(folder: Path) -> None:
        import torch

        module = load_sparse(folder / "m", "float32")
        with torch.inference_mode():
            module(torch.from_numpy(IDS[None]))

    return Target([seeds.made("export", make)], use, files=("m/*",), names=("this plan",))


def report(seeds: Seeds) -> Target:
    """`report` that goes on from damaged parts, and damaged results that it shows."""
    from conftest import OTHER_TEXT, TEXT
    from fallow.calibration import tradeoff as sweep
    from fallow.reporting import page

    def inputs(folder: Path) -> None:
        (folder / "calibration.txt").write_text(TEXT)
        (folder / "text.txt").write_text(OTHER_TEXT)

    texts, model = seeds.made("report-texts", inputs), str(seeds.model())
    sweep._draw = lambda *_: None  # a figure takes the time of a hundred cases
    page.get_plotlyjs = lambda: ""

    def run(folder: Path) -> None:
        page.report(
            [model], folder / "report.html", text=texts / "text.txt", work=folder / "work",
            calibration_text=texts / "calibration.txt", results=[folder / "bench.json"],
            context=16, windows=2, rules=["topk"], sparsities=[0.5],
        )  # fmt: skip

    def make(folder: Path) -> None:
        runs = [{"decode_tps": 10.0}, {"decode_tps": 12.0}]
        result = {"decode_tps": 11.0, "prefill_tps": 90.0, "all": {"engine": runs}}
        (folder / "bench.json").write_text(json.dumps(result))
        run(folder)

    files = ("*.json", "*.jsonl", "*.plan")
    names = ("this plan",)
    return Target([seeds.made("report", make)], run, files=files, writes=True, names=names)


def costs(seeds: Seeds) -> Target:
    """Costs of layers from which `optimize` goes on."""
    from fallow.optimization.candidates import Candidates
    from fallow.optimization.costs import measure_costs

    engine, calibrator = seeds.engine(), seeds.calibrator()
    windows = calibrator.calibration.windows[:2]
    candidates = Candidates(seeds.loaded(), windows, calibrator.text, engine, "bytes")

    def run(folder: Path) -> None:
        path, probe = folder / "costs.jsonl", windows[:, :8]
        found = measure_costs(candidates, engine, probe, path, {"quant": None})
        assert not any(np.isnan(table).any() for table in found.values())

    return Target([seeds.made("costs", run)], run, writes=True)


def harness(seeds: Seeds) -> Target:
    """No format: every kind of defect there is, so that none is overlooked."""
    import ctypes

    def make(folder: Path) -> None:
        (folder / "a.txt").write_text("neurons at rest")

    def use(folder: Path) -> None:
        kind = len(list(seeds.root.glob("called-*")))
        (seeds.root / f"called-{kind}").touch()
        if kind == 1:
            raise FallowError(f"{folder} is refused")
        if kind == 2:
            raise FallowError("something is wrong")
        if kind == 3:
            raise FallowError(f"{folder}:\nit is refused")
        if kind == 4:
            raise KeyError
        if kind == 5:
            _ = np.ones(100_000_000)
        if kind == 6:
            _ = np.ones(10**10)
        if kind == 7:
            ctypes.string_at(0)
        if kind == 8:
            time.sleep(1000)

    return Target([seeds.made("harness", make)], use)


# Share of the cases; what takes long has few of them.
