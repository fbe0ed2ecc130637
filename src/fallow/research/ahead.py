"""A layer's neurons from what the layer before it was given: in time to fetch them from a disk."""

from typing import ClassVar

import numpy as np
import torch

from fallow.common.progress import progress
from fallow.models.capture import Calibration
from fallow.models.devices import as_array, tensor
from fallow.models.taps import Layer
from fallow.selectors._base import Arrays, Bits, Seen, input_weights
from fallow.selectors._rounding import rounded, rounded_bytes
from fallow.selectors._svd import DAMPING, Inputs
from fallow.selectors.lowbit import LowBit

MAP_BITS = 8


class Ahead(LowBit):
    """Scores as `lowbit` does, of a guess of x: x' = s * y + A B y, y the earlier layer's input.

    s (d_model,) scales every entry by least squares, norm weights included. A (d_model, map) and
    B (map, d_model) are of rank `map` and closest, over calibration, to what the linear map from y
    to x with the least squared error adds to s. How far x' misses is the error of the score. The
    first layer's y is its own x. arXiv:2412.12178 V proposes it over many layers
    and by a network.
    """

    # On SmolLM2 (2 windows, 50 %, exact gate and up): recall 0.744, KL 0.178 ± 0.008 nats with s
    # alone; map=64 0.793, 0.129 ± 0.005; the whole map 0.810, 0.114 ± 0.004.
    known = "a layer early: inactive neurons need not be fetched, nor read"
    options: ClassVar[dict[str, int]] = {**LowBit.options, "up": 4, "map": 64}
    option_ranges: ClassVar[dict[str, range]] = {**LowBit.option_ranges, "map": range(1025)}

    @classmethod
    def ffn_bytes(cls, kept: float, layer: Layer) -> float:
        # What was read to choose is read again for the kept: their x was another one.
        stored = Bits()
        again = kept * sum(cls.first_bits(stored)) / (stored.gate + stored.up + stored.down)
        return super().ffn_bytes(kept, layer) + again

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        d_model, d_ff = layer.down_proj.weight.shape
        n_errors = d_ff * (2 if layer.gated else 1)
        factors = sum(rounded_bytes(size, MAP_BITS) for size in cls._sizes(layer).values())
        return super().extra_bytes(layer) + factors + 2 * (d_model + n_errors)  # half precision

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        factors = sum(rows * columns for rows, columns in cls._sizes(layer).values())
        return super().extra_multiplications(layer) + factors + layer.down_proj.out_features

    @classmethod
    def _sizes(cls, layer: Layer) -> dict[str, tuple[int, int]]:
        """The shapes of A, "map.out", and B, "map.in"; none with map=0."""
        d_model = layer.down_proj.out_features
        rank = min(cls.options["map"], d_model)
        return {"map.out": (d_model, rank), "map.in": (rank, d_model)} if rank else {}

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        arrays = super().learn_scores(calibration)
        bits = cls(0.0, arrays)
        moments = [tensor(m, calibration.layers[0].device) for m in calibration.input_moments]
        parts: dict[str, list[np.ndarray]] = {}
        with progress("look ahead", len(moments)) as ticker:
            for index, layer in enumerate(calibration.layers):
                x, y = moments[index], moments[max(index - 1, 0)]
                xy = tensor(calibration.successive_moments[index], layer.device)
                found, whole = cls._map(y, xy)
                for name, (weight, _) in zip(("gate", "up"), input_weights(layer), strict=False):
                    true = weight.float()
                    guess = bits.approximate(index, weight, name).float() @ whole
                    # E[(w x - v y)²] per row
                    square = ((true @ x - 2 * guess @ xy.T) * true + guess @ y * guess).sum(dim=1)
                    found[f"{name}.error"] = square.clamp_min(0).sqrt()
                for key, value in found.items():
                    parts.setdefault(key, []).append(as_array(value.half()))
                ticker.advance()
        return arrays | {key: np.stack(values) for key, values in parts.items()}

    @classmethod
    def _map(
        cls, y: torch.Tensor, xy: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """s, A and B of E[y yᵀ] and E[x yᵀ], and the map (d_model, d_model) that they make."""
        power = y.diagonal()
        scale = xy.diagonal() / power.clamp_min(DAMPING * float(power.mean()))
        found, whole = {"map.scale": scale}, scale.diag()
        if cls.options["map"]:
            inputs = Inputs(y)
            best = xy @ inputs.inverse.T @ inputs.inverse
            product = inputs.truncate(best - whole, cls.options["map"])
            out, inner = (rounded(factor, MAP_BITS) for factor in product)
            found |= {"map.out": out, "map.in": inner}
            whole = whole + out @ inner
        return found, whole

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        scale, *product = (
            self.tensor(key, index, seen.x).float()
            for key in ("map.scale", "map.in", "map.out")
            if key in self.arrays
        )
        y = seen.earlier.float()
        x = y * scale
        if product:
            inner, out = product
            x += y @ inner.T @ out.T
        return self.expected_norm(index, layer, x.to(seen.x.dtype))
