"""Commands within limits of the machine: they work, or one line says which limit ends them."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import make_packed
from fallow.common.errors import FallowError, exceeded_limit
from harness.killing import files_of

CGROUPS = Path("/sys/fs/cgroup")
Limit = Callable[[], None]
# Those that do without torch, which takes seconds to import.
QUICK = ("models", "generate", "bench", "serve")


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model, and it packed."""
    root = tmp_path_factory.mktemp("limits")
    make_packed(root)
    return root


def commands(things: Path, out: Path) -> dict[str, tuple[object, ...]]:
    packed = things / "packed.gguf"
    return {
        "models": ("models",),
        "generate": ("generate", packed, "neuron", "-n", 4),
        "generate --memory": ("generate", packed, "neuron", "-n", 4, "--memory", "300MB"),
        "bench": ("bench", packed, "-p", 4, "-n", 2, "--runs", 1),
        "serve": ("serve", packed, "--port", 0),
        "pack": ("pack", things / "model", "--quant", "f32", "-o", out / "packed.gguf"),
    }


def run(words: tuple[object, ...], limit: Limit) -> tuple[int, str]:
    """The exit code and stderr of a command; a server is ended as soon as it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fallow", *map(str, words)], preexec_fn=limit, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "2"},
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    try:
        if words[0] == "serve":
            for line in process.stderr:
                said += line
                if "serving" in line:
                    process.send_signal(signal.SIGTERM)
        said += process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, said


def check(things: Path, out: Path, limit: Limit, *names: str) -> dict[str, str]:
    """Every command works, or ends with one line and leaves nothing; what these lines are."""
    errors = {}
    every = commands(things, out)
    for name in names or QUICK:
        words = every[name]
        code, said = run(words, limit)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code in (0, 1), (name, said)
        assert len(lines) == code, (name, said)
        assert "Traceback" not in said, (name, said)
        if code:
            errors[name] = lines[0]
            assert not files_of(out), name
            assert not list(out.rglob(".*")), name
    return errors


@contextlib.contextmanager
def cgroup(controller: str, **settings: str) -> Iterator[Limit]:
    """Of version 1, where root may make one."""
    folder = CGROUPS / controller / f"fallow-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup of {controller} can be made here: {error.strerror}")
    try:
        for name, value in settings.items():
            (folder / f"{controller}.{name}").write_text(value)
        yield lambda: print(os.getpid(), file=(folder / "cgroup.procs").open("w"), flush=True)
    finally:
        for _ in range(100):  # until the kernel has seen the last process end
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.05)


def within(kind: int, most: int) -> Limit:
    return lambda: resource.setrlimit(kind, (most, most))


def test_few_open_files(things: Path, tmp_path: Path) -> None:
    names = ("models", "generate", "generate --memory", "serve")
    errors = check(things, tmp_path, within(resource.RLIMIT_NOFILE, 5), *names)
    assert set(errors) == {"generate --memory", "serve"}  # others read one file at a time
    assert all("ulimit -n" in line for line in errors.values())


def test_nothing_is_left_half_written(things: Path, tmp_path: Path) -> None:
    errors = check(things, tmp_path, within(resource.RLIMIT_NOFILE, 5), "pack")
    assert "ulimit -n" in errors["pack"]


@pytest.mark.parametrize("threads", [1, 3])
def test_few_threads(threads: int, things: Path, tmp_path: Path) -> None:
    """A cgroup's limit, since root has none of its own.

    With one, OpenBLAS starts no thread, and interrupts; with three, the server's does not start.
    """
    with cgroup("pids", max=str(threads)) as limit:
        errors = check(things, tmp_path, limit)
    assert "models" not in errors
    assert "ulimit -u" in errors["serve"]
    assert all("pids.max" in line for line in errors.values())


def test_little_address_space(things: Path, tmp_path: Path) -> None:
    """60 MB hold Python, 250 MB the engine with this model but not what bench reads."""
    small = within(resource.RLIMIT_AS, 60 << 20)
    errors = check(things, tmp_path, small, "models", "generate", "serve")
    assert set(errors) == {"generate", "serve"}
    assert all("ulimit -v" in line for line in errors.values())
    room = within(resource.RLIMIT_AS, 250 << 20)
    errors = check(things, tmp_path, room, "generate", "bench")
    assert set(errors) == {"bench"}
    assert "ulimit -v" in errors["bench"]


def test_one_core(things: Path, tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    names = ("generate", "bench", "serve")
    assert check(things, tmp_path, lambda: os.sched_setaffinity(0, {core}), *names) == {}


def test_half_a_core(things: Path, tmp_path: Path) -> None:
    with cgroup("cpu", cfs_quota_us="50000", cfs_period_us="100000") as limit:
        assert check(things, tmp_path, limit, "generate", "serve") == {}


def test_which_limit_an_error_comes_from() -> None:
    def raised_from(cause: Exception) -> Exception:
        error = ValueError("damaged")
        error.__cause__ = cause
        return error

    files = OSError(errno.EMFILE, "Too many open files", "model.gguf")
    for error, remedy in (
        (files, "ulimit -n"),
        (raised_from(files), "ulimit -n"),
        (MemoryError("std::bad_alloc"), "ulimit -v"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "ulimit -v"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
    ):
        assert remedy in (exceeded_limit(error) or "")
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "model.gguf"),
        BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0),
        ValueError("damaged"),
        FallowError("damaged"),
    ):
        assert exceeded_limit(error) is None
