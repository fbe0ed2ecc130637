"""Plans that might be chosen: thresholds of every layer at a grid of sparsities."""

from collections.abc import Iterator
from statistics import median

import numpy as np
import torch

from fallow import _core
from fallow.calibration.calibrator import origin
from fallow.checkpoints.text import Text
from fallow.checkpoints.weights import StoredTensor
from fallow.common.progress import console, progress
from fallow.engine.engine import Engine
from fallow.engine.memory import COARSE_HEAD
from fallow.models.capture import Calibration
from fallow.plan import Plan
from fallow.reference.model import Model
from fallow.rules._gate import gate_weights
from fallow.rules.two_stage import TwoStage, two_stage_cuts

# Sparsities at which each layer's thresholds are measured; between them the divergence is taken as
# linear, which overestimates it a little since it is convex.
LEVELS = {
    "gate_act": (0.1, 0.25, 0.4),
    "inter": (0.3, 0.5, 0.7, 0.85),
}
# What each stage spares rows of, and the product that reads them.
ROWS = {"gate_act": ("up_proj", "gemv"), "inter": ("down_proj_t", "axpy")}
GRID = np.arange(0, 0.951, 0.05)  # sparsities that a layer may be given
SCORE_TOKENS = 256  # per layer, whose scores' quantiles are thresholds
# Scattered rows take longer than their share of a matrix: how much is timed on half of the rows of
# one too large for any cache, and never taken to be less than nothing.
TIMED_BYTES, ROW_RUNS = 1 << 26, 5
# Nats below the largest coarse logit, and of the vocabulary how much at most. On WikiText-2,
# Qwen2.5-Coder: 12 nats cost 0.0008 nats of divergence and 3,300 exact rows per token, 11 0.0012
# and 1,800, 10 0.0020 and 1,000; 12 and at most 2,000 rows 0.0018 and 1,200, as much PPL as 11.
# Where many rows are near none matters much, and of a head on the disk they would take as long as
# a layer.
HEAD_MARGIN = 12.0
HEAD_SHARE, HEAD_LEAST = 1 / 64, 1024  # of rows, whichever is more


class Candidates:
    """Plans of `two_stage` for one model, given the share of neurons that each layer's taps cut."""

    def __init__(
        self,
        model: Model,
        windows: np.ndarray,
        text: Text,
        engine: Engine,
        prefer: str = "speed",
    ) -> None:
        """Thresholds come from windows (n, context) of the text, costs from the packed model."""
        self.model, self.text = model, text
        self.n_layers = len(model.layers)
        self.stages = ("gate_act", "inter") if model.layers[0].gated else ("inter",)
        self.calibration = Calibration(model, windows)
        self.weights = gate_weights(self.calibration)
        tensors = engine.file.tensors
        coarse = tensors.get(COARSE_HEAD[0])
        self.head_margin = HEAD_MARGIN if coarse else 0.0
        self.head_limit = max(HEAD_LEAST, int(coarse.shape[0] * HEAD_SHARE)) if coarse else 0

        def sizes(matrix: str) -> np.ndarray:
            names = [f"layers.{i}.{matrix}.weight" for i in range(self.n_layers)]
            return np.array([tensors[n].data.nbytes if n in tensors else 0 for n in names])

        total = sum(sizes(name).sum() for name in ("gate_proj", "up_proj", "down_proj_t"))
        # Of all the FFN's bytes: a stage's matrix.
        self.shares = {stage: sizes(ROWS[stage][0]) / total for stage in self.stages}
        self.thresholds = {stage: self._quantiles(stage) for stage in self.stages}
        self.row_costs = dict.fromkeys(self.stages, 1.0)
        if prefer == "speed":
            for stage in self.stages:
                name, product = ROWS[stage]
                cost = _row_cost(tensors[f"layers.0.{name}.weight"], product, engine.threads)
                self.row_costs[stage] = cost
                console.print(
                    f"half of {name} takes {cost / 2:.2f} of the time of all", highlight=False
                )

    def _quantiles(self, stage: str) -> np.ndarray:
        """The score below which a share of a layer's scores lies, (L, grid) float32."""

        def scores(i: int) -> torch.Tensor:
            values = getattr(self.calibration, stage)[i]
            some = values[:: max(1, len(values) // SCORE_TOKENS)].abs().float()
            if stage == "gate_act":
                return some * torch.from_numpy(self.weights[i])
            return some * self.model.layers[i].down_norm

        found = np.empty((self.n_layers, len(GRID)), dtype=np.float32)
        with progress(f"thresholds of {stage}", self.n_layers) as ticker:
            for i in range(self.n_layers):
                found[i] = np.quantile(scores(i).numpy(), GRID)
                ticker.advance()
        found[:, 0] = -1  # nothing is cut, not even exact zeros
        return found

    def plan(self, choice: dict[str, np.ndarray], head_margin: float) -> Plan:
        """A plan from the index into the grid of every tap and layer, (L,) each."""
        layers = np.arange(self.n_layers)
        nothing = np.full(self.n_layers, -1)
        first, second = (
            self.thresholds[tap][layers, choice[tap]] if tap in self.stages else nothing
            for tap in ("gate_act", "inter")
        )
        cuts = two_stage_cuts(first, second, self.weights)
        return Plan(
            rule=TwoStage.name,
            knob=0.0,
            knob_name=TwoStage.knob_name,
            cuts=tuple(cut for cut in cuts if cut.leaves_out.any()),
            head_margin=head_margin,
            head_limit=self.head_limit,
            **origin(self.model, self.text, self.calibration),
        )

    def nothing(self) -> dict[str, np.ndarray]:
        """The choice that skips no neuron."""
        return {stage: np.zeros(self.n_layers, dtype=int) for stage in self.stages}

    def probes(self) -> Iterator[tuple[str, int, int, Plan]]:
        """Every plan that cuts one layer at one tap: tap, layer, index into the grid, plan."""
        for layer in range(self.n_layers):
            for tap in self.stages:
                for level in LEVELS[tap]:
                    index = int(np.abs(GRID - level).argmin())
                    choice = self.nothing()
                    choice[tap][layer] = index
                    yield tap, layer, index, self.plan(choice, 0.0)

    def choose(self, costs: dict[str, np.ndarray], price: float) -> dict[str, np.ndarray]:
        """The choice of each layer that is cheapest at `price` nats for all of the FFN's bytes."""
        found = self.nothing()
        for layer in range(self.n_layers):
            for stage in self.stages:
                read = np.minimum(1, self.row_costs[stage] * (1 - GRID))
                loss = costs[stage][layer] + price * self.shares[stage][layer] * read
                found[stage][layer] = int(np.argmin(loss))
        return found


def _row_cost(tensor: StoredTensor, product: str, threads: int) -> float:
    """Time per row of every other row, on average, over that of all rows of a matrix."""
    width = tensor.shape[1]
    rows = max(2, TIMED_BYTES * tensor.shape[0] // tensor.data.nbytes)
    half = np.sort(np.random.default_rng(0).choice(rows, rows // 2, replace=False))
    runs = [
        _core.time_rows(tensor.type, rows, width, half.astype(np.int32), threads)
        for _ in range(ROW_RUNS)
    ]
    return max(1.0, 2 * median(r[f"{product}_rows"] / r[product] for r in runs))
