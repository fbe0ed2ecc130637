"""Several texts in one engine: what one reads does not depend on the others, to the bit."""

import gc
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import PACKED, VOCABULARY, engine_plan, make_folder
from engines import cutting_plan, fails
from fallow import _core
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.engine.answer import Piece
from fallow.engine.batch import Batch
from fallow.engine.engine import Engine
from fallow.engine.memory import RESERVE, parts_of, residencies
from fallow.engine.process import rss_bytes
from fallow.engine.sampling import Sampler
from fallow.packing.packer import pack
from fallow.plan import Cut

RNG = np.random.default_rng(11)
# Prompts end before, at and behind each other's windows and panels of keys.
PROMPTS = [RNG.integers(2, VOCABULARY, n) for n in (3, 40, 17, 64, 1, 33, 16, 9, 25)]
STEPS = 6
TOKENS = RNG.integers(2, VOCABULARY, (STEPS, len(PROMPTS)))


def alone(engine: Engine, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    engine.reset()
    engine.forward(prompt)
    return np.concatenate([engine.forward([token]) for token in tokens])


def check_together(engine: Engine, one: Engine) -> None:
    """Slots come and go, so that a text has other neighbours at every step."""
    expected = [alone(one, p, TOKENS[:, i]) for i, p in enumerate(PROMPTS)]
    for slot, prompt in enumerate(PROMPTS):
        engine.reset(slot=slot)
        engine.forward(prompt, slot=slot)
    read = [0] * len(PROMPTS)
    for step in range(2 * STEPS):
        slots = [
            slot for slot in np.random.default_rng(step).permutation(len(PROMPTS)).tolist()
            if read[slot] < STEPS and (slot + step) % 3
        ]  # fmt: skip
        if not slots:
            continue
        found = engine.forward_together([TOKENS[read[slot], slot] for slot in slots], slots)
        for slot, logits in zip(slots, found, strict=True):
            np.testing.assert_array_equal(logits, expected[slot][read[slot]])
            read[slot] += 1
    assert min(read) > 3


@pytest.mark.parametrize("name", PACKED)
def test_texts_read_together_are_as_each_alone(name: str, packed: dict[str, Path]) -> None:
    threads = 2 if name == "llama" else 1
    engine = Engine(packed[name], threads=threads, slots=len(PROMPTS))  # more than one pass takes
    one = Engine(packed[name], threads=threads)
    check_together(engine, one)
    plan = cutting_plan(engine)
    engine.use_plan(plan)
    one.use_plan(plan)
    check_together(engine, one)


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batch")
    folder = make_folder(
        "llama", root / "m", hidden_size=256, num_attention_heads=4, num_hidden_layers=6
    )
    pack(folder, root / "m.gguf", quant="q4_k")
    return root / "m.gguf"


@pytest.mark.parametrize("kernels", _core.KERNELS)
def test_of_quantised_weights_too(kernels: str, q4: Path) -> None:
    engine = Engine(q4, threads=2, kernels=kernels, slots=len(PROMPTS))
    check_together(engine, Engine(q4, threads=2, kernels=kernels))


def test_neurons_and_bytes_are_told(packed: dict[str, Path]) -> None:
    engine = Engine(packed["llama"], threads=2, slots=9)
    engine.use_plan(cutting_plan(engine))
    expected = []
    for prompt, token in zip(PROMPTS, TOKENS[0], strict=True):
        engine.reset()
        engine.forward(prompt)
        engine.forward([token], record=True)
        expected.append(engine.active_neurons()[0])
    for slot, prompt in enumerate(PROMPTS):
        engine.reset(slot=slot)
        engine.forward(prompt, slot=slot)
    found = engine._read_together(TOKENS[0], range(9), False, True)[1]
    np.testing.assert_array_equal(found, expected)
    # Weights are read once, keys and values for each.
    engine.use_plan(None)
    engine.reset_stats()
    engine.forward([5])
    one = engine.core_stats()["bytes_read"]
    engine.reset_stats()
    engine.forward_together([5, 6], [0, 1])
    assert one < engine.core_stats()["bytes_read"] < 1.5 * one


def test_under_a_plan_all_but_neurons_is_shared(packed: dict[str, Path]) -> None:
    """Two tokens read together spare all weights; under a plan all but those of the FFN."""
    engine = Engine(packed["llama"], threads=1, slots=2)

    def read(*tokens: int) -> int:
        for slot, _ in enumerate(tokens):
            engine.reset(slot=slot)
            engine.forward([3, 4], slot=slot)
        engine.reset_stats()
        engine.forward_together(tokens, range(len(tokens)))
        return engine.core_stats()["bytes_read"]

    def spared() -> int:
        return read(5) + read(6) - read(5, 6)

    dense = spared()
    ffn = ("gate_proj", "up_proj", "down_proj_t")
    matrices = [engine.matrix(f"layers.{i}.{name}") for i in range(2) for name in ffn]
    engine.use_plan(engine_plan(engine, Cut("gate_act", "threshold", 0.0)))
    assert dense - spared() == sum(matrix.data.nbytes for matrix in matrices)


def test_wrong_slots_are_one_line(packed: dict[str, Path]) -> None:
    path = packed["llama"]
    engine = Engine(path, context=8, slots=2)
    assert "--slots 0 is outside 1 to 1024" in fails(UsageError, lambda: Engine(path, slots=0))
    assert "slot 2 is outside 0 to 1" in fails(UsageError, lambda: engine.forward([5], slot=2))
    assert "different slots" in fails(UsageError, lambda: engine.forward_together([5, 6], [1, 1]))
    assert "different slots" in fails(UsageError, lambda: engine.forward_together([5], [0, 1]))
    assert "token id 300" in fails(FallowError, lambda: engine.forward_together([5, 300], [0, 1]))
    engine.forward(np.arange(2, 10), slot=1)
    assert "exceed the context of 8" in fails(
        FallowError, lambda: engine.forward_together([5, 6], [0, 1])
    )


# Answers ------------------------------------------------------------------------------------------


def finish(batch: Batch, answers: list[Any]) -> dict[Any, list[Piece]]:
    """All rounds; each answer's pieces. Those that failed have None last."""
    found: dict[Any, list[Any]] = {answer: [] for answer in answers}
    said = [batch.add(answer) for answer in answers]
    left = len(answers)
    while left:
        for each in said:
            found[each.answer] += each.pieces
            left -= each.ended
            if each.error:
                found[each.answer].append(None)
        said = batch.round()
    return found


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_answers_at_once_are_as_one_by_one(name: str, packed: dict[str, Path]) -> None:
    """Long prompts, sampling, activity and all: pieces and figures but those of time."""
    engine = Engine(packed[name], threads=2, slots=len(PROMPTS))
    engine.use_plan(cutting_plan(engine))
    options = [
        {
            "top_logprobs": 2 if i % 2 else None,
            "activity": i % 3 == 0,
            "echo": "a" if i == 4 else None,
        }
        for i in range(len(PROMPTS))
    ]

    def sampler(i: int) -> Sampler:
        return Sampler(temperature=0.8 if i % 4 == 1 else 0, seed=i)

    expected, stats = [], []
    for i, prompt in enumerate(PROMPTS):
        given: Any = options[i]
        expected.append(list(engine.answer(prompt, 4 + 5 * i, sampler(i), **given)))
        stats.append(engine.stats)
    answers = [
        engine.begin(prompt, 4 + 5 * i, sampler(i), slot=i, **options[i])  # type: ignore[arg-type]
        for i, prompt in enumerate(PROMPTS)
    ]
    found = finish(Batch(engine), answers)
    for i, answer in enumerate(answers):
        assert text_and_choices(found[answer]) == text_and_choices(expected[i])
        for key in ("finish", "new_tokens", "prompt_tokens", "logits_hash"):
            assert getattr(answer.stats, key) == getattr(stats[i], key)
    # Alone it reads all of the weights; among others a part, and the neurons add up.
    shared = np.array([a.stats.bytes_per_token for a in answers])
    assert (shared <= [s.bytes_per_token * 1.001 for s in stats]).all()
    assert shared[0] < 0.7 * stats[0].bytes_per_token
    idle, shared_idle = (
        np.array([x.sparsity for x in each]) @ [x.new_tokens - (x.finish == "length") for x in each]
        for each in (stats, [a.stats for a in answers])
    )
    assert shared_idle == pytest.approx(idle)


def text_and_choices(pieces: list[Piece]) -> Any:
    tokens = [t for p in pieces for t in p.tokens]
    seen = [t.activity.active.tolist() if t.activity else None for t in tokens]
    return "".join(p.text for p in pieces), [(t.id, t.logprob, t.top) for t in tokens], seen


def test_a_prompt_in_parts_lets_others_speak(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fallow.engine.answer.PREFILL_STEP", 16)
    engine = Engine(packed["llama"], threads=2, slots=3)
    batch = Batch(engine)
    short = engine.begin(PROMPTS[0], 30, Sampler())
    batch.add(short)
    batch.round()
    first, second = (engine.begin(PROMPTS[3], 2, Sampler(), slot=i) for i in (1, 2))
    batch.add(first)
    batch.add(second)
    for i in range(7):  # 64 tokens each, 16 in a round
        said = batch.round()
        assert [s.answer is short for s in said] == [True, False]
        assert said[1].answer is (first, second)[i % 2]
        assert len(said[0].pieces) == 1
    assert {s.answer for s in batch.round()} == {short, first, second}


def test_a_failure_is_that_of_one_answer(packed: dict[str, Path]) -> None:
    class Failing(Sampler):
        def pick(self, logits: np.ndarray) -> int:
            self.left = getattr(self, "left", 3) - 1
            if not self.left:
                raise FallowError("no token")
            return super().pick(logits)

    engine = Engine(packed["llama"], threads=2, slots=3)
    expected = [list(engine.answer(p, 12, Sampler())) for p in PROMPTS[:3]]
    answers = [
        engine.begin(prompt, 12, Failing() if i == 1 else Sampler(), slot=i)
        for i, prompt in enumerate(PROMPTS[:3])
    ]
    found = finish(Batch(engine), answers)
    assert found[answers[1]].pop() is None
    assert answers[1].stats.finish == ""
    assert answers[1].stats.new_tokens == 2
    for i in (0, 2):
        assert text_and_choices(found[answers[i]]) == text_and_choices(expected[i])
    # Its slot is free for the next.
    again = engine.begin(PROMPTS[1], 12, Sampler(), slot=1, reuse=True)
    assert text_and_choices(finish(Batch(engine), [again])[again]) == text_and_choices(expected[1])
    assert again.stats.cached_tokens == len(PROMPTS[1]) - 1


@pytest.mark.parametrize("n", [1, 3])
def test_what_comes_from_the_disk_is_the_same(
    n: int, q4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over the file is for all; alone an answer guesses ahead, beside others not."""
    monkeypatch.setattr("fallow.engine.engine.rss_bytes", lambda: 0)  # of weights alone
    least = RESERVE + min(r.memory for r in residencies(parts_of(read_gguf(q4), False)))
    engine = Engine(q4, threads=2, context=128, slots=3, memory=least + 100_000)
    assert engine.streams
    in_memory = Engine(q4, threads=2, context=128)
    expected = [list(in_memory.answer(p, 40, Sampler())) for p in PROMPTS[:n]]
    one = in_memory.stats.bytes_per_token
    answers = [engine.begin(p, 40, Sampler(), slot=i) for i, p in enumerate(PROMPTS[:n])]
    found = finish(Batch(engine), answers)
    for answer, pieces in zip(answers, expected, strict=True):
        assert text_and_choices(found[answer]) == text_and_choices(pieces)
    assert (answers[0].stats.drafted > 0) == (n == 1)
    if n > 1:
        assert answers[0].stats.bytes_per_token < 0.6 * one


def test_every_slot_counts_in_a_budget(tmp_path: Path) -> None:
    """Its cache is resident when weights are chosen."""
    context = 1 << 16
    folder = make_folder("llama", tmp_path / "m", max_position_embeddings=context)
    path = tmp_path / "m.gguf"
    pack(folder, path, quant="f32")
    message = fails(FallowError, lambda: Engine(path, memory=1, context=context, slots=9))
    assert f"{context} tokens in each of 9 slots; the least is" in message
    gc.collect()  # engines of other tests
    before = rss_bytes()
    engine = Engine(path, threads=1, context=context, slots=9)
    sizes = [engine.file.get(f"fallow.{key}") for key in ("n_layers", "n_kv_heads", "head_dim")]
    assert rss_bytes() - before > 0.9 * 9 * context * int(np.prod(sizes)) * 4


def test_slots_by_themselves_take_little(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed["llama"]
    engine = Engine(path, slots=None, context=64)
    assert engine.slots == 4
    sizes = [engine.file.get(f"fallow.{key}") for key in ("n_layers", "n_kv_heads", "head_dim")]
    cache = 64 * int(np.prod(sizes)) * 4
    for available, slots in ((39 * cache, 3), (40 * cache, 4), (5 * cache, 1)):
        monkeypatch.setattr("fallow.engine.engine.available_bytes", lambda a=available: a)
        assert Engine(path, slots=None, context=64).slots == slots


def test_a_damaged_number_of_layers_takes_no_memory(
    packed: dict[str, Path], tmp_path: Path
) -> None:
    """Where slots are counted by what their caches take, as the server does."""
    damaged = bytearray(packed["llama"].read_bytes())
    at = damaged.index(b"fallow.n_layers") + len(b"fallow.n_layers")
    assert struct.unpack_from("<II", damaged, at) == (4, 2)  # a uint32
    struct.pack_into("<I", damaged, at + 4, (1 << 32) - 1)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    tracemalloc.start()
    with pytest.raises(FallowError, match=r"n_layers must be .* from 1 to 65536; pack it again"):
        Engine(path, slots=None)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
