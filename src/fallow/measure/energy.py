"""Energy that processors say they took: the counters of RAPL, as Linux shows them.

They count whole packages, hence whatever else the machine does meanwhile, and not its memory
(Documentation/power/powercap in the Linux kernel's sources).
"""

from dataclasses import dataclass
from pathlib import Path

from fallow.engine.process import read_text

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Packages:
    """Counters of a machine's processors; `missing` says why there are none."""

    folders: tuple[Path, ...] = ()
    missing: str | None = None

    def microjoules(self) -> list[int]:
        """Of each package, since some time in the past."""
        return [int(read_text(folder / "energy_uj")) for folder in self.folders]

    def joules_since(self, start: list[int]) -> float:
        """From a time when they were at `start` until now, at most one turn of a counter later."""
        total = 0
        for folder, before, after in zip(self.folders, start, self.microjoules(), strict=True):
            turn = int(read_text(folder / "max_energy_range_uj")) if after < before else 0
            total += after - before + turn
        return total / 1e6


def packages(powercap: Path = POWERCAP) -> Packages:
    """The machine's packages that can be read."""
    # A package is intel-rapl:0 (of AMD too), its parts intel-rapl:0:1.
    folders = tuple(sorted(f for f in powercap.glob("intel-rapl:*") if f.name.count(":") == 1))
    if not folders:
        return Packages(missing="this machine has no RAPL counters")
    if not all(read_text(folder / "energy_uj").strip() for folder in folders):
        return Packages(missing=f"{folders[0] / 'energy_uj'} can be read by root alone")
    return Packages(folders)
