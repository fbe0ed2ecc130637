"""Commands that are killed at any moment: what they leave is whole, and the same command finishes.

A trial starts a command as a process of its own, kills it (SIGKILL), looks at every file that has
its final name, runs the command again, and compares what is there then with an undisturbed run.
Half of the moments are spread over all of the command's usual time, half over the part in which it
writes; time is that of the processor, so that a busy machine does not matter. Processes are forked
from one that has imported torch and transformers: else most moments would lie in these imports.
`benchmarks/reliability.py kill` runs hundreds of trials.
"""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

POLL = 0.002  # seconds


@dataclass(frozen=True)
class Command:
    """What is run, with the inputs' names and the output folder in braces.

    `state` are patterns of files that a stopped run goes on from; `grows`, of results that are
    written again and again; `varies`, of files that two undisturbed runs write differently. `once`
    does not write over what a finished run wrote.
    """

    line: str
    state: tuple[str, ...] = ()
    grows: tuple[str, ...] = ()
    varies: tuple[str, ...] = ()
    once: bool = False


_TEXT = "--text {text} --context 16 --windows 8"
_LAW = "--hidden-size 64 --layers 1 --intermediate-size 24 --vocabulary 270 --context 16 --batch 8"
_CHECKPOINTS = ("checkpoints/*/*", "*/checkpoints/*/*")
COMMANDS = {
    "profile": Command("profile {model} " + _TEXT + " -o {out}/profile"),
    "calibrate": Command(
        "calibrate {model} --rule tail --max-ppl-increase 5 --text {calibration} --context 16 "
        "--windows 4 --validation-windows 2 -o {out}/tail.plan"
    ),
    "pack": Command("pack {model} --quant f32 --plan {plan} -o {out}/packed.gguf"),
    "optimize": Command(
        "optimize {model} --quant f32 --prefer bytes --max-ppl-increase 5 --context 32 --windows 2 "
        "--validation-windows 8 --check-windows 2 --text {text} --calibration-text {calibration} "
        "--threads 1 -o {out}/fast.gguf",
        state=("fast.gguf.costs.jsonl",),
    ),
    "tradeoff": Command(
        "tradeoff {model} --rules topk,tail,cats,cett --sparsities 0.3,0.5,0.7 --text {text} "
        "--calibration-text {calibration} --context 16 --windows 8 --calibration-windows 4 "
        "--validation-windows 1 -o {out}/tradeoff",
        state=("tradeoff/cells.jsonl", "tradeoff/plans/*"),
        grows=("tradeoff/cells.jsonl",),
        varies=("*.svg",),
    ),
    "select train": Command(
        "select train {model} --rank 4 --tokens 2000 --checks 5 --text {calibration} --context 16 "
        "--validation-windows 2 -o {out}/learned.plan",
        state=("learned.plan.training",),
    ),
    "patterns collect": Command(
        "patterns collect {model} --rule topk --sparsity 0.5 --calibration-text {calibration} "
        "--text {text} --context 16 --magnitudes -o {out}/store",
        state=("store/done.jsonl",),
        grows=("store/*",),
    ),
    "patterns cluster": Command(
        "patterns cluster {store} --clusters 8 --threads 1 -o {out}/codebooks",
        state=("codebooks.parts/layer.*", "codebooks.parts/settings.json"),
    ),
    "patterns predict": Command("patterns predict {store} {codebooks} --threads 1"),
    "patterns similarity": Command(
        "patterns similarity {model} --sparsity 0.5 --calibration-text {calibration} --text {text} "
        "--documents 2 --context 32 -o {out}/similarity"
    ),
    "law fit": Command("law fit {curve} --draws 20 -o {out}/law"),
    "law train": Command(
        "law train --text {novel} " + _LAW + " --tokens 12e3 --checkpoints 3 -o {out}/m",
        state=("m/state.pt", "m/checkpoints/*/*", "m/tokens.npy", "m/tokenizer.json"),
        grows=("m/curve.json", "m/tokenizer.json"),
    ),
    "law sweep": Command(
        "law sweep {sweep} -o {out}/sweep",
        state=("sweep/*/state.pt", "sweep/*/checkpoints/*/*", "sweep/*/tokens.npy", "sweep/*.json"),
        grows=("sweep/sweep.json", "sweep/*/curve.json", "sweep/*/tokenizer.json"),
    ),
    "plan import": Command("plan import {thresholds} {model} -o {out}/a.plan"),
    "export": Command("export {model} --plan {plan} -o {out}/m", once=True),
    "report": Command(
        "report {model} --rules topk --sparsities 0.5 --text {text} --calibration-text "
        "{calibration} --context 16 --windows 8 -o {out}/report.html",
        state=("report.html.work/*", "report.html.work/*/*", "report.html.work/*/*/*"),
        grows=("*.jsonl",),
        varies=("*.svg",),
    ),
}


def make_inputs(root: Path) -> dict[str, str]:
    """What the commands read, by the names in their lines; made on first use."""
    names = {
        "model": "model", "text": "text.txt", "calibration": "calibration.txt", "plan": "a.plan",
        "store": "store", "codebooks": "codebooks", "curve": "curve.json", "novel": "novel.txt",
        "sweep": "sweep.toml", "thresholds": "model_50.json",
    }  # fmt: skip
    folder = root / "inputs"
    if not folder.exists():
        part = root / ".inputs"
        shutil.rmtree(part, ignore_errors=True)
        _write_inputs(part)
        part.rename(folder)
    return {name: str(folder / file) for name, file in names.items()} | {"out": str(root / "out")}


def _write_inputs(folder: Path) -> None:
    import fallow
    from conftest import OTHER_TEXT, TEXT, make_folder
    from fallow.calibration.calibrator import calibrate
    from fallow.checkpoints.text import Text
    from fallow.patterns.codebooks import cluster_store
    from fallow.patterns.collect import collect

    # Of this model's weights PPL depends so little on neurons that a search has something to find.
    model = fallow.load(make_folder("llama", folder / "model", initializer_range=0.1))
    (folder / "calibration.txt").write_text(TEXT)
    (folder / "text.txt").write_text(OTHER_TEXT)
    text = Text("calibration", TEXT)
    plan = calibrate(model, "topk", sparsity=0.5, text=text, context=16, windows=4, measure=False)
    plan.save(folder / "a.plan")
    store = collect(model, plan, folder / "store", text, context=16, windows=40)
    cluster_store(store, folder / "codebooks", 4)
    layers = {"layer_0": 0.1, "layer_1": 0.2}
    thresholds = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), layers)
    (folder / "model_50.json").write_text(json.dumps(thresholds))
    x = np.geomspace(1e9, 1e11, 12)
    ratio = np.exp(-((x / 1e10) ** 0.3)) * 0.2 + 0.1 + 1e-3 * np.sin(np.arange(12))
    points = {"token_passed": x.tolist(), "activation_ratio": ratio.tolist()}
    (folder / "curve.json").write_text(json.dumps(points))
    words = ["the", "ship", "sailed", "at", "dawn", "and", "no", "one", "saw", "it", "return"]
    rng = np.random.default_rng(0)
    novel = "\n".join(" ".join(rng.choice(words, 12)) for _ in range(600))
    (folder / "novel.txt").write_text(novel)
    (folder / "sweep.toml").write_text(
        '[base]\ntext = "novel.txt"\nhidden_size = 64\nlayers = 1\nintermediate_size = 24\n'
        "vocabulary = 270\ncontext = 16\nbatch = 8\ntokens = 2000\ncheckpoints = 1\n"
        "[grid]\nseed = [0, 1]\n"
    )


# Files -------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, Path]:
    """Every file by its path in the folder, but for those under names that begin with a dot."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {
        name: path
        for name, path in found.items()
        if path.is_file() and not any(part.startswith(".") for part in Path(name).parts)
    }


def check_whole(path: Path) -> None:
    """Raises whatever its reader does if a file is not whole."""
    import torch

    from fallow.engine.engine import Engine
    from fallow.patterns.codebooks import load_codebooks
    from fallow.plan import Plan

    kind, data = path.suffix, path.read_bytes()
    if kind == ".json":
        json.loads(data)
    elif kind == ".npy":
        np.load(path)
    elif kind == ".npz":
        content(path)
    elif kind == ".plan":
        Plan.load(path)
    elif kind == ".gguf":
        Engine(path, threads=1).forward([1, 2])
    elif kind == ".safetensors":
        from safetensors.numpy import load_file

        load_file(path)
    elif kind in (".pt", ".training"):
        torch.load(path, weights_only=True)
    elif path.name == "codebooks" or path.parent.name == "codebooks.parts":
        load_codebooks(path)
    elif kind == ".csv":
        list(csv.reader(data.decode().splitlines(), strict=True))
    elif kind == ".svg":
        ElementTree.fromstring(data)
    elif kind == ".png":
        import matplotlib.image

        matplotlib.image.imread(path)
    elif kind == ".html" and not data.rstrip().endswith(b"</html>"):
        raise ValueError("the end is missing")


def content(path: Path) -> str:
    """What two files of equal content have in common."""
    if path.name == "codebooks":  # safetensors write metadata in any order
        data = path.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:size]), sort_keys=True).encode()
        return hashlib.sha256(header + data[size:]).hexdigest()
    if path.suffix != ".npz":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with zipfile.ZipFile(path) as file:  # which has times
        parts = {name: hashlib.sha256(file.read(name)).hexdigest() for name in file.namelist()}
    return json.dumps(parts, sort_keys=True)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


# Trials ------------------------------------------------------------------------------------------


@dataclass
class Usual:
    """Undisturbed runs of a command."""

    seconds: float
    first_write: float  # seconds, until the first file is there
    files: dict[str, str]  # content by name
    folder: Path  # a copy of the last run's output


@dataclass
class Tally:
    """What became of a command's trials."""

    command: str
    seconds: float
    first_write: float
    kills: int = 0
    too_late: int = 0  # besides: it had finished
    writing: int = 0  # kills after the first file
    temporary: int = 0  # kills that left temporary files
    continued: int = 0  # kills that left something to go on from
    defects: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


SERVER = """
import importlib, json, os, pkgutil, signal, sys
import matplotlib.pyplot, scipy.optimize, scipy.stats, torch
import transformers.models.llama.modeling_llama
import fallow
for module in pkgutil.walk_packages(fallow.__path__, "fallow."):
    if module.name.split(".")[1] not in ("__main__", "serving", "harness"):
        importlib.import_module(module.name)
for line in sys.stdin:
    request = json.loads(line)
    process = os.fork()
    if process == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.dup2(os.open(request["said"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        sys.argv = ["fallow", *request["words"]]
        try:
            fallow.cli.main()
        except SystemExit as stop:
            os._exit(stop.code or 0)  # clearing up what torch imported takes a second
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Server:
    """Starts commands as processes of their own, quickly."""

    def __init__(self, before: tuple[str, ...] = (), **variables: str) -> None:
        """With these environment variables besides its own, and words before the command."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | variables
        self._process = subprocess.Popen(
            [*before, sys.executable, "-c", SERVER], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()

    def start(self, words: list[str], said: Path) -> "Process":
        assert self._process.stdin is not None
        request = {"words": words, "said": str(said)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Process(int(self._answer()), self._answer)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that starts commands has ended")
        return line


@dataclass
class Process:
    """A command that runs."""

    number: int
    _answer: Any = field(repr=False)

    @property
    def seconds(self) -> float | None:
        """Processor time of all its threads; None if it has ended."""
        total = 0
        try:
            for task in Path(f"/proc/{self.number}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
            state = Path(f"/proc/{self.number}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return None
        return None if state == "Z" else total / 1e9

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code, below 0 of one that was killed."""
        return int(self._answer())


class Killer:
    """Runs a command's trials in a folder of inputs and outputs."""

    def __init__(self, name: str, root: Path, server: Server, seed: int = 0) -> None:
        self.name, self.command, self.root, self.server = name, COMMANDS[name], root, server
        self.inputs = make_inputs(root)
        self.out = root / "out"
        self.rng = np.random.default_rng([seed, *name.encode()])

    def run(self, kills: int) -> Tally:
        usual = self.measure()
        tally = Tally(self.name, round(usual.seconds, 3), round(usual.first_write, 3))
        while tally.kills < kills:
            self._trial(usual, tally)
        return tally

    def measure(self) -> Usual:
        """Two undisturbed runs, which must agree."""
        found: list[dict[str, str]] = []
        for _ in range(2):
            self._clear()
            seconds = first = 0.0
            process = self.start()
            while (now := process.seconds) is not None:
                seconds = now
                if not first and any(self.out.iterdir()):
                    first = now
                time.sleep(POLL)
            self._check_end(process)
            files = files_of(self.out)
            for path in files.values():
                check_whole(path)
            found.append({name: self._content(name, path) for name, path in files.items()})
        differing = [n for n in found[0] | found[1] if found[0].get(n) != found[1].get(n)]
        if differing:
            raise RuntimeError(f"{self.name}: two undisturbed runs differ in {differing}")
        folder = self.root / "undisturbed" / self.name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.out, folder)
        return Usual(seconds, first or seconds, found[0], folder)

    def _trial(self, usual: Usual, tally: Tally) -> None:
        self._clear()
        late = min(usual.first_write, 0.8 * usual.seconds)
        begin = late if (tally.kills + tally.too_late) % 2 else 0.0
        moment = float(self.rng.uniform(begin, usual.seconds))
        process = self.start()
        while (now := process.seconds) is not None and now < moment:
            time.sleep(POLL)
        if now is not None:
            process.kill()
        killed = process.wait() == -signal.SIGKILL
        left = files_of(self.out)
        if killed:
            tally.kills += 1
            tally.writing += bool(left)
            tally.temporary += any(p.name.startswith(".") for p in self.out.rglob("*"))
            tally.continued += any(_matches(name, self.command.state) for name in left)
        else:
            tally.too_late += 1
        problems = [*self._problems(left, usual), *self._again(usual)]
        tally.defects += [f"killed after {moment:.3f} s: {problem}" for problem in problems]

    def _problems(self, left: dict[str, Path], usual: Usual) -> Iterator[str]:
        """What is wrong with files that have their final names."""
        for name, path in left.items():
            grows, state = (
                _matches(name, patterns) for patterns in (self.command.grows, self.command.state)
            )
            if path.suffix == ".jsonl":
                yield from self._lost_lines(name, path, usual)
                continue
            if grows and path.parent.name == "store":
                yield from self._wrong_rows(name, path, usual)
                continue
            try:
                check_whole(path)
            except Exception as error:
                yield f"{name} is not whole: {type(error).__name__}: {error}"
                continue
            if name not in usual.files and not state:
                yield f"{name} should not be there"
            if name in usual.files and not grows and self._content(name, path) != usual.files[name]:
                yield f"{name} differs from that of an undisturbed run"

    @staticmethod
    def _lost_lines(name: str, path: Path, usual: Usual) -> Iterator[str]:
        """Whole lines must be some of the undisturbed run's."""
        whole = usual.folder / name
        known = set(whole.read_bytes().split(b"\n")) if whole.exists() else None
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                json.loads(line)
            except ValueError:
                yield f"{name} has a line that is no JSON"
            if known is not None and line not in known:
                yield f"{name} has a line that the undisturbed run's has not"

    @staticmethod
    def _wrong_rows(name: str, path: Path, usual: Usual) -> Iterator[str]:
        """Windows that a store says are finished must be the undisturbed run's."""
        whole = usual.folder / name
        log = path.parent / "done.jsonl"
        done = [int(n) for n in log.read_text().split("\n")[:-1]] if log.exists() else []
        header = path.parent / "store.json"
        if path.suffix in (".json", ".npy") or not header.exists():
            if path.read_bytes() != whole.read_bytes():
                yield f"{name} differs from that of an undisturbed run"
            return
        size = whole.stat().st_size // json.loads(header.read_text())["n_windows"]
        found, expected = path.read_bytes(), whole.read_bytes()
        for window in done:
            rows = slice(window * size, (window + 1) * size)
            if found[rows] != expected[rows]:
                yield f"{name} lacks rows of window {window}, which counts as finished"

    def _again(self, usual: Usual) -> Iterator[str]:
        """What is wrong when the same command has run again."""
        try:
            self._check_end(self.start())
        except RuntimeError as error:
            if not (self.command.once and "is there already" in str(error)):
                yield f"the same command fails: {error}"
                return
        found = {name: self._content(name, path) for name, path in files_of(self.out).items()}
        for name in sorted(found | usual.files):
            if found.get(name) != usual.files.get(name):
                what = "differs from" if name in found and name in usual.files else "is not as in"
                yield f"after the same command {name} {what} the undisturbed run"

    def _content(self, name: str, path: Path) -> str:
        return "" if _matches(name, self.command.varies) else content(path)

    def start(self) -> Process:
        words = [word.format(**self.inputs) for word in self.command.line.split()]
        return self.server.start(words, self.root / "said")

    def _check_end(self, process: Process) -> None:
        """Raises RuntimeError with what the command said last if it fails."""
        code = process.wait()
        if code:
            lines = (self.root / "said").read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.name}: exit code {code}, {lines[-1:]}")

    def _clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
