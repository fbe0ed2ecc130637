"""Matrices in two planes: the same model when rows are whole, coarse rows where a plan says so."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fallow
from conftest import VOCABULARY, engine_plan, make_folder
from fallow import _core
from fallow.engine import Engine
from fallow.errors import FallowError
from fallow.packing import Matrix, dequantize, pack
from fallow.plan import Plan
from fallow.planes import PLANE_TYPES, join_planes, split_planes
from fallow.taps import attach

IDS = np.random.default_rng(1).integers(2, VOCABULARY, 40)
N_LAYERS = 2
ERROR = 0.3  # of gate_pre from coarse rows, as plans here have it
RANK = 3
Packed = dict[tuple[str, str, bool], Path]


@pytest.fixture(scope="session")
def broad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models whose rows are one whole K block: gated, and not."""
    root = tmp_path_factory.mktemp("broad")
    changes = {
        # Wider rows, smaller weights; two threads part these neurons inside a block of 32.
        "llama": {"initializer_range": 0.05, "intermediate_size": 96},
        "opt": {"init_std": 0.05, "word_embed_proj_dim": 256},
    }
    return {
        name: make_folder(name, root / name, hidden_size=256, **more)
        for name, more in changes.items()
    }


@pytest.fixture(scope="session")
def packed(broad: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """By model, type, and whether it is in planes."""
    root, found = tmp_path_factory.mktemp("packed"), {}
    for name, folder in broad.items():
        for kind in PLANE_TYPES:
            for planes in (False, True):
                path = root / f"{name}-{kind}-{planes}.gguf"
                pack(folder, path, quant=kind.lower(), planes=planes)
                found[name, kind, planes] = path
    return found


@pytest.mark.parametrize("kind", PLANE_TYPES)
def test_planes_are_joined_to_the_same_bytes(kind: str) -> None:
    header, nibbles = PLANE_TYPES[kind]
    data = np.random.default_rng(0).integers(0, 256, (7, 3 * (header + nibbles)), dtype=np.uint8)
    base, rest = split_planes(kind, data)
    assert (base.shape, rest.shape) == ((7, 3 * (header + nibbles // 2)), (7, 3 * nibbles // 2))
    np.testing.assert_array_equal(join_planes(kind, base, rest), data)


def plan_for(engine: Engine, rule: str = "two_stage", **thresholds: float) -> Plan:
    n_layers = engine._core.n_layers
    weights = np.ones((n_layers, engine._core.intermediate_size), dtype=np.float32)
    arrays = {f"threshold.{tap}": np.full(n_layers, v) for tap, v in thresholds.items()}
    arrays |= {"weight.gate_act": weights}
    arrays |= {f"error.{tap}": ERROR * weights for tap in ("gate_coarse", "up_coarse")}
    return engine_plan(engine, rule, arrays)


def corrections(engine: Engine) -> dict[str, np.ndarray]:
    """As large as what coarse rows are short of; no guess at it."""
    d_ff, hidden = engine.matrix("layers.0.up_proj").shape
    random = np.random.default_rng(5)
    found = {}
    for tap in ("gate_coarse", "up_coarse"):
        for part, width, size in (("in", hidden, 0.02), ("out", d_ff, 0.5)):
            values = size * random.standard_normal((N_LAYERS, RANK, width))
            found[f"correction.{tap}.{part}"] = values.astype(np.float16)
    return found


def decode(engine: Engine) -> np.ndarray:
    engine.reset()
    return np.concatenate([engine.forward(IDS[i : i + 1]) for i in range(len(IDS))])


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("kind", PLANE_TYPES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_whole_rows_are_the_same_model(name: str, kind: str, kernels: str, packed: Packed) -> None:
    """Dense, with rows skipped, and in blocks; rows are summed in another order."""
    logits = []
    for planes in (False, True):
        engine = Engine(packed[name, kind, planes], threads=2, kernels=kernels)
        found = [decode(engine), engine.logits(IDS), engine.matrix("layers.1.up_proj").data]
        for thresholds in ({"gate_act": 0.01, "inter": 0.01}, {"inter": 0.02}):
            engine.use_plan(plan_for(engine, **thresholds))
            found += [decode(engine), engine.logits(IDS)]
        logits.append(found)
    for whole, joined in zip(*logits, strict=True):
        np.testing.assert_allclose(whole, joined, atol=0.05)  # of logits up to 14


def coarse(engine: Engine, name: str) -> torch.Tensor:
    """A matrix whose nibbles' lower bits are 1 and 2, in turn, or 2 and 1: every other row of
    down_proj_t, every other pair of rows else."""
    matrix = engine.matrix(name)
    header, nibbles = PLANE_TYPES[matrix.type]
    shape = matrix.shape
    blocks = matrix.data.reshape(shape[0], -1, header + nibbles).copy()
    low_bits = np.repeat(np.array([0x21, 0x12], dtype=np.uint8), nibbles // 2)
    turned = np.arange(shape[0]) // (1 if "down" in name else 2) % 2 == 1
    blocks[..., header:] &= 0xCC
    blocks[~turned, :, header:] |= low_bits
    blocks[turned, :, header:] |= low_bits[::-1]
    return torch.from_numpy(
        dequantize(Matrix(matrix.type, (shape[0], shape[1]), blocks.reshape(shape[0], -1)))
    )


def as_packed(engine: Engine, folder: Path) -> fallow.Model:
    """The reference model with the packed file's values."""
    model = fallow.load(folder, "float32")

    def fill(module: torch.nn.Module, name: str) -> None:
        values = torch.from_numpy(engine.matrix(name).dequantize())
        assert isinstance(module.weight, torch.Tensor)
        module.weight.data = values

    fill(model.module.get_input_embeddings(), "embed_tokens")
    if "lm_head.weight" in engine.file.tensors:
        fill(model.module.get_output_embeddings(), "lm_head")
    for i, layer in enumerate(model.layers):
        for name, module in zip("qkvo", layer.attention.values(), strict=True):
            fill(module, f"layers.{i}.{name}_proj")
        names = ("gate_proj", "up_proj") if layer.gated else ("up_proj",)
        for name, module in zip(names, layer.ffn_inputs.values(), strict=True):
            fill(module, f"layers.{i}.{name}")
        down = engine.matrix(f"layers.{i}.down_proj_t").dequantize()
        if f"layers.{i}.outliers.weight" in engine.file.tensors:
            down[outliers(engine, i)] = engine.matrix(f"layers.{i}.outliers").dequantize()
        layer.down_proj.weight.data = torch.from_numpy(down).T.contiguous()
    return model


def outliers(engine: Engine, layer: int) -> list[int]:
    count = engine.file.get("fallow.n_outliers")
    return list(engine.file.get("fallow.outliers"))[layer * count : (layer + 1) * count]


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("kind", PLANE_TYPES)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_coarse_rows(
    name: str, kind: str, kernels: str, packed: Packed, broad: dict[str, Path]
) -> None:
    """Which rows are idle, coarse and whole, and what that gives, against the reference model."""
    engine = Engine(packed[name, kind, True], threads=2, kernels=kernels)
    model = as_packed(engine, broad[name])
    gated = name == "llama"
    marks = {"gate_coarse": 0.3, "gate_act": 0.1, "up_coarse": 0.15} if gated else {}
    marks |= {"inter": 0.03, "down_coarse": 0.15}
    seen: dict[str, torch.Tensor] = {}
    shares: dict[str, list[float]] = {mark: [] for mark in marks}

    def at_or_below(mark: str, score: torch.Tensor) -> torch.Tensor:
        below = score <= marks[mark]
        shares[mark].append(float(below.float().mean()))
        return below

    def keep(index: int, x: torch.Tensor) -> None:
        seen["x"] = x.clone()

    added = corrections(engine)

    def rough(index: int, name: str) -> torch.Tensor:
        tap = name.replace("proj", "coarse")
        inner, out = (
            torch.from_numpy(added[f"correction.{tap}.{part}"][index]).float()
            for part in ("in", "out")
        )
        weight = coarse(engine, f"layers.{index}.{name}") + out.T @ inner
        return seen["x"] @ weight.T  # a Llama has no biases

    def cut_gate(index: int, gate: torch.Tensor) -> torch.Tensor | None:
        if not gated:
            return None
        gate_pre = rough(index, "gate_proj")
        low, first, high = (torch.nn.functional.silu(gate_pre + e) for e in (-ERROR, 0, ERROR))
        off = (high - first).abs() + (first - low).abs()
        gate = torch.where(at_or_below("gate_coarse", off), first, gate)
        seen["gate"] = gate.masked_fill(at_or_below("gate_act", gate.abs()), 0)
        return seen["gate"]

    def choose_up(index: int, up: torch.Tensor) -> torch.Tensor:
        norm = model.layers[index].down_norm
        at = at_or_below("up_coarse", seen["gate"].abs() * ERROR * norm)
        return torch.where(at, rough(index, "up_proj"), up)

    def cut_inter(index: int, inter: torch.Tensor) -> torch.Tensor:
        norm = model.layers[index].down_norm
        inter = inter.masked_fill(at_or_below("inter", inter.abs() * norm), 0)
        seen["coarse"] = inter * at_or_below("down_coarse", inter.abs() * norm)
        return inter

    def coarse_down(index: int, out: torch.Tensor) -> torch.Tensor:
        some = coarse(engine, f"layers.{index}.down_proj_t")
        whole = torch.from_numpy(engine.matrix(f"layers.{index}.down_proj_t").dequantize())
        some[outliers(engine, index)] = whole[outliers(engine, index)]
        return out + seen["coarse"] @ (some - whole)

    taps = {"x": keep, "gate_act": cut_gate, "inter": cut_inter, "ffn_out": coarse_down}
    taps |= {"up": choose_up} if gated else {}
    with attach(model.layers, taps), torch.inference_mode():
        expected = model.module(torch.from_numpy(IDS[None])).logits[0].numpy()
    plan = plan_for(engine, **marks)
    if gated:
        plan.arrays |= added
    engine.use_plan(plan)
    for found in (engine.logits(IDS), decode(engine)):
        # Rounding lets a few values change sides of a threshold.
        error = np.abs(found - expected) / np.abs(expected).max()
        assert np.median(error) < 0.005
        assert error.max() < 0.1
    assert all(0.02 < np.mean(share) < 0.98 for share in shares.values()), shares


def test_coarse_rows_are_fewer_bytes(packed: Packed) -> None:
    read = {}
    for planes in (False, True):
        engine = Engine(packed["llama", "Q4_K", planes], threads=2)
        engine.use_plan(plan_for(engine, gate_coarse=1e9, up_coarse=1e9, down_coarse=1e9))
        engine.forward(IDS[:1])
        read[planes] = engine.core_stats()["bytes_read"]
    d_ff = engine.matrix("layers.0.up_proj").shape[0]
    assert read[False] - read[True] == N_LAYERS * 3 * d_ff * 64  # of 144
    engine.reset()
    engine.reset_stats()
    plan = plan_for(engine, gate_coarse=1e9, up_coarse=1e9, down_coarse=1e9)
    plan.arrays |= corrections(engine)
    engine.use_plan(plan)
    engine.forward(IDS[:1])
    more = engine.core_stats()["bytes_read"] - read[True]
    assert more == N_LAYERS * 2 * RANK * (2 * 256 + d_ff // 32 * 34)


def test_wrong_use(packed: Packed, tmp_path: Path) -> None:
    engine = Engine(packed["llama", "Q4_K", True])
    with pytest.raises(FallowError, match="a plan of 'topk' cannot read rows coarse, two_stage"):
        engine.use_plan(plan_for(engine, "topk", up_coarse=1.0))
    plan = plan_for(engine, gate_coarse=1.0)
    del plan.arrays["error.gate_coarse"]
    with pytest.raises(FallowError, match=r"this plan has no array error\.gate_coarse; calibrate"):
        engine.use_plan(plan)
    plan = plan_for(engine, up_coarse=1.0)
    plan.arrays |= corrections(engine)
    plan.arrays["correction.up_coarse.out"] = plan.arrays["correction.up_coarse.out"][..., 1:]
    with pytest.raises(FallowError, match=r"array correction\.up_coarse\.out has the shape"):
        engine.use_plan(plan)
    raw = packed["llama", "Q4_K", True].read_bytes()
    # A type that has no planes.
    key = raw.index(b"fallow.up_proj_planes") + len(b"fallow.up_proj_planes") + 4 + 4 + 8
    (tmp_path / "m.gguf").write_bytes(raw[:key] + bytes([14]) + raw[key + 1 :])
    with pytest.raises(FallowError, match=r"layers\.0\.up_proj cannot be in planes of type 14"):
        Engine(tmp_path / "m.gguf")
