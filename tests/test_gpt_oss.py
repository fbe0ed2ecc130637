"""What GPT-OSS alone has: sinks, clamped SwiGLU, MXFP4 folders, and how its tokens end."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers.models.gpt_oss import modeling_gpt_oss

import fallow
from conftest import make_folder
from engines import ERROR, IDS, check_a_few, fails, one_by_one, reference
from fallow.checkpoints.tokenizer import tokenizer_from_gguf
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.packing.packer import pack
from test_models import write_gguf
from test_tokenizer import gguf_file

pytestmark = pytest.mark.usefixtures("rounded_cache")

# Of the logits' spread, where keys and values are rounded alike.
SMALL = 0.001
# E2M1: the values of four bits. https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@pytest.fixture
def rounded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' keys and values become float16, as the engine's are.

    Where two experts are as likely as each other, that decides.
    """
    exact = modeling_gpt_oss.eager_attention_forward

    def rounded(module: Any, q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        return exact(module, q, k.half().float(), v.half().float(), *rest, **options)

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", rounded)


def check_engine(path: Path, expected: np.ndarray) -> None:
    """Prefill and decode are near these logits, (T, vocabulary)."""
    engine, spread = Engine(path), np.ptp(expected)
    for found in (engine.logits(IDS), one_by_one(engine)):
        assert np.abs(found - expected).max() < SMALL * spread
        assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.995
    check_a_few(engine)


def test_both_kinds_of_layers(tmp_path: Path) -> None:
    """Windows are shorter than the text; from the folder and from a GGUF."""
    folder = make_folder("gpt_oss", tmp_path / "m", num_hidden_layers=4)
    model = fallow.load(folder)
    pack(folder, tmp_path / "folder.gguf", quant="f32")
    check_engine(tmp_path / "folder.gguf", reference(model))
    two = fallow.load(make_folder("gpt_oss", tmp_path / "two"))
    file = write_gguf("gpt_oss", two, tmp_path / "m.gguf")
    pack(file, tmp_path / "packed.gguf", down="f32")
    check_engine(tmp_path / "packed.gguf", reference(two))
    windows = Engine(tmp_path / "packed.gguf").file.get("fallow.sliding_window")
    assert windows.tolist() == [16, 0]


def test_sinks_and_clamps(tmp_path: Path) -> None:
    """Sinks from far below all scores to far above, and a limit that most values reach."""
    limits = {"swiglu_limit": 0.4, "swiglu_alpha": 1.3}
    folder = make_folder("gpt_oss", tmp_path / "m", **limits)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.sinks"] = torch.tensor([-200.0, 0.0, 5.0, 200.0])
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = fallow.load(folder)
    pack(folder, tmp_path / "m.gguf", quant="f32")
    expected = reference(model)
    check_engine(tmp_path / "m.gguf", expected)
    model.module.model.layers[0].self_attn.sinks.fill_(-200.0)
    assert np.abs(reference(model) - expected).max() > 0.1
    wide = fallow.load(make_folder("gpt_oss", tmp_path / "wide"))
    assert np.abs(reference(wide) - expected).max() > 0.1


def test_biases_of_each_expert_count(tmp_path: Path) -> None:
    folder = make_folder("gpt_oss", tmp_path / "m")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, values in state.items():
        if ".experts." in name and name.endswith("_bias"):  # transformers begins with zeros
            values += 0.5 * torch.randn(values.shape, generator=generator)
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = fallow.load(folder)
    pack(folder, tmp_path / "m.gguf", quant="f32")
    check_engine(tmp_path / "m.gguf", reference(model))
    again = fallow.load(write_gguf("gpt_oss", model, tmp_path / "file.gguf"))
    torch.testing.assert_close(again.hidden(IDS[None]), model.hidden(IDS[None]))


# MXFP4 ------------------------------------------------------------------------------------------


def make_mxfp4(folder: Path) -> dict[str, np.ndarray]:
    """A folder as OpenAI's are; the values of its experts' matrices, (n_experts, rows, columns)."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4}
    make_folder("gpt_oss", folder, initializer_range=0.05, **sizes)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    random, values = np.random.default_rng(0), {}
    for name in [n for n in state if n.endswith(("gate_up_proj", "down_proj"))]:
        n, cols, rows = state.pop(name).shape
        blocks = random.integers(0, 256, (n, rows, cols // 32, 16), dtype=np.uint8)
        scales = random.integers(119, 123, (n, rows, cols // 32), dtype=np.uint8)
        state[f"{name}_blocks"] = torch.from_numpy(blocks)
        state[f"{name}_scales"] = torch.from_numpy(scales)
        # The lower half of a byte is the first of two neighbours.
        codes = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(n, rows, cols // 32, 32)
        scale = np.exp2(scales.astype(np.float32) - 127)[..., None]
        values[name] = (VALUES[codes] * scale).reshape(n, rows, cols)
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4"}, experts_per_token=3)
    return values


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_mxfp4_folder(tmp_path: Path) -> None:
    """Weights are the stored ones, in the packed file too, whose products are near them."""
    values = make_mxfp4(tmp_path / "m")
    model = fallow.load(tmp_path / "m")
    assert model.dtype == torch.float32
    for name, expected in values.items():
        found = model.module.get_parameter(name).transpose(1, 2).numpy()
        np.testing.assert_array_equal(found, expected)
    assert not hasattr(model.module.config, "quantization_config")
    pack(tmp_path / "m", tmp_path / "m.gguf")
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    for i in range(2):
        rows = values[f"model.layers.{i}.mlp.experts.gate_up_proj"]
        for e in range(4):
            for half, part in enumerate(("gate_proj", "up_proj")):
                tensor = tensors[f"layers.{i}.experts.{e}.{part}.weight"]
                assert tensor.type == "MXFP4"
                np.testing.assert_array_equal(tensor.dequantize(), rows[e, half::2])
            assert tensors[f"layers.{i}.experts.{e}.down_proj_t.weight"].type == "Q8_0"
    expected, spread = reference(model), np.ptp(reference(model))
    engine = Engine(tmp_path / "m.gguf")
    for found in (engine.logits(IDS), one_by_one(engine)):
        # All but gate_proj and up_proj is Q8_0.
        assert np.median(np.abs(found - expected).max(axis=1)) < 0.008 * spread
    check_a_few(engine)


def test_mxfp4_folder_in_another_type(tmp_path: Path) -> None:
    make_mxfp4(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "m.gguf", quant="f32")
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    assert tensors["layers.1.experts.3.up_proj.weight"].type == "F32"
    check_engine(tmp_path / "m.gguf", reference(fallow.load(tmp_path / "m")))


def test_mxfp4_gguf(tmp_path: Path) -> None:
    """The same values as llama.cpp's converter would write them."""
    make_mxfp4(tmp_path / "m")
    model = fallow.load(tmp_path / "m")
    changes: dict[str, Any] = {}
    for i in range(2):
        experts = model.layers[i].experts
        assert experts is not None
        parts = {"gate": experts.gate_proj, "up": experts.up_proj, "down": experts.down_proj}
        for part, weight in parts.items():
            rows = np.ascontiguousarray(weight.numpy())
            kind = gguf.GGMLQuantizationType.MXFP4
            changes[f"blk.{i}.ffn_{part}_exps.weight"] = gguf.quantize(rows, kind)
    path = write_gguf("gpt_oss", model, tmp_path / "m.gguf", quant="MXFP4", **changes)
    again = fallow.load(path)
    torch.testing.assert_close(again.hidden(IDS[None]), model.hidden(IDS[None]))
    pack(path, tmp_path / "packed.gguf")
    pack(tmp_path / "m", tmp_path / "folder.gguf")
    one, other = (read_gguf(tmp_path / f"{n}.gguf").tensors for n in ("packed", "folder"))
    for name in one:
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            assert one[name].type == other[name].type == "MXFP4"
            np.testing.assert_array_equal(one[name].dequantize(), other[name].dequantize())


# What is refused --------------------------------------------------------------------------------


def test_folders_that_are_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    make_mxfp4(folder)
    change_config(folder, quantization_config={"quant_method": "gptq"})
    assert fails(FallowError, lambda: fallow.load(folder)) == (
        f"{folder}/config.json: quantization_config is {{'quant_method': 'gptq'}}, which is not "
        "computed for gpt_oss models; give the model that was quantised"
    )
    change_config(folder, quantization_config=None)
    assert "lacks the tensors" in fails(FallowError, lambda: fallow.load(folder))
    change_config(folder, quantization_config={"quant_method": "mxfp4"}, experts_per_token=2)
    assert "experts_per_token is 2, which is not computed" in (
        fails(FallowError, lambda: fallow.load(folder))
    )
    change_config(folder, experts_per_token=3)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.experts.gate_up_proj_scales")
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    fails(FallowError, lambda: fallow.load(folder))


def test_gguf_of_biases_that_others_do_not_have(tmp_path: Path) -> None:
    model = fallow.load(make_folder("qwen3_moe", tmp_path / "m"))
    add = {"blk.0.ffn_up_exps.bias": np.zeros((7, 19), np.float32)}
    path = write_gguf("qwen3_moe", model, tmp_path / "m.gguf", add=add)
    assert "unexpected ['model.layers.0.mlp.experts.gate_up_proj_bias']" in (
        fails(FallowError, lambda: fallow.load(path))
    )


def test_packed_files_with_other_numbers(tmp_path: Path) -> None:
    folder = make_folder("gpt_oss", tmp_path / "m")
    pack(folder, tmp_path / "m.gguf", quant="f32")
    content = (tmp_path / "m.gguf").read_bytes()
    for key, value, said in (
        (b"fallow.swiglu_alpha", 0.0, "for experts, with a fallow.swiglu_alpha above 0"),
        (b"fallow.swiglu_limit", np.nan, "fallow.swiglu_limit must be a finite number >= 0"),
    ):
        at = content.index(key) + len(key) + 4
        changed = content[:at] + np.float32(value).tobytes() + content[at + 4 :]
        (tmp_path / "changed.gguf").write_bytes(changed)
        assert said in fails(FallowError, lambda: Engine(tmp_path / "changed.gguf"))
    changed = content.replace(b"layers.0.sinks", b"layers.0.sinkx")
    (tmp_path / "changed.gguf").write_bytes(changed)
    found = Engine(tmp_path / "changed.gguf").logits(IDS)  # which are an option
    assert np.abs(found - Engine(tmp_path / "m.gguf").logits(IDS)).max() > ERROR


# Tokens -----------------------------------------------------------------------------------------


def harmony(*more: str) -> Any:
    tokens = ["a", "b", "<|return|>", "<|end|>", *more]
    kinds = [1, 1] + [3] * (len(tokens) - 2)
    return tokenizer_from_gguf(
        gguf_file(
            **{
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "gpt-4o",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": kinds,
                "tokenizer.ggml.merges": [],
                "tokenizer.ggml.bos_token_id": 0,
                "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.unknown_token_id": 1,
            }
        )
    )


def test_an_answer_does_not_end_where_thinking_does() -> None:
    """Of OpenAI's format, as in llama.cpp; <|end|> alone is other models' end."""
    assert harmony("<|call|>").eos_ids == (2, 4)
    assert harmony().eos_ids == (2, 3)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("HelloWorld", ["Hello", "World"]),
        ("HTTPServer's", ["HTTPServer's"]),
        ("in 12345 days", ["in", " ", "123", "45", " days"]),
        ("a/b//\nc", ["a", "/b", "//\n", "c"]),
        ("it'LL  be", ["it'LL", " ", " be"]),
    ],
)
def test_how_text_is_cut(text: str, pieces: list[str]) -> None:
    found = harmony().backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == pieces
