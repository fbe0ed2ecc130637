"""safetensors files that say in one JSON object of their metadata what their arrays are."""

import json
from dataclasses import Field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fallow.common.errors import FallowError, in_one_line
from fallow.common.files import atomic_path, fits, parse_json


def to_bytes(key: str, metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    """A file's content, with `metadata` under a key."""
    # safetensors writes the memory of an array as it lies, whatever its strides say.
    stored = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return save_arrays(stored, metadata={key: json.dumps(metadata, allow_nan=False)})


def write(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all. Raises FallowError if it cannot be written."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def from_bytes(
    content: bytes, key: str, where: str, kind: str, remedies: tuple[str, str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and arrays of a file's content.

    Args:
        kind: "plan", say; `where` names the file in errors.
        remedies: what to do about a damaged file, and about one of another kind.

    Raises:
        FallowError: truncated, no safetensors file, or none with that key.
    """
    try:
        arrays = load_arrays(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # a type numpy lacks
        raise FallowError(
            f"{kind} {where} is truncated or no safetensors file ({in_one_line(error)}); "
            f"{remedies[0]}"
        ) from error
    text = (header.get("__metadata__") or {}).get(key)
    if text is None:
        raise FallowError(f"{where} is a safetensors file but no {kind}; {remedies[1]}")
    try:
        return dict(parse_json(text)), arrays
    except (ValueError, TypeError) as error:
        raise FallowError(f"{kind} {where} has damaged metadata; {remedies[0]}") from error


def check_fields(
    metadata: dict[str, Any], known: tuple[Field[Any], ...], needed: set[str]
) -> dict[str, Any]:
    """What of the metadata is a value of one of these fields.

    Raises:
        ValueError: a field that is needed is missing, or has a value of another type.
    """
    missing = needed - metadata.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    values = {f.name: metadata[f.name] for f in known if f.name in metadata}
    for f in known:
        if f.name in values and not fits(values[f.name], f.type):
            raise ValueError(f"{f.name} cannot be {in_one_line(values[f.name])}")
    return values


def take_sketch(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Takes a `Text.sketch`, (n,) uint64, out of a file's arrays; empty if there is none.

    Raises:
        ValueError: another array has its name.
    """
    sketch = arrays.pop(name, np.empty(0, dtype=np.uint64))
    if sketch.dtype != np.uint64 or sketch.ndim != 1:
        raise ValueError(f"array {name} is damaged")
    return sketch
