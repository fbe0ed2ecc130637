"""Figures of answers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fallow.common.tables import Result

BINS = 64  # ranges of a layer's neurons that `Activity` tells apart, or all if there are fewer


@dataclass(frozen=True, eq=False)
class Activity:
    """What was used for one token: by the pass that it was picked after."""

    active: np.ndarray  # (L,), share of the layer's neurons, in [0, 1]
    bins: np.ndarray  # (L, at most BINS), the same of ranges of equal size, lowest neurons first
    # Weights and cache; None: the pass read the prompt. The first token of a pass that gave several
    # has all its bytes, the others 0.
    bytes_read: int | None

    @classmethod
    def of(cls, neurons: np.ndarray, widths: Sequence[int], bytes_read: int | None) -> "Activity":
        """From the active neurons of a token, (L, widest) bool, of layers with so many neurons."""
        n, bins = np.array(widths)[:, None], min(BINS, *widths)
        ends = np.arange(1, bins + 1) * n // bins
        counts = np.diff(np.take_along_axis(neurons.cumsum(axis=1), ends - 1, axis=1), prepend=0)
        active = neurons.sum(axis=1) / widths
        return cls(active, counts / np.diff(ends, prepend=0), bytes_read)


@dataclass(repr=False)
class Stats(Result):
    """One answer's figures. Prefill and decode are never merged."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, what the cache held already
    new_tokens: int = 0
    finish: str = ""  # "stop": an end token or a stop text; "length": max_tokens; "": broken off
    ttft_ms: float = 0.0  # from the call to the first token
    prefill_tps: float = 0.0  # tokens per second, of those that were read
    decode_tps: float = 0.0
    bytes_per_token: float = 0.0  # weights and cache read per decoded token
    gbps: float = 0.0  # those bytes per second, 1e9
    sparsity_per_layer: list[float] = field(default_factory=list)  # inactive while decoding
    peak_rss_mb: float = 0.0
    logits_hash: str = ""  # of the last token's logits
    # Under a memory budget: read from the disk per token, and what was waited for it; of the bytes
    # that a token needs the share that was in memory; of reads the share that was there in time.
    disk_bytes_per_token: float = 0.0
    stall_ms_per_token: float = 0.0
    hit_rate: float = 1.0
    read_ahead_rate: float = 1.0
    drafted: int = 0  # tokens guessed ahead, in the lossless mode or under a memory budget
    accepted: int = 0  # of these, what the model said too

    @property
    def sparsity(self) -> float:
        """Share of neurons inactive while decoding, mean of layers."""
        return float(np.mean(self.sparsity_per_layer)) if self.sparsity_per_layer else 0.0

    def to_json(self) -> dict[str, Any]:
        """All figures; of decoding None where no token was decoded, as an answer's first is not."""
        unknown = () if self.sparsity_per_layer else ("decode_tps", "bytes_per_token", "gbps")
        return dict(vars(self)) | dict.fromkeys(unknown)

    def __repr__(self) -> str:
        return (
            f"<Stats of {self.new_tokens} tokens after {self.prompt_tokens}: "
            f"{self.decode_tps:.1f} tok/s, {self.bytes_per_token / 1e6:.1f} MB per token, "
            f"sparsity {self.sparsity:.3f}, first token after {self.ttft_ms:.0f} ms>"
        )


class Counters(Protocol):
    """What counts passes: an engine, whose every pass counts, or an answer's `Share`."""

    def reset_stats(self) -> None: ...
    def core_stats(self) -> dict[str, Any]: ...


class Share:
    """The core's counters for one of several answers: its equal part of every pass it was in."""

    def __init__(self) -> None:
        self.reset_stats()

    def reset_stats(self) -> None:
        self._sums: dict[str, Any] = {"tokens": 0, "bytes_read": 0}

    def core_stats(self) -> dict[str, Any]:
        return self._sums

    def add(self, figures: dict[str, Any], among: int) -> None:
        """Counts a pass, with the core's counters of it alone, of so many answers."""
        kept = ("tokens", "bytes_read", "active", "seconds", "disk")
        parts = {key: figures[key] for key in kept if key in figures}
        self._sums = _sum(self._sums, parts, among)


def _sum(sums: dict[str, Any], figures: dict[str, Any], among: int) -> dict[str, Any]:
    found = dict(sums)
    for key, value in figures.items():
        if isinstance(value, dict):
            found[key] = _sum(sums.get(key, {}), value, among)
        else:
            part = np.array(value) / among if isinstance(value, list) else value / among
            found[key] = sums.get(key, 0) + part
    return found


def logits_hash(logits: np.ndarray | None) -> str:
    """16 hex digits of a token's logits: equal runs have equal hashes."""
    return "" if logits is None else hashlib.sha256(logits.tobytes()).hexdigest()[:16]


def disk_figures(figures: dict[str, Any], tokens: int) -> dict[str, float]:
    """What `Stats` says of the disk, from the core's counters over some tokens."""
    disk = figures["disk"]
    return {
        "disk_bytes_per_token": disk["bytes"] / tokens,
        "stall_ms_per_token": 1e3 * figures["seconds"]["disk"] / tokens,
        "hit_rate": max(0.0, 1 - disk["bytes"] / figures["bytes_read"]),
        "read_ahead_rate": disk["in_time"] / disk["waits"] if disk["waits"] else 1.0,
    }
