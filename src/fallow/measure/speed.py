"""Speed of a packed model, and of other engines on the same weights, in alternating runs.

Decode reads every weight that is not skipped once per token, so it is bound by memory: tokens per
second times bytes per token cannot exceed what the machine reads per second. Prefill is bound by
arithmetic. Absolute figures depend on the machine's other tenants; ratios within one run do not.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fallow import _core
from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import atomic_path
from fallow.common.progress import progress
from fallow.engine.engine import Engine
from fallow.engine.memory import parse_size
from fallow.engine.process import peak_rss_mb
from fallow.engine.stats import disk_figures
from fallow.measure.energy import packages
from fallow.plan import Plan

# Other engines: the module that each needs, and what installs it. "-rtr" is what ik_llama.cpp calls
# laying weights out anew as they are loaded.
BASELINES = {
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    "llama.cpp+fallow": ("llama_cpp", "llama-cpp-python"),
    "ik_llama.cpp": ("ik_llama_cpp", "ik-llama-cpp-python"),
    "ik_llama.cpp-rtr": ("ik_llama_cpp", "ik-llama-cpp-python"),
    "openvino": ("openvino_genai", "openvino-genai"),
}
_CHARACTERS_PER_TOKEN = 16  # more than any text has on average
_STREAM_BYTES = 1 << 28  # far beyond any cache here


def bench(
    path: str | Path,
    plan: Plan | None = None,
    *,
    threads: int | None = None,
    skip_zeros: bool = True,
    kernels: str = "",
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    runs: int = 5,
    against: str | None = None,
    source: str | Path | None = None,
    memory: str | int | None = None,
    text: str | Path | None = None,
) -> dict[str, Any]:
    """Times prefill of a text's first tokens and decode of the following ones, fed as they are.

    Args:
        against: one of BASELINES; needs `source`, the GGUF that it reads.
        skip_zeros, kernels, memory: as for `Engine`; the other engine is not bound by them.

    Returns:
        Medians over the runs, all runs under `all`; with `against` the baseline's and the ratios.
        `fingerprint` and `plan_sha256` (None: no plan) say what ran.
        `joules_per_token` is missing where `no_energy` says why.

    Raises:
        UsageError: unknown baseline, no source, sizes out of range.
        FallowError: the baseline is not installed or fails; the text is too short.
    """
    if against is not None and against not in BASELINES:
        raise UsageError(f"unknown baseline {against!r}; known: {', '.join(BASELINES)}")
    if (against is None) != (source is None):
        raise UsageError("--against and --source, the GGUF it reads, belong together")
    if prompt_tokens < 2 or new_tokens < 1 or runs < 1:
        raise UsageError("give at least -p 2, -n 1 and --runs 1")
    context = prompt_tokens + new_tokens
    engine = Engine(
        path,
        plan,
        threads,
        context=context,
        skip_zeros=skip_zeros,
        kernels=kernels,
        memory=memory,
    )
    ids = _first_tokens(engine, text, context)
    baseline = Baseline(against, source, engine.threads, ids, prompt_tokens) if against else None
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    stream: list[float] = []
    peak = 0.0
    try:
        with progress("bench", runs) as ticker:
            for _ in range(runs):
                ours.append(run_once(engine, ids, prompt_tokens))
                peak = peak or peak_rss_mb()  # before the stream test takes memory of its own
                if memory is None:  # of which this test takes a good part
                    stream.append(_core.read_bandwidth(_STREAM_BYTES, engine.threads) / 1e9)
                if baseline:
                    theirs.append(baseline.run())
                ticker.advance()
    finally:
        if baseline:
            baseline.close()
    result = _summary(engine, ours, theirs, stream, against) | {"peak_rss_mb": peak}
    return result | {"no_energy": packages().missing}


def _first_tokens(engine: Engine, text: str | Path | None, count: int) -> np.ndarray:
    """A text's first token ids; FallowError if it has fewer."""
    # Not all of a long text: its tokens would count as the engine's memory.
    part = load_text(text, "evaluation").content[: _CHARACTERS_PER_TOKEN * count]
    ids = engine.tokenizer.with_bos(engine.tokenizer.encode(part))
    if len(ids) < count:
        raise FallowError(f"the text has {len(ids)} tokens, -p and -n need {count}")
    return ids[:count]


def bench_budgets(
    path: str | Path, budgets: Sequence[str], arguments: Sequence[str]
) -> list[dict[str, Any]]:
    """`fallow bench PATH --memory` of each budget in turn, with further arguments of the command.

    Each in a process of its own, since memory once taken is not all given back. A budget that does
    not work has `error` in place of figures.
    """
    found: list[dict[str, Any]] = []
    with progress("budgets", len(budgets)) as ticker:
        for budget in budgets:
            command = [sys.executable, "-m", "fallow", "bench", str(path), "--memory", budget]
            done = subprocess.run(
                [*command, *arguments, "--json"], capture_output=True, text=True, check=False
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                found.append({"memory_mb": parse_size(budget) / 1e6, "error": lines[-1]})
            else:
                found.append(json.loads(done.stdout.splitlines()[-1]))
            ticker.advance()
    return found


def draw_budgets(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A figure of decode and of what is waited for, against the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted((r for r in rows if "error" not in r), key=lambda r: r["memory_mb"])
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(5.5, 6), sharex=True)
    budgets = [r["memory_mb"] for r in rows]
    top.plot(budgets, [r["decode_tps"] for r in rows], marker="o")
    top.set_ylabel("decode, tokens/s")
    bottom.plot(budgets, [r["stall_ms_per_token"] for r in rows], marker="o")
    bottom.set_ylabel("waiting for the disk, ms/token")
    bottom.set_xlabel("memory budget, MB")
    for axis in (top, bottom):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def run_once(engine: Engine, ids: np.ndarray, prompt_tokens: int) -> dict[str, float]:
    """Figures of one prefill of ids[:prompt_tokens] and one decode of the rest.

    Among them `joules_per_token` of decode where the machine's processors tell (measure/energy.py).
    """
    counters = packages()
    engine.reset()
    start = time.perf_counter()
    engine.forward(ids[:prompt_tokens])
    prefill = time.perf_counter() - start
    engine.reset_stats()
    energy = counters.microjoules()
    start = time.perf_counter()
    for i in range(prompt_tokens, len(ids)):
        engine.forward(ids[i : i + 1])
    decode = time.perf_counter() - start
    joules = counters.joules_since(energy)
    figures, n = engine.core_stats(), len(ids) - prompt_tokens
    products = sum(figures["seconds"][k] for k in ("attention_proj", "ffn", "head"))
    return {
        "prefill_tps": prompt_tokens / prefill,
        "ttft_ms": 1e3 * prefill,
        "decode_tps": n / decode,
        "bytes_per_token": figures["bytes_read"] / n,
        "gbps": figures["bytes_read"] / decode / 1e9,
        # The share of decode outside products with weights: attention, selection, norms, Python.
        "overhead": 1 - products / decode,
        "sparsity": float(engine.idle_neurons().mean()),
        "predicted": float(engine.predicted_neurons().mean()),
        **{f"ms_{k}": 1e3 * v / n for k, v in figures["seconds"].items()},
        **disk_figures(figures, n),
        **({"joules_per_token": joules / n} if counters.folders else {}),
    }


def run_in_turn(
    engine: Engine,
    plans: Mapping[str, Plan | None],
    ids: np.ndarray,
    prompt_tokens: int,
    runs: int,
    source: str | Path | None = None,
    against: Sequence[str] = (),
) -> dict[str, list[dict[str, float]]]:
    """`run_once` with each plan in turn, `runs` times, by the plans' names.

    And of BASELINES those in `against`, which read `source`, in turn with them.

    Raises:
        FallowError: a baseline is not installed or fails.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in [*against, *plans]}
    with progress("timing", runs) as ticker, ExitStack() as stack:
        others = {}
        for name in against:
            others[name] = Baseline(name, source, engine.threads, ids, prompt_tokens)
            stack.callback(others[name].close)
        for _ in range(runs):
            for name, other in others.items():
                found[name].append(other.run())
            for name, plan in plans.items():
                engine.use_plan(plan)
                found[name].append(run_once(engine, ids, prompt_tokens))
            ticker.advance()
    return found


def _summary(
    engine: Engine,
    ours: list[dict[str, float]],
    theirs: list[dict[str, float]],
    stream: list[float],
    against: str | None,
) -> dict[str, Any]:
    result: dict[str, Any] = {k: statistics.median(r[k] for r in ours) for k in ours[0]}
    if stream:
        result["stream_gbps"] = statistics.median(stream)
        result["mbu"] = statistics.median(r["gbps"] / s for r, s in zip(ours, stream, strict=True))
    if engine.residency is not None:
        result["memory_mb"] = (engine.memory or 0) / 1e6
        result["disk_gbps"] = engine.disk_gbps
        result["disk_bytes_per_pass"] = engine.residency.pass_bytes
    result["sparsity_per_layer"] = engine.idle_neurons().tolist()
    result["fingerprint"] = engine.fingerprint
    result["plan_sha256"] = None if engine.plan is None else engine.plan.sha256
    result["file_mb"] = engine.path.stat().st_size / 1e6
    result["logits_hash"] = engine.logits_hash()
    result["threads"] = engine.threads
    result["kernels"] = engine.kernels
    result["runs"] = len(ours)
    result["all"] = {"engine": ours}
    if theirs:
        result["baseline"] = against
        result["all"]["baseline"] = theirs
        for key in ("prefill_tps", "decode_tps"):
            result[f"baseline_{key}"] = statistics.median(r[key] for r in theirs)
            ratios = [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]
            name = key.replace("_tps", "_ratio")
            result[name] = statistics.median(ratios)
            result[f"{name}_range"] = [min(ratios), max(ratios)]
    return result


class Baseline:
    """Another engine in a process of its own, so that its memory and threads are not ours."""

    def __init__(
        self,
        name: str,
        source: str | Path | None,
        threads: int,
        ids: np.ndarray,
        prompt: int,
        plan: str | Path | None = None,  # of llama.cpp+fallow
    ) -> None:
        from importlib.util import find_spec

        module, package = BASELINES[name]
        if find_spec(module) is None:
            raise FallowError(f"{name} is not installed; install it with: pip install {package}")
        assert source is not None
        if not Path(source).is_file():
            raise FallowError(f"--source {source} not found; give the GGUF that was packed")
        self.name = name
        # Threads as it would have them: told to wait passively, llama.cpp's are slow.
        own = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        own |= {"FALLOW_PLAN": str(plan or "")} | ({} if plan else {"FALLOW_MEMORY": ""})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fallow.measure.baselines", name, str(source), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=own,
        )
        self._ask({"ids": ids.tolist(), "prompt_tokens": prompt})

    def run(self) -> dict[str, float]:
        return self._ask({"run": True})

    def _ask(self, message: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the empty answer says so
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                answer = json.loads(line)
                if "error" in answer:
                    raise FallowError(f"{self.name} failed: {answer['error']}")
                return answer
        raise FallowError(f"{self.name} ended unexpectedly; does it run this model by itself?")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
