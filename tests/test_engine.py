"""The engine against transformers, on every architecture and on the real SmolLM2."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import (
    EXPERTS,
    PACKED,
    SAMPLE,
    OnDemand,
    engine_plan,
    make_folder,
    thread_count,
)
from engines import ERROR, IDS, check_a_few, cutting_plan, fails, make_plan, one_by_one, reference
from fallow import _core
from fallow.calibration.calibrator import Calibrator
from fallow.checkpoints.text import Half, load_text
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.engine.batch import Batch
from fallow.engine.engine import Engine
from fallow.engine.packed import is_packed
from fallow.engine.sampling import Sampler
from fallow.measure.evaluation import dense_logits
from fallow.measure.quality import compare_logits, evaluate_engine
from fallow.packing import packer, selfcheck
from fallow.packing.packer import pack
from fallow.packing.source import Source
from fallow.plan import Cut
from test_models import GGUF_NAMES, write_gguf

# Every architecture on the plainest and the fastest kernels, and two on all: what differs between
# tables are products, which tests of kernels compare, and attention, with a window and without.
ENDS = (_core.KERNELS[0], _core.KERNELS[-1])
PAIRS = [
    (name, kernels)
    for name in PACKED
    for kernels in _core.KERNELS
    if kernels in ENDS or name in ("llama", "gemma3")
]


@pytest.mark.parametrize(("name", "kernels"), PAIRS)
def test_logits_are_those_of_transformers(
    name: str, kernels: str, tiny: dict[str, fallow.Model], packed: dict[str, Path]
) -> None:
    expected = reference(tiny[name])
    engine = Engine(packed[name], kernels=kernels)
    assert engine.kernels == kernels
    assert np.abs(engine.logits(IDS) - expected).max() < ERROR
    assert np.abs(one_by_one(engine) - expected).max() < ERROR
    engine.reset()  # blocks that start in the middle of the sliding window
    parts = [engine.forward(part, every=True) for part in np.split(IDS, [30, 31, 77])]
    assert np.abs(np.concatenate(parts) - expected).max() < ERROR


@pytest.mark.parametrize("name", PACKED)
def test_hidden_states_and_embeddings_are_those_of_transformers(
    name: str, tiny: dict[str, fallow.Model], packed: dict[str, Path], monkeypatch: Any
) -> None:
    engine, model = Engine(packed[name]), tiny[name]
    ids = IDS if name not in EXPERTS else IDS[:40]
    expected = model.hidden(ids[None])[0].float().numpy()
    found = engine.hidden(ids)
    assert np.abs(found - model.logit_scale * expected).max() < 10 * ERROR
    mean = expected.astype(float).mean(axis=0)
    np.testing.assert_allclose(engine.embed(ids), mean / np.linalg.norm(mean), atol=10 * ERROR)
    monkeypatch.setattr("fallow.engine.answer.PREFILL_STEP", 16)  # the last part of one token, too
    for n in (1, 8, 33):
        mean = expected[:n].astype(float).mean(axis=0)
        found = engine.embed(ids[:n])
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=10 * ERROR)
        assert engine.stats.prompt_tokens == n
    # As after any other text, the thread that asked goes on.
    assert np.abs(engine.forward([5]) - engine.logits([*ids[:33], 5])[-1]).max() < ERROR


def test_an_embedding_depends_on_the_plan_and_on_nothing_else(packed: dict[str, Path]) -> None:
    engine = Engine(packed["llama"], slots=2)
    alone = engine.embed(IDS)
    batch = Batch(engine)
    answer = engine.begin(IDS[:20], 12, Sampler(), slot=1)
    said = [batch.add(engine.begin_embedding(IDS[:1])), batch.add(answer)]
    short = [s for _ in range(3) for s in batch.round()]
    said += [*short, batch.add(engine.begin_embedding(IDS))]
    while not (said[-1].ended and said[-1].answer is answer):
        said += batch.round()
    pieces = [piece.embedding for s in said for piece in s.pieces if piece.embedding is not None]
    assert len(pieces) == 2
    assert np.array_equal(pieces[0], engine.embed(IDS[:1]))
    assert np.array_equal(pieces[1], alone)
    text = "".join(piece.text for s in said if s.answer is answer for piece in s.pieces)
    assert text == "".join(engine.generate(IDS[:20], 12))
    engine.use_plan(cutting_plan(engine))
    assert np.abs(engine.embed(IDS) - alone).max() > 1e-3
    small = Engine(packed["llama"], memory="3GB")  # in smaller blocks
    np.testing.assert_allclose(small.embed(IDS), alone, atol=10 * ERROR)


def test_what_has_no_embedding(packed: dict[str, Path], monkeypatch: Any) -> None:
    engine = Engine(packed["llama"], context=16)
    for ids, said in (([], "no tokens"), (IDS[:17], "exceed the context of 16"), ([300], "300")):
        assert said in fails(FallowError, partial(engine.embed, ids))
    nothing = np.zeros((4, engine.hidden_size), dtype=np.float32)
    for value in (0, np.nan):
        monkeypatch.setattr(engine, "_read_hidden", lambda *_, value=value: nothing + value)
        found = fails(FallowError, partial(engine.embed, IDS[:4]))
        assert "check the file with: fallow evaluate" in found


@pytest.mark.parametrize(("name", "kernels"), PAIRS)
def test_a_few_tokens_are_as_one_by_one(name: str, kernels: str, packed: dict[str, Path]) -> None:
    """Bit by bit: a batch verifies what one token after another would have said."""
    engine = Engine(packed[name], kernels=kernels)
    check_a_few(engine)
    engine.use_plan(cutting_plan(engine))
    check_a_few(engine)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny llama in each type, whose scores of attention are spread by 2 to 3, as SmolLM2's."""
    root = tmp_path_factory.mktemp("quantised")

    def make(kind: str) -> Path:
        width = 256 if kind.endswith("k") else 96
        sizes = {"hidden_size": width, "num_attention_heads": 4}
        folder = make_folder("llama", root / kind, **sizes, initializer_range=2 / width**0.5)
        pack(folder, root / f"{kind}.gguf", quant=kind)
        return root / f"{kind}.gguf"

    return OnDemand(("q4_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"), make)


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"])
def test_a_few_quantised_tokens(kind: str, kernels: str, quantised: Mapping[str, Path]) -> None:
    check_a_few(Engine(quantised[kind], kernels=kernels))


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q8_0", "q4_k", "q5_k"])
def test_a_prompt_in_bytes_is_near_the_exact_one(
    kind: str, kernels: str, quantised: Mapping[str, Path]
) -> None:
    engine = Engine(quantised[kind], kernels=kernels)
    exact = engine.logits(IDS)
    assert np.abs(engine.logits(IDS, exact=False) - exact).max() < 0.05 * np.ptp(exact)


@pytest.mark.parametrize("name", [n for n in GGUF_NAMES if n in PACKED])
def test_packing_a_gguf(name: str, tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    source = write_gguf(name, tiny[name], tmp_path / "m.gguf")
    check = pack(source, tmp_path / "packed.gguf")
    assert check.passed
    logits = Engine(tmp_path / "packed.gguf").logits(IDS)
    assert np.abs(logits - reference(tiny[name])).max() < 2 * ERROR  # down_proj is F16
    kept = read_gguf(tmp_path / "packed.gguf").tensors
    up = "experts.1.up_proj" if name in EXPERTS else "up_proj"
    assert {kept[f"layers.0.{p}.weight"].type for p in ("q_proj", up)} == {"F32"}


def test_the_type_of_down_proj_is_chosen_on_another_text_than_reported(
    tiny: dict[str, fallow.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = tiny["llama"], tmp_path / "packed.gguf"
    source = write_gguf("llama", model, tmp_path / "m.gguf")
    halves: tuple[Half, ...] = ("calibration", "evaluation")
    read: list[tuple[bytes, str]] = []  # windows, and the type of down_proj_t they were read for

    def compare(window: np.ndarray, *rest: Any) -> Any:
        read.append((window.tobytes(), kinds[-1]))
        return compare_logits(window, *rest)

    def write(*arguments: Any) -> None:
        kinds.append(arguments[3])
        write_packed(*arguments)

    write_packed = packer.write_packed
    kinds: list[str] = []
    monkeypatch.setattr(selfcheck, "compare_logits", compare)
    monkeypatch.setattr(packer, "write_packed", write)
    monkeypatch.setattr(Source, "down_types", lambda *_: ("BF16", "F16", "F32"))
    monkeypatch.setattr(selfcheck, "LARGEST_KL", 4e-6)  # BF16 has 8e-6, F16 1e-6
    check = pack(source, output)
    assert kinds == ["BF16", "F16"]
    windows = {
        half: {w.tobytes() for w in model.windows(load_text(None, half), 128)} for half in halves
    }
    chosen = [window for window, _ in read[: -selfcheck.CHECK_WINDOWS]]
    reported = [window for window, _ in read[-selfcheck.CHECK_WINDOWS :]]
    assert set(chosen) <= windows["calibration"]
    assert set(reported) <= windows["evaluation"]
    assert read[-1][1] == "F16"
    # The figures are those of the file, on the first windows of the evaluation text.
    engine = Engine(output)
    found = evaluate_engine(
        engine, None, context=128, windows=selfcheck.CHECK_WINDOWS,
        against=partial(dense_logits, model),
    )  # fmt: skip
    assert check.kl == pytest.approx(found.kl_to_dense["mean"], rel=1e-6)
    assert check.ppl_change_percent == pytest.approx(found.ppl_change_percent, rel=1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_threads_share_the_work(name: str, packed: dict[str, Path]) -> None:
    """Of a prompt, a few tokens and one, dense and under plans; most tests run a single thread."""
    one, three = engines = [Engine(packed[name], threads=n) for n in (1, 3)]
    inter = engine_plan(one, Cut("inter", "topk", 0.4, "column_norm"))
    for plan in (None, cutting_plan(one), inter):
        found = []
        for engine in engines:
            engine.use_plan(plan)
            engine.reset()
            parts = np.split(IDS[:25], [12, 20, 24, 25])[:4]
            found.append(np.concatenate([engine.forward(p, every=True) for p in parts]))
        np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    assert three.threads == 3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_run_is_deterministic(threads: int, packed: dict[str, Path]) -> None:
    runs = [one_by_one(Engine(packed["llama"], threads=threads)) for _ in range(2)]
    np.testing.assert_array_equal(runs[0], runs[1])


def test_score(packed: dict[str, Path], tiny: dict[str, fallow.Model]) -> None:
    log_p = torch.from_numpy(reference(tiny["llama"])).log_softmax(-1)
    expected = log_p[:-1].gather(1, torch.from_numpy(IDS[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(Engine(packed["llama"]).score(IDS), expected, atol=ERROR)


def test_generation(packed: dict[str, Path], tiny: dict[str, fallow.Model]) -> None:
    engine = Engine(packed["gemma3"])
    pieces = list(engine.generate("neuron 3 rests", max_tokens=24))
    assert list(pieces) == list(tiny["gemma3"].generate("neuron 3 rests", 24))
    stats = engine.stats
    assert stats.new_tokens <= 24
    assert stats.prompt_tokens == len(engine.tokenizer.prompt("neuron 3 rests"))
    assert len(stats.sparsity_per_layer) == 2
    assert len(stats.logits_hash) == 16
    assert min(stats.decode_tps, stats.prefill_tps, stats.bytes_per_token, stats.peak_rss_mb) > 0


def test_tokenizer_survives(packed: dict[str, Path], tiny: dict[str, fallow.Model]) -> None:
    text = "neuron 7 rests; the 3rd gate — «works»"
    ids = tiny["llama"].tokenizer.encode(text)
    found = Engine(packed["llama"]).tokenizer
    np.testing.assert_array_equal(found.encode(text), ids)
    assert found.decode(ids) == text
    assert found.eos_ids == tiny["llama"].tokenizer.eos_ids


def test_wrong_use(
    packed: dict[str, Path], tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    path = packed["llama"]
    engine = Engine(path, context=16)
    assert "threads 0 is outside" in fails(UsageError, lambda: Engine(path, threads=0))
    assert "--context 999 is outside 1 to 128" in fails(
        UsageError, lambda: Engine(path, context=999)
    )
    assert "do not run here; known: " in fails(UsageError, lambda: Engine(path, kernels="mmx"))
    assert "exceed the context of 16" in fails(FallowError, lambda: engine.logits(IDS))
    assert "exceed the context of 16" in fails(FallowError, lambda: engine.generate("neuron " * 20))
    assert "token id 300 is outside the vocabulary of 300" in fails(
        FallowError, lambda: engine.forward([300])
    )
    assert "token id -1" in fails(FallowError, lambda: engine.forward([-1]))
    for begin in (engine.forward, engine.begin_embedding, partial(engine.generate, max_tokens=1)):
        for ids, said in (([], "no tokens to read"), ([300], "token id 300 is outside")):
            assert said in fails(FallowError, partial(begin, ids))  # before anything is read
    assert "top_p 0 is outside" in fails(UsageError, lambda: engine.generate("neuron", top_p=0))
    other = make_plan(calibrators["qwen2"], "topk", 0.5)
    assert "not for llama" in fails(FallowError, lambda: Engine(path, other))
    plan = make_plan(calibrators["llama"], "cats", 0.5)
    short = dataclasses.replace(plan, cuts=(Cut("gate_act", "threshold", np.zeros(1)),))
    assert "is for 1 layers" in fails(FallowError, lambda: Engine(path, short))
    assert "unknown type 'q9'" in fails(
        UsageError, lambda: pack(tiny["llama"], "x.gguf", quant="q9")
    )
    assert "not whole blocks of 32" in fails(
        FallowError, lambda: pack(tiny["llama"], "x.gguf", quant="q8_0")
    )
    assert not Path("x.gguf").exists()


def test_files_that_are_not_packed(
    packed: dict[str, Path], tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    plain = write_gguf("llama", tiny["llama"], tmp_path / "plain.gguf")
    assert is_packed(packed["llama"])
    assert not is_packed(plain)
    assert not is_packed("smollm2")
    assert "not a packed model; make one with" in fails(FallowError, lambda: Engine(plain))
    assert "cannot read GGUF" in fails(FallowError, lambda: Engine(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("neurons at rest, and more of them")
    assert "not a GGUF file" in fails(FallowError, lambda: Engine(tmp_path / "text.gguf"))


def test_truncated_at_any_byte(packed: dict[str, Path], tmp_path: Path) -> None:
    content = packed["phi"].read_bytes()
    rng = np.random.default_rng(0)
    used = len(content) - 4096  # the last tensor is padded to whole pages
    cuts = {0, 1, 4, 23, used, *rng.integers(0, used, 60).tolist()}
    for cut in sorted(cuts):
        path = tmp_path / f"{cut}.gguf"
        path.write_bytes(content[:cut])
        assert str(path) in fails(FallowError, lambda path=path: Engine(path))


def test_smollm2_is_its_reference(
    smollm2: fallow.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """690 tokens of a novel: KL <= 0.002 nats and top-1 agreement >= 98 %."""
    monkeypatch.setattr(selfcheck, "CHECK_WINDOWS", 1)  # which the novel's come besides
    check = pack("smollm2", tmp_path / "m.gguf")
    assert check.passed
    engine = Engine(tmp_path / "m.gguf", context=345)
    found = evaluate_engine(
        engine, None, SAMPLE, context=345, windows=2, against=partial(dense_logits, smollm2)
    )
    assert found.kl_to_dense["mean"] <= 0.002
    assert found.top1_agreement >= 0.98
    assert abs(found.ppl_change_percent) < 0.2


_LITTLE_ROOM = """
import resource, sys
from pathlib import Path
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
model, threads, memory = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
Engine(model, threads=1, memory=memory)
pages = int(Path("/proc/self/statm").read_text().split()[0])
room = pages * resource.getpagesize() + 100_000_000  # a dozen stacks
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    print("".join(Engine(model, threads=threads, memory=memory).generate("a", 3)) and "runs")
except FallowError as error:
    print(error)
"""


@pytest.mark.parametrize("memory", ["", "1GB"])
def test_threads_that_do_not_start_are_one_line(talking: Path, memory: str) -> None:
    """An exception while others run had ended the process."""
    for threads, said in ((2, "runs"), (900, "the system does not start 899 threads")):
        done = subprocess.run(
            [sys.executable, "-c", _LITTLE_ROOM, str(talking), str(threads), memory],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(said)
        assert "give fewer --threads" in done.stdout or said == "runs"


def test_as_many_threads_as_may_run(packed: dict[str, Path], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("fallow.engine.engine.thread_count", thread_count)
    monkeypatch.setattr("fallow.engine.engine.processors", lambda: 3)
    assert Engine(packed["llama"]).threads == 3
    assert capsys.readouterr().err == ""
    assert Engine(packed["llama"], threads=4).threads == 4
    assert "note: 4 threads are more than this process has processors, 3" in capsys.readouterr().err


def test_processors_by_affinity() -> None:
    script = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from fallow.common.procfs import processors; print(processors())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "1\n"
