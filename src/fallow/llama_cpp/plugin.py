"""Builds the plugin for one version of llama.cpp, and finds it again.

ggml's structures change between releases under one version of its interface, so that a plugin is
built with the headers of the very library that loads it.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fallow
from fallow.checkpoints.catalog import cache_folder
from fallow.common.errors import FallowError
from fallow.common.files import atomic_path
from fallow.common.progress import console

PACKAGE = "llama-cpp-python"
LIBRARY = "libggml-fallow.so"
CORE = Path(__file__).parent / "core"  # what CMakeLists.txt installs: headers, a library


@dataclass(frozen=True)
class Target:
    """A llama.cpp to build for. `folder`: its checkout, or None for what pip has installed."""

    name: str
    libraries: Path
    folder: Path | None = None


def installed() -> Target:
    """Raises FallowError if llama-cpp-python is not."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise FallowError(f"{PACKAGE} is not installed; install it with: pip install {PACKAGE}")
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise FallowError(
            f"the version of llama_cpp in {Path(spec.origin).parent} is not known, as it was not "
            f"installed; install it with: pip install {PACKAGE}"
        ) from error
    return Target(f"{PACKAGE} {version}", Path(spec.origin).parent / "lib")


def checkout(folder: Path) -> Target:
    """A folder of llama.cpp, or of llama-cpp-python's source, that was built there."""
    if not folder.is_dir():
        raise FallowError(f"--llama-cpp {folder} is no folder")
    found = sorted(folder.rglob("libggml-base.so*"))
    if not found:
        raise FallowError(
            f"{folder} has no libggml-base.so: build llama.cpp there first, with "
            "-DBUILD_SHARED_LIBS=ON (static builds cannot load plugins)"
        )
    return Target(f"llama.cpp in {folder}", found[0].parent, folder.resolve())


def target_of(folder: Path | None) -> Target:
    return installed() if folder is None else checkout(folder)


def place(target: Target) -> Path:
    """Where the plugin for it lies, if it was built."""
    name = re.sub(r"\W+", "-", f"{target.name} fallow {fallow.__version__}").strip("-")
    if target.folder is not None:
        name += "-" + hashlib.sha256(str(target.folder).encode()).hexdigest()[:8]
    return cache_folder() / "llama" / name / LIBRARY


def built(target: Target) -> Path:
    """Raises FallowError if it was not."""
    path = place(target)
    if not path.is_file():
        option = f" --llama-cpp {target.folder}" if target.folder else ""
        raise FallowError(
            f"there is no plugin for {target.name} yet; build it once, with: "
            f"fallow llama build{option}"
        )
    return path


def build(target: Target, headers: Path | None = None) -> Path:
    """Compiles the plugin; g++ 11 or newer, with OpenMP, must be there. CXXFLAGS are heeded.

    Args:
        headers: the unpacked source of the installed llama-cpp-python; None: it is fetched.

    Raises:
        FallowError: no compiler, no headers, or they are of a version that the plugin is not for.
    """
    if sys.platform != "linux":
        raise FallowError("the plugin is for Linux only so far")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FallowError("no C++ compiler found; install g++ (apt install g++)")
    base = next(iter(sorted(target.libraries.glob("libggml-base.so*"))), None)
    if base is None:
        raise FallowError(
            f"{target.name} has no libggml-base.so in {target.libraries}: a static build, which "
            "cannot load plugins"
        )
    with tempfile.TemporaryDirectory() as scratch:
        ggml = _headers(target.folder or headers or _fetch(target, Path(scratch)))
        path = place(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            command = [
                compiler, "-std=c++20", "-O3", "-fPIC", "-shared", "-fvisibility=hidden",
                "-fopenmp", *shlex.split(os.environ.get("CXXFLAGS", "")),
                f'-DFALLOW_GGML_VERSION="{_identity(base, ggml)}"',
                f"-I{CORE / 'include'}", f"-I{ggml / 'include'}", f"-I{ggml / 'src'}",
                str(CORE / "plugin.cpp"), str(CORE / "libfallow_kernels.a"),
                "-Wl,--exclude-libs,ALL", str(base), "-o", str(temporary),
            ]  # fmt: skip
            console.print(f"building for {target.name}", highlight=False)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if "error" in line]
                raise FallowError(
                    f"the plugin does not compile with the headers of {target.name}, whose "
                    f"interface may have changed: {(errors or ['no message'])[0]}"
                )
    return path


def _headers(folder: Path) -> Path:
    """The folder `ggml` in sources of llama.cpp or of llama-cpp-python."""
    for inside in ("ggml", "vendor/llama.cpp/ggml"):
        if (folder / inside / "src" / "ggml-backend-impl.h").is_file():
            return folder / inside
    raise FallowError(f"{folder} has no ggml/src/ggml-backend-impl.h; give llama.cpp's own folder")


def _fetch(target: Target, scratch: Path) -> Path:
    """The source that the installed library was built from, headers alone."""
    version = target.name.split()[-1]
    console.print(f"fetching the source of {target.name}, for its headers", highlight=False)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
        "--dest", str(scratch), f"{PACKAGE}=={version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(scratch.glob("*.tar.gz"))
    if done.returncode or not archives:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise FallowError(
            f"cannot fetch the source of {target.name} ({said[-1]}); unpack it yourself, then: "
            "fallow llama build --headers DIR"
        )
    needed = re.compile(r"/ggml/(include/.*\.h|src/ggml-[^/]*\.h|CMakeLists\.txt)$")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(scratch, [m for m in archive if needed.search(m.name)], filter="data")
    return next(folder for folder in scratch.iterdir() if folder.is_dir())


def _identity(base: Path, ggml: Path) -> str:
    """Version and commit of a library, which its headers must be of.

    Raises:
        FallowError: they are not.
    """
    library = ctypes.CDLL(str(base))
    for name in ("ggml_version", "ggml_commit"):
        getattr(library, name).restype = ctypes.c_char_p
    version = library.ggml_version().decode()
    text = (ggml / "CMakeLists.txt").read_text()
    found = dict(re.findall(r"set\(GGML_VERSION_(MAJOR|MINOR|PATCH)\s+(\d+)\)", text))
    headers = ".".join(found.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
    if not version.startswith(headers):
        raise FallowError(
            f"{ggml} is of ggml {headers}, but the library {base} is {version}; give its own source"
        )
    return f"{version} {library.ggml_commit().decode()}"
