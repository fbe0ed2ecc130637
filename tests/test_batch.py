"""Several texts in one engine: what one reads does not depend on the others, to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import PACKED, VOCABULARY, make_folder
from engines import cutting_plan, fails
from fallow import _core
from fallow.common.errors import FallowError, UsageError
from fallow.engine.answer import Piece
from fallow.engine.batch import Batch
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler
from fallow.packing.packer import pack

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
    engine = Engine(packed[name], threads=2, slots=len(PROMPTS))  # more than one pass takes
    one = Engine(packed[name], threads=2)
    check_together(engine, one)
    plan = cutting_plan(engine)
    engine.use_plan(plan)
    one.use_plan(plan)
    check_together(engine, one)


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batch")
    folder = make_folder("llama", root / "m", hidden_size=256, num_attention_heads=4)
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
