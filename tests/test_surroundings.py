"""Commands in odd surroundings: locales, names, homes, streams and disks; whole processes."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import OTHER_TEXT, make_packed
from harness.killing import COMMANDS, Killer, Server, check_whole, files_of

NAMES = ("with spaces", "größe-語", "ö" * 120)  # the last one has 240 bytes


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model, it packed, a plan and a text."""
    root = tmp_path_factory.mktemp("things")
    make_packed(root).save(root / "topk.plan")
    (root / "text.txt").write_text(OTHER_TEXT)
    return root


def fallow(
    *words: object,
    without: tuple[str, ...] = (),
    variables: dict[str, str] | None = None,
    **how: Any,
) -> subprocess.CompletedProcess[bytes]:
    """A command with other environment variables; its output is bytes."""
    environment = {k: v for k, v in os.environ.items() if k not in without}
    environment |= {"OMP_NUM_THREADS": "1"} | (variables or {})
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    command = [sys.executable, "-m", "fallow", *map(str, words)]
    return subprocess.run(command, env=environment, timeout=120, **how)


def in_shell(redirection: str, *words: object) -> subprocess.CompletedProcess[bytes]:
    """A command whose streams a shell redirects or closes; what is not goes to pipes."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "fallow"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, timeout=120)


def one_line(result: subprocess.CompletedProcess[bytes]) -> str:
    """The error that a command ended with."""
    assert result.returncode == 1
    lines = [line for line in result.stderr.decode().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert b"Traceback" not in result.stderr
    return lines[0]


# Locales -----------------------------------------------------------------------------------------

LOCALES = [
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
]


@pytest.fixture(scope="module")
def usual(things: Path) -> str:
    """What the model goes on with after "neuron é", in the locale of these tests."""
    found = fallow("generate", things / "packed.gguf", "neuron é", "-n", 8, "--json")
    return json.loads(found.stdout)["text"]


@pytest.mark.parametrize("locale", LOCALES, ids=str)
def test_any_locale(locale: dict[str, str], things: Path, usual: str, tmp_path: Path) -> None:
    folder = tmp_path / NAMES[1]
    folder.mkdir()
    packed = folder / "packed.gguf"
    packed.write_bytes((things / "packed.gguf").read_bytes())
    found = fallow("generate", packed, "neuron é", "-n", 8, "--json", variables=locale)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["text"] == usual
    sizes = ("--text", things / "text.txt", "--context", 16, "--windows", 2)
    evaluated = fallow("evaluate", packed, *sizes, variables=locale)  # prints ±
    assert evaluated.returncode == 0, evaluated.stderr
    assert b"against dense" in evaluated.stdout


def test_text_that_is_not_utf8(things: Path) -> None:
    words = ("generate", str(things / "packed.gguf"))
    command = [sys.executable, "-m", "fallow", *words]
    found = subprocess.run([*command, b"\xff\xfe"], capture_output=True, timeout=120)
    assert one_line(found) == "error: the text has bytes that are not UTF-8; convert it"


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_any_name(name: str, things: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    plan = folder / f"{name}.plan"
    plan.write_bytes((things / "topk.plan").read_bytes())
    packed = folder / f"{name}.gguf"
    packed.write_bytes((things / "packed.gguf").read_bytes())
    answer = fallow("generate", packed, "neuron", "--plan", plan, "--max-new-tokens", 2)
    assert answer.returncode == 0, answer.stderr
    shown = fallow("plan", "show", plan)
    assert shown.returncode == 0
    assert name.encode() in shown.stdout


def test_names_that_no_file_can_have(things: Path, tmp_path: Path, run: Any) -> None:
    def error(*words: object) -> str:
        found = run(*words)
        (line,) = [line for line in found.err.splitlines() if line.startswith("error: ")]
        assert (found.code, "Traceback" in found.err) == (1, False)
        return line

    name = "x" * 300
    for words in (("generate", name, "a"), ("plan", "show", name), ("profile", name)):
        assert name in error(*words)
    calibrate = ("calibrate", things / "model", "--rule", "topk", "--sparsity", 0.5, "-o")
    for output, reason in (
        (tmp_path / name, "File name too long"),
        (tmp_path, "it is there and no file"),
        ("/dev/null", "it is there and no file"),
    ):
        assert reason in error(*calibrate, output)
    assert Path("/dev/null").is_char_device()


# Homes -------------------------------------------------------------------------------------------


def test_without_a_home(things: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    homes = [{"HOME": home} for home in (str(file), "/proc/1", "")]
    for variables in (*homes, {"TMPDIR": str(file)}):
        for words in (("models",), ("generate", things / "packed.gguf", "a")):
            found = fallow(*words, variables=variables)
            assert found.returncode == 0, found.stderr
    for words in (("models",), ("generate", things / "packed.gguf", "a")):
        assert fallow(*words, without=("HOME", "TMPDIR", "XDG_CACHE_HOME")).returncode == 0
    if os.geteuid() == 0:  # a user that no one knows, as in some containers
        nobody = {"user": 54321, "group": 54321}
        with contextlib.suppress(PermissionError):  # to run this Python
            found = fallow("models", without=("HOME", "XDG_CACHE_HOME"), **nobody)
            if b"Permission denied" not in found.stderr:  # to read the sources
                assert "set FALLOW_CACHE" in one_line(found)


def test_long_commands_without_a_home(things: Path, tmp_path: Path) -> None:
    """With torch, transformers and matplotlib, which would like to write there."""
    file = tmp_path / "file"
    file.touch()
    out = tmp_path / NAMES[1]
    text = ("--text", things / "text.txt", "--context", 16, "--windows", 4)
    model = things / "model"
    commands: list[tuple[object, ...]] = [
        ("profile", model, *text, "-o", out / "profile"),
        ("calibrate", model, "--rule", "tail", "--sparsity", 0.5, *text, "-o", out / "tail.plan"),
        ("pack", model, "--quant", "f32", "-o", out / f"{NAMES[2]}.gguf"),
        ("tradeoff", model, "--rules", "topk", "--sparsities", 0.5, *text, "-o", out / "tradeoff"),
        ("bench", out / f"{NAMES[2]}.gguf", "-p", 4, "-n", 2, "--runs", 1, "--threads", 1),
    ]
    with Server(HOME=str(file), TMPDIR=str(file), MPLBACKEND="agg") as server:
        for words in commands:
            process = server.start([str(word) for word in words], tmp_path / "said")
            assert process.wait() == 0, (tmp_path / "said").read_text()
    files = files_of(out)
    assert {"profile/profile.npz", "tail.plan", "tradeoff/tradeoff.svg"} <= set(files)
    for path in files.values():
        if path.suffix != ".jsonl":
            check_whole(path)


# Streams -----------------------------------------------------------------------------------------


def test_closed_streams(things: Path) -> None:
    generate = ("generate", things / "packed.gguf", "neuron", "--max-new-tokens", 2)
    for redirection in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        for words in (("models",), generate):
            assert in_shell(redirection, *words).returncode == 0
    assert in_shell("2>&-", "generate", "nowhere.gguf", "a").stdout == b""
    assert one_line(in_shell(">&-", "generate", "nowhere.gguf", "a"))
    for redirection in ("<&-", "</dev/null"):
        found = in_shell(redirection, "run", things / "packed.gguf")
        assert "standard input holds no prompt" in one_line(found)


def test_broken_pipe(things: Path) -> None:
    for words in (("models",), ("plan", "show", things / "topk.plan")):
        reader, writer = os.pipe()
        os.close(reader)
        found = fallow(*words, stdout=writer)
        os.close(writer)
        assert (found.returncode, found.stderr) == (1, b"")


# Disks -------------------------------------------------------------------------------------------


def test_full_stdout(things: Path) -> None:
    sizes = ("--text", things / "text.txt", "--context", 16, "--windows", 2)
    for words in (
        ("models",),
        ("rules", "--json"),
        ("generate", things / "packed.gguf", "a", "--max-new-tokens", 2),
        ("evaluate", things / "packed.gguf", *sizes),
    ):
        error = one_line(in_shell(">/dev/full", *words))
        assert error == "error: cannot write the output: No space left on device"


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("disks can only be mounted by root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_full_disk(server: Server, tmp_path: Path) -> None:
    """Every command that writes says so in one line, and leaves nothing half-written."""
    refused = 0
    for name in COMMANDS:
        killer = Killer(name, tmp_path, server)
        for size in ("4k", "24k"):
            with small_disk(killer.out, size):
                code = killer.start().wait()
                said = (tmp_path / "said").read_text()
                errors = [line for line in said.splitlines() if line.startswith("error: ")]
                assert "Traceback" not in said
                assert code in (0, 1)
                assert len(errors) == code
                assert all("cannot write" in line for line in errors)
                refused += code
                for path in files_of(killer.out).values():
                    if path.suffix != ".jsonl" and path.parent.name != "store":
                        check_whole(path)
    assert refused > len(COMMANDS)
