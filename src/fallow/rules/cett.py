"""CETT: a threshold per layer such that the dropped neurons' summed output stays below a share."""

import math

import numpy as np
import torch

from fallow.common.progress import progress
from fallow.models.capture import Calibration
from fallow.models.cuts import zero_where
from fallow.plan import Cut
from fallow.rules._base import Rule, bisect

N_CANDIDATES = 65536
HIGHEST_QUANTILE = 0.99  # the published cap: no layer gets sparser than about 99 %


class Cett(Rule):
    """||n_i|| = |inter_i| ||down_proj[:, i]|| against one threshold per layer (Eq. 3).

    The threshold is the largest whose cumulative error of tail truncation
    mean over tokens of ||Σ_D n_i|| / ||FFN(x)|| is at most the knob, the same in all layers.
    """

    name = "cett"
    paper = "arXiv:2411.02335 2.2"
    where = "inter"
    knob_name = "CETT, share of the FFN output's norm"
    known = "after gate and up: saves down_proj"
    search = "knob"

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        searches = cett_searches(calibration)

        def mean_sparsity(cett: float) -> float:
            return float(np.mean([s.sparsity(s.threshold(cett)) for s in searches]))

        with progress("cett for a sparsity"):
            return bisect(mean_sparsity, sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> Cut:
        searches = cett_searches(calibration)
        thresholds = []
        with progress("cett thresholds", len(searches)) as ticker:
            for search in searches:
                thresholds.append(search.threshold(knob))
                ticker.advance()
        return Cut("inter", "threshold", np.array(thresholds), "column_norm")


class CettSearch:
    """Thresholds of one layer, on scores (T, d_ff); `inter` likewise, `down_proj` (d_model, d_ff).

    Of a mixture `down_proj` is (n_experts, d_model, d_ff), and `experts` (T,) whose each row is.
    Candidates are 65,536 even steps from the smallest score to the 0.99 quantile.
    Evaluated candidates are remembered, so that the next search starts from a narrow bracket.
    """

    def __init__(
        self,
        inter: torch.Tensor,
        down_proj: torch.Tensor,
        score: torch.Tensor,
        experts: torch.Tensor | None = None,
    ) -> None:
        self.inter, self.down_proj, self.score, self.experts = inter, down_proj, score, experts
        sample = self.score.flatten()
        stride = max(1, sample.numel() // 1_000_000)
        while math.gcd(stride, inter.shape[1]) > 1:  # else some neurons would never be looked at
            stride += 1
        sample = sample[::stride]
        self.lowest = float(self.score.min())
        self.highest = float(torch.quantile(sample, HIGHEST_QUANTILE))
        self.output_norm = self.norm(inter)
        self.errors: dict[int, float] = {}

    def norm(self, inter: torch.Tensor) -> torch.Tensor:
        """Of the output for `inter`, (T,)."""
        if self.experts is None:
            return (inter @ self.down_proj.T).float().norm(dim=1)
        found = inter.new_empty(len(inter), dtype=torch.float32)
        for expert in self.experts.unique().tolist():
            rows = self.experts == expert
            found[rows] = (inter[rows] @ self.down_proj[expert].T).float().norm(dim=1)
        return found

    def candidate(self, index: int) -> float:
        step = (self.highest - self.lowest) / (N_CANDIDATES - 1)
        # float32, as the threshold is stored: what is searched is what is applied.
        return float(np.float32(self.lowest + index * step))

    def error(self, index: int) -> float:
        """CETT when scores <= candidate(index) are dropped: per-token ratio first, then the mean.

        A token whose FFN output is 0 loses nothing and counts 0.
        """
        if index not in self.errors:
            dropped = zero_where(self.score > self.candidate(index), self.inter)
            ratio = torch.where(self.output_norm > 0, self.norm(dropped) / self.output_norm, 0.0)
            self.errors[index] = float(ratio.mean())
        return self.errors[index]

    def threshold(self, target: float) -> float:
        """The largest candidate with error <= target, found by bisection.

        If there is none, what cuts nothing but exact zeros: without it the published code's index
        becomes -1 and wraps to the largest threshold (docs/methods.md, "CETT"). A target of 0 is
        that too, though a ReLU model has candidates without error: what is lossless on this text
        need not be on another.
        """
        nothing = 0.0 if self.lowest == 0 else -1.0
        if target <= 0:
            return nothing
        high = min((i for i, e in self.errors.items() if e > target), default=N_CANDIDATES)
        low = max((i for i in self.errors if i < high), default=-1)
        while high - low > 1:
            middle = (low + high) // 2
            if self.error(middle) <= target:
                low = middle
            else:
                high = middle
        return self.candidate(low) if low >= 0 else nothing

    def sparsity(self, threshold: float) -> float:
        return float((self.score <= threshold).float().mean())


def cett_searches(calibration: Calibration) -> list[CettSearch]:
    """One search per layer, with neurons dropped in the order of their outputs' norms."""
    if "cett" not in calibration.cache:
        norms = [layer.down_norm for layer in calibration.layers]
        scores = calibration.scores(calibration.inter, norms)
        calibration.cache["cett"] = searches_of(calibration, scores)
    return calibration.cache["cett"]


def searches_of(calibration: Calibration, scores: list[torch.Tensor]) -> list[CettSearch]:
    """One search per layer, with neurons dropped in the order of these scores (T', d_ff)."""
    found = []
    for index, (layer, score) in enumerate(zip(calibration.layers, scores, strict=True)):
        inter = calibration.inter[index]
        if layer.experts is None:
            found.append(CettSearch(inter, layer.down_proj.weight.detach(), score))
        else:
            experts = calibration.sampled_experts[index]
            found.append(CettSearch(inter, layer.experts.down_proj.detach(), score, experts))
    return found


RULE = Cett
