"""CATS: a threshold per layer on the gate's activation."""

from typing import Self

from fallow.capture import Calibration
from fallow.rules._base import Rule, layer_quantiles, one_of
from fallow.taps import Layer


class Cats(Rule):
    """|gate_act| against the layer's own quantile of |gate_act|."""

    name = "cats"
    paper = "arXiv:2404.08763"
    where = "inter"
    knob_name = "quantile of |gate_act| per layer, [0, 1)"
    known = "after gate: saves up_proj and down_proj"

    @classmethod
    def cuts(cls, layer: Layer) -> tuple[str, ...]:
        return ("gate_act",)

    @classmethod
    def fit(
        cls, calibration: Calibration, *, sparsity: float | None = None, knob: float | None = None
    ) -> Self:
        sparsity, knob = one_of(sparsity, knob, 0, 1, cls.knob_name)
        q = sparsity if knob is None else knob
        assert q is not None
        return cls(q, {"threshold.gate_act": layer_quantiles(calibration, "gate_act", q)})


RULE = Cats
