"""Compiled core; see csrc/bindings.cpp. Arrays are contiguous and are not copied."""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

HISTOGRAM_BINS: int
HISTOGRAM_BINS_PER_OCTAVE: int
HISTOGRAM_MIN_EXPONENT: int
FORMATS: dict[str, tuple[int, int]]  # type -> (weights per block, bytes per block)

class GgufError(ValueError): ...
class DiskError(OSError): ...
class ThreadError(RuntimeError): ...

def gguf_header(data: np.ndarray) -> dict[str, Any]: ...
def dequantize(type: str, src: np.ndarray, dst: np.ndarray, n_threads: int = 1) -> None: ...
def add_magnitudes(values: np.ndarray, bins: np.ndarray, n_threads: int = 1) -> tuple[int, int]: ...
def topk_thresholds(
    scores: np.ndarray, k: int, thresholds: np.ndarray, n_threads: int = 1
) -> None: ...
def tail_thresholds(
    scores: np.ndarray, tau: float, thresholds: np.ndarray, n_threads: int = 1
) -> None: ...
def mass_thresholds(
    scores: np.ndarray, share: float, thresholds: np.ndarray, n_threads: int = 1
) -> None: ...

LINE_WORDS: int
WEIGHT_PLANES: int

def nearest_rows(
    rows: np.ndarray,
    codebook: np.ndarray,
    offset: np.ndarray,
    planes: int,
    labels: np.ndarray,
    overlap: np.ndarray,
    n_threads: int = 1,
    kernels: str = "",
) -> None: ...
def row_overlaps(
    rows: np.ndarray,
    others: np.ndarray,
    counts: np.ndarray,
    n_threads: int = 1,
    kernels: str = "",
) -> None: ...
def add_rows(
    rows: np.ndarray, labels: np.ndarray, counts: np.ndarray, n_threads: int = 1
) -> None: ...

KERNELS: list[str]
TILE_ROWS: int
TAPS: list[str]
FEW: int

class PackedError(ValueError): ...

class Mapping:
    def __init__(self, path: bytes) -> None: ...
    @property
    def data(self) -> np.ndarray: ...
    def forget(self) -> None: ...
    def check(self) -> None: ...

class Engine:
    @overload
    def __init__(
        self,
        mapping: Mapping,
        kernels: str,
        n_threads: int,
        context: int,
        slots: int,
        copy: bool,
    ) -> None: ...
    @overload
    def __init__(
        self,
        path: bytes,
        header_bytes: int,
        kernels: str,
        n_threads: int,
        context: int,
        slots: int,
    ) -> None: ...
    def load(self, parts: Sequence[tuple[int, int]]) -> None: ...
    def rows_from_file(
        self, embedding: bool, head: bool, offset: int, room: int, range_bytes: int
    ) -> None: ...
    def cache_experts(self, n_slots: int) -> None: ...
    def stream(
        self,
        units: Sequence[tuple[int, Sequence[tuple[str, int, int]]]],
        n_slots: int,
    ) -> None: ...
    def forward(
        self,
        tokens: np.ndarray,
        slot: int,
        position: int,
        all: bool,
        dense: bool,
        exact: bool,
        record: bool,
        logits: np.ndarray,
    ) -> None: ...
    def forward_together(
        self,
        tokens: np.ndarray,
        places: Sequence[tuple[int, int]],
        dense: bool,
        record: bool,
        logits: np.ndarray,
    ) -> None: ...
    def set_skips_zeros(self, skips: bool) -> None: ...
    def set_cuts(self, cuts: Sequence[tuple[int, int, int, float, np.ndarray | None]]) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def reset_stats(self) -> None: ...
    def active_neurons(self) -> bytes: ...
    def set_shortlist(self, nats: float, most: int) -> None: ...
    def down_norm(self, layer: int) -> list[float]: ...
    @property
    def context(self) -> int: ...
    @property
    def kernels(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def neurons(self) -> int: ...

def quantize_k(type: str, x: np.ndarray, n_threads: int = 1) -> bytes: ...
def check_ffn_file(data: np.ndarray) -> None: ...
def fingerprint(data: np.ndarray) -> int: ...
def read_bandwidth(n_bytes: int, n_threads: int) -> float: ...
def time_rows(
    type: str, rows: int, width: int, list: np.ndarray, n_threads: int, kernels: str = ""
) -> dict[str, float]: ...
