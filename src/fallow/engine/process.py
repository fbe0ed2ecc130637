"""What this process takes of the machine's memory, as the operating system tells."""

import ctypes
import resource
from contextlib import suppress
from pathlib import Path


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
