"""Decode under a memory limit, ours and llama.cpp's on the GGUF that was packed, both in a cgroup.

For each limit: the packed model with `--memory`, one token per pass and in the lossless mode, and
llama.cpp with its weights mapped, with and without repacking (a copy in anonymous memory), of which
the faster one counts. Page caches are dropped before each. Needs root, cgroup v1 and
llama-cpp-python==0.3.36:

    python benchmarks/memory.py qwen2.5-1.5b    # writes benchmarks/results/memory
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine import TEST, THREADS
from tradeoff import ROOT, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "memory"
CGROUP = Path("/sys/fs/cgroup/memory/fallow-benchmark")
LIMITS_MB = (1000, 800, 600)
PROMPT, NEW, LLAMA_NEW, PROMPTS = 256, 64, 16, 3


def run(name: str) -> None:
    from fallow import pack
    from fallow.catalog import ALIASES, resolve

    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    packed, source = folder / "packed.gguf", resolve(ALIASES[name])
    if not packed.exists():
        pack(name, packed)
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for limit in LIMITS_MB:
        for kind in ("fallow", "lossless", "llama.cpp", "llama.cpp without repacking"):
            key = f"{limit} MB, {kind}"
            if key not in result:
                file = packed if "llama" not in kind else source
                result[key] = in_cgroup(limit, [kind, str(file), str(limit)])
                path.write_text(json.dumps(result, indent=1) + "\n")


def in_cgroup(limit_mb: int, arguments: list[str]) -> dict[str, Any]:
    """What a child that may not take more than the limit and 5 % prints last."""
    CGROUP.mkdir(exist_ok=True)
    (CGROUP / "memory.limit_in_bytes").write_text(str(int(limit_mb * 1.05e6)))
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")

    def enter() -> None:
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def child(kind: str, path: str, limit: str) -> dict[str, Any]:
    return llama(path, "without" not in kind) if "llama" in kind else ours(kind, path, limit)


def prompts(tokenizer: Any) -> list[Any]:
    from fallow.text import cut_windows, load_text

    return list(cut_windows(load_text(TEST, "evaluation"), tokenizer, PROMPT, PROMPTS))


def ours(kind: str, path: str, limit: str) -> dict[str, Any]:
    from fallow import Engine

    engine = Engine(path, plan=False, threads=THREADS, context=PROMPT + NEW, memory=f"{limit}MB")
    runs = []
    for prompt in prompts(engine.tokenizer):
        for _ in engine.generate(prompt, NEW, lossless=kind == "lossless"):
            pass
        runs.append(engine.stats.to_json())
    assert engine.residency is not None
    return {
        "runs": [{k: v for k, v in r.items() if k != "sparsity_per_layer"} for r in runs],
        "pass_bytes": engine.residency.pass_bytes,
        "disk_gbps": engine.disk_gbps,
    }


def llama(path: str, repack: bool) -> dict[str, Any]:
    import llama_cpp

    from fallow.baselines import LlamaCpp

    usual = llama_cpp.llama_model_default_params

    def parameters() -> Any:
        found = usual()
        found.use_extra_bufts = repack
        return found

    llama_cpp.llama_cpp.llama_model_default_params = parameters
    engine = LlamaCpp(path, THREADS, PROMPT + LLAMA_NEW)
    text = TEST.read_text(encoding="utf-8")[: 16 * PROMPT * PROMPTS].encode()
    ids = engine.model.tokenize(text, add_bos=False)
    starts = range(0, PROMPT * PROMPTS, PROMPT)
    return {"runs": [engine.run(ids[i : i + PROMPT + LLAMA_NEW], PROMPT) for i in starts]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    for name in arguments.models:
        run(name)


if __name__ == "__main__":
    main()
