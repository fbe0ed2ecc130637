"""Speed and memory that `fallow bench --json` and `fallow optimize --json` printed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fallow.common.errors import FallowError
from fallow.common.files import parse_json

# What is drawn where a result has it: its key, what it is called, and what to divide it by.
METRICS = {
    "decode_tps": ("decode, tokens/s", 1),
    "prefill_tps": ("prefill, tokens/s", 1),
    "bytes_per_token": ("read per decoded token, MB", 1e6),
    "peak_rss_mb": ("peak memory, MB", 1),
    "file_mb": ("file, MB", 1),
    "decode_ratio_dense": ("decode over the same file's dense decode", 1),
    "ppl_change_percent": ("PPL change against the source, %", 1),
}


@dataclass(frozen=True)
class Timing:
    """A measured speed, and what it is of: a model under a plan."""

    fingerprint: str  # of the source model
    plan_sha256: str | None  # None: no plan
    told: str
    found: dict[str, Any] | None  # of `fallow optimize`: what it says of quality


@dataclass(frozen=True)
class Results:
    """`bars` by metric: {"label", "value", and of several runs "low" and "high"}."""

    bars: dict[str, list[dict[str, Any]]]
    timings: list[Timing] = field(default_factory=list)

    def told_of(self, fingerprint: str, plan_sha256: str | None) -> str | None:
        """The speeds of a model under a plan; None: none was measured."""
        of = (fingerprint, plan_sha256)
        told = [t.told for t in self.timings if (t.fingerprint, t.plan_sha256) == of]
        return "; ".join(told) or None

    def optimized(self, fingerprint: str) -> list[Timing]:
        """What `fallow optimize` made of a model, where it found a plan."""
        own = [t for t in self.timings if t.fingerprint == fingerprint]
        return [t for t in own if t.found is not None and t.plan_sha256 is not None]


def read_results(paths: Sequence[str | Path]) -> Results:
    """What files say that `fallow bench --json` and `fallow optimize --json` printed.

    A file is what a command printed; its last line counts. A result that also timed another engine,
    or several memory budgets, gives a bar for each.

    Raises:
        FallowError: a file is missing, or its last line is no such result.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in METRICS.values()}
    timings: list[Timing] = []
    for path in map(Path, paths):
        line = _last_line(path)
        try:
            results = list(_results(path.stem, line))
            bars = [bar for label, result in results for bar in _bars(label, result)]
            timings += [_timing(*each) for each in results if "plan_sha256" in each[1]]
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise FallowError(
                f"the last line of {path} is no result of fallow bench --json or fallow optimize "
                "--json; check --results"
            ) from error
        for name, bar in bars:
            found[name].append(bar)
    return Results({name: bars for name, bars in found.items() if bars}, timings)


def speed_headlines(bars: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Of every result one sentence: its speed, what it reads, and what timed beside it did."""
    by_label = {
        name: {bar["label"]: bar["value"] for bar in bars.get(METRICS[name][0], [])}
        for name in ("decode_tps", "bytes_per_token")
    }
    speeds, found = by_label["decode_tps"], []
    for label, speed in speeds.items():
        beside = {
            other.removeprefix(f"{label}: "): theirs
            for other, theirs in speeds.items()
            if other.startswith(f"{label}: ")
        }
        if any(label.startswith(f"{other}: ") for other in speeds):
            continue  # it is told beside that one
        read = by_label["bytes_per_token"].get(label)
        told = f"{label}: {speed:.1f} tokens/s"
        told += "" if read is None else f", {read:.1f} MB read per token"
        told += "".join(f", against {theirs:.1f} of {who}" for who, theirs in beside.items())
        found.append(f"{told}.")
    return found


def _last_line(path: Path) -> str:
    try:
        return (path.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise FallowError(f"cannot read {path}: {reason}; check --results") from error


def _results(name: str, line: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results that a line of JSON holds, and what to call them."""
    result = parse_json(line)
    if "budgets" not in result:
        yield name, result
    for row in result.get("budgets", []):
        if "error" not in row:
            yield f"{name}, {row['memory_mb']:.0f} MB", row


def _bars(label: str, result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Metric and bar: of a result, and of the engine that was timed in turn with it."""
    if "decode_tps" not in result:
        raise KeyError("decode_tps")
    for key, (name, unit) in METRICS.items():
        for prefix, runs, who in (
            ("", "engine", label),
            ("baseline_", "baseline", f"{label}: {result.get('baseline')}"),
        ):
            if prefix + key in result:
                values = [_number(run[key], unit) for run in _runs(result, runs) if key in run]
                spread = {"low": min(values), "high": max(values)} if values else {}
                value = _number(result[prefix + key], unit)
                yield name, {"label": who, "value": value} | spread


def _timing(label: str, result: dict[str, Any]) -> Timing:
    """The speed that a result holds, and what it says that it is of."""
    fingerprint, plan = result["fingerprint"], result["plan_sha256"]
    if not isinstance(fingerprint, str) or not isinstance(plan, str | None):
        raise TypeError(plan)
    told = f"{_number(result['decode_tps'], 1):.1f} tokens/s"
    if "bytes_per_token" in result:
        told += f", {_number(result['bytes_per_token'], 1e6):.1f} MB read per token"
    found = None
    if "ppl_change_percent" in result:
        error = result["ppl_change_se"]
        found = {
            "rule": f"optimized, {result['selector']}",
            "where": "inter",
            "achieved_sparsity": _number(result["sparsity_ratio"], 1),
            "ppl_change_percent": _number(result["ppl_change_percent"], 1),
            "ppl_change_se": None if error is None else _number(error, 1),
            "kl_to_dense": _number(result["kl_to_dense"], 1),
            "of": f"{result['windows']} windows of {result['text']}",
        }
    return Timing(fingerprint, plan, f"{told} ({label})", found)


def _runs(result: dict[str, Any], of: str) -> list[dict[str, Any]]:
    return result.get("all", {}).get(of, [])


def _number(value: Any, unit: float) -> float:
    number = float(value) / unit
    if not math.isfinite(number):
        raise ValueError(value)
    return number
