"""`fallow llama pack`: what it writes and refuses. The plugin itself: test_llama_cpp.py."""

from pathlib import Path

import gguf
import numpy as np
import pytest

import fallow
from conftest import make_folder
from fallow import _core, cli
from fallow.checkpoints.weights import fingerprint, read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.engine.memory import parts_of
from fallow.packing.ffn_file import pack_ffns
from fallow.plan import COLUMN_NORM, Cut, Plan
from test_models import write_gguf

SIZES = {"hidden_size": 64, "intermediate_size": 96}
LAYERS = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    model = fallow.load(make_folder("llama", folder / "llama", **SIZES))
    return write_gguf("llama", model, folder / "source.gguf")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    path = source.with_name("packed.gguf")
    fallow.pack(source, path, down="q8_0")
    return path


def plan_of(source: Path, *cuts: Cut, **more: float) -> Plan:
    mark = fingerprint(read_gguf(source).tensors)
    return Plan("source", mark, "topk", 0.5, "keep", cuts, **more)


def down_proj(source: Path, layer: int) -> np.ndarray:
    return read_gguf(source).tensors[f"blk.{layer}.ffn_down.weight"].dequantize()


def test_it_holds_down_proj_by_neuron(source: Path, tmp_path: Path) -> None:
    pack_ffns(source, tmp_path / "ffn.gguf", down="f32")
    file = read_gguf(tmp_path / "ffn.gguf")
    assert file.get("fallow.ffn.n_layers") == LAYERS
    for i in range(LAYERS):
        found = file.tensors[f"layers.{i}.down_proj_t.weight"].dequantize()
        np.testing.assert_array_equal(found, down_proj(source, i).T)
    marks = file.get("fallow.ffn.fingerprints")
    tensors = read_gguf(source).tensors
    assert marks[3] == _core.fingerprint(tensors["blk.1.ffn_gate.weight"].data.reshape(-1))
    assert len(set(marks)) == 3 * LAYERS
    assert "fallow.ffn.cuts.layer" not in file.metadata


def test_cuts_are_those_of_the_plan(source: Path, tmp_path: Path) -> None:
    weight = np.arange(LAYERS * 96, dtype=np.float32).reshape(LAYERS, 96)
    cuts = (
        Cut("gate_act", "threshold", np.array([0.1, -1.0]), weight),  # below 0: nothing is cut
        Cut("inter", "topk", np.array([0.5, 0.25]), COLUMN_NORM),
    )
    pack_ffns(source, tmp_path / "ffn.gguf", plan=plan_of(source, *cuts))
    file = read_gguf(tmp_path / "ffn.gguf")
    kept = [file.get(f"fallow.ffn.cuts.{key}") for key in ("layer", "tap", "by", "value")]
    act, inter = (_core.TAPS.index(tap) for tap in ("gate_act", "inter"))
    assert [list(column) for column in kept] == [
        [0, 0, 1],
        [act, inter, inter],
        [1, 2, 2],
        [pytest.approx(0.1), 0.5, 0.25],
    ]
    np.testing.assert_array_equal(file.tensors["cuts.0.weight"].dequantize(), weight[0])
    norms = np.linalg.norm(down_proj(source, 1), axis=0)
    np.testing.assert_allclose(file.tensors["cuts.2.weight"].dequantize(), norms, rtol=1e-6)


def test_a_packed_model_lends_its_rounding_and_its_plan(
    source: Path, packed: Path, tmp_path: Path
) -> None:
    plan = plan_of(source, Cut("inter", "topk", np.full(LAYERS, 0.5)))
    with_plan = tmp_path / "packed.gguf"
    fallow.pack(source, with_plan, plan=plan, down="q8_0")
    pack_ffns(source, tmp_path / "ffn.gguf", packed=with_plan)
    file, lender = read_gguf(tmp_path / "ffn.gguf"), read_gguf(packed)
    for name in ("layers.1.down_proj_t.weight", "layers.1.outliers.weight"):
        np.testing.assert_array_equal(file.tensors[name].data, lender.tensors[name].data)
    np.testing.assert_array_equal(file.get("fallow.ffn.outliers"), lender.get("fallow.outliers"))
    assert list(file.get("fallow.ffn.cuts.value")) == [0.5, 0.5]


def test_a_packed_model_has_the_same_as_its_file(source: Path, tmp_path: Path) -> None:
    plan = plan_of(
        source, Cut("inter", "topk", np.array([0.5, 0.25]), COLUMN_NORM), head_margin=1.0
    )
    packed, beside = tmp_path / "packed.gguf", tmp_path / "ffn.gguf"
    fallow.pack(source, packed, plan=plan, down="q8_0")
    pack_ffns(source, beside, packed=packed)
    file, other = read_gguf(packed), read_gguf(beside)
    for key in (
        "version",
        "fingerprints",
        "note",
        *(f"cuts.{k}" for k in ("layer", "tap", "value")),
    ):
        np.testing.assert_array_equal(file.get(f"fallow.ffn.{key}"), other.get(f"fallow.ffn.{key}"))
    assert "shortlist is left out" in file.get("fallow.ffn.note")
    for i in range(LAYERS):
        found, expected = (f.tensors[f"cuts.{i}.weight"].dequantize() for f in (file, other))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    _core.check_ffn_file(np.fromfile(packed, np.uint8))
    # Under a budget the engine reads nothing of it.
    assert not any("cuts." in part.name for part in parts_of(file, False))


@pytest.mark.parametrize("what", ["folder", "attention"])
def test_a_packed_model_that_the_plugin_cannot_take(
    source: Path, tmp_path: Path, what: str
) -> None:
    packed = tmp_path / "packed.gguf"
    if what == "folder":
        fallow.pack(source.with_name("llama"), packed)
    else:
        plan = plan_of(source, Cut("q_proj", "topk", np.full(LAYERS, 0.5)))
        fallow.pack(source, packed, plan=plan, down="q8_0")
    with pytest.raises(_core.PackedError, match=r"fallow llama pack MODEL\.gguf --packed THIS"):
        _core.check_ffn_file(np.fromfile(packed, np.uint8))


def test_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    other = fallow.load(make_folder("llama", tmp_path / "other", **SIZES, initializer_range=0.2))
    other_packed = tmp_path / "other.gguf"
    fallow.pack(write_gguf("llama", other, tmp_path / "o.gguf"), other_packed, down="q8_0")
    with pytest.raises(FallowError, match="was packed from another model"):
        pack_ffns(source, tmp_path / "ffn.gguf", packed=other_packed)
    with pytest.raises(FallowError, match="is not a packed model"):
        pack_ffns(source, tmp_path / "ffn.gguf", packed=source)
    assert not (tmp_path / "ffn.gguf").exists()


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (Cut("q_proj", "topk", 0.5), "cuts q_proj, which llama.cpp computes by itself"),
        (Cut("up_proj", "topk", np.full(LAYERS, 0.5), COLUMN_NORM), "weighs inputs of up_proj"),
        (Cut("inter", "topk", np.full(5, 0.5)), "is for 5 layers"),
    ],
)
def test_cuts_that_the_plugin_does_not_make(
    source: Path, tmp_path: Path, cut: Cut, said: str
) -> None:
    with pytest.raises(FallowError, match=said):
        pack_ffns(source, tmp_path / "ffn.gguf", plan=plan_of(source, cut))
    assert not (tmp_path / "ffn.gguf").exists()


def test_a_plan_of_another_form_of_the_model_is_noted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(source, Cut("inter", "topk", np.full(LAYERS, 0.5)), head_margin=1.0)
    plan.fingerprint = "0" * 16
    pack_ffns(source, tmp_path / "ffn.gguf", plan=plan)
    said = " ".join(capsys.readouterr().err.split())
    assert "was made on source in another form" in said
    assert "the plan's shortlist is left out" in said


def test_what_has_no_dense_ffns(tmp_path: Path) -> None:
    model = fallow.load(make_folder("qwen3_moe", tmp_path / "experts"))
    path = write_gguf("qwen3_moe", model, tmp_path / "experts.gguf")
    with pytest.raises(
        FallowError, match="has a mixture of experts, of which the plugin computes nothing"
    ):
        pack_ffns(path, tmp_path / "ffn.gguf")


def test_gate_and_up_in_one_tensor(tmp_path: Path) -> None:
    model = fallow.load(make_folder("phi3", tmp_path / "phi3"))
    path = write_gguf("phi3", model, tmp_path / "m.gguf")
    with pytest.raises(FallowError, match="has gate and up in one tensor"):
        pack_ffns(path, tmp_path / "ffn.gguf")


def test_usage(source: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown type 'q9'"):
        pack_ffns(source, tmp_path / "ffn.gguf", down="q9")
    with pytest.raises(UsageError, match="--down is for models without --packed"):
        pack_ffns(source, tmp_path / "ffn.gguf", packed=packed, down="q8_0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fallow.ffn.version": 2}, "made by another version"),
        ({"fallow.ffn.fingerprints": [1, 2]}, "three values per layer"),
        ({"fallow.ffn.n_outliers": 97}, "from 0 to 96"),
        ({"fallow.ffn.cuts.tap": [0, 0]}, "a cut that is none of an FFN"),
        ({"fallow.ffn.cuts.by": [9, 2]}, "from 0 to 4"),
        ({"fallow.ffn.cuts.layer": [0]}, "must be an array of 2 values"),
        ({"fallow.ffn.hidden_size": 32}, "expected"),
    ],
)
def test_damaged_files_are_refused(source: Path, tmp_path: Path, change: dict, said: str) -> None:
    path, damaged = tmp_path / "ffn.gguf", tmp_path / "damaged.gguf"
    pack_ffns(source, path, plan=plan_of(source, Cut("inter", "topk", np.full(LAYERS, 0.5))))
    file = read_gguf(path)
    writer = gguf.GGUFWriter(damaged, "fallow")
    kinds = gguf.GGUFValueType
    for key, value in (dict(file.metadata) | change).items():
        if key.startswith(("GGUF.", "general.")):
            continue
        if isinstance(value, int):
            writer.add_uint32(key, value)
            continue
        kind = kinds.FLOAT64 if key.endswith("value") else kinds.UINT32
        kind = kinds.UINT64 if key.endswith("fingerprints") else kind
        writer.add_key_value(key, list(value), kinds.ARRAY, kind)
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, tensor.dequantize())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(_core.PackedError, match=said):
        _core.check_ffn_file(np.fromfile(damaged, np.uint8))


def test_fingerprints_tell_bytes_apart() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 1000).astype(np.uint8)
    marks = {_core.fingerprint(data), *(_core.fingerprint(data[:n]) for n in range(100))}
    for i in range(0, 1000, 7):
        changed = data.copy()
        changed[i] ^= 1
        marks.add(_core.fingerprint(changed))
    assert len(marks) == 1 + 100 + len(range(0, 1000, 7))


def test_the_command(
    source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ffn.gguf"
    cli.app(
        ["llama", "pack", str(source), "--packed", str(packed), "-o", str(out)],
        standalone_mode=False,
    )
    assert str(out) in capsys.readouterr().out
    _core.check_ffn_file(np.fromfile(out, np.uint8))
