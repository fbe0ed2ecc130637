"""LoRA adapters (arXiv:2106.09685): a PEFT folder or a GGUF, merged into a model's weights."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fallow.checkpoints.weights import (
    StoredTensor,
    fingerprint,
    read_gguf,
    read_safetensors_file,
)
from fallow.common.errors import FallowError
from fallow.common.files import read_json
from fallow.reference.model import Model

_REMEDY = "merge it with peft's merge_and_unload and give the merged folder"
# Settings that change what is added, beside those that are read.
_REFUSED = ("use_dora", "fan_in_fan_out", "modules_to_save", "use_qalora", "lora_bias")


class _Delta(NamedTuple):
    """What a parameter gains: scale * b a."""

    name: str
    a: np.ndarray  # (r, in)
    b: np.ndarray  # (out, r)
    scale: float


def merge_lora(model: Model, path: str | Path) -> None:
    """Adds an adapter to the weights of a model, which is another model from then on.

    Its fingerprint changes, and `model.changed` names the parameters.

    Raises:
        FallowError: no LoRA adapter, of another model, or of a kind that adds something else.
    """
    path = Path(path)
    is_folder = path.is_dir()
    stored, deltas = (_from_folder if is_folder else _from_gguf)(model, path)
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    for delta in deltas:
        parameter = parameters.get(delta.name)
        if parameter is None or tuple(parameter.shape) != (len(delta.b), delta.a.shape[1]):
            raise FallowError(
                f"adapter {path} changes {delta.name} of shape ({len(delta.b)}, "
                f"{delta.a.shape[1]}), which {model.name} does not have; give its own model"
            )
        with torch.no_grad():
            change = torch.from_numpy(delta.b) @ torch.from_numpy(delta.a)
            parameter += (delta.scale * change).to(parameter)
        model.changed.add(delta.name)
    if not model.changed:
        raise FallowError(f"adapter {path} has no LoRA weights")
    both = model.fingerprint + fingerprint(stored)
    model.fingerprint = hashlib.sha256(both.encode()).hexdigest()[:16]
    model.refresh_head()


def _from_folder(model: Model, folder: Path) -> tuple[dict[str, StoredTensor], list[_Delta]]:
    config = read_json(folder / "adapter_config.json", "download it again")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FallowError(f"adapter {folder} is of the kind {kind}, not LORA; {_REMEDY}")
    for key in _REFUSED:
        if config.get(key):
            raise FallowError(f"adapter {folder} has {key}, which is not computed; {_REMEDY}")
    if config.get("bias", "none") != "none":
        raise FallowError(f"adapter {folder} trains biases, which are not merged; {_REMEDY}")
    stored = {t.name: t for t in read_safetensors_file(folder / "adapter_model.safetensors")}
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in stored.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if found is None:
            raise FallowError(f"adapter {folder} has {name}, which is not computed; {_REMEDY}")
        pairs.setdefault(found[1], {})[found[2].lower()] = tensor.dequantize()
    return stored, [
        _delta(folder, f"{module}.weight", pair, _peft_scale(config, module, pair))
        for module, pair in sorted(pairs.items())
    ]


def _peft_scale(config: dict[str, Any], module: str, pair: dict[str, np.ndarray]) -> float:
    def of_module(patterns: Any, default: Any) -> float:
        # As peft: a key is a pattern that the module's name ends with, after a dot or whole.
        for pattern, value in (patterns or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(value)
        return float(default)

    alpha = of_module(config.get("alpha_pattern"), config.get("lora_alpha", 8))
    rank = pair["a"].shape[0] if "a" in pair else config.get("r", 8)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _from_gguf(model: Model, path: Path) -> tuple[dict[str, StoredTensor], list[_Delta]]:
    file, architecture = read_gguf(path), model.architecture
    kind = file.get("adapter.type", None)
    if file.get("general.type", None) != "adapter" or kind != "lora":
        raise FallowError(f"GGUF {path} is no LoRA adapter (its adapter.type is {kind})")
    if file.architecture != architecture.gguf_name:
        raise FallowError(
            f"adapter {path} is for {file.architecture} models, {model.name} is "
            f"{architecture.gguf_name or architecture.model_type}"
        )
    alpha = float(file.get("adapter.lora.alpha"))
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in file.tensors.items():
        stem, _, part = name.rpartition(".lora_")
        if part not in ("a", "b"):
            raise FallowError(f"adapter {path} has {name}, which is not computed; {_REMEDY}")
        pairs.setdefault(stem, {})[part] = tensor.dequantize()
    deltas: list[_Delta] = []
    for stem, pair in sorted(pairs.items()):
        if (changed := architecture.hf_name(stem)) is None:
            raise FallowError(
                f"adapter {path} changes {stem}, which {architecture.model_type} models do not have"
            )
        whole = _delta(path, changed, pair, alpha / pair["a"].shape[0] if "a" in pair else 1.0)
        # Rows are reordered and split as those of the matrix are.
        parts = architecture.from_gguf(changed, whole.b, model.module.config)
        deltas += [whole._replace(name=part, b=b) for part, b in parts.items()]
    return dict(file.tensors), deltas


def _delta(path: Path, name: str, pair: dict[str, np.ndarray], scale: float) -> _Delta:
    if set(pair) != {"a", "b"}:
        raise FallowError(f"adapter {path} has only one of the two matrices for {name}")
    a, b = pair["a"], pair["b"]
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
        raise FallowError(f"adapter {path}: the two matrices for {name} do not fit each other")
    return _Delta(name, a, np.ascontiguousarray(b), scale)
