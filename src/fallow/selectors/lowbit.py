"""The top bits of the weights choose; the rest is read for the chosen neurons alone."""

from typing import ClassVar

import numpy as np
import torch

from fallow.capture import Calibration
from fallow.progress import progress
from fallow.rules import Arrays
from fallow.selectors._base import Approximate, Bits, Selector, input_weights
from fallow.taps import Layer

# As Q4_K stores gate_proj and up_proj.
GROUP, STORED_BITS = 32, 4
# Variance, as a share of the mean, that directions of the input have at least: what calibration
# did not see may still come.
DAMPING = 1e-3


class LowBit(Approximate):
    """Reads the top `gate` and `up` bits of the stored weights to choose; 4: all of them.

    Stored weights are rounded to 4 bits between the smallest and the largest of each group of 32
    along a row, as Q4_K does. A value of the top bits stands for the mean of the matrix's stored
    values that share it, the reconstruction with the least squared error.

    With `rank` r the error is approximated by a product A B of that rank, A (d_ff, r) and
    B (r, d_model), closest on inputs like those of the calibration: with S Sᵀ = E[x xᵀ], the
    truncated SVD of (W - W') S, times S⁻¹ (arXiv:2403.07378 3.2, there of W itself).
    """

    name = "lowbit"
    known = "after the top bits of gate and up: saves their rest, and down_proj"
    options: ClassVar[dict[str, int]] = {"gate": 4, "up": 2, "rank": 0, **Selector.options}
    option_ranges: ClassVar[dict[str, range]] = {
        "gate": range(1, STORED_BITS + 1),
        "up": range(1, STORED_BITS + 1),
        "rank": range(1025),
        **Selector.option_ranges,
    }

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        unread = {name: STORED_BITS - cls.options[name] for name in ("gate", "up")}
        return stored.gate - unread["gate"], stored.up - unread["up"]

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        corrected = sum(cls._corrected(name) for name in ("gate", "up"))
        return corrected * cls.options["rank"] * sum(layer.down_proj.weight.shape)  # as int8

    @classmethod
    def _corrected(cls, name: str) -> bool:
        return cls.options["rank"] > 0 and cls.options[name] < STORED_BITS

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        parts: dict[str, list[np.ndarray]] = {}
        if cls.options["rank"]:
            with progress("lowbit correction", len(calibration.layers)) as ticker:
                for layer, moment in zip(
                    calibration.layers, calibration.input_moments, strict=True
                ):
                    for key, value in cls._corrections(layer, torch.from_numpy(moment)).items():
                        parts.setdefault(key, []).append(value.half().numpy())
                    ticker.advance()
        return {key: np.stack(values) for key, values in parts.items()}

    @classmethod
    def _corrections(cls, layer: Layer, moment: torch.Tensor) -> dict[str, torch.Tensor]:
        variance, directions = torch.linalg.eigh(moment)
        scale = variance.clamp_min(DAMPING * float(variance.mean())).sqrt()
        found = {}
        for name, (weight, _) in zip(("gate", "up"), input_weights(layer), strict=False):
            if cls._corrected(name):
                error = weight.float() - top_bits(weight, cls.options[name]).float()
                scaled = error @ (directions * scale)
                top = torch.linalg.eigh(scaled.T @ scaled)[1][:, -cls.options["rank"] :]
                found[f"{name}.out"] = scaled @ top
                found[f"{name}.in"] = (directions / scale @ top).T
        return found

    @classmethod
    def score_shapes(cls, layers: list[Layer]) -> dict[str, tuple[int, ...]]:
        d_model, d_ff = layers[0].down_proj.weight.shape
        n, rank = len(layers), min(cls.options["rank"], d_model)
        own: dict[str, tuple[int, ...]] = {}
        for name, _ in zip(("gate", "up"), input_weights(layers[0]), strict=False):
            if cls._corrected(name):
                own |= {f"{name}.out": (n, d_ff, rank), f"{name}.in": (n, rank, d_model)}
        return own

    def approximate(self, index: int, weight: torch.Tensor, name: str) -> torch.Tensor:
        if self.options[name] == STORED_BITS:
            return weight
        rounded = top_bits(weight, self.options[name])
        if not self._corrected(name):
            return rounded
        out, inner = (
            torch.from_numpy(self.arrays[f"{name}.{part}"][index]).float() for part in ("out", "in")
        )
        return (rounded.float() + out @ inner).to(weight.dtype)


def top_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """W (out, in) with the top `bits` of the 4 that each weight is stored in."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % GROUP))
    groups = padded.reshape(rows, -1, GROUP)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    step = (high - low) / (2**STORED_BITS - 1)
    stored = ((groups - low) / step.clamp_min(1e-30)).round()
    top = (stored / 2 ** (STORED_BITS - bits)).floor().long()
    sums = torch.zeros(2**bits).scatter_add_(0, top.flatten(), stored.flatten())
    means = sums / torch.bincount(top.flatten(), minlength=2**bits).clamp_min(1)
    return (low + means[top] * step).reshape(rows, -1)[:, :columns].to(weight.dtype)


RULE = LowBit
