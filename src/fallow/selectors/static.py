"""The neurons that matter most on average, the same ones for every token."""

import numpy as np
import torch

from fallow.models.capture import Calibration
from fallow.models.devices import as_array
from fallow.models.taps import Layer
from fallow.selectors._base import Arrays, Seen, Selector


class Static(Selector):
    """Keeps the k neurons with the largest E|inter_i| ||down_proj[:, i]|| of the calibration."""

    name = "static"
    known = "before gate: saves gate_proj, up_proj and down_proj"

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        return {"mean": mean_out_norm(calibration)}

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        return self.tensor("mean", index, seen.out_norm).expand(seen.out_norm.shape)


def mean_out_norm(calibration: Calibration) -> np.ndarray:
    """E|inter_i| ||down_proj[:, i]|| of every neuron over the calibration sample, (L, d_ff)."""
    means = [
        inter.abs().float().mean(dim=0) * layer.down_norm
        for inter, layer in zip(calibration.inter, calibration.layers, strict=True)
    ]
    return as_array(torch.stack(means))


RULE = Static
