"""What /proc and cgroups tell of this process."""

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    return len(os.sched_getaffinity(0))


def processors(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Threads that do not get into each other's way here, by affinity and a cgroup's quota.

    Of a quota of 1.5 it is one: threads that have used theirs up stand still, and those that wait
    for them, too.
    """
    quota = cpu_quota(proc, cgroups)
    return usable_cores() if quota is None else max(1, min(usable_cores(), int(quota)))


def cpu_quota(proc: Path, cgroups: Path) -> float | None:
    """Cores of processor time; the smallest of the cgroup and those it lies in."""
    shares = []
    for folder in cgroup_folders("cpu", proc, cgroups):
        quota, _, period = read_text(folder / "cpu.max").partition(" ")
        if not quota:
            quota = read_text(folder / "cpu.cfs_quota_us")
            period = read_text(folder / "cpu.cfs_period_us")
        if quota.strip().isdecimal() and period.strip().isdecimal():
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def cgroup_folders(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and of those it lies in, of both versions."""
    for line in read_text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        inner = Path(path.lstrip("/"))
        for part in (inner, *inner.parents):
            yield root / part


def read_text(path: Path) -> str:
    """A file's text, empty if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
