"""Plans that might be chosen: thresholds of every layer at a grid of sparsities."""

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
from fallow.models.devices import as_array, tensor
from fallow.plan import Plan
from fallow.reference.model import Model, in_bfloat16
from fallow.rules._gate import gate_weights
from fallow.rules.two_stage import TwoStage, two_stage_cuts

# What each stage spares rows of, and the product that reads them.
ROWS = {"gate_act": ("up_proj", "gemv"), "inter": ("down_proj_t", "axpy")}
GRID = np.arange(0, 0.951, 0.05)  # sparsities that a layer may be given
# What a sparsity costs at one layer is as the energy that its inactive neurons would have put out
# (`energies`), so one sparsity of each layer is measured: docs/results/layer_costs.md. At one much
# lower the rounding of prefill would be all that is seen.
PROBED = 14  # index into the grid
SCORE_TOKENS = 128  # per layer, whose scores' quantiles are thresholds
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
# Logarithm of the price, in nats for all of the FFN's bytes.
LOWEST_PRICE, HIGHEST_PRICE, PRICE_STEPS = -5.0, 2.0, 24


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
        with in_bfloat16(model.device):
            self.calibration.collect_stages()
        self.weights = gate_weights(self.calibration)
        tensors = engine.file.tensors
        self.head_margin, self.head_limit = shortlist_of(engine)

        def sizes(matrix: str) -> np.ndarray:
            names = [f"layers.{i}.{matrix}.weight" for i in range(self.n_layers)]
            return np.array([tensors[n].data.nbytes if n in tensors else 0 for n in names])

        total = sum(sizes(name).sum() for name in ("gate_proj", "up_proj", "down_proj_t"))
        # Of all the FFN's bytes: a stage's matrix.
        self.shares = {stage: sizes(ROWS[stage][0]) / total for stage in self.stages}
        shape = (self.n_layers, len(GRID))
        self.thresholds = {s: np.empty(shape, dtype=np.float32) for s in self.stages}
        self.energies = {s: np.empty(shape) for s in self.stages}
        with progress("thresholds", self.n_layers) as ticker:
            for layer in range(self.n_layers):
                self._measure(layer)
                ticker.advance()
        self.row_costs = dict.fromkeys(self.stages, 1.0)
        if prefer == "speed":
            for stage in self.stages:
                name, product = ROWS[stage]
                cost = _row_cost(tensors[f"layers.0.{name}.weight"], product, engine.threads)
                self.row_costs[stage] = cost
                console.print(
                    f"half of {name} takes {cost / 2:.2f} of the time of all", highlight=False
                )

    def _measure(self, layer: int) -> None:
        """Of a layer and each stage the scores below which each share of the grid lies, (grid,).

        And the energy of the neurons with such scores: the sum of inter_i² ||down_proj[:, i]||²,
        mean over tokens.
        """
        norm = self.model.layers[layer].down_norm
        out_norm = self._some("inter", layer) * norm
        energy = as_array(out_norm.square())
        for stage in self.stages:
            if stage == "gate_act":
                scores = self._some(stage, layer) * tensor(self.weights[layer], norm.device)
            else:
                scores = out_norm
            values = as_array(scores)
            found = np.quantile(values, GRID)
            found[0] = -1  # nothing is cut, not even exact zeros
            self.thresholds[stage][layer] = found
            self.energies[stage][layer] = [energy[values <= t].sum() / len(energy) for t in found]

    def _some(self, tap: str, layer: int) -> torch.Tensor:
        """Magnitudes of a tap at some tokens, (T, d_ff) float32."""
        values: torch.Tensor = getattr(self.calibration, tap)[layer]
        return values[:: max(1, len(values) // SCORE_TOKENS)].abs().float()

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

    def probe(self, layer: int) -> Plan:
        """The plan that cuts `inter` of one layer, at the sparsity that is measured."""
        choice = self.nothing()
        choice["inter"][layer] = PROBED
        return self.plan(choice, 0.0)

    def choose(self, costs: dict[str, np.ndarray], price: float) -> dict[str, np.ndarray]:
        """The choice of each layer that is cheapest at `price` nats for all of the FFN's bytes."""
        found = self.nothing()
        for stage in self.stages:
            read = np.minimum(1, self.row_costs[stage] * (1 - GRID))
            loss = costs[stage] + price * self.shares[stage][:, None] * read
            found[stage] = loss.argmin(axis=1)
        return found

    def within(
        self, costs: dict[str, np.ndarray], loss: float
    ) -> tuple[dict[str, np.ndarray], float]:
        """The choice of the highest price that costs no more than `loss` nats, and its cost."""
        low, high = LOWEST_PRICE, HIGHEST_PRICE
        found = self.nothing(), 0.0
        for _ in range(PRICE_STEPS):
            price = (low + high) / 2
            choice = self.choose(costs, 10**price)
            cost = sum(float(costs[s][np.arange(self.n_layers), choice[s]].sum()) for s in choice)
            if cost <= loss:
                low, found = price, (choice, cost)
            else:
                high = price
        return found


def shortlist_of(engine: Engine) -> tuple[float, int]:
    """Margin and limit of a plan's shortlist for a file; none without a coarse head."""
    coarse = engine.file.tensors.get(COARSE_HEAD[0])
    if coarse is None:
        return 0.0, 0
    return HEAD_MARGIN, max(HEAD_LEAST, int(coarse.shape[0] * HEAD_SHARE))


def _row_cost(tensor: StoredTensor, product: str, threads: int) -> float:
    """Time per row of every other row, on average, over that of all rows of a matrix."""
    width = tensor.shape[1]
    tile = _core.TILE_ROWS
    rows = max(1, TIMED_BYTES * tensor.shape[0] // tensor.data.nbytes // tile) * tile
    half = np.sort(np.random.default_rng(0).choice(rows, rows // 2, replace=False))
    runs = [
        _core.time_rows(tensor.type, rows, width, half.astype(np.int32), threads)
        for _ in range(ROW_RUNS)
    ]
    return max(1.0, 2 * median(r[f"{product}_rows"] / r[product] for r in runs))
