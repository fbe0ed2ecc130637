"""Damaged files of every format that fallow reads: each is read and used, or refused in one line.

    python tests/fuzzing.py --cases 100000 --seed 0      # all targets; also: make fuzz
    python tests/fuzzing.py --targets plan --first 4711 --cases 1      # one of them again

A case is a whole file, changed as its number and the seed decide (tests/damage.py), and given to
what reads it. Anything but a result or a FallowError of one line that names the file is a defect:
another exception, the process's death, more than `SECONDS`, or more than `MEMORY_MB`. Cases run in
a process of their own, so that its death is told apart and costs nothing but a new start.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import damage
from fallow.common.errors import FallowError
from fallow.engine.process import peak_rss_mb

SECONDS = 10.0  # of processor time that a case may take
LONGEST = 600.0  # seconds of any kind, for a case or to make whole files
MEMORY_MB = 400  # that a case may take beyond what the process had
ADDRESS_SPACE = 4_000_000_000  # bytes beyond what the process had: larger requests fail at once
Damage = Callable[[np.random.Generator, bytes], bytes]
DAMAGE: dict[str, Damage] = {
    "*.gguf": damage.damage_gguf,
    "*.plan": damage.damage_safetensors,
    "*.safetensors": damage.damage_safetensors,
    "codebooks": damage.damage_safetensors,
    "layer.*": damage.damage_safetensors,
    "*.jsonl": damage.damage_json_lines,
    "*.json": damage.damage_json,
    "*.txt": damage.damage_text,
    "*.toml": damage.damage_text,
    "*.jinja": damage.damage_text,
    "*": damage.damage_bytes,
}


@dataclass
class Target:
    """Whole files, and what reads them.

    `use` is given a folder in which one of the `files` (patterns) is damaged. What it writes there
    is thrown away if `writes`. `names` are words by which a refusal may name the file besides its
    path or the folder's.
    """

    seeds: list[Path]  # folders
    use: Callable[[Path], None]
    files: tuple[str, ...] = ("*",)
    writes: bool = False
    names: tuple[str, ...] = ()


# What is read ------------------------------------------------------------------------------------


class Seeds:
    """Tiny models and what fallow makes of them, written once into a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder of that name, made whole on first use."""
        folder = self.root / name
        if not folder.exists():
            part = self.root / f".{name.replace('/', '.')}"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            make(part)
            folder.parent.mkdir(parents=True, exist_ok=True)
            part.rename(folder)
        return folder

    def model(self, name: str = "llama", **changes: Any) -> Path:
        from conftest import make_folder

        key = "-".join([name, *(f"{k}={v}" for k, v in changes.items())])
        return self.made(f"models/{key}", lambda folder: make_folder(name, folder, **changes))

    @cache  # noqa: B019
    def loaded(self, name: str = "llama") -> Any:
        import fallow

        return fallow.load(self.model(name))

    def packed(self, key: str, source: Path, **options: Any) -> Path:
        from fallow.packing.packer import pack

        return self.made(f"packed/{key}", lambda to: pack(source, to / "packed.gguf", **options))

    @cache  # noqa: B019
    def engine(self) -> Any:
        from fallow.engine.engine import Engine

        folder = self.packed("llama", self.model(), quant="f32")
        return Engine(folder / "packed.gguf", plan=False, threads=1, context=16)

    @cache  # noqa: B019
    def calibrator(self) -> Any:
        from conftest import TEXT
        from fallow.calibration.calibrator import Calibrator
        from fallow.checkpoints.text import Text

        model, text = self.loaded(), Text("calibration", TEXT)
        return Calibrator(model, text, context=32, windows=4, validation_windows=2)

    def plan(self, rule: str) -> Any:
        knob = {"knob": 0.0} if rule == "relu" else {"sparsity": 0.5}
        return self.calibrator().plan(rule, measure=False, **knob)

    def text(self) -> Any:
        from conftest import OTHER_TEXT
        from fallow.checkpoints.text import Text

        return Text("evaluation", OTHER_TEXT)


IDS = np.array([1, 2])
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def packed(seeds: Seeds) -> Target:
    """Packed models, mapped: a pass, the tokenizer, a short answer."""
    from fallow.engine.engine import Engine
    from fallow.engine.packed import is_packed

    found = _packed_seeds(seeds)

    def use(folder: Path) -> None:
        path = folder / "packed.gguf"
        is_packed(path)
        engine = Engine(path, threads=1)
        engine.forward(IDS, every=True)
        _answer(engine)

    return Target(found, use, names=_OF_AN_ANSWER)


# Refusals of an answer, for which there is one model and one plan.
_OF_AN_ANSWER = ("the model", "the context", "token id", "this plan", "there are no tokens")


def _packed_seeds(seeds: Seeds) -> list[Path]:
    from conftest import TALK

    def talking(folder: Path) -> None:
        shutil.copytree(seeds.model(), folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(TALK)

    talks = seeds.made("models/talking", talking)
    wide = seeds.model("llama", hidden_size=64)
    return [
        seeds.packed("talking", talks, quant="f32", plan=seeds.plan("cats")),
        seeds.packed("opt", seeds.model("opt"), quant="bf16"),
        seeds.packed("shortlist", wide, quant="q4_0", shortlist=True),
    ]


def _answer(engine: Any) -> None:
    tokenizer = engine.tokenizer
    ids = tokenizer.prompt("a", chat=tokenizer.chat_template is not None)
    tokenizer.decode(ids)
    "".join(piece for piece in engine.generate(ids[-3:], 2))
    _ = engine.dtype_name


def budget(seeds: Seeds) -> Target:
    """Packed models of which a part is read from the disk for every pass."""
    from fallow.checkpoints.weights import read_gguf
    from fallow.engine import engine as module
    from fallow.engine.memory import RESERVE, parts_of, residencies

    module.rss_bytes = lambda: 0  # this process is far larger than these models
    found = _packed_seeds(seeds)
    all_parts = [parts_of(read_gguf(folder / "packed.gguf"), True) for folder in found]
    rooms = [RESERVE + residencies(parts)[-3].memory for parts in all_parts]

    def use(folder: Path) -> None:
        room = rooms[[f.name for f in found].index(folder.name)]
        engine = module.Engine(folder / "packed.gguf", threads=1, memory=room)
        engine.forward(IDS, every=True)
        _answer(engine)

    return Target(found, use, names=(*_OF_AN_ANSWER, "--memory"))


def source(seeds: Seeds) -> Target:
    """GGUF files of other programs: header, tokenizer, values."""
    from fallow.checkpoints.tokenizer import tokenizer_from_gguf
    from fallow.checkpoints.weights import fingerprint, read_gguf

    def use(folder: Path) -> None:
        file = read_gguf(folder / "m.gguf")
        for tensor in file.tensors.values():
            tensor.dequantize()
        fingerprint(file.tensors)
        tokenizer = tokenizer_from_gguf(file)
        tokenizer.decode(tokenizer.prompt("neuron 5", chat=tokenizer.chat_template is not None))

    return Target(_sources(seeds), use, names=("tensor ", "the model's chat template"))


def _sources(seeds: Seeds) -> list[Path]:
    import gguf

    from test_models import write_gguf

    def quantised(folder: Path) -> None:
        name = "blk.0.ffn_down.weight"
        values = np.zeros((24, 37), dtype=np.float16)
        write_gguf("llama", seeds.loaded(), folder / "m.gguf", **{name: values})

    def sentencepiece(folder: Path) -> None:
        writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
        writer.add_tokenizer_model("llama")
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "n", "▁n"]
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1, 1])
        writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0])
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
        for kind in ("Q4_0", "Q6_K", "IQ4_NL"):
            quantization = gguf.GGMLQuantizationType[kind]
            block, size = gguf.GGML_QUANT_SIZES[quantization]
            data = np.arange(2 * size * 256 // block, dtype=np.uint8).reshape(2, -1)
            writer.add_tensor(f"{kind}.weight", data, raw_dtype=quantization)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def plain(folder: Path) -> None:
        write_gguf("llama", seeds.loaded(), folder / "m.gguf")

    return [
        seeds.made("sources/llama", plain),
        seeds.made("sources/f16", quantised),
        seeds.made("sources/sentencepiece", sentencepiece),
    ]


def loaded_source(seeds: Seeds) -> Target:
    """GGUF files as models: config, weights, a pass."""
    import fallow
    from test_models import write_gguf

    def make(name: str) -> Callable[[Path], Any]:
        return lambda folder: write_gguf(name, seeds.loaded(name), folder / "m.gguf")

    def use(folder: Path) -> None:
        _pass(fallow.load(folder / "m.gguf"))

    names = ("llama", "phi3", "gemma3", "qwen3")
    return Target([seeds.made(f"gguf/{name}", make(name)) for name in names], use)


def _pass(model: Any) -> None:
    model.logits(model.hidden(IDS[None]))
    tokenizer = model.tokenizer
    tokenizer.decode(tokenizer.prompt("neuron 5", chat=tokenizer.chat_template is not None))


def weights(seeds: Seeds) -> Target:
    """safetensors of a folder: header, index, values."""
    from fallow.checkpoints.weights import fingerprint, read_safetensors

    def shards(folder: Path) -> None:
        seeds.loaded().module.save_pretrained(folder, max_shard_size="40KB")

    def single(folder: Path) -> None:
        shutil.copy(seeds.model() / "model.safetensors", folder)

    def use(folder: Path) -> None:
        found = {tensor.name: tensor for tensor in read_safetensors(folder)}
        fingerprint(found)

    whole, parts = seeds.made("weights/whole", single), seeds.made("weights/shards", shards)
    return Target([whole, parts], use, files=("*.safetensors", "*.index.json"))


def folder(seeds: Seeds) -> Target:
    """Hugging Face folders as models: config, tokenizer, weights, a pass."""
    import fallow

    def talking(made: Path) -> None:
        shutil.copytree(seeds.model(), made, dirs_exist_ok=True)
        (made / "chat_template.jinja").write_text(TEMPLATE)
        (made / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')

    def use(folder: Path) -> None:
        _pass(fallow.load(folder))

    found = [seeds.made("models/folder", talking), seeds.model("phi3")]
    return Target(found, use, names=("the model's chat template",))


def plan(seeds: Seeds) -> Target:
    """Plans of all rules and some selectors, in the engine and in the reference."""
    from conftest import engine_plan
    from fallow.plan import Plan
    from fallow.rules import RULES

    engine, model = seeds.engine(), seeds.loaded()
    names = [*RULES, "gate", "lowbit", "lowrank", "cluster", "static", "gate_bucket"]

    def coarse() -> Plan:
        arrays = {
            "threshold.gate_act": np.full(2, 0.1, dtype=np.float32),
            "weight.gate_act": np.ones((2, 37), dtype=np.float32),
            "threshold.inter": np.full(2, 0.2, dtype=np.float32),
            "head_margin": np.array([1.0]),
            "head_limit": np.array([8.0]),
        }
        return engine_plan(engine, "two_stage", arrays)

    def make(name: str) -> Callable[[Path], Any]:
        made = coarse if name == "coarse" else lambda: seeds.plan(name)
        return lambda folder: made().save(folder / "a.plan")

    def use(folder: Path) -> None:
        plan = Plan.load(folder / "a.plan")
        plan.to_bytes()
        try:
            _reference(model, plan)
        finally:
            _engine(engine, plan)

    found = [seeds.made(f"plans/{name}", make(name)) for name in (*names, "coarse")]
    names = ("this plan", "the engine cannot run plans", "a plan of", "logits")
    return Target(found, use, names=names)


def _reference(model: Any, plan: Any) -> None:
    with model.sparse(plan):
        model.logits(model.hidden(IDS[None]))


def _engine(engine: Any, plan: Any) -> None:
    engine.use_plan(plan)
    engine.logits(IDS)
    engine.forward(IDS[:1])


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
    from fallow.research import learning as training

    model = seeds.loaded()

    def run(folder: Path) -> None:
        training.train(
            model, folder / "a.plan", rank=2, tokens=64, text=Text("t", TEXT), context=16,
            validation_windows=1, checks=1,
        )  # fmt: skip

    def stopped(folder: Path) -> None:
        finish, training.Trainer.read = training.Trainer.read, _interrupt
        try:
            with contextlib.suppress(KeyboardInterrupt):
                run(folder)
        finally:
            training.Trainer.read = finish

    return Target([seeds.made("selector", stopped)], run, writes=True)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def law(seeds: Seeds) -> Target:
    """`law train` that goes on from a damaged folder, unfinished or finished."""
    from fallow.checkpoints.text import Text
    from fallow.laws import training

    training.FIT_WINDOWS = training.JUDGE_WINDOWS = 2
    settings = training.Settings(
        hidden_size=64, layers=1, intermediate_size=8, vocabulary=260, tokens=64, context=8,
        batch=2, checkpoints=1,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    words = ["the", "ship", "sailed", "at", "dawn", "and", "no", "one", "saw", "it", "return"]
    novel = Text("novel", "\n".join(" ".join(rng.choice(words, 12)) for _ in range(30)))
    measured = {"activation_ratio": 0.5, "zero_ratio": 0.5, "validation_loss": 5.0}
    training.measure = lambda *_: dict(measured)  # takes the time of a hundred cases

    def run(folder: Path) -> None:
        training.train(folder, novel, settings, "cpu").to_json()

    def stopped(folder: Path) -> None:
        final, training._Run._save_final = training._Run._save_final, _interrupt
        try:
            with contextlib.suppress(KeyboardInterrupt):
                run(folder)
        finally:
            training._Run._save_final = final

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
TARGETS: dict[str, tuple[Callable[[Seeds], Target], int]] = {
    "packed": (packed, 220),
    "budget": (budget, 60),
    "source": (source, 150),
    "loaded source": (loaded_source, 10),
    "weights": (weights, 100),
    "folder": (folder, 10),
    "plan": (plan, 150),
    "store": (store, 70),
    "clusters": (clusters, 20),
    "codebook": (codebook, 50),
    "curve": (curve, 50),
    "text": (text, 40),
    "task": (task, 20),
    "thresholds": (thresholds, 15),
    "samples": (samples, 5),
    "tradeoff": (tradeoff, 5),
    "selector": (selector, 5),
    "law": (law, 5),
    "runs": (runs, 12),
    "export": (export, 3),
    "report": (report, 5),
    "costs": (costs, 10),
    "harness": (harness, 0),  # only if it is asked for
}


# Cases -------------------------------------------------------------------------------------------


@dataclass
class Case:
    """What became of one file."""

    target: str
    number: int
    outcome: str  # "read", "refused" or "defect"
    kind: str = ""  # of defect: what and where
    detail: str = ""


class Runner:
    """Runs the cases of a target in this process, in the folder `scratch`."""

    def __init__(self, name: str, root: Path, seed: int, scratch: Path) -> None:
        self.name, self.seed, self.scratch = name, seed, scratch
        self.target = TARGETS[name][0](Seeds(root))
        self.files = [
            (folder, path.relative_to(folder))
            for folder in self.target.seeds
            for path in sorted(folder.rglob("*"))
            if path.is_file() and any(path.relative_to(folder).match(f) for f in self.target.files)
        ]
        self._changed: tuple[Path, Path] | None = None  # a damaged file, and its whole one

    def run(self, number: int) -> Case:
        folder = self.prepare(number)
        before = peak_rss_mb()
        try:
            self.target.use(folder)
            case = Case(self.name, number, "read")
        except FallowError as error:
            case = self._refusal(number, folder, str(error))
        except BaseException as error:  # a panic of tokenizers' is no Exception
            case = self._defect(number, _place(error), traceback.format_exc())
        grown = peak_rss_mb() - before
        if grown > MEMORY_MB:
            return self._defect(number, "too much memory", f"{grown:.0f} MB")
        return case

    def prepare(self, number: int) -> Path:
        """A folder in which a file is damaged as the number says."""
        rng = np.random.default_rng((self.seed, zlib.crc32(self.name.encode()), number))
        whole, inner = self.files[int(rng.integers(len(self.files)))]
        folder = self.scratch / whole.name
        if self._changed is not None:
            _write(self._changed[0], self._changed[1].read_bytes())
        if self.target.writes or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
        change = next(d for pattern, d in DAMAGE.items() if fnmatch(inner.name, pattern))
        _write(folder / inner, change(rng, (whole / inner).read_bytes()))
        self._changed = folder / inner, whole / inner
        return folder

    def _refusal(self, number: int, folder: Path, message: str) -> Case:
        if "\n" in message.strip():
            return self._defect(number, "a refusal of several lines", message)
        if not any(name in message for name in (str(folder), *self.target.names)):
            words = " ".join(word for word in message.split() if word.isalpha())
            return self._defect(number, f"a refusal that names no file: {words[:60]}", message)
        return Case(self.name, number, "refused")

    def _defect(self, number: int, kind: str, detail: str) -> Case:
        return Case(self.name, number, "defect", kind, detail)


def _write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # the old file may be mapped still
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _place(error: BaseException) -> str:
    """The error's type, and the last function of fallow's that it passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/fallow/" in f.filename]
    where = f" in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}{where}"


@dataclass
class Result:
    """What became of a target's cases."""

    target: str
    seed: int
    read: int = 0
    refused: int = 0
    defects: int = 0
    seconds: float = 0.0
    kinds: dict[str, list[int]] = field(default_factory=dict)  # of defects: numbers of cases

    @property
    def cases(self) -> int:
        return self.read + self.refused + self.defects

    def add(self, case: Case) -> None:
        if case.outcome == "defect":
            self.defects += 1
            self.kinds.setdefault(case.kind, []).append(case.number)
        else:
            setattr(self, case.outcome, getattr(self, case.outcome) + 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": round(self.seconds, 1)}


@dataclass
class Fuzzer:
    """Runs cases in other processes.

    Args:
        seed: decides every change.
        root: folder of whole files, made on first use.
        keep: folder for the damaged files of the first case of every kind of defect.
        seconds: of processor time, after which a case counts as hanging.
        longest: seconds of any kind, likewise.
    """

    seed: int
    root: Path
    keep: Path
    seconds: float = SECONDS
    longest: float = LONGEST

    def run(self, numbers: dict[str, range]) -> list[Result]:
        """Those cases of each target, one target after another."""
        results = {name: Result(name, self.seed) for name in numbers}
        left = dict(numbers)
        start = time.monotonic()
        while left:
            known = {(r.target, kind) for r in results.values() for kind in r.kinds}
            for case in self._cases(left, known):
                now = time.monotonic()
                results[case.target].add(case)
                results[case.target].seconds += now - start
                start = now
                for name in list(left):  # targets before it are done
                    if name == case.target:
                        left[name] = range(case.number + 1, left[name].stop)
                        break
                    del left[name]
            left = {name: rest for name, rest in left.items() if rest}
        return list(results.values())

    def _cases(self, left: dict[str, range], known: set[tuple[str, str]]) -> Iterator[Case]:
        """The cases of one process, up to the one that it dies of."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            scratch = Path(folder)
            process = context.Process(target=self._work, args=(theirs, left, known, scratch))
            process.start()
            theirs.close()
            current: tuple[str, int] | None = None  # target and number of the case that runs
            try:
                while self._waits(ours, process.pid, current is not None):
                    message = ours.recv()
                    if message == "done":
                        return
                    if isinstance(message, Case):
                        current = message.target, message.number + 1
                        yield message
                    else:
                        current = message
                kind = "it hangs"
            except EOFError:
                process.join()
                kind = f"the process died: {process.exitcode}"
            finally:
                process.join(1)  # it ends by itself, or hangs
                process.kill()
                process.join()
            if current is None:
                raise RuntimeError(f"no whole files of {', '.join(left)}: {kind}")
            case = Case(*current, "defect", kind)
            if (case.target, kind) not in known:
                self._keep(case, scratch / case.target)
            yield case

    def _waits(self, connection: Any, process: int, is_case: bool) -> bool:
        """For a message. False: it takes too long."""
        start, used = time.monotonic(), _processor_seconds(process)
        while not connection.poll(0.5):
            if time.monotonic() - start > self.longest:
                return False
            if is_case and _processor_seconds(process) - used > self.seconds:
                return False
        return True

    def _work(
        self, connection: Any, left: dict[str, range], known: set[tuple[str, str]], scratch: Path
    ) -> None:
        """The process that runs cases, and keeps files of kinds that are not known.

        Sends None while it makes whole files, then the target and first number, each case, "done".
        """
        import torch

        from fallow.common.progress import console

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        console.quiet = True
        tempfile.tempdir = str(scratch)
        for name, numbers in left.items():
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            connection.send(None)
            runner = Runner(name, self.root, self.seed, scratch / name)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
            connection.send((name, numbers.start))
            for number in numbers:
                case = runner.run(number)
                if case.kind and (name, case.kind) not in known:
                    known.add((name, case.kind))
                    runner.prepare(number)
                    self._keep(case, runner.scratch)
                connection.send(case)
        connection.send("done")

    def _keep(self, case: Case, scratch: Path) -> None:
        place = self.keep / f"{case.target.replace(' ', '-')}-{self.seed}-{case.number}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(scratch, place)
        text = f"{case.kind}\n\n{case.detail}\n"
        (place / "defect.txt").write_text(text, encoding="utf-8", errors="replace")
        what = f"{case.target}, seed {self.seed}, case {case.number}: {case.kind}"
        print(f"{what}; kept: {place}", file=sys.stderr, flush=True)


def _processor_seconds(process: int) -> float:
    """Of all its threads so far; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shares(cases: int, first: int = 0) -> dict[str, range]:
    """Numbers of cases of every target, so many in all."""
    total = sum(share for _, share in TARGETS.values())
    counts = {name: -(-cases * share // total) for name, (_, share) in TARGETS.items()}
    return {name: range(first, first + count) for name, count in counts.items() if count}


def table(results: list[Result]) -> str:
    lines = [f"{'target':16}{'cases':>9}{'read':>9}{'refused':>9}{'defects':>9}{'seconds':>9}"]
    for r in results:
        numbers = (r.cases, r.read, r.refused, r.defects)
        lines.append(f"{r.target:16}" + "".join(f"{n:9}" for n in numbers) + f"{r.seconds:9.0f}")
    total = [sum(getattr(r, n) for r in results) for n in ("cases", "read", "refused", "defects")]
    lines.append(f"{'all':16}" + "".join(f"{n:9}" for n in total))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="in all, or of each --targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--targets", nargs="+", choices=TARGETS)
    parser.add_argument("--seeds", type=Path, help="folder of whole files; default: a new one")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz-defects"))
    arguments = parser.parse_args()
    numbers = shares(arguments.cases, arguments.first)
    if arguments.targets:
        some = range(arguments.first, arguments.first + arguments.cases)
        numbers = dict.fromkeys(arguments.targets, some)
    with tempfile.TemporaryDirectory() as made:
        root = arguments.seeds or Path(made)
        results = Fuzzer(arguments.seed, root, arguments.keep.resolve()).run(numbers)
    print(table(results))
    sys.exit(any(r.defects for r in results))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
