"""Every command and snippet of the README, the tutorial and the how-to pages works as it is shown.

A document's blocks run in order in one folder. Names and options are those shown; what is changed,
so that it takes seconds, is in the tables below: the models are tiny, texts short, and options that
say how much is done are added where a line has none.
"""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import ModuleType

import pytest

import fallow
from conftest import TALK, make_folder
from fallow import cli
from fallow.adaptation import texts as adaptation_texts
from fallow.checkpoints import text
from fallow.laws import training
from fallow.packing import cache
from fallow.packing.packer import pack
from test_models import write_gguf

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("index.md", "tutorial.md", "python.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# Lines that are not run, by how they begin, and why.
SKIPPED = {
    "make ": "installs the package, or runs these tests",
    "pip install ": "changes the environment",
    "python -m fallow.measure.harness ": "test_harness.py runs it",
    "fallow optimize smollm2 --adapt ": "packs only what is faster; test_optimize.py runs it",
    "python llama.cpp/convert_hf_to_gguf.py ": "is llama.cpp's",
    "fallow llama pack my-model.gguf --plan ": "of what that line makes; test_llama_cpp.py runs it",
    "fallow bench my-model.gguf --against ": "needs llama-cpp-python, which no extra brings",
    **{
        f"fallow llama {name} ": "needs llama-cpp-python; make test-llama runs test_llama_cpp.py"
        for name in ("build", "run", "serve", "verify", "bench")
    },
}
_WINDOWS = {"--context": "64", "--windows": "2"}
# Added to a command, where the document does not say it.
SHORTER: dict[str, dict[str, str]] = {
    "profile": _WINDOWS,
    "report": _WINDOWS,
    "neurons": _WINDOWS,
    "calibrate": _WINDOWS | {"--validation-windows": "2"},
    "adapt": {
        "--tokens": "1k", "--context": "32", "--batch": "8", "--learning-rate": "1e-3",
    },
    "optimize": _WINDOWS | {"--validation-windows": "4", "--check-windows": "2", "--threads": "1"},
    "evaluate": _WINDOWS,
    "tradeoff": _WINDOWS | {"--calibration-windows": "2", "--sparsities": "0.5"},
    "bench": {"-p": "16", "-n": "4", "--runs": "1", "--threads": "1"},
    "generate": {"--max-new-tokens": "4"},
    "run": {"--max-new-tokens": "4"},
    "serve": {"--threads": "1"},
    "harness": {"--limit": "2", "--include-path": "my-tasks"},
    "select compare": _WINDOWS | {"--calibration-windows": "2"},
    "select train": {
        "--tokens": "256", "--rank": "4", "--context": "64", "--validation-windows": "1",
        "--checks": "1",
    },
    "patterns collect": {"--context": "64", "--windows": "8"},
    "patterns cluster": {"--clusters": "4", "--threads": "1"},
    "patterns predict": {"--hidden": "4", "--epochs": "1", "--threads": "1"},
    "patterns similarity": {"--context": "64", "--documents": "2"},
    "law train": {
        "--tokens": "16000", "--hidden-size": "64", "--layers": "1", "--intermediate-size": "48",
        "--vocabulary": "300", "--context": "32", "--batch": "16", "--checkpoints": "8",
    },
    "law fit": {"--draws": "20", "--unit": "1"},  # so few tokens would pass for billions
}  # fmt: skip
HALVES: tuple[text.Half, ...] = ("calibration", "evaluation")
CONVERSATION = "What is a neuron?\n/stats\n/quit\n"
TASK = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/my-task.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""


def blocks(document: Path) -> list[tuple[str, str, str]]:
    """The fenced blocks: language, file that it is to be saved as, content."""
    fences = r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$"
    return re.findall(fences, document.read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that documents take as given, under the names that they give it."""
    folder = tmp_path_factory.mktemp("things")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 2048}
    # Weights so small that no plan changes much: any limit of a loss can be kept to.
    sizes |= {"num_hidden_layers": 11, "initializer_range": 0.05}
    model = make_folder("llama", folder / "smollm2", **sizes)
    (model / "chat_template.jinja").write_text(TALK)
    for name in ("gemma3", "my-model", "HuggingFaceTB/SmolLM2-135M"):
        shutil.copytree(model, folder / name)
    small = fallow.load(make_folder("llama", tmp_path_factory.mktemp("small") / "llama"))
    template = {"tokenizer.chat_template": TALK}
    write_gguf("llama", small, folder / "my-model.gguf", keys=template)
    halves = [short_text(half).content for half in HALVES]
    (folder / "novels.txt").write_text("\n".join(halves))
    (folder / "my-tasks").mkdir()
    docs = [{"query": "Water is", "choices": ["wet", "dry"], "gold": i % 2} for i in range(4)]
    (folder / "my-task.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return folder


def short_text(half: text.Half) -> text.Text:
    found = text._default_text(half)
    return text.Text(found.name, found.content[:30_000])


class Reader:
    """Somebody who does what a document says, in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.servers: list[subprocess.Popen[str]] = []
        self.port = ""

    def read(self, document: Path) -> None:
        for language, title, content in blocks(document):
            if title:
                with (self.folder / title).open("a") as file:
                    file.write(content + "\n\n")
            elif language == "python":
                self.run_python(content)
            elif not language:
                for line in commands(content):
                    self.run(line)

    def run_python(self, code: str) -> None:
        if "openai" in code and self.port:
            code = code.replace("8080", self.port)
        code = code.replace('"cuda", torch.bfloat16', '"cpu"').replace('"cuda"', '"cpu"')
        if "fallow.accelerate" in code:  # a token takes Triton's interpreter some ten seconds
            code = code.replace("max_new_tokens=8", "max_new_tokens=2")
        exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})

    def run(self, line: str) -> None:
        if line.startswith(tuple(SKIPPED)):
            return
        words = shlex.split(line, comments=True)
        if words[0] == "curl":
            self.run_curl([word.replace("8080", self.port) for word in words])
            return
        assert words[0] == "fallow", f"what is {line!r}?"
        words = shortened(words[1:])
        if words[0] == "serve":
            self.start_server(words)
        elif "--memory" in words:  # of a process of its own
            self.run_alone(words)
        else:
            self.run_here(words)

    def run_curl(self, words: list[str]) -> None:
        if shutil.which("curl") is None:
            pytest.skip("there is no curl")
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        [choice] = json.loads(done.stdout)["choices"]
        assert choice["finish_reason"] in ("stop", "length")

    def run_here(self, words: list[str]) -> None:
        """In this process, since torch takes seconds to start."""
        self.monkeypatch.setattr(sys, "argv", ["fallow", *words])
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(CONVERSATION))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, words
        # A new process would import the user's modules anew.
        for name in ("my_rules", "my_selectors"):
            sys.modules.pop(name, None)

    def run_alone(self, words: list[str]) -> None:
        subprocess.run(
            [sys.executable, "-m", "fallow", *words], check=True, input=CONVERSATION, text=True
        )

    def start_server(self, words: list[str]) -> None:
        if "--port" in words:
            words[words.index("--port") + 1] = "0"
        else:
            words += ["--port", "0"]
        # Its process has aliases, which would go before folders of their names.
        words = [f"./{w}" if os.sep not in w and Path(w).is_dir() else w for w in words]
        command = [sys.executable, "-m", "fallow", *words]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.servers.append(server)
        assert server.stderr is not None
        for line in server.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = found[1]
                return
        pytest.fail(f"{words} did not start")

    def stop_servers(self) -> list[int]:
        """Their exit codes."""
        for server in self.servers:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)
        return [server.returncode for server in self.servers]


def shortened(words: list[str]) -> list[str]:
    """The command with what SHORTER says, where it does not say so itself."""
    name = next((n for n in SHORTER if words[: n.count(" ") + 1] == n.split()), None)
    added = SHORTER[name].items() if name else ()
    return words + [part for option in added if option[0] not in words for part in option]


@pytest.fixture
def reader(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    folder = tmp_path / "work"
    shutil.copytree(things, folder)
    for name in ("arc_easy", "my_task"):
        task = f"task: {name}\n" + TASK.format(folder=folder)
        (folder / "my-tasks" / f"{name}.yaml").write_text(task)
    # A model's name is then that of a folder here, and texts are short.
    monkeypatch.setattr("fallow.checkpoints.catalog.ALIASES", {})
    texts = {half: short_text(half) for half in HALVES}
    monkeypatch.setattr(text, "_default_text", texts.__getitem__)
    monkeypatch.setenv("FALLOW_CACHE", str(folder / "cache"))
    monkeypatch.setattr(cache, "_pack", lambda model, path, quant: pack(model, path, quant=quant))
    monkeypatch.setattr(adaptation_texts, "HELD_OUT", 4)
    for name in ("FIT_WINDOWS", "SEARCH_WINDOWS", "JUDGE_WINDOWS"):
        monkeypatch.setattr(training, name, 6)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = Reader(folder, monkeypatch)
    with chdir(folder):
        yield made
    assert all(code == 0 for code in made.stop_servers())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands(document: Path, reader: Reader, request: pytest.FixtureRequest) -> None:
    if document.stem == "gpu":  # on the CPU, slowly
        pytest.importorskip("triton", reason="triton is for x86-64 alone")
        pytest.importorskip("interpreted")
    if "fallow harness" in document.read_text():
        request.getfixturevalue("own_tasks_only")
    if document.parent.name == "how-to":  # made in the tutorial
        reader.run("fallow pack smollm2 -o smollm2.gguf")
        reader.run("fallow calibrate smollm2 --rule tail --sparsity 0.3 -o tail.plan")
    reader.read(document)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks(path: Path, reader: Reader) -> None:
    """Cells run in their order, in the module that a notebook's names are in."""
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    module = ModuleType("__main__")
    reader.monkeypatch.setitem(sys.modules, "__main__", module)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), path.name, "exec"), vars(module))


def test_links_of_notebooks() -> None:
    for path in NOTEBOOKS:
        for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            assert (path.parent / link).exists(), (path, link)
        assert f"notebooks/{path.name}" in (ROOT / "docs" / "index.md").read_text()


def test_little_is_skipped() -> None:
    lines = [
        line
        for document in DOCUMENTS
        for language, _, content in blocks(document)
        if not language
        for line in commands(content)
    ]
    for start in SKIPPED:
        assert any(line.startswith(start) for line in lines), f"{start!r} is nowhere"
    skipped = [line for line in lines if line.startswith(tuple(SKIPPED))]
    assert len(skipped) <= len(lines) / 5


def test_what_makes_commands_shorter_is_used() -> None:
    shown = "\n".join(content for d in DOCUMENTS for _, _, content in blocks(d))
    for name in SHORTER:
        assert f"fallow {name} " in shown
