"""Fuzzing that looks for new paths: libFuzzer through the C++ core, atheris through the readers.

    PYTHONPATH=tests python -m harness.guided --seconds 300    # part of: make fuzz

`core` runs tests/harness/fuzz_core.cpp, which clang builds with Address- and
UndefinedBehaviorSanitizer. The others run a target of fuzzing.py on one file, whose changes are
those of damage.py and libFuzzer's own. Seeds are tiny models, written anew. What ends a process,
takes ten seconds or more memory than `MEMORY_MB`, or is neither read nor refused in one line is a
defect; its input is kept.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
READERS = {"source": "m.gguf", "weights": "model.safetensors", "plan": "a.plan"}
TARGETS = ("core", *READERS)
LONGEST = 1 << 20  # bytes of an input: libFuzzer cuts longer seeds, which nothing then accepts
SECONDS = 10  # that one may take
MEMORY_MB = 2048  # of the process, a sanitizer's own among it


@dataclass
class Found:
    """What a run did."""

    target: str
    seconds: int
    executions: int
    edges: int
    defects: list[str]  # files

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# Seeds -------------------------------------------------------------------------------------------


def write_core_seeds(root: Path, corpus: Path) -> None:
    """Models of every kind of layer, without tokenizers; and the names in them (words.txt)."""
    from conftest import engine_plan
    from fallow.common.progress import console
    from fallow.engine.engine import Engine
    from fallow.packing.ffn_file import pack_ffns
    from fallow.plan import Cut
    from harness.damage import read_gguf_entries, write_gguf_entries
    from harness.seeds import Seeds
    from test_models import write_gguf

    console.quiet = True
    seeds = Seeds(root)
    found = [
        seeds.packed(f"core/{name}", seeds.model(name), quant="f32")
        for name in ("llama", "gemma3", "gemma4", "phi", "opt", "olmo2", "qwen3_moe", "gpt_oss")
    ]
    wide = seeds.model("llama", hidden_size=64, intermediate_size=64)
    found.append(seeds.packed("core/coarse", wide, quant="q4_0", shortlist=True))
    ffn = seeds.root / "ffn"
    ffn.mkdir()
    source = write_gguf("llama", seeds.loaded(), ffn / "m.gguf")
    whole = Engine(seeds.packed("core/llama", seeds.model()) / "packed.gguf", plan=False)
    plan = engine_plan(whole, Cut("gate_act", "threshold", 0.1), Cut("inter", "tail", 0.2))
    pack_ffns(source, ffn / "packed.gguf", plan=plan, down="f32")
    tails = (bytes(34), bytes(range(32)) + b"\x80\x01", b"\x00\x09\x01\x90" * 8 + b"\xc1\x02")
    words = set()
    for folder in (*found, ffn):
        data = (folder / "packed.gguf").read_bytes()
        fields, tensors, start = read_gguf_entries(data)
        kept = [entry for entry in fields if entry[0].startswith(b"fallow.")]
        words |= {name.decode() for name, _ in (*kept, *tensors)}
        small = write_gguf_entries(data[4:8], kept, tensors, data[start:])
        if len(small) + len(tails[0]) > LONGEST:
            raise ValueError(f"the seed {folder.name} has {len(small)} bytes")
        for i, tail in enumerate(tails):
            (corpus / f"{folder.name}.{i}").write_bytes(small + tail)
    (root / "words.txt").write_text("".join(f'"{word}"\n' for word in sorted(words)))


# The readers, in a process of their own ----------------------------------------------------------


def read(name: str, root: Path, corpus: Path, options: list[str]) -> None:
    """Runs the readers of a target of fuzzing.py, its paths through Python recorded."""
    import atheris

    with atheris.instrument_imports(include=["fallow.checkpoints", "fallow.plan"]):
        import fallow.checkpoints.tokenizer
        import fallow.plan  # noqa: F401
    import numpy as np
    import torch

    from fallow.common.errors import FallowError
    from fallow.common.progress import console
    from harness import damage, fuzzing
    from harness.seeds import Seeds

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console.quiet = True
    target = fuzzing.TARGETS[name][0](Seeds(root))
    file = READERS[name]
    for seed in target.seeds:
        if (seed / file).exists():
            shutil.copy(seed / file, corpus / f"{seed.name}-{file}")
    folder = root / "scratch"
    shutil.copytree(target.seeds[0], folder)
    change = damage.damage_gguf if file.endswith(".gguf") else damage.damage_safetensors

    def run(data: bytes) -> None:
        (folder / file).unlink(missing_ok=True)  # it may be mapped still
        (folder / file).write_bytes(data)
        try:
            target.use(folder)
        except FallowError as error:
            if "\n" in str(error):
                raise RuntimeError("a refusal of several lines") from error

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        if rng.random() < 0.5:
            try:
                return change(rng, data)[:longest]
            except Exception:  # it is too damaged for changes of its structure
                pass
        return atheris.Mutate(data, longest)

    atheris.Setup([sys.argv[0], *options], run, custom_mutator=mutate)
    atheris.Fuzz()


# Runs --------------------------------------------------------------------------------------------


def build_core(folder: Path) -> Path:
    """The program of fuzz_core.cpp."""
    sanitizers = "fuzzer-no-link,address,undefined"
    how = ("-DCMAKE_CXX_COMPILER=clang++", "-DFALLOW_FUZZ=ON", f"-DFALLOW_SANITIZE={sanitizers}")
    subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), *how], check=True, stdout=subprocess.DEVNULL
    )
    jobs = ("--parallel", str(os.cpu_count()))
    build = ["cmake", "--build", str(folder), "--target", "fallow_fuzz", *jobs]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return folder / "fallow_fuzz"


def run(name: str, seconds: int, seed: int, root: Path, keep: Path, program: Path) -> Found:
    """One target, for so many seconds; it ends at its first defect."""
    corpus, words = root / "corpus", root / "words.txt"
    corpus.mkdir(parents=True)
    keep.mkdir(parents=True, exist_ok=True)
    before = set(keep.iterdir())
    options = [
        f"-max_total_time={seconds}", f"-seed={seed + 1}", f"-max_len={LONGEST}",
        f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={keep}/{name}-",
        "-print_final_stats=1", "-verbosity=1", str(corpus),
    ]  # fmt: skip
    if name == "core":
        write_core_seeds(root, corpus)
        command = [str(program), f"-dict={words}", *options]
    else:
        command = [sys.executable, "-m", "harness.guided", "--read", name, str(root), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    edges = re.findall(r"cov: (\d+)", done.stderr)
    executions = re.findall(r"number_of_executed_units:\s*(\d+)", done.stderr)
    if not edges or (not executions and done.returncode == 0):
        raise RuntimeError(f"{name} did not run: {done.stderr[-2000:]}")
    defects = sorted(str(path) for path in set(keep.iterdir()) - before)
    if done.returncode != 0:
        print(done.stderr[-6000:], file=sys.stderr)
        defects = defects or [f"exit code {done.returncode}"]
    count = int(executions[-1]) if executions else 0
    return Found(name, seconds, count, int(edges[-1]), defects)


def table(found: list[Found]) -> str:
    lines = [f"{'target':16}{'seconds':>9}{'executions':>12}{'edges':>9}{'defects':>9}"]
    for f in found:
        lines.append(f"{f.target:16}{f.seconds:9}{f.executions:12}{f.edges:9}{len(f.defects):9}")
    return "\n".join([*lines, *(defect for f in found for defect in f.defects)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "fuzz-defects")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    program = build_core(arguments.build) if "core" in arguments.targets else Path()
    seconds, found = max(1, arguments.seconds // len(arguments.targets)), []
    for name in arguments.targets:
        with tempfile.TemporaryDirectory() as root:
            keep = arguments.keep.resolve()
            found.append(run(name, seconds, arguments.seed, Path(root), keep, program))
    print(json.dumps([f.to_json() for f in found]) if arguments.json else table(found))
    sys.exit(any(f.defects for f in found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[-1]), sys.argv[4:])
    else:
        main()
