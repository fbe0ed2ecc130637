"""Packed files: what they are known by, and their tokenizer."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fallow.checkpoints.catalog import ALIASES, is_hub_id
from fallow.checkpoints.text import Text, cut_windows
from fallow.checkpoints.tokenizer import TextTokenizer, note_endless, tokenizer_from_json, usable
from fallow.checkpoints.weights import GgufFile, read_gguf
from fallow.common.errors import FallowError
from fallow.common.files import parse_json
from fallow.engine.process import return_freed_memory

PACKED_VERSION = 5  # that pack writes
RUNNING_VERSIONS = (2, 3, 4, 5)


def is_packed(path: str | Path) -> bool:
    """Whether a file is a GGUF that `fallow pack` made; False for anything else."""
    path = Path(path)
    if not path.is_file() or path.suffix == ".plan":
        return False
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return False
    return "fallow.version" in read_gguf(path).metadata


def packed_windows(
    path: str | Path, text: Text, context: int, limit: int | None = None
) -> np.ndarray:
    """As `Engine.windows`, for a text that is cut before an engine takes the memory."""
    return cut_windows(text, packed_tokenizer(read_gguf(path)), context, limit)


def refuse_unpacked(path: Path) -> None:
    """Raises FallowError for the name of a model that is still to be packed."""
    name = str(path)
    is_named = name in ALIASES or is_hub_id(name)
    if os.path.isdir(path) or (is_named and not os.path.exists(path)):
        raise FallowError(
            f"{name} is not a packed model; make one with: fallow pack {name} -o packed.gguf"
        )


def packed_tokenizer(file: GgufFile) -> TextTokenizer:
    try:
        with usable(f"the tokenizer of packed model {file.path}"):
            backend = tokenizer_from_json(file.get("tokenizer.huggingface.json"))
            found = TextTokenizer(
                backend,
                bos_id=file.get("tokenizer.ggml.bos_token_id", None),
                eos_ids=tuple(file.numbers("fallow.eos_token_ids", ())),
                add_bos=bool(file.get("tokenizer.ggml.add_bos_token", False)),
                chat_template=file.get("tokenizer.chat_template", None),
                special_tokens=_special_tokens(file, backend),
            )
    finally:
        return_freed_memory()
    note_endless(found, str(file.path))
    return found


def _special_tokens(file: GgufFile, backend: Any) -> dict[str, str]:
    key = "fallow.special_tokens"
    if key in file.metadata:
        return dict(parse_json(file.get(key)))
    # What files have that were packed before that key.
    ids = {"bos_token": file.get("tokenizer.ggml.bos_token_id", None)}
    ids["eos_token"] = next(iter(file.numbers("fallow.eos_token_ids", ())), None)
    return {name: backend.id_to_token(i) or "" for name, i in ids.items() if i is not None}
