"""Damaged files, sudden death, rude clients: a hundred thousand files and hundreds of kills.

Some ten minutes of one core each; a stopped step goes on where it was:

    python benchmarks/reliability.py fuzz        # damaged files of every format
    python benchmarks/reliability.py kill        # every command that writes, killed at any moment
    python benchmarks/reliability.py power       # the same, and the power fails; needs strace
    python benchmarks/reliability.py guided      # libFuzzer, atheris: 20 minutes; needs clang
    python benchmarks/reliability.py load        # many clients at one server: two minutes
    python benchmarks/reliability.py hostile     # requests that mean harm: five minutes
    python benchmarks/reliability.py pages       # reports in a browser; makes them first: an hour
    python benchmarks/reliability.py --report    # writes docs/results/reliability.md
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import LINES, MEMORY_MB, SECONDS, SENDERS
from tradeoff import ROOT, keeper, machine_line

sys.path.append(str(ROOT / "tests"))  # where the short runs of the same are

RESULTS = ROOT / "benchmarks" / "results" / "reliability"
CASES, SEED = 100_000, 0
KILLS = 15  # of each command
STATES = 6  # after a loss of power, from which the command is run again
GUIDED_SECONDS = 300  # of each target


def steps() -> dict[str, Callable[[], None]]:
    return {
        "fuzz": fuzz, "guided": guided, "kill": kill, "power": power, "load": load,
        "hostile": hostile, "pages": pages,
    }  # fmt: skip


def fuzz() -> None:
    """Damaged files by target: see tests/harness/fuzzing.py."""
    from harness.fuzzing import Fuzzer, shares

    keep = keeper(RESULTS / "fuzz")
    with tempfile.TemporaryDirectory() as seeds:
        fuzzer = Fuzzer(SEED, Path(seeds), ROOT / "build" / "fuzz-defects")
        for name, numbers in shares(CASES).items():
            keep(name, lambda some={name: numbers}: fuzzer.run(some)[0].to_json())
            print(name, flush=True)


def kill() -> None:
    """Killed commands: see tests/harness/killing.py."""
    from harness.killing import COMMANDS, Killer, Server

    keep = keeper(RESULTS / "kill")
    with tempfile.TemporaryDirectory() as root, Server() as server:
        for name in COMMANDS:
            keep(name, lambda n=name: Killer(n, Path(root), server, SEED).run(KILLS).to_json())
            print(name, flush=True)


def guided() -> None:
    """Fuzzing that looks for new paths: see tests/harness/guided.py."""
    from harness.guided import TARGETS, build_core, run

    keep, defects = keeper(RESULTS / "guided"), ROOT / "build" / "fuzz-defects"
    program = build_core(ROOT / "build" / "fuzz")
    for name in TARGETS:
        with tempfile.TemporaryDirectory() as root:
            keep(
                name,
                lambda n=name, r=Path(root): run(
                    n, GUIDED_SECONDS, SEED, r, defects, program
                ).to_json(),
            )
        print(name, flush=True)


def power() -> None:
    """Commands whose machine loses power: see tests/harness/power.py."""
    from harness.killing import COMMANDS, Server
    from harness.power import PowerLoss

    keep = keeper(RESULTS / "power")
    with tempfile.TemporaryDirectory() as root, Server() as server:
        for name in COMMANDS:
            keep(name, lambda n=name: PowerLoss(n, Path(root), server).run_states(STATES).to_json())
            print(name, flush=True)


def load() -> None:
    """Clients of a server: see load.py."""
    from fallow.packing.packer import pack
    from load import load as run

    keep = keeper(RESULTS / "load")
    with tempfile.TemporaryDirectory() as folder:
        pack("smollm2", Path(folder) / "model.gguf")
        keep("smollm2", lambda: run(Path(folder) / "model.gguf"))


def hostile() -> None:
    """Requests that mean harm: see hostile.py."""
    from fallow.packing.packer import pack
    from hostile import hostile as run

    keep = keeper(RESULTS / "hostile")
    with tempfile.TemporaryDirectory() as folder:
        pack("smollm2", Path(folder) / "model.gguf")
        keep("smollm2", lambda: run(Path(folder) / "model.gguf"))


def pages() -> None:
    """Reports in a browser: see pages.py."""
    from pages import measure

    keep = keeper(RESULTS / "pages")
    for name in ("smollm2", "qwen2.5-1.5b", "gemma3"):
        keep(name, lambda n=name: measure(n))


# Report ------------------------------------------------------------------------------------------


INTRODUCTION = """# Reliability

`benchmarks/reliability.py` does it; short runs of the same are tests."""

FUZZ = """
## Damaged files

Whole files of every format that fallow reads are damaged: bits and bytes changed, parts cut off,
removed, repeated, swapped or blanked, numbers set to extremes, and the structure of JSON, GGUF and
safetensors changed (keys dropped, values of other types, NaN, wrong shapes, deep nesting). A
damaged file must be read, and is then used (a forward pass, a fit, a resumed run), or be refused
with one line that names it. Anything else is a defect: another exception, a crash, ten seconds of
processor time, 400 MB of memory. `make fuzz` runs it with any seed."""

KILL = """
## Killed commands

Every command that writes files is started on a tiny model, killed (SIGKILL) at a random moment,
and run again. Whatever has its final name must be whole, by reading it and against an undisturbed
run, and the second run must end with the undisturbed run's files. Time is that of the processor,
without imports; half of the moments are spread over all of it, half over that behind the first
file. **Too late**: trials besides, which found the command finished; **writing**: kills that found
files; **temporary**: kills that left temporary files, whose names begin with a dot; **continued**:
kills that left something which the second run goes on from."""

GUIDED = """
## Paths that were not taken

libFuzzer (the C++ core's readers of packed files and of the plugin's, and a pass with random cuts
through what they accept, under Address- and UndefinedBehaviorSanitizer) and atheris (the readers of
GGUF, safetensors and plans in Python) change tiny models and keep what takes a new path. **Edges**:
those that were taken, of Python in `fallow.checkpoints` and `fallow.plan`. The same things are
defects as above. `make fuzz` runs it."""

POWER = f"""
## Lost power

strace records what a command tells the kernel of its output folder, from C++, Rust and Python.
After every call that changes it the power fails, and four disks are looked at: with everything
written; with all names, but of files only what was synced; with zeros where data were not synced;
and of folders only the names that were synced. Whatever has its final name must be whole, as above;
from {STATES} of a command's disks, evenly spread, the same command must end with the undisturbed
run's files. **States**: disks that differ."""

LOAD = """
## Rude clients

Clients of one `fallow serve` ask for greedy answers to a handful of prompts that begin differently;
some read them as a stream, some leave in the middle of their own request or of the answer, some
send garbage. Told to come back (429) they do. Every answer must be the engine's own to that prompt,
and memory must not grow."""

HOSTILE = f"""
## Hostile requests

Each kind is sent for {SECONDS:g} seconds by {SENDERS} clients at once to a `fallow serve` of
SmolLM2 with one thread and `--memory {MEMORY_MB}MB`, while a client of another address asks for
`/health` all the time, each time over a new connection. **/health**: how long that took.
**Memory**: the most that the process had, mapped pages of the model's file among it. Kinds that
hold connections open have {LINES} of each client."""

PAGES = """
## Reports

`fallow report` with its own settings, opened in headless Chromium at the width of a phone and of a
desk, until the page has loaded and its first figure is drawn; five times each, in a new browser."""


def report() -> str:
    lines = [INTRODUCTION]
    for name, table in (
        ("fuzz", _fuzz_lines), ("guided", _guided_lines), ("kill", _kill_lines),
        ("power", _power_lines), ("load", _load_lines), ("hostile", _hostile_lines),
        ("pages", _page_lines),
    ):  # fmt: skip
        path = RESULTS / name / "result.json"
        if path.exists():
            lines += table(list(json.loads(path.read_text()).values()))
            where = json.loads((RESULTS / name / "machine.json").read_text())
            lines.append(f"\n{machine_line(where)}.")
    return "\n".join(lines) + "\n"


def _fuzz_lines(rows: list[dict[str, Any]]) -> list[str]:
    total: dict[str, Any] = {"target": "**all**"}
    names = ("read", "refused", "defects", "seconds")
    total |= {name: sum(row[name] for row in rows) for name in names}
    lines = [FUZZ, "\n| files | cases | read | refused | defects | seconds |\n" + "|---" * 6 + "|"]
    for row in [*rows, total]:
        cases = row["read"] + row["refused"] + row["defects"]
        lines.append(
            f"| {row['target']} | {cases} | {row['read']} | {row['refused']} | {row['defects']} "
            f"| {row['seconds']:.0f} |"
        )
    return lines


def _kill_lines(rows: list[dict[str, Any]]) -> list[str]:
    names = ("kills", "too_late", "writing", "temporary", "continued")
    heads = ("command", "seconds", "kills", "too late", "writing", "temporary", "continued")
    lines = [KILL, f"\n| {' | '.join(heads)} | defects |\n" + "|---" * 8 + "|"]
    for row in rows:
        cells = [row["command"], f"{row['seconds']:.2f}", *(str(row[name]) for name in names)]
        lines.append(f"| {' | '.join(cells)} | {len(row['defects'])} |")
    sums = [str(sum(row[name] for row in rows)) for name in names]
    defects = sum(len(row["defects"]) for row in rows)
    lines.append(f"| **all** | | {' | '.join(sums)} | {defects} |")
    return lines


def _guided_lines(rows: list[dict[str, Any]]) -> list[str]:
    heads = ("target", "seconds", "executions", "edges", "defects")
    lines = [GUIDED, f"\n| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|"]
    for r in rows:
        cells = (r["target"], r["seconds"], r["executions"], r["edges"], len(r["defects"]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _power_lines(rows: list[dict[str, Any]]) -> list[str]:
    names = ("calls", "syncs", "states", "again")
    heads = ("command", "calls", "syncs among them", "states", "run again", "defects")
    lines = [POWER, f"\n| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|"]
    for r in rows:
        cells = (r["command"], *(r[name] for name in names), len(r["defects"]))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    sums = [*(sum(r[name] for r in rows) for name in names), sum(len(r["defects"]) for r in rows)]
    lines.append(f"| **all** | {' | '.join(map(str, sums))} |")
    return lines


def _load_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [LOAD]
    for r in rows:
        lines += [
            f"\n{r['requests']} requests of {r['clients']} clients on SmolLM2, one thread, "
            f"{r['seconds']:.0f} s; exit code {r['exit_code']}.\n\n| outcome | requests |\n"
            "|---|---|",
        ]
        lines += [f"| {name} | {count} |" for name, count in r["outcomes"].items()]
        (first, before), (last, after) = r["memory_mb"][0], r["memory_mb"][-1]
        lines.append(
            f"\nMemory besides the model's file: {before:.1f} MB after {first} requests, "
            f"{after:.1f} MB after {last}."
        )
    return lines


def _hostile_lines(rows: list[dict[str, Any]]) -> list[str]:
    heads = ("sent", "what became of it", "/health, median ms", "worst", "memory, MB", "CPU, s")
    lines = [HOSTILE, f"\n| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|"]
    (found,) = rows
    for name, r in found.items():
        became = ", ".join(f"{what}: {count}" for what, count in r["outcomes"].items())
        broken = [] if r["exit_code"] == 0 else [f"exit code {r['exit_code']}"]
        broken += ["traceback"] if r["traceback"] else []
        lines.append(
            f"| {name} | {'; '.join([became, *broken])} | {r['health_ms']['median']:.0f} | "
            f"{r['health_ms']['worst']:.0f} | {r['peak_mb']:.0f} | {r['processor_seconds']:.1f} |"
        )
    slow = sum(r["health_ms"]["worst"] > 100 for r in found.values())
    lines.append(f"\n`/health` took more than 100 ms at worst for {slow} of {len(found)} kinds.")
    return lines


def _page_lines(rows: list[dict[str, Any]]) -> list[str]:
    kinds = list(rows[0]["seconds"])
    lines = [
        f"{PAGES}\n\n| report | MB | figures | {', '.join(kinds)}: median (most), seconds "
        "| errors on the console |\n" + "|---" * 5 + "|"
    ]
    for r in rows:
        times = (f"{r['seconds'][k]['median']:.2f} ({r['seconds'][k]['most']:.2f})" for k in kinds)
        lines.append(
            f"| {r['model']} | {r['mb']:.1f} | {r['figures']} | {', '.join(times)} "
            f"| {len(r['faults'])} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", choices=[*steps(), []])
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.steps:
        steps()[name]()
    if arguments.report:
        (ROOT / "docs" / "results" / "reliability.md").write_text(report())


if __name__ == "__main__":
    main()
