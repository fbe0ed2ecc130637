"""TEAL: magnitude thresholds on the inputs of all projections, allocated greedily per block."""

from fallow.models.capture import Calibration, input_histogram
from fallow.rules._greedy import Greedy


class Teal(Greedy):
    """|x_j| of every projection's input against a threshold per layer and projection.

    The first half of each window stays dense in the search, as in the code.
    """

    name = "teal"
    paper = "arXiv:2408.14690"
    kind = "threshold"

    @classmethod
    def value(cls, calibration: Calibration, index: int, projection: str, sparsity: float) -> float:
        histogram = input_histogram(calibration.layers[0], projection)
        return calibration.histograms[histogram].quantile(index, sparsity)

    @classmethod
    def first_cut_token(cls, length: int) -> int:
        return length - length // 2


RULE = Teal
