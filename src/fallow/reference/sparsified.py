"""A plan applied to a transformers model that stays one: for torch users and other tools.

The folder that `save_sparse` writes is a Hugging Face model with one more file, `fallow.plan`
(docs/plan.md); anything that ignores that file sees the dense model, but for models with FATReLU or
dReLU, whose activation transformers does not know.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from fallow.checkpoints.tokenizer import TextTokenizer
from fallow.checkpoints.weights import StoredTensor, fingerprint, read_safetensors
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import atomic_folder, write_json
from fallow.models import by_model_type
from fallow.models._base import Architecture
from fallow.models.cuts import cut_taps
from fallow.models.devices import as_array
from fallow.models.taps import Layer, Tap, attach
from fallow.plan import Plan
from fallow.reference.model import Model, inspect_folder, pretrained, quieten_transformers

PLAN_FILE = "fallow.plan"
_STATE = "_fallow_sparse"  # attribute of the module: plan, and what removes the hooks
# The types that a checkpoint may have had before it was loaded as another.
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Beside weights and config, what another program needs of a model's folder.
_COMPANIONS = ("*token*", "vocab*", "merges.txt", "chat_template*", "generation_config.json")


def sparsify(model: Any, plan: Plan | str | Path) -> Any:
    """Sets a model's neurons to zero as a plan says, in every forward from now on.

    Values are computed and set to zero, by hooks: nothing is patched, and nothing is faster. On
    CPU, for inference.

    Args:
        model: a transformers model of a known architecture, or what `fallow.load` gave.
        plan: a plan for that model, or its file.

    Returns:
        The transformers model. It can be made dense again with `densify`.

    Raises:
        FallowError: the plan is for another model or the model is sparse already.
        UsageError: this is no such model.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    module = model.module if isinstance(model, Model) else model
    if getattr(module, _STATE, None) is not None:
        raise FallowError("the model is sparse already; make it dense with fallow.densify first")
    layers, taps = _taps_of(model, plan)
    hooks = ExitStack()
    hooks.enter_context(attach(layers, taps))
    setattr(module, _STATE, (plan, hooks))
    return module


def densify(module: Any) -> Any:
    """Undoes `sparsify`; nothing happens to a model that is not sparse."""
    state = getattr(module, _STATE, None)
    if state is not None:
        state[1].close()
        setattr(module, _STATE, None)
    return module


def save_sparse(module: Any, folder: str | Path, tokenizer: TextTokenizer | None = None) -> None:
    """Writes a sparse model as a Hugging Face folder, whole or not at all.

    Args:
        folder: must not be there, or be empty.
        tokenizer: also written, if given.

    Raises:
        FallowError: the model is not sparse, or the folder is there or cannot be written.
    """
    state = getattr(module, _STATE, None)
    if state is None:
        raise FallowError("this model is not sparse; apply a plan with fallow.sparsify first")
    with atomic_folder(folder) as made:
        module.save_pretrained(made)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, made)
        _save_plan(state[0], made)


def load_sparse(folder: str | Path, dtype: str = "auto") -> Any:
    """The transformers model of a folder that `save_sparse` wrote, sparse; `dtype` as in torch.

    Raises:
        FallowError: the folder has no plan, or transformers cannot load it.
    """
    folder = Path(folder)
    plan = Plan.load(folder / PLAN_FILE)
    quieten_transformers()
    architecture, _ = inspect_folder(folder)
    return sparsify(pretrained(folder, architecture, dtype).eval(), plan)


def export(model: Model, plan: Plan, folder: str | Path, source: Path | None = None) -> None:
    """Writes a loaded model with its plan; `source` is the Hugging Face folder it came from.

    Raises:
        FallowError: as `sparsify` and `save_sparse`.
    """
    module = sparsify(model, plan)
    try:
        if source is None or not source.is_dir():
            save_sparse(module, folder, model.tokenizer)
            return
        with atomic_folder(folder) as made:
            module.save_pretrained(made)
            for pattern in _COMPANIONS:
                for path in source.glob(pattern):
                    shutil.copyfile(path, made / path.name)
            _save_plan(plan, made)
    finally:
        densify(module)


def _taps_of(model: Any, plan: Plan) -> tuple[list[Layer], dict[str, Tap]]:
    if isinstance(model, Model):
        return model.layers, model.taps(plan)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, torch.nn.Module) or model_type is None:
        raise UsageError(f"{type(model).__name__} is no transformers model")
    name = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
    architecture = by_model_type(model_type, name)
    if architecture.experts is not None:  # files have the weights under other names
        raise UsageError(f"{name} is a mixture of experts; give what fallow.load makes of it")
    check_fingerprint(model, architecture, plan, name)
    layers = architecture.find_layers(model)
    return layers, cut_taps(plan.cuts, layers, name)


def check_fingerprint(module: Any, architecture: Architecture, plan: Plan, name: str) -> None:
    """Raises FallowError if a plan is for another model; `name` is this one's in the error."""
    if not any(mark == plan.fingerprint for mark in _fingerprints(module, architecture.stored_as)):
        raise FallowError(
            f"this plan is for {plan.model} (fingerprint {plan.fingerprint}), not for {name}; "
            "calibrate a plan for it, or give what fallow.load makes of the plan's own source"
        )


def _fingerprints(module: Any, names: dict[str, str]) -> Iterator[str]:
    """Fingerprints of the weights as they are, and in the types they may have been stored in.

    `names`: those that parameters have in files, where they are others.
    """
    own = next(module.parameters()).dtype
    kinds = sorted(_TYPES, key=lambda kind: _TYPES[kind] is not own)
    in_files = module.state_dict().keys()
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    tensors |= {name: b for name, b in module.named_buffers() if name in in_files}  # Gemma 4's
    for kind in kinds:
        stored = {names.get(name, name): p for name, p in tensors.items()}
        yield fingerprint({name: _stored(name, kind, p) for name, p in stored.items()})


def _stored(name: str, kind: str, parameter: torch.Tensor) -> StoredTensor:
    values = parameter.detach().to(_TYPES[kind]).contiguous().view(torch.uint8)
    return StoredTensor(name, tuple(parameter.shape), kind, as_array(values).reshape(-1))


def _save_plan(plan: Plan, folder: Path) -> None:
    """With the fingerprint of the weights that lie beside it."""
    mark = fingerprint({t.name: t for t in read_safetensors(folder)})
    dataclasses.replace(plan, fingerprint=mark).save(folder / PLAN_FILE)


def _save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """With the BOS that the model wants, and its end tokens."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        bos = backend.id_to_token(tokenizer.bos_id)
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": list(tokenizer.eos_ids)})
