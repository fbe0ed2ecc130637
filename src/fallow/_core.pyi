"""Compiled core; see csrc/bindings.cpp. Arrays are contiguous and are not copied."""

from typing import Any

import numpy as np

HISTOGRAM_BINS: int
HISTOGRAM_BINS_PER_OCTAVE: int
HISTOGRAM_MIN_EXPONENT: int
FORMATS: dict[str, tuple[int, int]]  # type -> (weights per block, bytes per block)

class GgufError(ValueError): ...

def gguf_header(data: np.ndarray) -> dict[str, Any]: ...
def dequantize(type: str, src: np.ndarray, dst: np.ndarray, n_threads: int = 1) -> None: ...
def add_magnitudes(values: np.ndarray, bins: np.ndarray, n_threads: int = 1) -> tuple[int, int]: ...
def topk_thresholds(
    scores: np.ndarray, k: int, thresholds: np.ndarray, n_threads: int = 1
) -> None: ...
def tail_thresholds(
    scores: np.ndarray, tau: float, thresholds: np.ndarray, n_threads: int = 1
) -> None: ...
