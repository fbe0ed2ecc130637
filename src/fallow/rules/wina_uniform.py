"""WINA's scores with the same k everywhere: per-token top-k of every projection's input."""

from fallow.models.capture import Calibration
from fallow.plan import Cut
from fallow.rules.topk import TopK


class WinaUniform(TopK):
    """Keeps the inputs with the largest |x_j| ||W[:, j]|| of each token and projection."""

    name = "wina_uniform"
    paper = "arXiv:2505.19427, without its allocation"
    where = "input"
    knob_name = "share of inputs kept per token and projection"
    known = "before each projection: saves its columns"

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> list[Cut]:
        taps = calibration.layers[0].projections
        return [Cut(tap, "topk", knob, "column_norm") for tap in taps]


RULE = WinaUniform
