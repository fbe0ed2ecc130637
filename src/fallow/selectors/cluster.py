"""Which of some typical patterns a token's is: one choice for all neurons of a layer.

The patterns are a codebook of the calibration text (fallow.patterns.clustering): as many masks as
clusters, in place of a score per neuron, are what an engine would have to read to choose.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fallow.common.errors import UsageError
from fallow.common.progress import progress
from fallow.models.capture import Calibration
from fallow.models.cuts import per_token_topk
from fallow.models.devices import as_array, tensor
from fallow.models.taps import Layer
from fallow.patterns.clustering import energy_weights, fit, one_pass
from fallow.patterns.store import pack_bits, unpack_bits
from fallow.selectors._base import Arrays, Bits, Seen, Selector, watch
from fallow.selectors._rounding import from_int8, to_int8

BUDGET = 0.5  # of the patterns that are clustered, and of centroids
RIDGE = 0.01  # of the inputs' mean variance


class Cluster(Selector):
    """Keeps the k neurons with the largest expected energy in the cluster chosen for the token.

    That is how often a neuron is active in the cluster times its mean energy when it is. Overlaps
    count neurons by weights of their energy. Chosen is the cluster with the largest expected
    overlap, sum over its neurons of w_i P(i active), which a linear regression of the active sets
    on the FFN's input x gives: (C w W) x + C w b, one row per cluster. With oracle=1 it is the one
    that overlaps the true active set most, a bound (arXiv:2507.14179). With and=1 only
    neurons of the true active set remain, as published.
    """

    name = "cluster"
    paper = "ours (docs/methods.md); arXiv:2507.14179"
    known = (
        "before gate: saves gate_proj, up_proj and down_proj; oracle=1 or and=1: not before down"
    )
    options: ClassVar[dict[str, int]] = {"k": 64, "oracle": 0, "and": 0}
    option_ranges: ClassVar[dict[str, range]] = {
        "k": range(1, 16385),
        "oracle": range(2),
        "and": range(2),
    }

    def __init__(self, knob: float, arrays: Arrays) -> None:
        super().__init__(knob, arrays)
        self._choice: dict[int, torch.Tensor] = {}

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        knows_truth = cls.options["oracle"] or cls.options["and"]
        return (stored.gate, stored.up) if knows_truth else (0.0, 0.0)

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        """The chosen cluster's mask, in bits, and what chooses.

        That is the linear map in int8 with a scale and a bias per cluster; with oracle=1 every
        centroid's bits and the neurons' weights.
        """
        d_model, d_ff = layer.down_proj.weight.shape
        mask, k = -(-d_ff // 8), cls.options["k"]
        choice = k * mask + d_ff if cls.options["oracle"] else k * (d_model + 4)
        return choice + mask

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        return 0 if cls.options["oracle"] else int(cls.options["k"] * layer.down_proj.out_features)

    @classmethod
    def scores_key(cls) -> str:
        return f"selector:cluster:k={cls.options['k']}"

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        k = cls.options["k"]
        if k > calibration.n_tokens:
            raise UsageError(
                f"k={k} clusters of {calibration.n_tokens} calibration tokens; give more"
            )
        found = _patterns(calibration)
        parts: dict[str, list[np.ndarray]] = {}
        width = calibration.layers[0].down_proj.in_features
        with progress("codebooks", len(found)) as ticker:
            for seen in found:
                rows = np.concatenate(seen.rows)
                weights = energy_weights(seen.energy, seen.counts)
                codebook = fit(
                    rows, width, k, BUDGET, weights=weights, n_threads=torch.get_num_threads()
                )
                last = one_pass(rows, codebook.centroids, weights)
                rate = last.counts[:, :width] / np.maximum(last.sizes, 1)[:, None]
                centroids = unpack_bits(codebook.centroids, width)
                weighted = torch.from_numpy((centroids * weights).astype(np.float32))
                values = weighted @ seen.regression().cpu()
                choice, scale = to_int8(values[:, :-1])
                loudness = seen.energy / np.maximum(seen.counts, 1)
                layer_arrays = {
                    # Where rates are equal, the centroid's neurons come first.
                    "rate": np.round(250 * rate + 2 * centroids).astype(np.uint8),
                    # Above 0, so that rates tell even silent neurons apart.
                    "loudness": np.maximum(loudness, 1e-6 * loudness.max()).astype(np.float32),
                    "weights": weights,
                    "centroids": codebook.centroids,
                    "choice": choice,
                    "choice.scale": scale,
                    "bias": values[:, -1].numpy().astype(np.float32),
                }
                for name, array in layer_arrays.items():
                    parts.setdefault(name, []).append(array)
                ticker.advance()
        return {name: np.stack(arrays) for name, arrays in parts.items()}

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        if self.options["oracle"]:
            active = seen.out_norm > per_token_topk(seen.out_norm, BUDGET)
            centroids = unpack_bits(self.arrays["centroids"][index], active.shape[1])
            weights = (centroids * self.arrays["weights"][index]).astype("f4")
            weighted = tensor(weights, active.device)
            labels = (active.float() @ weighted.T).argmax(dim=1)
        else:
            if index not in self._choice:
                self._choice[index] = from_int8(self.arrays, "choice", index, layer.device)
            bias = self.tensor("bias", index, seen.x)
            labels = nn.functional.linear(seen.x.float(), self._choice[index], bias).argmax(dim=1)
        # Distinct, so that exactly k stay: of equal rates the neurons of lower number.
        width = seen.out_norm.shape[1]
        order = torch.arange(width, 0, -1, device=seen.x.device) / (2 * width)
        rate = self.tensor("rate", index, seen.x)[labels] + order
        expected = rate * self.tensor("loudness", index, seen.x)
        if self.options["and"]:
            both = [s > super(Cluster, self).threshold(index, s) for s in (expected, seen.out_norm)]
            return seen.out_norm * both[0] * both[1]
        return expected

    def threshold(self, index: int, score: torch.Tensor) -> float | torch.Tensor:
        return 0.0 if self.options["and"] else super().threshold(index, score)


RULE = Cluster


@dataclass
class _Patterns:
    """What the dense model's active sets are in one layer, and how they hang on x."""

    rows: list[np.ndarray]  # (tokens, words) of each window
    energy: np.ndarray  # (d_ff,): of each token's energy the neuron's share, where active, summed
    counts: np.ndarray  # (d_ff,)
    moments: torch.Tensor  # (d_model + 1, d_model + 1) of (x, 1)
    products: torch.Tensor  # (d_ff, d_model + 1) of active sets and (x, 1)

    def regression(self) -> torch.Tensor:
        """P(neuron is active) of (x, 1), (d_ff, d_model + 1), by ridge regression."""
        damped = self.moments.double()
        damped.diagonal()[:-1].add_(RIDGE * damped.diagonal()[:-1].mean())
        return torch.linalg.solve(damped, self.products.double().T).T.float()


def _patterns(calibration: Calibration) -> list[_Patterns]:
    layers = calibration.layers
    d_model, d_ff = layers[0].down_proj.weight.shape
    found = [
        _Patterns(
            [],
            np.zeros(d_ff),
            np.zeros(d_ff, dtype=np.int64),
            torch.zeros(d_model + 1, d_model + 1, device=layer.device),
            torch.zeros(d_ff, d_model + 1, device=layer.device),
        )
        for layer in layers
    ]

    def add(index: int, inter: torch.Tensor, seen: Seen) -> None:
        active, into = seen.out_norm > per_token_topk(seen.out_norm, BUDGET), found[index]
        into.rows.append(pack_bits(as_array(active)))
        energy = seen.out_norm.square()
        energy /= energy.sum(dim=1, keepdim=True).clamp_min(1e-30)
        into.energy += as_array((energy * active).sum(dim=0))
        into.counts += as_array(active.sum(dim=0))
        x = nn.functional.pad(seen.x.float(), (0, 1), value=1.0)
        into.moments += x.T @ x
        into.products += active.float().T @ x

    calibration.run("patterns", watch(layers, add))
    return found
