"""llama.cpp with our plugin beside llama.cpp without: what comes out, and how fast.

`python -m fallow.measure.llama_cpp` is one of them, in a process of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fallow.checkpoints.text import load_text
from fallow.common.errors import FallowError, UsageError
from fallow.common.progress import progress
from fallow.measure.speed import Baseline

STOCK, PLUGIN = "llama.cpp", "llama.cpp+fallow"


def _variants(plan: str | Path | None) -> dict[str, tuple[str, str | Path | None]]:
    """What is compared: the engine, and the file that it gets."""
    found: dict[str, tuple[str, str | Path | None]] = {
        "stock": (STOCK, None),
        "dense": (PLUGIN, None),
    }
    return found if plan is None else found | {"plan": (PLUGIN, plan)}


def verify(
    model: str | Path,
    plan: str | Path | None = None,
    *,
    text: str | Path | None = None,
    tokens: int = 256,
    threads: int = 2,
) -> dict[str, dict[str, dict[str, float]]]:
    """Logits of the plugin, dense and with a file of `fallow llama pack`, against stock ones.

    Args:
        tokens: of the text, read as one prompt and, again, one by one.

    Returns:
        By `dense` and `plan`, then by `prompt` and `decode`: `kl`, nats per token from stock;
        `top1`, the share of tokens where both find the same likeliest; `ppl_change_percent`.

    Raises:
        FallowError: one of them fails, or the text is too short.
    """
    logits = model_logits(model, plan, text=text, tokens=tokens, threads=threads)
    stock = logits.pop("stock")
    return {
        name: {way: compare(stock[way], own[way], stock["ids"]) for way in ("prompt", "decode")}
        for name, own in logits.items()
    }


def model_logits(
    model: str | Path,
    plan: str | Path | None,
    *,
    text: str | Path | None,
    tokens: int,
    threads: int,
) -> dict[str, dict[str, np.ndarray]]:
    """By `stock`, `dense` and `plan`: token `ids`, and logits (tokens, vocabulary) of `verify`."""
    if tokens < 2:
        raise UsageError("give at least --tokens 2")
    content = load_text(text, "evaluation").content[: 16 * tokens]
    found: dict[str, dict[str, np.ndarray]] = {}
    variants = _variants(plan)
    with tempfile.TemporaryDirectory() as folder, progress("verify", len(variants)) as ticker:
        for name, (engine, file) in variants.items():
            path = Path(folder) / "logits.npz"
            _ask(engine, file, {
                "model": str(model), "text": content, "tokens": tokens, "threads": threads,
                "output": str(path),
            })  # fmt: skip
            with np.load(path) as arrays:
                found[name] = dict(arrays)
            ticker.advance()
    return found


def compare(stock: np.ndarray, other: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Logits (tokens, vocabulary) with others of the same ids: what `verify` returns of them."""
    sums = {"kl": 0.0, "top1": 0.0, "stock_nll": 0.0, "nll": 0.0}
    for i, (a, b) in enumerate(zip(stock, other, strict=True)):
        p, q = _log_softmax(a), _log_softmax(b)
        sums["kl"] += float((np.exp(p) * (p - q)).sum())
        sums["top1"] += float(a.argmax() == b.argmax())
        if i + 1 < len(ids):
            sums["stock_nll"] -= float(p[ids[i + 1]])
            sums["nll"] -= float(q[ids[i + 1]])
    n = len(ids)
    change = np.exp((sums["nll"] - sums["stock_nll"]) / (n - 1)) - 1
    return {
        "kl": max(0.0, sums["kl"] / n),
        "top1": sums["top1"] / n,
        "ppl_change_percent": 100 * float(change),
    }


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max()
    return x - np.log(np.exp(x).sum())


def bench(
    model: str | Path,
    plan: str | Path | None = None,
    *,
    threads: int = 2,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    runs: int = 5,
    text: str | Path | None = None,
) -> dict[str, Any]:
    """Prefill and decode of stock llama.cpp and of the plugin, each in turn.

    Returns:
        `runs`: by `stock`, `dense` and `plan`, each run's `prefill_tps` and `decode_tps`;
        `ratios`: of the latter two medians over stock's run in the same turn, with the lowest and
        the highest.

    Raises:
        FallowError: one of them fails, or the text is too short.
    """
    if prompt_tokens < 2 or new_tokens < 1 or runs < 1:
        raise UsageError("give at least -p 2, -n 1 and --runs 1")
    count = prompt_tokens + new_tokens
    content = load_text(text, "evaluation").content[: 16 * count]
    ids = np.array(
        _ask(STOCK, None, {"model": str(model), "text": content, "tokens": count})["ids"]
    )
    found: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack, progress("bench", runs) as ticker:
        others = {}
        for name, (engine, file) in _variants(plan).items():
            others[name] = Baseline(engine, model, threads, ids, prompt_tokens, file)
            stack.callback(others[name].close)
        for _ in range(runs):
            for name, other in others.items():
                found.setdefault(name, []).append(other.run())
            ticker.advance()
    return {"runs": found, "ratios": _ratios(found)}


def _ratios(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for name in runs.keys() - {"stock"}:
        found[name] = {}
        for key in ("prefill", "decode"):
            pairs = zip(runs[name], runs["stock"], strict=True)
            all_of = [a[f"{key}_tps"] / b[f"{key}_tps"] for a, b in pairs]
            found[name][key] = [statistics.median(all_of), min(all_of), max(all_of)]
    return found


def _ask(engine: str, plan: str | Path | None, request: dict[str, Any]) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")} | {"FALLOW_PLAN": ""}
    if plan is None:
        env["FALLOW_MEMORY"] = ""
    done = subprocess.run(
        [sys.executable, "-m", "fallow.measure.llama_cpp"],
        input=json.dumps(request | {"engine": engine, "plan": None if plan is None else str(plan)}),
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    answer: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if "error" in answer or not answer:
        raise FallowError(f"{engine}: {answer.get('error') or 'it ended unexpectedly'}")
    if "another model" in done.stderr:
        raise FallowError(f"{plan} was made for another model than {request['model']}")
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if request["engine"] == PLUGIN:
        import fallow.llama_cpp

        fallow.llama_cpp.load(request["plan"])
    from llama_cpp import Llama

    tokens, output = request["tokens"], request.get("output")
    size, threads = max(32, tokens), request.get("threads", 1)
    model = Llama(
        request["model"], n_ctx=size, n_batch=size, n_threads=threads, n_threads_batch=threads,
        logits_all=output is not None, vocab_only=output is None, verbose=False,
    )  # fmt: skip
    ids = model.tokenize(request["text"].encode())[:tokens]
    if len(ids) < tokens:
        raise FallowError(f"the text has {len(ids)} tokens, {tokens} are needed")
    if output is None:
        return {"ids": ids}
    model.eval(ids)
    prompt = np.array(model.scores[:tokens])
    model.reset()
    for token in ids:
        model.eval([token])
    np.savez(output, ids=np.array(ids), prompt=prompt, decode=np.array(model.scores[:tokens]))
    return {"done": True}


def main() -> None:
    try:
        answer = _answer(json.load(sys.stdin))
    except Exception as error:  # any failure of a foreign engine goes to the parent as a line
        answer = {"error": (str(error).strip() or type(error).__name__).splitlines()[-1][:300]}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
