"""`fallow doctor`: what it finds here, and on machines that are made up."""

import copy
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fallow
from fallow import _core, cli
from fallow.common.errors import UsageError
from fallow.common.procfs import processors
from fallow.measure import energy, machine

CPUINFO = """processor\t: 0
model name\t: Some Processor
flags\t\t: fpu sse2 {flags}
"""
HASWELL = "avx2 fma f16c"
GOOD: dict[str, Any] = {
    "processor": {"kernels": "avx2", "better_kernels_lack": {}},
    "cores": {"machine": 4, "affinity": 4, "cgroup": None, "load": 0.1},
    "memory": {"total": 8e9, "available": 4e9, "swap_used": 0, "cgroup": None},
    "disk": {"folder": "/models", "filesystem": "ext4", "gbps": 1.0, "error": None},
    "numpy": {"version": "2.0", "blas": "openblas"},
    "torch": 4,
    "extras": {"lab": {"torch": "2.13.0"}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it finds here."""
    return machine.examine(tmp_path_factory.mktemp("disk"))


def test_this_machine(found: dict[str, Any]) -> None:
    assert found["processor"]["kernels"] == _core.KERNELS[0]
    assert found["cores"]["machine"] == os.cpu_count()
    assert found["cores"]["affinity"] == found["bandwidth_gbps"]["threads"]
    assert 0 < found["memory"]["available"] < found["memory"]["total"]
    assert found["bandwidth_gbps"]["one_thread"] > 0
    assert found["bandwidth_gbps"]["all_threads"] > 0
    assert found["numpy"]["version"] == np.__version__
    assert found["extras"]["lab"]["torch"].startswith("2.")
    assert set(found["models"]) == {"smollm2", "gemma3", "qwen2.5-1.5b"}
    assert found["torch"] >= 1
    assert os.listdir(found["disk"]["folder"]) == []
    assert (found["disk"]["gbps"] is None) == (found["disk"]["error"] is not None)


@pytest.mark.skipif(platform.machine() not in machine._NEEDS, reason="another architecture")
def test_what_kernels_need_is_what_the_core_asks_for() -> None:
    features = set(machine.processor()["features"])
    needs = machine._NEEDS[platform.machine()]
    assert [name for name, wanted in needs.items() if features >= set(wanted)] == _core.KERNELS


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_command(
    options: tuple[str, ...],
    found: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = found | {"warnings": ["the disk is full of holes"]}
    monkeypatch.setattr(machine, "examine", lambda folder: changed)
    monkeypatch.setattr(sys, "argv", ["fallow", "doctor", *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    if options:
        assert json.loads(out) == changed
    else:
        assert re.search(rf"^kernels       {_core.KERNELS[0]}(;|$)", out, re.MULTILINE)
        assert f"[lab]         torch {found['extras']['lab']['torch']}, transformers" in out
        assert out.endswith("warning: the disk is full of holes\n")


def test_needs_no_torch() -> None:
    code = "import fallow.measure.machine, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_an_installation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Found by PYTHONPATH alone, as a checkout of the sources may be."""
    by_name = Distribution.from_name
    monkeypatch.delattr(fallow, "__version__")  # which is looked up once

    def others(name: str) -> Distribution:
        if name == "fallow":
            raise PackageNotFoundError(name)
        return by_name(name)

    monkeypatch.setattr(Distribution, "from_name", others)
    monkeypatch.setattr(machine, "_DISK_BYTES", 1 << 21)
    monkeypatch.setattr(sys, "argv", ["fallow", "doctor", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert out.startswith("fallow        unknown, Python ")
    assert "warning: fallow is not installed, so that neither its version" in out
    assert "[lab]" not in out


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        machine.examine(tmp_path / "none")
    assert str(error.value) == (
        f"--folder {tmp_path / 'none'} is no folder; give the one that models are in"
    )


def test_a_disk_that_cannot_be_read_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int) -> float:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(machine, "_read_speed", refuse)
    found = machine.disk(tmp_path)
    assert (found["gbps"], found["error"]) == (None, "Invalid argument")
    assert os.listdir(tmp_path) == []


# Other machines ----------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_processor_says_what_better_kernels_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(_core, "KERNELS", ["avx2", "portable"])
    tree(tmp_path, {"cpuinfo": CPUINFO.format(flags=f"{HASWELL} avx512f avx512bw avx512vl")})
    found = machine.processor(tmp_path)
    assert (found["name"], found["kernels"]) == ("Some Processor", "avx2")
    assert found["better_kernels_lack"] == {
        "avx512_bf16": ["avx512dq", "avx512_vnni", "avx512_bf16"],
        "avx512": ["avx512dq", "avx512_vnni"],
    }


def test_limits_of_cgroups_version_2(tmp_path: Path) -> None:
    proc = tree(tmp_path / "proc", {"self/cgroup": "0::/slice/job\n", "meminfo": ""})
    cgroups = tree(
        tmp_path / "cgroup",
        {
            "slice/cpu.max": "150000 100000\n",
            "slice/job/cpu.max": "max 100000\n",
            "slice/memory.max": "2000000000\n",
            "slice/job/memory.max": "3000000000\n",
        },
    )
    assert machine.cores(proc, cgroups)["cgroup"] == 1.5
    assert processors(proc, cgroups) == 1
    assert machine.memory(proc, cgroups)["cgroup"] == 2_000_000_000


def test_limits_of_cgroups_version_1(tmp_path: Path) -> None:
    lines = "4:memory:/job\n1:cpu,cpuacct:/job\n2:cpuset:/\n"
    proc = tree(tmp_path / "proc", {"self/cgroup": lines})
    cgroups = tree(
        tmp_path / "cgroup",
        {
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "cpu/job/cpu.cfs_quota_us": "50000\n",
            "cpu/job/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/job/memory.limit_in_bytes": "500000000\n",
        },
    )
    assert machine.cores(proc, cgroups)["cgroup"] == 0.5
    assert processors(proc, cgroups) == 1
    assert machine.memory(proc, cgroups)["cgroup"] == 500_000_000


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    assert machine.cores(tmp_path, tmp_path)["cgroup"] is None
    assert processors(tmp_path, tmp_path) == len(os.sched_getaffinity(0))
    assert machine.memory(tmp_path, tmp_path)["cgroup"] is None
    assert machine.processor(tmp_path)["name"] == platform.machine()
    assert machine.filesystem(tmp_path, tmp_path) is None


def test_memory_and_swap(tmp_path: Path) -> None:
    lines = ("MemTotal: 8 kB", "MemAvailable: 3 kB", "SwapTotal: 5 kB", "SwapFree: 4 kB")
    found = machine.memory(tree(tmp_path, {"meminfo": "\n".join(lines) + "\n"}), tmp_path)
    assert found == {"total": 8192, "available": 3072, "swap_used": 1024, "cgroup": None}


def test_nothing_to_warn_of() -> None:
    assert machine.warnings(GOOD) == []


@pytest.mark.parametrize(
    ("part", "change", "warning"),
    [
        (
            "processor",
            {"kernels": "portable", "better_kernels_lack": {"avx512": ["a"], "avx2": ["fma"]}},
            "only the portable kernels, which are slow, run on this processor; for better ones it "
            "lacks fma",
        ),
        (
            "cores",
            {"load": 2.5},
            "other processes are at work (load 2.5 on 4 cores): what is measured now is too slow",
        ),
        (
            "memory",
            {"cgroup": 500_000_000},
            "500 MB of memory are left; --memory runs models that do not fit",
        ),
        ("memory", {"swap_used": 7e6}, "7 MB are swapped out; timings vary with that"),
        (
            "disk",
            {"error": "Invalid argument"},
            "the disk of /models was not timed: Invalid argument; --memory wants a folder on a "
            "disk",
        ),
        (
            "disk",
            {"filesystem": "tmpfs"},
            "/models is in memory (tmpfs), not on a disk: packed models belong elsewhere if "
            "memory is short",
        ),
        (
            "numpy",
            {"blas": None},
            "numpy was built without a BLAS library: products of matrices are slow",
        ),
        ("torch", 1, "torch takes 1 of 4 cores; see OMP_NUM_THREADS"),
        (
            "extras",
            None,
            "fallow is not installed, so that neither its version nor its extras are known; in the "
            "folder of its sources: pip install .",
        ),
    ],
)
def test_warnings(part: str, change: Any, warning: str) -> None:
    changed = copy.deepcopy(GOOD)
    changed[part] = changed[part] | change if isinstance(change, dict) else change
    assert machine.warnings(changed) == [warning]


# Energy -------------------------------------------------------------------------------------------


def counters(powercap: Path, values: dict[str, int]) -> Path:
    for name, value in values.items():
        (powercap / name).mkdir(parents=True, exist_ok=True)
        (powercap / name / "energy_uj").write_text(f"{value}\n")
        (powercap / name / "max_energy_range_uj").write_text("262143328850\n")
    return powercap


def test_energy_of_packages_is_that_since_the_start_of_a_run(tmp_path: Path) -> None:
    """Of all of them, not of their parts, and past the end of a counter."""
    start = {"intel-rapl:0": 262143000000, "intel-rapl:1": 500000, "intel-rapl:0:0": 7}
    found = energy.packages(counters(tmp_path, start))
    before = found.microjoules()
    assert before == [262143000000, 500000]
    counters(tmp_path, {"intel-rapl:0": 1671150, "intel-rapl:1": 1500000, "intel-rapl:0:0": 9000})
    assert found.joules_since(before) == pytest.approx(2 + 1)


def test_machines_that_tell_no_energy(tmp_path: Path) -> None:
    assert energy.packages(tmp_path / "none").missing == "this machine has no RAPL counters"
    (counters(tmp_path, {"intel-rapl:0": 1}) / "intel-rapl:0" / "energy_uj").write_text("")
    found = energy.packages(tmp_path)
    assert found.missing == f"{tmp_path}/intel-rapl:0/energy_uj can be read by root alone"
    assert found.joules_since(found.microjoules()) == 0
