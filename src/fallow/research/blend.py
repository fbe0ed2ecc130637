"""Cheap features together: each neuron has its own weights for them."""

import torch

from fallow.models.capture import Calibration
from fallow.models.devices import as_array
from fallow.models.taps import Layer
from fallow.research.lowrank import LowRank
from fallow.research.previous import Previous, earlier_mean
from fallow.selectors._base import Arrays, Bits, Seen, watch
from fallow.selectors.static import mean_out_norm

FEATURES = 3
# What the weights are drawn to, the score of `lowrank` alone, and how strongly: as a share of each
# feature's own weight in the sums.
PRIOR, RIDGE = (1.0, 0.0, 0.0), 0.01
SMALLEST = 1e-30  # of a score: at 0 a neuron is inactive even where all are kept


class Blend(LowRank):
    """Scores a r + b p + c m: r the score of `lowrank`, p that of `previous`, m that of `static`.

    a, b and c, an array "blend" (L, d_ff, 3), are the neuron's own and have the least squared error
    of out_norm over the calibration. Tokens count by the inverse of their FFN's squared out_norm,
    or attention sinks would decide. As with `previous`, p is a bound: it knows inactive neurons
    too, and gate and up are read whole for it.
    """

    known = Previous.known

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        return stored.gate, stored.up

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        # Half precision: the weights, the mean, and the state, read and written.
        return super().extra_bytes(layer) + 2 * (FEATURES + 3) * layer.down_proj.in_features

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        return super().extra_multiplications(layer) + (FEATURES + 2) * layer.down_proj.in_features

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        arrays = super().learn_scores(calibration) | {"mean": mean_out_norm(calibration)}
        selector, layers = cls(0.0, arrays), calibration.layers
        size = (len(layers), layers[0].down_proj.in_features, FEATURES)
        device = layers[0].device
        squares, products = (torch.zeros(s, device=device) for s in ((*size, FEATURES), size))

        def add(index: int, inter: torch.Tensor, seen: Seen) -> None:
            features = selector.features(index, layers[index], seen)
            weight = seen.out_norm.square().sum(dim=1).clamp_min(1e-30).reciprocal()
            weighted = features * weight[:, None, None]
            squares[index] += torch.einsum("tnf,tng->nfg", weighted, features)
            products[index] += torch.einsum("tnf,tn->nf", weighted, seen.out_norm)

        calibration.run("blend", watch(layers, add))
        prior = torch.tensor(PRIOR, device=device)
        own = squares.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30)
        damped = squares + torch.diag_embed(RIDGE * own)
        blend = prior + torch.linalg.solve(damped, products - squares @ prior)
        return arrays | {"blend": as_array(blend.half())}

    def features(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        """(T, d_ff, 3), float32."""
        mean = self.tensor("mean", index, seen.out_norm)
        found = (
            self.expected_norm(index, layer, seen.x),
            earlier_mean(mean, seen.out_norm),
            mean.expand(seen.out_norm.shape),
        )
        return torch.stack(found, dim=-1)

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        blend = self.tensor("blend", index, seen.out_norm).float()
        return (self.features(index, layer, seen) * blend).sum(dim=-1).clamp_min(SMALLEST)
