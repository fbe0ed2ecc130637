"""Architectures, one file each. To add one, add a file with an `ARCHITECTURE`."""

from importlib import import_module
from pkgutil import iter_modules

from fallow.common.errors import FallowError
from fallow.models._activations import (
    REPLACEMENTS,
    FatRelu,
    Rectified,
    activate,
    activation_key,
    replace_activation,
    told,
)
from fallow.models._base import Architecture, has_part
from fallow.models._by_names import by_names, check_logits, check_names
from fallow.models._keys import check_config, check_gguf_keys, check_gguf_type, check_wrapper
from fallow.models._rope import ROPE_TENSORS
from fallow.models._wrappers import TEXT_NAMES, text_config, text_name

_OTHERS = ("capture", "cuts", "devices", "taps")  # that look into models of any architecture
ARCHITECTURES = tuple(
    sorted(m.name for m in iter_modules(__path__) if m.name[0] != "_" and m.name not in _OTHERS)
)


def architectures() -> list[Architecture]:
    return [import_module(f"fallow.models.{name}").ARCHITECTURE for name in ARCHITECTURES]


def by_model_type(model_type: str, where: str) -> Architecture:
    """The architecture of a config.json's model_type, its own file's or one found by names.

    Raises:
        FallowError: there is neither; the known ones are named.
    """
    found = {a.model_type: a for a in architectures()}
    if model_type not in found and (other := by_names(model_type)) is not None:
        return other
    return _pick(found, model_type, where)


def by_gguf_name(name: str, where: str, has_experts: bool = False) -> Architecture:
    """The architecture of a GGUF's general.architecture. Raises FallowError likewise.

    Some have the same name with experts and without.
    """
    known = sorted(architectures(), key=lambda a: (a.experts is not None) == has_experts)
    if any(a.gguf_name == name and a.gguf_config is None for a in known):
        raise FallowError(
            f"{where} is of the architecture {name}, of which only Hugging Face folders are read; "
            "give the model as one"
        )
    return _pick({a.gguf_name: a for a in known if a.gguf_name and a.gguf_config}, name, where)


def _pick(found: dict[str, Architecture], name: str, where: str) -> Architecture:
    if not isinstance(name, str) or name not in found:  # metadata may be of any type
        raise FallowError(
            f"unknown architecture {name!r} in {where}; known: {', '.join(sorted(found))}"
        )
    return found[name]


__all__ = [
    "ARCHITECTURES",
    "REPLACEMENTS",
    "ROPE_TENSORS",
    "TEXT_NAMES",
    "Architecture",
    "FatRelu",
    "Rectified",
    "activate",
    "activation_key",
    "architectures",
    "by_gguf_name",
    "by_model_type",
    "check_config",
    "check_gguf_keys",
    "check_gguf_type",
    "check_logits",
    "check_names",
    "check_wrapper",
    "has_part",
    "replace_activation",
    "text_config",
    "text_name",
    "told",
]
