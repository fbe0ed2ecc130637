"""What a machine is, as far as it decides how fast fallow runs on it."""

import fcntl
import mmap
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import numpy as np

import fallow
from fallow import _core
from fallow.checkpoints.catalog import ALIASES, find_pieces
from fallow.common.errors import UsageError
from fallow.common.procfs import CGROUPS, PROC, cpu_quota, read_text, usable_cores
from fallow.engine.process import memory

# What each table of kernels needs of a processor, as /proc/cpuinfo names it; best first. The core
# asks the processor itself, so that this only explains what it chose.
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
_NEEDS = {
    "x86_64": {
        "avx512_bf16": (*_AVX512, "avx512_bf16"),
        "avx512": _AVX512,
        "avx2": ("avx2", "fma", "f16c"),
        "portable": (),
    },
    "aarch64": {"neon_dotprod": ("asimddp",), "neon": (), "portable": ()},
}
_SECONDS = 0.4  # of a measurement
_LEAST_RUNS = 3
_MEMORY_BYTES = 1 << 27  # beyond the caches that one core reaches
_DISK_BYTES = 1 << 27
_PIECE, _READERS = 1 << 20, 4  # as csrc/engine/disk.cpp reads
_LITTLE_MEMORY = 1_000_000_000
_IN_MEMORY = ("tmpfs", "ramfs")  # file systems


def examine(folder: str | Path = ".") -> dict[str, Any]:
    """Everything that `fallow doctor --json` prints; takes about two seconds.

    Args:
        folder: whose disk is timed, by a file of 134 MB that has no name and is gone afterwards.

    Raises:
        UsageError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--folder {folder} is no folder; give the one that models are in")
    found: dict[str, Any] = {
        "fallow": fallow.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "cores": cores(),
        "memory": memory(),
        "bandwidth_gbps": bandwidth(usable_cores()),
        "disk": disk(folder),
        "numpy": {"version": np.__version__, "blas": blas()},
        "extras": extras(),
        "torch": torch_threads(),
        "models": {alias.name: find_pieces(alias) is not None for alias in ALIASES.values()},
    }
    return found | {"warnings": warnings(found)}


def processor(proc: Path = PROC) -> dict[str, Any]:
    """Name and architecture, the kernels that run here, and what the better ones lack."""
    text = read_text(proc / "cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    needs = _NEEDS.get(platform.machine(), {})
    chosen = _core.KERNELS[0]
    missing = {}
    for kernels, wanted in needs.items():
        if kernels == chosen:
            break
        missing[kernels] = [feature for feature in wanted if feature not in has]
    return {
        "name": name[1].strip() if name else platform.machine(),
        "architecture": platform.machine(),
        "features": sorted(has & {f for wanted in needs.values() for f in wanted}),
        "kernels": chosen,
        "usable_kernels": list(_core.KERNELS),
        "better_kernels_lack": missing,
    }


def cores(proc: Path = PROC, cgroups: Path = CGROUPS) -> dict[str, Any]:
    """Cores of the machine, by affinity and by a cgroup's quota (None: no quota), and the load."""
    return {
        "machine": os.cpu_count() or 1,
        "affinity": usable_cores(),
        "cgroup": cpu_quota(proc, cgroups),
        "load": os.getloadavg()[0],
    }


def bandwidth(threads: int) -> dict[str, float]:
    """At which one thread, and `threads`, read memory: 1e9 bytes per second, medians."""

    def measure(n: int) -> float:
        return _median(lambda: _core.read_bandwidth(_MEMORY_BYTES, n) / 1e9)

    return {"one_thread": measure(1), "all_threads": measure(threads), "threads": threads}


def disk(folder: Path) -> dict[str, Any]:
    """At which a file in the folder is read, past the cache: 1e9 bytes per second; or why not."""
    found: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "filesystem": filesystem(folder),
        "gbps": None,
        "error": None,
    }
    try:
        # A file without a name: it goes with the process, however that ends.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            block = os.urandom(_PIECE)
            for _ in range(_DISK_BYTES // _PIECE):
                file.write(block)
            os.fsync(file.fileno())
            found["gbps"] = _read_speed(file.fileno())
    except OSError as error:
        found["error"] = error.strerror or str(error)
    return found


def filesystem(folder: Path, proc: Path = PROC) -> str | None:
    """The type of file system that a folder is on, such as ext4; None: not known."""
    device = folder.stat().st_dev
    number = re.escape(f"{os.major(device)}:{os.minor(device)}")
    mounts = read_text(proc / "self" / "mountinfo")
    found = re.search(rf"^\d+ \d+ {number} .* - (\S+) ", mounts, re.MULTILINE)
    return found[1] if found else None


def _read_speed(file: int) -> float:
    """Raises OSError where a file system cannot read past its cache."""
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
    pieces = range(0, _DISK_BYTES, _PIECE)

    def read(reader: int) -> None:
        with mmap.mmap(-1, _PIECE) as buffer:  # at the start of a page, as direct reads ask for
            for offset in pieces[reader::_READERS]:
                if os.preadv(file, [buffer], offset) != _PIECE:
                    raise OSError("a part of the file was not read")

    with ThreadPoolExecutor(_READERS) as pool:

        def once() -> float:
            start = time.perf_counter()
            list(pool.map(read, range(_READERS)))
            return _DISK_BYTES / (time.perf_counter() - start) / 1e9

        return _median(once)


def _median(measure: Callable[[], float]) -> float:
    """The median of at least _LEAST_RUNS measurements, and of more for about _SECONDS."""
    values: list[float] = []
    start = time.perf_counter()
    while len(values) < _LEAST_RUNS or time.perf_counter() - start < _SECONDS:
        values.append(measure())
    return statistics.median(values)


def blas() -> str | None:
    """What numpy multiplies matrices with; None: plain loops."""
    found = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    return str(found["name"]) if found.get("found") else None


def extras() -> dict[str, dict[str, str | None]]:
    """Per extra its packages, and which version of them is installed; None: it is not.

    None at all where fallow itself is not installed: its metadata name them.
    """
    found: dict[str, dict[str, str | None]] = {}
    for requirement in _requirements():
        parts = re.fullmatch(r"([\w.-]+).*;.*extra == [\"']([\w-]+)[\"'].*", requirement)
        if parts:
            found.setdefault(parts[2], {})[parts[1]] = _installed(parts[1])
    return found


def _requirements() -> list[str]:
    try:
        return metadata("fallow").get_all("Requires-Dist") or []
    except PackageNotFoundError:
        return []


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torch_threads() -> int | None:
    """How many threads torch takes; None: there is no torch."""
    if _installed("torch") is None:
        return None
    import torch

    return torch.get_num_threads()


def warnings(found: dict[str, Any]) -> list[str]:
    """What of `examine`'s findings makes fallow slower, or its timings less sure."""
    cpu, count, ram = found["processor"], found["cores"], found["memory"]
    said: list[str] = []
    if not found["extras"]:
        said.append(
            "fallow is not installed, so that neither its version nor its extras are known; in the "
            "folder of its sources: pip install ."
        )
    if cpu["kernels"] == "portable":
        lacking = list(cpu["better_kernels_lack"].values())
        why = f"; for better ones it lacks {', '.join(lacking[-1])}" if lacking else ""
        said.append(f"only the portable kernels, which are slow, run on this processor{why}")
    if count["load"] > count["machine"] / 2:
        said.append(
            f"other processes are at work (load {count['load']:.1f} on {count['machine']} cores): "
            "what is measured now is too slow"
        )
    usable = min(ram["available"], ram["cgroup"] or ram["available"])
    if usable < _LITTLE_MEMORY:
        said.append(
            f"{usable / 1e6:.0f} MB of memory are left; --memory runs models that do not fit"
        )
    if ram["swap_used"]:
        said.append(f"{ram['swap_used'] / 1e6:.0f} MB are swapped out; timings vary with that")
    if found["disk"]["error"]:
        said.append(
            f"the disk of {found['disk']['folder']} was not timed: {found['disk']['error']}; "
            "--memory wants a folder on a disk"
        )
    if found["disk"]["filesystem"] in _IN_MEMORY:
        said.append(
            f"{found['disk']['folder']} is in memory ({found['disk']['filesystem']}), not on a "
            "disk: packed models belong elsewhere if memory is short"
        )
    if found["numpy"]["blas"] is None:
        said.append("numpy was built without a BLAS library: products of matrices are slow")
    if found["torch"] is not None and found["torch"] < count["affinity"]:
        said.append(
            f"torch takes {found['torch']} of {count['affinity']} cores; see OMP_NUM_THREADS"
        )
    return said
