"""Figures of answers."""

from dataclasses import dataclass, field
from typing import Any

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
    def of(cls, neurons: np.ndarray, bytes_read: int | None) -> "Activity":
        """From the active neurons of a token, (L, neurons) bool."""
        n = neurons.shape[1]
        ends = np.arange(1, min(BINS, n) + 1) * n // min(BINS, n)
        counts = np.diff(neurons.cumsum(axis=1)[:, ends - 1], prepend=0)
        return cls(neurons.mean(axis=1), counts / np.diff(ends, prepend=0), bytes_read)


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


def disk_figures(figures: dict[str, Any], tokens: int) -> dict[str, float]:
    """What `Stats` says of the disk, from the core's counters over some tokens."""
    disk = figures["disk"]
    return {
        "disk_bytes_per_token": disk["bytes"] / tokens,
        "stall_ms_per_token": 1e3 * figures["seconds"]["disk"] / tokens,
        "hit_rate": max(0.0, 1 - disk["bytes"] / figures["bytes_read"]),
        "read_ahead_rate": disk["in_time"] / disk["waits"] if disk["waits"] else 1.0,
    }
