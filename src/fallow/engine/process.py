"""What this process takes of the machine's memory, and may, as the operating system tells."""

import ctypes
import re
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

from fallow.common.procfs import CGROUPS, PROC, cgroup_folders, read_text

_UNLIMITED = 1 << 60  # bytes: what version 1 of cgroups says where there is no limit


def peak_rss_mb() -> float:
    """The process's largest resident memory so far, mapped files included, 1e6 bytes.

    From /proc where there is one: getrusage also counts the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def rss_bytes() -> int:
    """The process's resident memory now, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def return_freed_memory() -> None:
    """glibc keeps what parsing the tokenizer took and freed: 60 MB for Qwen2.5."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """Of memory, to this process: what the machine has left, or a cgroup's limit allows."""
    found = memory()
    if found["cgroup"] is None:
        return found["available"]
    return min(found["available"], found["cgroup"] - rss_bytes())


def memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> dict[str, Any]:
    """Bytes: of the machine, available, of swap, and a cgroup's limit (None: no limit)."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB$", read_text(proc / "meminfo"), re.MULTILINE)
    kilobytes = {name: int(value) for name, value in lines}
    return {
        "total": 1024 * kilobytes.get("MemTotal", 0),
        "available": 1024 * kilobytes.get("MemAvailable", 0),
        "swap_used": 1024 * (kilobytes.get("SwapTotal", 0) - kilobytes.get("SwapFree", 0)),
        "cgroup": _memory_limit(proc, cgroups),
    }


def _memory_limit(proc: Path, cgroups: Path) -> int | None:
    limits = []
    for folder in cgroup_folders("memory", proc, cgroups):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = read_text(folder / name).strip()
            if limit.isdecimal() and int(limit) < _UNLIMITED:
                limits.append(int(limit))
    return min(limits, default=None)
