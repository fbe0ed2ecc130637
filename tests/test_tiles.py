"""Weights that were laid out in tiles give to the bit what rows of the mapped file give."""

from pathlib import Path

import numpy as np
import pytest

from conftest import engine_plan, make_folder
from fallow import _core
from fallow.engine.engine import Engine
from fallow.packing.packer import pack
from fallow.plan import Cut

# Wide enough for blocks of 256; of q_proj and o_proj too the widths differ. The vocabulary is
# whole tiles.
WIDE = {
    "vocab_size": 304,
    "hidden_size": 256,
    "intermediate_size": 528,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "initializer_range": 0.02,
}
IDS = np.random.default_rng(0).integers(2, 250, 49)


@pytest.fixture(
    scope="module",
    params=[("q4_k", "q5_k", False), ("q5_k", "q4_k", True), ("q8_0", "q8_0", True)]
    + [(quant, "q8_0", False) for quant in ("q4_0", "q4_1", "q5_0", "q5_1", "q6_k")],
    ids=str,
)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quant, down, tied = request.param
    root = tmp_path_factory.mktemp("tiles")
    folder = make_folder("llama", root / "model", tie_word_embeddings=tied, **WIDE)
    pack(folder, root / "packed.gguf", quant=quant, down=down, shortlist=True)
    return root / "packed.gguf"


def read(engine: Engine) -> list[np.ndarray]:
    """Logits of a prompt, some tokens, one, and one that leaves the plan aside."""
    engine.reset()
    return [
        engine.forward(IDS[:40]),
        engine.forward(IDS[40:47], every=True),
        engine.forward(IDS[47:48]),
        engine.forward(IDS[48:49], dense=True),
        engine.logits(IDS[:17]),
    ]


@pytest.mark.parametrize("kernels", _core.KERNELS)
def test_tiles_are_rows_to_the_bit(
    kernels: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(path, kernels=kernels)
    monkeypatch.setattr("fallow.engine.engine.available_bytes", lambda: 0)
    mapped = Engine(path, kernels=kernels)
    half = engine_plan(engine, Cut("gate_act", "topk", 0.5))
    fixed = engine_plan(engine, Cut("gate_act", "threshold", 0.001))
    shortlist = engine_plan(engine, Cut("gate_act", "topk", 0.5), head_margin=1.0)
    after_up = [
        engine_plan(engine, Cut("inter", "topk", 0.5)),
        engine_plan(engine, Cut("inter", "threshold", 0.001)),
        engine_plan(engine, Cut("up", "topk", 0.5)),
    ]
    for plan in (None, half, *after_up, fixed, shortlist, None):
        for each in (engine, mapped):
            each.use_plan(plan)
        for found, expected in zip(read(engine), read(mapped), strict=True):
            np.testing.assert_array_equal(found, expected)
