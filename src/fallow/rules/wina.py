"""WINA: per-token top-k on weight-informed scores of every projection's input."""

from fallow.models.capture import Calibration
from fallow.plan import Cut
from fallow.rules.topk import TopK


class Wina(TopK):
    """Keeps the inputs with the largest |x_j| ||W[:, j]|| of each token and projection."""

    name = "wina"
    paper = "arXiv:2505.19427"
    where = "input"
    knob_name = "share of inputs kept per token and projection"
    known = "before each projection: saves its columns"

    @classmethod
    def learn(cls, calibration: Calibration, knob: float) -> list[Cut]:
        taps = calibration.layers[0].projections
        return [Cut(tap, "topk", knob, "column_norm") for tap in taps]


RULE = Wina
