"""The NEON kernels against their portable twins: neon_check.cpp, under an emulator off ARM."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ON_ARM = platform.machine() in ("aarch64", "arm64")
COMPILER = "g++" if ON_ARM else "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"

TABLES = ("neon", "neon_dotprod")


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in [COMPILER] if ON_ARM else [COMPILER, EMULATOR]:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("neon")
    core = ROOT / "csrc"
    sources = [*(core / "kernels").glob("*.cpp"), core / "formats" / "dequant.cpp"]
    sources.append(ROOT / "tests" / "harness" / "neon_check.cpp")
    for source in sources:
        options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{core}"]
        if source.stem.endswith("dotprod"):
            options.append("-march=armv8.2-a+dotprod")  # as CMake compiles it
        subprocess.run(
            [COMPILER, *options, "-c", source, "-o", folder / f"{source.stem}.o"], check=True
        )
    static = [] if ON_ARM else ["-static"]
    program = folder / "check"
    subprocess.run([COMPILER, *static, *folder.glob("*.o"), "-o", program], check=True)
    return program


def run(program: Path, *arguments: str, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    emulator = [] if ON_ARM else [EMULATOR, "-cpu", cpu]
    return subprocess.run([*emulator, program, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("table", TABLES)
def test_neon_equals_portable(check: Path, table: str) -> None:
    result = run(check, table)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    assert result.stdout.startswith("0 of ")


@pytest.mark.parametrize("table", TABLES)
def test_every_comparison_can_fail(check: Path, table: str) -> None:
    result = run(check, table, "--break")
    assert result.returncode == 1
    failed, _, compared = result.stdout.splitlines()[-1].split()[:3]
    assert int(failed) == int(compared) > 0


@pytest.mark.skipif(ON_ARM, reason="needs an emulator of an older processor")
def test_processors_without_dotprod(check: Path) -> None:
    assert run(check, "neon", cpu="cortex-a72").returncode == 0
    missing = run(check, "neon_dotprod", cpu="cortex-a72")
    assert (missing.returncode, missing.stdout) == (2, "this table does not run here\n")
