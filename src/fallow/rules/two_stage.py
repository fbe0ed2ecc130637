"""Two thresholds per layer: the gate drops the surest neurons, the whole inter drops the rest."""

from typing import ClassVar

import numpy as np

from fallow.common.progress import progress
from fallow.models.capture import Calibration
from fallow.models.devices import tensor
from fallow.plan import Cut
from fallow.rules._base import Rule, bisect
from fallow.rules._gate import gate_weights
from fallow.rules.cett import CettSearch, cett_searches, searches_of


class TwoStage(Rule):
    """A neuron is inactive if its score is at most the threshold in one of two stages.

    The first scores |gate_act_i| E|up_i| ||down_proj[:, i]||, after gate_proj; the second
    |inter_i| ||down_proj[:, i]||, after up_proj. Both thresholds follow `cett` (arXiv:2411.02335
    2.2): the second one's cumulative error of tail truncation is the knob, the first one's `early`
    percent of it, the same in all layers. `fallow optimize` sets every threshold by what it costs
    the whole model instead.
    """

    name = "two_stage"
    paper = "ours (docs/methods.md)"
    where = "inter"
    knob_name = "CETT of the second stage, share of the FFN output's norm"
    known = "after gate: saves some of up_proj; after up: more of down_proj"
    search = "knob"
    options: ClassVar[dict[str, int]] = {"early": 30}
    option_ranges: ClassVar[dict[str, range]] = {"early": range(101)}

    @classmethod
    def knob_for(cls, calibration: Calibration, sparsity: float) -> float:
        first, second = gate_searches(calibration), cett_searches(calibration)

        def mean_sparsity(knob: float) -> float:
            return float(
                np.mean(
                    [
                        float(((a.score <= s) | (b.score <= t)).float().mean())
                        for a, b, (s, t) in zip(
                            first, second, cls._thresholds(first, second, knob), strict=True
                        )
                    ]
                )
            )

        with progress("two_stage for a sparsity"):
            return bisect(mean_sparsity, sparsity)

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> list[Cut]:
        found = cls._thresholds(gate_searches(calibration), cett_searches(calibration), knob)
        first, second = np.array(found, dtype=np.float32).T
        return two_stage_cuts(first, second, gate_weights(calibration))

    @classmethod
    def _thresholds(
        cls, first: list[CettSearch], second: list[CettSearch], knob: float
    ) -> list[tuple[float, float]]:
        early = knob * cls.options["early"] / 100
        return [(a.threshold(early), b.threshold(knob)) for a, b in zip(first, second, strict=True)]


def two_stage_cuts(first: np.ndarray, second: np.ndarray, weights: list[np.ndarray]) -> list[Cut]:
    """Thresholds (L,) of both stages, and `gate_weights` for the first."""
    return [
        Cut("gate_act", "threshold", first, weights),
        Cut("inter", "threshold", second, "column_norm"),
    ]


def gate_searches(calibration: Calibration) -> list[CettSearch]:
    """As those of `cett`, with neurons dropped in the order of the gate's score."""
    if "cett by gate" not in calibration.cache:
        device = calibration.layers[0].device
        weights = [tensor(weight, device) for weight in gate_weights(calibration)]
        scores = calibration.scores(calibration.gate_act, weights)
        calibration.cache["cett by gate"] = searches_of(calibration, scores)
    return calibration.cache["cett by gate"]


RULE = TwoStage
