"""The top bits of the weights choose; the others are read for the chosen neurons alone."""

from typing import ClassVar

import numpy as np
import torch

from fallow.common.progress import progress
from fallow.models.capture import Calibration
from fallow.models.devices import as_array, tensor
from fallow.models.taps import Layer
from fallow.selectors._base import Approximate, Arrays, Bits, Selector, input_weights
from fallow.selectors._rounding import STORED_BITS, top_bits
from fallow.selectors._svd import Inputs


class LowBit(Approximate):
    """Reads the top `gate` and `up` bits of the stored weights to choose; 4: all of them.

    Stored weights are rounded to 4 bits between the smallest and the largest of each group of 32
    along a row, as Q4_K does. A value of the top bits stands for the mean of the matrix's stored
    values that share it, the reconstruction with the least squared error.

    With `rank` r the error W - W' is approximated by a product A B of that rank, A (d_ff, r) and
    B (r, d_model), closest on inputs like those of the calibration.
    """

    name = "lowbit"
    known = "after the top bits of gate and up: saves their other bits, and down_proj"
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
        return 2 * cls._correction_size(layer)  # half precision

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        return cls._correction_size(layer)

    @classmethod
    def _correction_size(cls, layer: Layer) -> int:
        """Numbers in the factors of all corrections."""
        d_model, d_ff = layer.down_proj.weight.shape
        corrected = sum(map(cls._corrected, ("gate", "up") if layer.gated else ("gate",)))
        return corrected * min(cls.options["rank"], d_model) * (d_model + d_ff)

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
                    for key, value in cls._corrections(layer, tensor(moment, layer.device)).items():
                        parts.setdefault(key, []).append(as_array(value.half()))
                    ticker.advance()
        return {key: np.stack(values) for key, values in parts.items()}

    @classmethod
    def _corrections(cls, layer: Layer, moment: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs, found = Inputs(moment), {}
        for name, (weight, _) in zip(("gate", "up"), input_weights(layer), strict=False):
            if cls._corrected(name):
                error = weight.float() - top_bits(weight, cls.options[name]).float()
                product = inputs.truncate(error, cls.options["rank"])
                found[f"{name}.out"], found[f"{name}.in"] = product
        return found

    def approximate(self, index: int, weight: torch.Tensor, name: str) -> torch.Tensor:
        if self.options[name] == STORED_BITS:
            return weight
        rounded = top_bits(weight, self.options[name])
        if not self._corrected(name):
            return rounded
        out, inner = (
            self.tensor(f"{name}.{part}", index, weight).float() for part in ("out", "in")
        )
        return (rounded.float() + out @ inner).to(weight.dtype)


RULE = LowBit
