"""Damaged files of every format that fallow reads: each is read and used, or refused in one line.

    PYTHONPATH=tests python -m harness.fuzzing --cases 100000 --seed 0    # also: make fuzz
    PYTHONPATH=tests python -m harness.fuzzing --targets plan --first 4711 --cases 1    # one again

A case is a whole file, changed as its number and the seed decide (damage.py), and given to
what reads it. Anything but a result or a FallowError of one line that names the file is a defect:
another exception, the process's death, more than `SECONDS`, or more than `MEMORY_MB`. Cases run in
a process of their own, so that its death is told apart and costs nothing but a new start.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from fallow.common.errors import FallowError
from fallow.engine.process import peak_rss_mb
from harness import damage
from harness.model_files import (
    budget,
    folder,
    loaded_source,
    packed,
    plan,
    source,
    weights,
)
from harness.seeds import Seeds, Target
from harness.work_files import (
    clusters,
    codebook,
    costs,
    curve,
    export,
    harness,
    law,
    report,
    runs,
    samples,
    selector,
    store,
    task,
    text,
    thresholds,
    tradeoff,
)

SECONDS = 10.0  # of processor time that a case may take
LONGEST = 600.0  # seconds of any kind, for a case or to make whole files
MEMORY_MB = 400  # that a case may take beyond what the process had
ADDRESS_SPACE = 4_000_000_000  # bytes beyond what the process had: larger requests fail at once
Damage = Callable[[np.random.Generator, bytes], bytes]
DAMAGE: dict[str, Damage] = {
    "*.gguf": damage.damage_gguf,
    "*.plan": damage.damage_safetensors,
    "*.safetensors": damage.damage_safetensors,
    "codebooks": damage.damage_safetensors,
    "layer.*": damage.damage_safetensors,
    "*.jsonl": damage.damage_json_lines,
    "*.json": damage.damage_json,
    "*.txt": damage.damage_text,
    "*.toml": damage.damage_text,
    "*.jinja": damage.damage_text,
    "*": damage.damage_bytes,
}


TARGETS: dict[str, tuple[Callable[[Seeds], Target], int]] = {
    "packed": (packed, 220),
    "budget": (budget, 60),
    "source": (source, 150),
    "loaded source": (loaded_source, 10),
    "weights": (weights, 100),
    "folder": (folder, 10),
    "plan": (plan, 150),
    "store": (store, 70),
    "clusters": (clusters, 20),
    "codebook": (codebook, 50),
    "curve": (curve, 50),
    "text": (text, 40),
    "task": (task, 20),
    "thresholds": (thresholds, 15),
    "samples": (samples, 5),
    "tradeoff": (tradeoff, 5),
    "selector": (selector, 5),
    "law": (law, 5),
    "runs": (runs, 12),
    "export": (export, 3),
    "report": (report, 5),
    "costs": (costs, 10),
    "harness": (harness, 0),  # only if it is asked for
}


# Cases -------------------------------------------------------------------------------------------


@dataclass
class Case:
    """What became of one file."""

    target: str
    number: int
    outcome: str  # "read", "refused" or "defect"
    kind: str = ""  # of defect: what and where
    detail: str = ""


class Runner:
    """Runs the cases of a target in this process, in the folder `scratch`."""

    def __init__(self, name: str, root: Path, seed: int, scratch: Path) -> None:
        self.name, self.seed, self.scratch = name, seed, scratch
        self.target = TARGETS[name][0](Seeds(root))
        self.files = [
            (folder, path.relative_to(folder))
            for folder in self.target.seeds
            for path in sorted(folder.rglob("*"))
            if path.is_file() and any(path.relative_to(folder).match(f) for f in self.target.files)
        ]
        self._changed: tuple[Path, Path] | None = None  # a damaged file, and its whole one

    def run(self, number: int) -> Case:
        folder = self.prepare(number)
        before = peak_rss_mb()
        try:
            self.target.use(folder)
            case = Case(self.name, number, "read")
        except FallowError as error:
            case = self._refusal(number, folder, str(error))
        except BaseException as error:  # a panic of tokenizers' is no Exception
            case = self._defect(number, _place(error), traceback.format_exc())
        grown = peak_rss_mb() - before
        if grown > MEMORY_MB:
            return self._defect(number, "too much memory", f"{grown:.0f} MB")
        return case

    def prepare(self, number: int) -> Path:
        """A folder in which a file is damaged as the number says."""
        rng = np.random.default_rng((self.seed, zlib.crc32(self.name.encode()), number))
        whole, inner = self.files[int(rng.integers(len(self.files)))]
        folder = self.scratch / whole.name
        if self._changed is not None:
            _write(self._changed[0], self._changed[1].read_bytes())
        if self.target.writes or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
        change = next(d for pattern, d in DAMAGE.items() if fnmatch(inner.name, pattern))
        _write(folder / inner, change(rng, (whole / inner).read_bytes()))
        self._changed = folder / inner, whole / inner
        return folder

    def _refusal(self, number: int, folder: Path, message: str) -> Case:
        if "\n" in message.strip():
            return self._defect(number, "a refusal of several lines", message)
        if not any(name in message for name in (str(folder), *self.target.names)):
            words = " ".join(word for word in message.split() if word.isalpha())
            return self._defect(number, f"a refusal that names no file: {words[:60]}", message)
        return Case(self.name, number, "refused")

    def _defect(self, number: int, kind: str, detail: str) -> Case:
        return Case(self.name, number, "defect", kind, detail)


def _write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # the old file may be mapped still
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _place(error: BaseException) -> str:
    """The error's type, and the last function of fallow's that it passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/fallow/" in f.filename]
    where = f" in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}{where}"


@dataclass
class Result:
    """What became of a target's cases."""

    target: str
    seed: int
    read: int = 0
    refused: int = 0
    defects: int = 0
    seconds: float = 0.0
    kinds: dict[str, list[int]] = field(default_factory=dict)  # of defects: numbers of cases

    @property
    def cases(self) -> int:
        return self.read + self.refused + self.defects

    def add(self, case: Case) -> None:
        if case.outcome == "defect":
            self.defects += 1
            self.kinds.setdefault(case.kind, []).append(case.number)
        else:
            setattr(self, case.outcome, getattr(self, case.outcome) + 1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": round(self.seconds, 1)}


@dataclass
class Fuzzer:
    """Runs cases in other processes.

    Args:
        seed: decides every change.
        root: folder of whole files, made on first use.
        keep: folder for the damaged files of the first case of every kind of defect.
        seconds: of processor time, after which a case counts as hanging.
        longest: seconds of any kind, likewise.
    """

    seed: int
    root: Path
    keep: Path
    seconds: float = SECONDS
    longest: float = LONGEST

    def run(self, numbers: dict[str, range]) -> list[Result]:
        """Those cases of each target, one target after another."""
        results = {name: Result(name, self.seed) for name in numbers}
        left = dict(numbers)
        start = time.monotonic()
        while left:
            known = {(r.target, kind) for r in results.values() for kind in r.kinds}
            for case in self._cases(left, known):
                now = time.monotonic()
                results[case.target].add(case)
                results[case.target].seconds += now - start
                start = now
                for name in list(left):  # targets before it are done
                    if name == case.target:
                        left[name] = range(case.number + 1, left[name].stop)
                        break
                    del left[name]
            left = {name: rest for name, rest in left.items() if rest}
        return list(results.values())

    def _cases(self, left: dict[str, range], known: set[tuple[str, str]]) -> Iterator[Case]:
        """The cases of one process, up to the one that it dies of."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__])
        ours, theirs = context.Pipe()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            scratch = Path(folder)
            process = context.Process(target=self._work, args=(theirs, left, known, scratch))
            process.start()
            theirs.close()
            current: tuple[str, int] | None = None  # target and number of the case that runs
            try:
                while self._waits(ours, process.pid, current is not None):
                    message = ours.recv()
                    if message == "done":
                        return
                    if isinstance(message, Case):
                        current = message.target, message.number + 1
                        yield message
                    else:
                        current = message
                kind = "it hangs"
            except EOFError:
                process.join()
                kind = f"the process died: {process.exitcode}"
            finally:
                process.join(1)  # it ends by itself, or hangs
                process.kill()
                process.join()
            if current is None:
                raise RuntimeError(f"no whole files of {', '.join(left)}: {kind}")
            case = Case(*current, "defect", kind)
            if (case.target, kind) not in known:
                self._keep(case, scratch / case.target)
            yield case

    def _waits(self, connection: Any, process: int, is_case: bool) -> bool:
        """For a message. False: it takes too long."""
        start, used = time.monotonic(), _processor_seconds(process)
        while not connection.poll(0.5):
            if time.monotonic() - start > self.longest:
                return False
            if is_case and _processor_seconds(process) - used > self.seconds:
                return False
        return True

    def _work(
        self, connection: Any, left: dict[str, range], known: set[tuple[str, str]], scratch: Path
    ) -> None:
        """The process that runs cases, and keeps files of kinds that are not known.

        Sends None while it makes whole files, then the target and first number, each case, "done".
        """
        import torch

        from fallow.common.progress import console

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        console.quiet = True
        tempfile.tempdir = str(scratch)
        for name, numbers in left.items():
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            connection.send(None)
            runner = Runner(name, self.root, self.seed, scratch / name)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, resource.RLIM_INFINITY))
            connection.send((name, numbers.start))
            for number in numbers:
                case = runner.run(number)
                if case.kind and (name, case.kind) not in known:
                    known.add((name, case.kind))
                    runner.prepare(number)
                    self._keep(case, runner.scratch)
                connection.send(case)
        connection.send("done")

    def _keep(self, case: Case, scratch: Path) -> None:
        place = self.keep / f"{case.target.replace(' ', '-')}-{self.seed}-{case.number}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(scratch, place)
        text = f"{case.kind}\n\n{case.detail}\n"
        (place / "defect.txt").write_text(text, encoding="utf-8", errors="replace")
        what = f"{case.target}, seed {self.seed}, case {case.number}: {case.kind}"
        print(f"{what}; kept: {place}", file=sys.stderr, flush=True)


def _processor_seconds(process: int) -> float:
    """Of all its threads so far; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shares(cases: int, first: int = 0) -> dict[str, range]:
    """Numbers of cases of every target, so many in all."""
    total = sum(share for _, share in TARGETS.values())
    counts = {name: -(-cases * share // total) for name, (_, share) in TARGETS.items()}
    return {name: range(first, first + count) for name, count in counts.items() if count}


def table(results: list[Result]) -> str:
    lines = [f"{'target':16}{'cases':>9}{'read':>9}{'refused':>9}{'defects':>9}{'seconds':>9}"]
    for r in results:
        numbers = (r.cases, r.read, r.refused, r.defects)
        lines.append(f"{r.target:16}" + "".join(f"{n:9}" for n in numbers) + f"{r.seconds:9.0f}")
    total = [sum(getattr(r, n) for r in results) for n in ("cases", "read", "refused", "defects")]
    lines.append(f"{'all':16}" + "".join(f"{n:9}" for n in total))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="in all, or of each --targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--targets", nargs="+", choices=TARGETS)
    parser.add_argument("--seeds", type=Path, help="folder of whole files; default: a new one")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz-defects"))
    arguments = parser.parse_args()
    numbers = shares(arguments.cases, arguments.first)
    if arguments.targets:
        some = range(arguments.first, arguments.first + arguments.cases)
        numbers = dict.fromkeys(arguments.targets, some)
    with tempfile.TemporaryDirectory() as made:
        root = arguments.seeds or Path(made)
        results = Fuzzer(arguments.seed, root, arguments.keep.resolve()).run(numbers)
    print(table(results))
    sys.exit(any(r.defects for r in results))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
