"""LoRA adapters are merged as their formula says, and what they are not is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import fallow
from conftest import VOCABULARY
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.packing.packer import pack
from fallow.reference.lora import merge_lora
from fallow.reference.model import Model
from test_models import permute, write_gguf

RANK, ALPHA = 3, 6.0
MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 24),
    "model.layers.1.mlp.up_proj": (37, 24),
    "model.layers.1.mlp.down_proj": (24, 37),
}
IDS = np.random.default_rng(1).integers(2, VOCABULARY, 40)


def matrices() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        name: (
            rng.normal(size=(RANK, cols)).astype(np.float32),
            0.1 * rng.normal(size=(rows, RANK)).astype(np.float32),
        )
        for name, (rows, cols) in MODULES.items()
    }


def write_folder(folder: Path, more: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = dict(more or {})
    for name, (a, b) in matrices().items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_adapter(path: Path, architecture: str = "llama") -> Path:
    names = {"q_proj": "attn_q", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, (a, b) in matrices().items():
        _, _, layer, _, module = name.split(".")
        stem = f"blk.{layer}.{names[module]}.weight"
        writer.add_tensor(f"{stem}.lora_a", a)
        writer.add_tensor(f"{stem}.lora_b", permute(b, 4) if module == "q_proj" else b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(folder: Path, scale: float) -> Model:
    model = fallow.load(folder)
    parameters = dict(model.module.named_parameters())
    with torch.no_grad():
        for name, (a, b) in matrices().items():
            parameters[f"{name}.weight"] += scale * torch.from_numpy(b @ a)
    return model


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"alpha_pattern": {"q_proj|up_proj|down_proj": 9.0}}, 9.0 / RANK),
    ],
)
def test_a_peft_folder(
    settings: dict[str, Any], scale: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, expected = fallow.load(folders["llama"]), merged(folders["llama"], scale)
    before = model.fingerprint
    merge_lora(model, write_folder(tmp_path / "adapter", **settings))
    torch.testing.assert_close(model.hidden(IDS[None]), expected.hidden(IDS[None]))
    assert model.fingerprint != before
    assert model.changed == {f"{name}.weight" for name in MODULES}


def test_packed_with_an_adapter(
    folders: dict[str, Path], tiny: dict[str, Model], tmp_path: Path
) -> None:
    """From a folder and from a GGUF, with an adapter of either kind: one model."""
    with torch.inference_mode():
        module = merged(folders["llama"], ALPHA / RANK).module
        expected = module(torch.from_numpy(IDS)[None]).logits[0].numpy()
    source = write_gguf("llama", tiny["llama"], tmp_path / "m.gguf")
    for i, (model, adapter) in enumerate(
        [
            (folders["llama"], write_folder(tmp_path / "adapter")),
            (source, tmp_path / "adapter"),
            (source, write_adapter(tmp_path / "adapter.gguf")),
        ]
    ):
        packed = tmp_path / f"{i}.gguf"
        quant = "f32" if i == 0 else None
        pack(model, packed, quant=quant, down="f32", lora=adapter)
        np.testing.assert_allclose(Engine(packed).logits(IDS), expected, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "is of the kind IA3, not LORA"),
        ({"use_dora": True}, "has use_dora, which is not computed"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"bias": "all"}, "trains biases"),
    ],
)
def test_adapters_of_other_kinds(
    settings: dict[str, Any], reason: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = write_folder(tmp_path / "adapter", **settings)
    with pytest.raises(FallowError, match=reason):
        merge_lora(fallow.load(folders["llama"]), adapter)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("base_model.model.lm_head.lora_embedding_A", (3, 24), "lora_embedding_A, which is not"),
        ("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", (3, 24), "only one of the"),
    ],
)
def test_damaged_adapters(
    name: str, shape: tuple[int, int], reason: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    more = {name: np.zeros(shape, dtype=np.float32)}
    adapter = write_folder(tmp_path / "adapter", more)
    with pytest.raises(FallowError, match=reason):
        merge_lora(fallow.load(folders["llama"]), adapter)


def test_an_adapter_of_another_model(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = write_folder(tmp_path / "adapter")
    with pytest.raises(
        FallowError, match=r"changes model\.layers\.0\.self_attn\.q_proj\.weight of"
    ):
        merge_lora(fallow.load(folders["opt"]), adapter)
    other = write_adapter(tmp_path / "adapter.gguf", "qwen2")
    with pytest.raises(FallowError, match=r"is for qwen2 models, .* is llama"):
        merge_lora(fallow.load(folders["llama"]), other)
