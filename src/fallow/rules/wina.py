"""WINA: per-token top-k on weight-informed scores of inputs, allocated greedily per block."""

from fallow.models.capture import Calibration
from fallow.models.taps import Layer
from fallow.plan import COLUMN_NORM
from fallow.rules._greedy import Greedy


class Wina(Greedy):
    """Keeps the inputs with the largest scores of each token, k per layer and projection.

    The score is |x_j| ||W[:, j]|| where the published code has it so, which is k_proj and
    gate_proj (or what they are fused in), and |x_j| elsewhere; `wina_uniform` weights everywhere.
    The code transforms those two to orthogonal columns first, which is not done here: the residual
    stream would have to be rotated between any two of them (docs/methods.md, "WINA"). The first
    hundredth of each window stays dense in the search, as in the code.
    """

    name = "wina"
    paper = "arXiv:2505.19427, without its rotation of the weights"
    kind = "topk"

    @classmethod
    def value(cls, calibration: Calibration, index: int, projection: str, sparsity: float) -> float:
        return 1 - sparsity

    @classmethod
    def weight(cls, layer: Layer, projection: str) -> str | None:
        weighted = ("k_proj", "qkv_proj", *list(layer.ffn_inputs)[:1])  # without a gate: up_proj
        return COLUMN_NORM if projection in weighted else None

    @classmethod
    def first_cut_token(cls, length: int) -> int:
        return length - int(0.99 * length)


RULE = Wina
