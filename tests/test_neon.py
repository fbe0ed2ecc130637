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

# As CMake compiles them, and for processors without DotProd.
MARCHES = ("armv8.2-a+dotprod", "armv8-a")


@pytest.fixture(scope="module", params=MARCHES)
def check(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in [COMPILER] if ON_ARM else [COMPILER, EMULATOR]:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = tmp_path_factory.mktemp("neon") / f"check-{request.param}"
    options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", f"-march={request.param}"]
    if not ON_ARM:
        options.append("-static")
    sources = [*sorted((ROOT / "csrc").glob("kernels_*.cpp")), ROOT / "tests" / "neon_check.cpp"]
    subprocess.run([COMPILER, *options, *sources, "-o", program], check=True)
    return program


def run(program: Path, *arguments: str, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    emulator = [] if ON_ARM else [EMULATOR, "-cpu", cpu]
    return subprocess.run([*emulator, program, *arguments], capture_output=True, text=True)


def test_neon_equals_portable(check: Path) -> None:
    result = run(check)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    assert result.stdout.startswith("0 of ")


def test_every_comparison_can_fail(check: Path) -> None:
    result = run(check, "--break")
    assert result.returncode == 1
    failed, _, compared = result.stdout.splitlines()[-1].split()[:3]
    assert int(failed) == int(compared) > 0


@pytest.mark.skipif(ON_ARM, reason="needs an emulator of an older processor")
def test_processors_without_dotprod(check: Path) -> None:
    result = run(check, cpu="cortex-a72")
    if check.name.endswith("dotprod"):
        assert (result.returncode, result.stdout) == (2, "no NEON table here\n")
    else:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr
