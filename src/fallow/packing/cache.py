"""Packed copies of models that commands run by name: each is made once, and kept."""

import hashlib
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fallow.checkpoints.catalog import cache_folder, find_model
from fallow.checkpoints.weights import fingerprint, read_gguf, read_safetensors
from fallow.common.errors import FallowError
from fallow.common.progress import note
from fallow.engine.packed import PACKED_VERSION, is_packed

# What of a Hugging Face folder, beside its weights, a packed file depends on.
_SETTINGS = (".json", ".jinja", ".model", ".txt")


class Entry(NamedTuple):
    """A file of the cache."""

    name: str
    path: Path
    size: int  # bytes
    last_used: float  # seconds since 1970


def short_name(model: str) -> str:
    """What a model is called where its folder does not matter: the last part, without .gguf."""
    return Path(os.path.abspath(model)).name.removesuffix(".gguf")


def packed_copy(model: str, quant: str | None = None) -> Path:
    """The file that the engine runs for any model: its own if it is packed, else its packed copy.

    The copy is made unless the cache has one of the same source, `quant` and packed format. It is
    made in a process of its own, since torch and the source's weights would stay in this one.

    Raises:
        FallowError: there is no such model, or `quant` is given for one that is packed.
        SystemExit: it cannot be packed; why is on stderr by then.
    """
    source = find_model(model)
    if is_packed(source):
        if quant is not None:
            raise FallowError(f"--quant is for models that are not packed; {source} is")
        return source
    path = cache_folder() / f"{_entry_name(model, source, quant)}.gguf"
    if _is_whole(path):
        os.utime(path)  # when it was last used
        return path
    note(f"packing {model} once into {path}")
    _pack(model, path, quant)
    return path


def _entry_name(model: str, source: Path, quant: str | None) -> str:
    """A model's name, and what tells its copies apart: 12 hex digits."""
    digest = hashlib.sha256(f"{quant or ''}\n".encode())
    if source.is_dir():
        digest.update(fingerprint({t.name: t for t in read_safetensors(source)}).encode())
        for path in sorted(p for p in source.iterdir() if p.suffix in _SETTINGS):
            digest.update(path.name.encode() + path.read_bytes())
    else:
        file = read_gguf(source)
        digest.update(fingerprint(file.tensors).encode())
        # Up to the first tensor: the tokenizer, the chat template and all other settings.
        digest.update(file.mappings[0].data[: file.header_bytes].tobytes())
    name = re.sub(r"[^\w.-]", "_", short_name(model))
    return f"{name}-{digest.hexdigest()[:12]}"


def _is_whole(path: Path) -> bool:
    """Whether it is there, can be read, and has the format that is written now."""
    with suppress(FallowError):
        found = read_gguf(path).metadata.get("fallow.version") if path.is_file() else None
        return isinstance(found, int) and found == PACKED_VERSION
    return False


def _pack(model: str, path: Path, quant: str | None) -> None:
    # As JSON it suggests no next command, which is under way.
    command = [sys.executable, "-m", "fallow", "pack", model, "--output", str(path), "--json"]
    if quant is not None:
        command += ["--quant", quant]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        try:
            code = child.wait()
        except BaseException:  # Ctrl-C, which reached it too, or SIGTERM, which did not
            child.terminate()
            raise
    if code:
        raise SystemExit(code)


def entries() -> list[Entry]:
    """What the cache holds, the last used first."""
    found = [entry for entry in _files() if not entry.name.startswith(".")]
    return sorted(found, key=lambda entry: -entry.last_used)


def clear(name: str | None = None) -> list[Entry]:
    """Deletes everything, or the files of a name: an entry's, or a model's. Returns what is gone.

    Raises:
        FallowError: there is none of that name, or a file cannot be deleted.
    """
    if name is None:
        # Of hidden ones only those that a process which was killed has left behind.
        yesterday = time.time() - 86400
        found = [e for e in _files() if not e.name.startswith(".") or e.last_used < yesterday]
    else:
        of_model = re.compile(rf"{re.escape(short_name(name))}(-[0-9a-f]{{12}})?")
        found = [entry for entry in entries() if of_model.fullmatch(entry.name)]
        if not found:
            raise FallowError(f"the cache has no {name}; see: fallow cache list")
    for entry in found:
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise FallowError(f"cannot delete {entry.path}: {error.strerror}") from error
    return found


def _files() -> list[Entry]:
    """Those that are being written, whose names begin with a dot, among them."""
    found = []
    for path in cache_folder().glob("*.gguf"):
        facts = path.stat()
        found.append(Entry(path.stem, path, facts.st_size, facts.st_mtime))
    return found
