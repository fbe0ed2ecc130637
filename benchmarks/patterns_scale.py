"""The speed of clustering: its kernel, and a pass at the published scale, on made-up rows.

`python benchmarks/patterns.py scale` runs both.
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from engine import THREADS
from tradeoff import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "patterns" / "scale"
# The published scale: arXiv:2507.14179, its code.
SCALE_ROWS, SCALE_WIDTH, SCALE_CLUSTERS = 10_682_368, 14336, 2048
PROTOTYPES = 2048  # that synthetic rows differ from in a quarter of their bits
KERNEL_RUNS = 9


def kernel() -> dict[str, Any]:
    """Words of 64 bits per second of one thread: the kernel on rows in the cache, and the limit."""
    from fallow.patterns.clustering import nearest

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "popcount"
        source = ROOT / "benchmarks" / "popcount.c"
        subprocess.run(["cc", "-O3", "-march=native", source, "-o", program], check=True)

        def limit() -> float:
            done = subprocess.run([program], check=True, capture_output=True, text=True)
            return float(done.stdout)

        rng = np.random.default_rng(0)
        found = {}
        for width in (SCALE_WIDTH, 8960, 2048, 1536):
            words = -(-width // 512) * 8
            rows, centroids = (
                rng.integers(0, 2**64, (n, words), dtype=np.uint64) for n in (4096, 2048)
            )
            runs = []
            for _ in range(KERNEL_RUNS):
                most = limit()
                start = time.perf_counter()
                nearest(rows, centroids)
                seconds = time.perf_counter() - start
                runs.append((len(rows) * len(centroids) * words / seconds, most))
            found[str(width)] = runs
    return found


def published_scale() -> dict[str, Any]:
    """One pass of assignment and update over rows that are read from the disk."""
    from fallow.patterns.clustering import one_pass, update
    from fallow.patterns.store import n_words

    words, path = n_words(SCALE_WIDTH), RESULTS / "rows.bits"
    if not path.exists() or path.stat().st_size != SCALE_ROWS * words * 8:
        make_rows(path, words)
    os.sync()
    rows = np.memmap(path, dtype=np.uint64, mode="r", shape=(SCALE_ROWS, words))
    step = SCALE_ROWS // SCALE_CLUSTERS
    centroids = np.ascontiguousarray(rows[::step][:SCALE_CLUSTERS])
    start = time.perf_counter()
    found = one_pass(rows, centroids, n_threads=THREADS)
    assigned = time.perf_counter() - start
    update(found, SCALE_WIDTH, SCALE_WIDTH // 2)
    seconds = time.perf_counter() - start
    path.unlink()
    return {
        "rows": SCALE_ROWS,
        "width": SCALE_WIDTH,
        "clusters": SCALE_CLUSTERS,
        "seconds": seconds,
        "update_seconds": seconds - assigned,
        "private_mb": private_mb(),
    }


def private_mb() -> float:
    """Memory of the process that is no page of a mapped file, MB of 1e6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def make_rows(path: Path, words: int) -> None:
    """Rows that follow prototypes of half of the neurons, a quarter of the bits flipped."""
    rng = np.random.Generator(np.random.SFC64(0))
    prototypes = rng.integers(0, 2**64, (PROTOTYPES, words), dtype=np.uint64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for first in range(0, SCALE_ROWS, 65536):
            n = min(65536, SCALE_ROWS - first)
            a, b = (rng.integers(0, 2**64, (n, words), dtype=np.uint64) for _ in range(2))
            file.write((prototypes[rng.integers(0, PROTOTYPES, n)] ^ (a & b)).tobytes())
