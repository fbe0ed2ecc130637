"""What each layer's thresholds cost the whole model, measured one by one; resumable."""

from pathlib import Path
from typing import Any

import numpy as np

from fallow.common.errors import UsageError
from fallow.common.files import JsonLines, fits
from fallow.common.progress import console, progress
from fallow.engine.engine import Engine
from fallow.measure.quality import log_softmax
from fallow.optimization.candidates import PROBED, Candidates

PROBE_WINDOWS, PROBE_CONTEXT = 2, 128  # tokens on which the divergence is measured


def measure_costs(
    candidates: Candidates,
    engine: Engine,
    windows: np.ndarray,
    path: Path,
    settings: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Divergence from dense, nats per token, of each stage, layer and grid point: (L, grid).

    One sparsity of each layer is measured; the others cost as much more or less as they leave out
    energy (docs/methods.md).
    """
    probe = windows[:PROBE_WINDOWS, :PROBE_CONTEXT]
    file = JsonLines(path)
    if not file.found:
        file.add(settings)
    elif file.found[0] != settings:
        raise UsageError(f"{path} belongs to a run with another model, text or option; remove it")
    else:
        console.print(f"continuing with {len(file.found) - 1} costs of {path}", highlight=False)
    known = {line[0]: line[1] for line in file.found[1:] if _is_cost(line, candidates.n_layers)}
    dense = [Dense(engine.logits(window)) for window in probe]
    with progress("cost of layers", candidates.n_layers) as ticker:
        for layer in range(candidates.n_layers):
            if layer not in known:
                engine.use_plan(candidates.probe(layer))
                kl = [
                    d.divergence(engine.logits(window))
                    for d, window in zip(dense, probe, strict=True)
                ]
                known[layer] = float(np.mean(kl))
                file.add([layer, known[layer]])
            ticker.advance()
    measured = np.array([known[layer] for layer in range(candidates.n_layers)])
    left_out = candidates.energies["inter"][:, PROBED]
    # Nats per unit of energy. A layer whose neurons put out nothing has nothing to lose.
    per_energy = np.divide(measured, left_out, out=np.zeros_like(measured), where=left_out > 0)
    return {stage: found * per_energy[:, None] for stage, found in candidates.energies.items()}


def _is_cost(line: Any, n_layers: int) -> bool:
    """Whether a line of a file is a cost; any other is measured again."""
    return (
        fits(line, list)
        and len(line) == 2
        and type(line[0]) is int
        and 0 <= line[0] < n_layers
        and fits(line[1], float)
    )


class Dense:
    """A window's dense logits (T, vocabulary), to which others are compared."""

    def __init__(self, logits: np.ndarray) -> None:
        log_p = log_softmax(logits)
        self._p = np.exp(log_p)
        self._entropy = -np.einsum("tv,tv->t", self._p, log_p)

    def divergence(self, logits: np.ndarray) -> float:
        """Mean KL(dense || other), nats per token."""
        cross = -np.einsum("tv,tv->t", self._p, log_softmax(logits))
        return float((cross - self._entropy).mean())
