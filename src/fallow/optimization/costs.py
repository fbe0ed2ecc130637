"""What each layer's thresholds cost the whole model, measured one by one; resumable."""

from pathlib import Path
from typing import Any

import numpy as np

from fallow.common.errors import UsageError
from fallow.common.files import JsonLines, fits
from fallow.common.progress import console, progress
from fallow.engine.engine import Engine
from fallow.measure.quality import log_softmax
from fallow.optimization.candidates import GRID, Candidates

PROBE_WINDOWS, PROBE_CONTEXT = 2, 256  # tokens on which the divergence is measured


def measure_costs(
    candidates: Candidates,
    engine: Engine,
    windows: np.ndarray,
    path: Path,
    settings: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Divergence from dense, nats per token, of each tap, layer and grid point: (L, grid)."""
    probe = windows[:PROBE_WINDOWS, :PROBE_CONTEXT]
    file = JsonLines(path)
    if not file.found:
        file.add(settings)
    elif file.found[0] != settings:
        raise UsageError(f"{path} belongs to a run with another model, text or option; remove it")
    else:
        console.print(f"continuing with {len(file.found) - 1} costs of {path}", highlight=False)
    todo = list(candidates.probes())
    wanted = {(tap, layer, index) for tap, layer, index, _ in todo}
    known = {tuple(line[:3]): float(line[3]) for line in file.found[1:] if _is_cost(line, wanted)}
    dense = [_Dense(engine.logits(window)) for window in probe]
    with progress("cost of layers", len(todo)) as ticker:
        for tap, layer, index, plan in todo:
            if (tap, layer, index) not in known:
                engine.use_plan(plan)
                kl = [
                    d.divergence(engine.logits(window))
                    for d, window in zip(dense, probe, strict=True)
                ]
                known[tap, layer, index] = float(np.mean(kl))
                file.add([tap, layer, index, known[tap, layer, index]])
            ticker.advance()
    costs = {t: np.empty((candidates.n_layers, len(GRID))) for t in candidates.stages}
    for tap, table in costs.items():
        for layer in range(candidates.n_layers):
            points = {i: cost for (t, n, i), cost in known.items() if (t, n) == (tap, layer)}
            levels = sorted(points)
            table[layer] = np.interp(GRID, [0, *GRID[levels]], [0, *(points[i] for i in levels)])
            table[layer, levels[-1] + 1 :] = np.inf  # not measured
    return costs


def _is_cost(line: Any, wanted: set[tuple[str, int, int]]) -> bool:
    """Whether a line of a file is a cost; any other is measured again."""
    return (
        fits(line, list)
        and [type(part) for part in line[:3]] == [str, int, int]
        and tuple(line[:3]) in wanted
        and len(line) == 4
        and fits(line[3], float)
    )


class _Dense:
    """A window's dense logits (T, vocabulary), to which others are compared."""

    def __init__(self, logits: np.ndarray) -> None:
        log_p = log_softmax(logits)
        self._p = np.exp(log_p)
        self._entropy = -np.einsum("tv,tv->t", self._p, log_p)

    def divergence(self, logits: np.ndarray) -> float:
        """Mean KL(dense || other), nats per token."""
        cross = -np.einsum("tv,tv->t", self._p, log_softmax(logits))
        return float((cross - self._entropy).mean())
