"""TEAL without its allocation: every projection's input at the same sparsity."""

from fallow.models.capture import Calibration, input_histogram
from fallow.plan import Cut
from fallow.rules._base import Rule, layer_quantiles


class TealUniform(Rule):
    """|x_j| of every projection's input against the layer's own quantile of it."""

    name = "teal_uniform"
    paper = "arXiv:2408.14690, without its allocation, as its kernels run"
    where = "input"
    knob_name = "quantile of |x_j| per layer and projection"
    known = "before each projection: saves its columns"

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> list[Cut]:
        layer = calibration.layers[0]
        return [
            Cut(name, "threshold", layer_quantiles(calibration, input_histogram(layer, name), knob))
            for name in layer.projections
        ]


RULE = TealUniform
