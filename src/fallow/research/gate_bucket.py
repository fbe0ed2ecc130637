"""The exact gate, and up's mean magnitude where the gate was as large as it is now."""

import torch

from fallow.models.capture import Calibration
from fallow.models.devices import as_array
from fallow.models.taps import Layer
from fallow.selectors._base import Arrays, Seen
from fallow.selectors.gate import Gate

BUCKETS = 8  # of equal count per neuron: 128 of 1024 sampled tokens each


class GateBucket(Gate):
    """Keeps the k neurons with the largest |gate_act_i| E[|up_i| | gate_act_i] ||down_proj[:, i]||.

    The condition is the eighth of the neuron's calibration values that gate_act_i falls into.
    """

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        """Edges and means, in half precision."""
        return 2 * (2 * BUCKETS - 1) * layer.down_proj.in_features

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        return 0  # edges are compared with

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        edges, means = [], []
        for layer, gate, inter in zip(
            calibration.layers, calibration.gate_act, calibration.inter, strict=True
        ):
            values = gate.float().T.contiguous()  # (d_ff, T')
            order = values.argsort(dim=1)
            # |inter| = |gate| |up|: the mean of |inter| over that of |gate| weighs up as the score
            # will need it, and spares up.
            parts = [
                torch.stack(
                    [m.float().mean(dim=1) for m in matrix.gather(1, order).chunk(BUCKETS, 1)]
                )
                for matrix in (values.abs(), inter.float().abs().T.contiguous())
            ]
            means.append(parts[1] / parts[0].clamp_min(1e-12) * layer.down_norm)
            ordered = values.gather(1, order)
            edges.append(torch.stack([c[:, 0] for c in ordered.chunk(BUCKETS, 1)[1:]]))
        return {"edges": as_array(torch.stack(edges)), "means": as_array(torch.stack(means))}

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        gate = seen.gate_act.float()
        means = self.tensor("means", index, gate)
        factor = means[0].expand(gate.shape)
        for edge, mean in zip(self.tensor("edges", index, gate), means[1:], strict=True):
            factor = torch.where(gate >= edge, mean, factor)
        return gate.abs() * factor
