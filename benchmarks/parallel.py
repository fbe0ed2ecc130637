"""Eight answers at once: tokens per second in all and of each, beside llama.cpp.

The engines are fed the same ids, each stream another text: fallow dense and with the packed plan, a
token of every stream in one pass, and dense one stream after another; llama.cpp with eight
sequences in a batch. Then our server answers eight requests, with eight slots and with one. All in
turn, medians of some runs. Needs llama-cpp-python==0.3.36 and the packed files of
benchmarks/optimize.py, or others:

    python benchmarks/parallel.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/parallel.py smollm2 --packed smollm2.gguf --streams 4 --runs 1
    python benchmarks/parallel.py --report    # writes docs/results/parallel.md
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine import OPTIMIZED, TEST, machine, ratio
from tradeoff import ROOT, machine_line, record_machine

RESULTS = ROOT / "benchmarks" / "results" / "parallel"
STREAMS, PROMPT, NEW, RUNS = 8, 128, 64, 5
THREADS = 2
ONE_BY_ONE = "fallow, one by one"

INTRODUCTION = """# Several answers at once

Streams of other texts, a token of each in one pass over the weights; prompts of 128 tokens were
read before, but for the servers, whose seconds have them in. Everything in turn, five runs: medians
of tokens per second of all streams together, of each, and of the ratios, with the lowest and the
highest. llama.cpp is llama-cpp-python 0.3.36 with as many sequences in one batch, on the GGUF that
was packed; its server was not timed. `python benchmarks/parallel.py` does it; every run is in
`benchmarks/results/parallel`, a folder per processor. Compare nothing across processors.
"""


class Fallow:
    """Our engine, dense or with its plan."""

    def __init__(self, packed: Path, streams: int) -> None:
        from fallow import Engine

        self.engine = Engine(packed, threads=THREADS, context=PROMPT + NEW, slots=streams)
        self.plan = self.engine.plan

    def prepare(self, texts: np.ndarray, plan: bool) -> None:
        self.engine.use_plan(self.plan if plan else None)
        for slot, ids in enumerate(texts):
            self.engine.reset(slot=slot)
            self.engine.forward(ids[:PROMPT], slot=slot)

    def together(self, texts: np.ndarray, plan: bool = False) -> float:
        """Seconds of reading what follows the prompts, (streams, PROMPT + NEW)."""
        self.prepare(texts, plan)
        start = time.perf_counter()
        for ids in texts.T[PROMPT:]:
            self.engine.forward_together(ids, range(len(ids)))
        return time.perf_counter() - start

    def one_by_one(self, texts: np.ndarray) -> float:
        self.prepare(texts, False)
        start = time.perf_counter()
        for slot, ids in enumerate(texts):
            for token in ids[PROMPT:]:
                self.engine.forward([token], slot=slot)
        return time.perf_counter() - start


class LlamaCpp:
    """Eight sequences of one context, a token of each in a batch."""

    def __init__(self, source: Path, streams: int) -> None:
        import llama_cpp

        self.api = api = llama_cpp
        self.quiet = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(
            str(source).encode(), api.llama_model_default_params()
        )
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = streams * (PROMPT + NEW), streams
        settings.n_batch = settings.n_ubatch = max(PROMPT, streams)
        settings.n_threads = settings.n_threads_batch = THREADS
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context for {source}")
        self.batch = api.llama_batch_init(max(PROMPT, streams), 0, 1)

    def decode(self, tokens: np.ndarray, position: int, streams: range, every: bool) -> None:
        """Tokens (T,) of one stream, or one token of each."""
        batch, one = self.batch, len(streams) == 1
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens.tolist()):
            batch.token[i] = token
            batch.pos[i] = position + (i if one else 0)
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, streams[0 if one else i]
            batch.logits[i] = every or i + 1 == len(tokens)
        if self.api.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp cannot decode")

    def together(self, texts: np.ndarray) -> float:
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        for stream, ids in enumerate(texts):
            self.decode(ids[:PROMPT], 0, range(stream, stream + 1), every=False)
        start = time.perf_counter()
        for i, ids in enumerate(texts.T[PROMPT:]):
            self.decode(ids, PROMPT + i, range(len(ids)), every=True)
            for stream in range(len(ids)):  # which waits until they are there
                api.llama_get_logits_ith(self.context, stream)
        return time.perf_counter() - start


@contextmanager
def served(packed: Path, streams: int, slots: int) -> Iterator[str]:
    """Our server's address."""
    command = [sys.executable, "-m", "fallow", "serve", packed, "--port", 0, "--name", "model"]
    command += ["--slots", slots, "--queue", streams, "--threads", THREADS]
    command += ["--context", PROMPT + NEW]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = ""
        while "/v1" not in line:
            line = server.stderr.readline()
            if not line:
                raise SystemExit("the server does not start")
        try:
            yield line.split("/v1")[0].split(" on ")[1] + "/v1/completions"
        finally:
            server.terminate()


def answered(address: str, texts: np.ndarray) -> dict[str, float]:
    """Tokens per second of all answers together, prompts included, and of each once it began."""

    def ask(ids: np.ndarray) -> Any:
        body = {"model": "model", "prompt": ids[:PROMPT].tolist(), "max_tokens": NEW}
        # A salt of its own: the run before must not have read the prompt.
        body |= {"temperature": 0, "fallow_plan": False, "cache_salt": str(time.time_ns())}
        request = urllib.request.Request(
            address, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request))["usage"]

    start = time.perf_counter()
    with ThreadPoolExecutor(len(texts)) as threads:
        usages = list(threads.map(ask, texts))
    seconds = time.perf_counter() - start
    new = sum(usage["completion_tokens"] for usage in usages)
    each = statistics.median(usage["sparsity"]["decode_tps"] for usage in usages)
    return {"tps": new / seconds, "tps_per_stream": each}


def run(packed: Path, source: Path, streams: int, runs: int) -> dict[str, Any]:
    """Every way in turn, `runs` times: figures of each run."""
    from fallow.checkpoints.text import load_text

    ours, theirs = Fallow(packed, streams), LlamaCpp(source, streams)
    texts = ours.engine.windows(load_text(TEST, "evaluation"), PROMPT + NEW, streams)
    tokens = streams * NEW

    def fed(seconds: Callable[[], float], at_once: int) -> Callable[[], dict[str, float]]:
        def figures() -> dict[str, float]:
            tps = tokens / seconds()
            return {"tps": tps, "tps_per_stream": tps / at_once}

        return figures

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "llama.cpp": fed(lambda: theirs.together(texts), streams),
        "fallow": fed(lambda: ours.together(texts), streams),
        ONE_BY_ONE: fed(lambda: ours.one_by_one(texts), 1),
    }
    if ours.plan is not None:
        ways["fallow, plan"] = fed(lambda: ours.together(texts, True), streams)
    with ExitStack() as stack:
        for slots in (streams, 1):
            address = stack.enter_context(served(packed, streams, slots))
            name = f"server, {slots} slot{'s' if slots > 1 else ''}"
            ways[name] = lambda address=address: answered(address, texts)  # type: ignore[misc]
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for i in range(runs + 1):
            for name, way in ways.items():
                figures = way()
                if i:  # the first warms up
                    found[name].append(figures)
    return {"streams": streams, "prompt": PROMPT, "new": NEW, "threads": THREADS, "runs": found}


def report() -> str:
    sections = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*/*/result.json")):
        result = json.loads(path.read_text())
        runs, where = result["runs"], json.loads((path.parent / "machine.json").read_text())
        sections.append(
            f"## {path.parent.parent.name}, {path.parent.name}\n\n{machine_line(where)}. "
            f"{result['streams']} streams, {result['new']} tokens of each.\n\n"
            "| | tok/s in all | of each | / llama.cpp | / one by one |\n|---|---|---|---|---|"
        )
        for way, found in runs.items():
            in_all, each = (statistics.median(r[k] for r in found) for k in found[0])
            ratios = " | ".join(ratio(runs, way, o, "tps") for o in ("llama.cpp", ONE_BY_ONE))
            sections[-1] += f"\n| {way} | {in_all:.1f} | {each:.1f} | {ratios} |"
    return "\n\n".join(sections).replace("\n\n\n", "\n\n") + "\n"


def main() -> None:
    from fallow.checkpoints.catalog import ALIASES, resolve

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--packed", type=Path, help="in place of benchmarks/optimize.py's")
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        packed = arguments.packed or OPTIMIZED / name / machine() / "packed.gguf"
        if not packed.exists():
            raise SystemExit(f"{packed} not found; first: python benchmarks/optimize.py {name}")
        result = run(packed, resolve(ALIASES[name]), arguments.streams, arguments.runs)
        for way, runs in result["runs"].items():
            in_all, each = (statistics.median(r[key] for r in runs) for key in runs[0])
            print(f"{name}, {way}: {in_all:.1f} tok/s in all, {each:.1f} of each")
        if not arguments.packed:
            folder = RESULTS / name / machine()
            folder.mkdir(parents=True, exist_ok=True)
            record_machine(folder / "machine.json")
            (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    if arguments.report:
        (ROOT / "docs" / "results" / "parallel.md").write_text(report())


if __name__ == "__main__":
    main()
