"""What an installation is like: little is imported, and the shell completes commands."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
HEAVY = (
    "fastapi", "gguf", "jinja2", "matplotlib", "numpy", "plotly", "ray", "rich.progress",
    "safetensors", "scipy", "tokenizers", "torch", "transformers",
)  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("code", "also"),
    [
        ("import fallow", ("rich", "typer")),
        ("from fallow import cli", ("rich.console",)),
        ("import sys; from fallow import cli; sys.argv = ['fallow', '--help']; cli.main()", ()),
    ],
)
def test_little_is_imported(code: str, also: tuple[str, ...]) -> None:
    program = f"""
import atexit, sys
atexit.register(lambda: print(*sorted(set({(*HEAVY, *also)!r}) & set(sys.modules)), sep=":::"))
{code}
"""
    assert python(program).splitlines()[-1] == ""


def test_names_are_found_when_they_are_used() -> None:
    assert python("import fallow; print(fallow.Plan.__name__, fallow.UsageError.exit_code)") == (
        "Plan 2\n"
    )


@pytest.fixture
def fallow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command, by that name, as a package manager would install it; and a home of its own."""
    command = tmp_path / "bin" / "fallow"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom fallow.cli import main\nmain()\n")
    command.chmod(0o755)
    paths = [path for path in sys.path if path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(p).resolve()) for p in paths))
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return command


def complete(command: Path, shell: str, line: str) -> str:
    """What the command offers to a shell for the end of a line."""
    count = len(line.split(" ")) - 1
    asked = {
        "_FALLOW_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(count),
        "_TYPER_COMPLETE_ARGS": line,
    }
    done = subprocess.run([command], env=os.environ | asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_completions(fallow: Path) -> None:
    assert complete(fallow, "bash", "fallow pla").split() == ["plan"]
    assert complete(fallow, "bash", "fallow plan ").split() == ["show", "import"]
    assert "--max-ppl-increase" in complete(fallow, "bash", "fallow calibrate --max").split()
    assert '"show":"Print what a plan is for' in complete(fallow, "zsh", "fallow plan s")


@pytest.mark.parametrize(
    ("shell", "last"),
    [
        ("bash", "complete -o default -F _fallow_completion fallow"),
        ("zsh", "compdef _fallow_completion fallow"),
    ],
)
def test_show_completion(
    shell: str, last: str, fallow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise Typer looks which shell it was called from, and takes no other.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = subprocess.run([fallow, "--show-completion", shell], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(last)
    assert f"_FALLOW_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_after_installation(fallow: Path, tmp_path: Path) -> None:
    # A line after it, or bash would hand its own process over.
    done = subprocess.run(
        ["bash", "-c", "fallow --install-completion\ntrue"], capture_output=True, text=True
    )
    assert "bash completion installed" in done.stdout, done.stderr
    script = f"""
source {tmp_path}/.bashrc
COMP_WORDS=(fallow pat) COMP_CWORD=1
$(complete -p fallow | grep -o '_fallow[a-z_]*') fallow
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == "patterns\n", done.stderr


# The project's metadata --------------------------------------------------------------------------


def test_commands_name_extras_that_exist() -> None:
    from fallow.cli import EXTRAS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(EXTRAS) <= set(extras)
    named = {name.lower() for names in extras.values() for name in names}
    base = " ".join(project["dependencies"])
    assert not re.search(r"torch|transformers|fastapi|ray\b", base)
    assert any(name.startswith("torch") for name in named)


def test_workflows_call_targets_that_exist() -> None:
    """Workflows and issue forms are YAML; `make` is asked for what the Makefile has, of files that
    are there, and Python for modules that are.
    """
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    settings = dict(re.findall(r"^(\w+) \?= ?(.*)", makefile, re.MULTILINE))
    asked: set[str] = set()
    pythons: set[str] = set()
    files = sorted((ROOT / ".github").rglob("*.yml"))
    for path in files:
        content = yaml.safe_load(path.read_text())
        if path.parent.name == "ISSUE_TEMPLATE":
            assert {"name", "description", "body"} <= content.keys()
            continue
        for job in content["jobs"].values():
            pythons |= set(job.get("strategy", {}).get("matrix", {}).get("python", ()))
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step), step
                pythons.add(step.get("with", {}).get("python-version", ""))
                for command in re.split(r"&&|\n", step.get("run", "make")):
                    program, *words = shlex.split(command)
                    given = dict(word.split("=", 1) for word in words if "=" in word)
                    if program == "make":
                        asked |= set(words) - {f"{name}={given[name]}" for name in given}
                        assert given.keys() <= settings.keys()
                        assert all((ROOT / name).exists() for name in given.values())
                    elif program == f"{settings['VENV']}/bin/python":
                        assert importlib.util.find_spec(words[words.index("-m") + 1])
                    else:
                        assert program in ("sudo", "pipx"), command
    assert {"test", "lint", "docs", "cross"} <= asked <= targets
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = SpecifierSet(project["requires-python"])
    found = {version for version in pythons if re.fullmatch(r"[\d.]+", version)}
    assert "3.11" in found
    assert all(version in versions for version in found)
    assert f"\n{settings['TORCH']} " in (ROOT / "requirements.lock").read_text()
    shown = re.findall(r"^make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert set(shown) <= targets
    assert len(files) >= 5


def test_only_files_of_one_instruction_set_ask_for_more_than_the_baseline() -> None:
    """So that a wheel runs on any processor: kernels are chosen when the program starts."""
    settings = (ROOT / "CMakeLists.txt").read_text()
    assert "native" not in settings
    found = re.findall(r"set_source_files_properties\((\S+)[^)]*?\"([^\"]+)\"", settings)
    assert len(found) == 4
    for target, options in found:
        assert re.fullmatch(r"csrc/kernels/(avx2|avx512|avx512_bf16|neon_dotprod)\.cpp", target)
        assert "-m" in options or "AVX512" in options
    assert not re.search(r"add_compile_options\([^)]*-m", settings)
