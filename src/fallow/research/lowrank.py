"""Thin matrices stand for gate and up; nothing is trained."""

from typing import ClassVar

import numpy as np
import torch

from fallow.common.progress import progress
from fallow.models.capture import Calibration
from fallow.models.devices import as_array, tensor
from fallow.models.taps import Layer
from fallow.selectors._base import Approximate, Arrays, Bits, Selector, input_weights
from fallow.selectors._rounding import rounded, rounded_bytes
from fallow.selectors._svd import Inputs


class LowRank(Approximate):
    """Scores with gate_proj and up_proj replaced by the two halves of a product A B.

    A (2 d_ff, rank) and B (rank, d_model) are closest on inputs like those of the calibration, then
    rounded to `bits`; what they miss is the error of the score. With gate=1 the gate is exact, and
    A B is up_proj alone. An FFN without a gate has one matrix, here called "gate".
    """

    # One B for both, measured on SmolLM2 at equal bytes (2 windows, 50 %): recall 0.740 against
    # 0.734 with one each, KL 0.176 ± 0.008 against 0.177 ± 0.022 nats.
    # No gain: A fitted again to the rounded B, rows weighted by what the neuron puts out.
    known = "before gate (gate=1: after it): saves gate_proj, up_proj and down_proj"
    options: ClassVar[dict[str, int]] = {"rank": 128, "bits": 4, "gate": 0, **Selector.options}
    option_ranges: ClassVar[dict[str, range]] = {
        "rank": range(1, 1025),
        "bits": range(4, 9, 4),
        "gate": range(2),
        **Selector.option_ranges,
    }

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        return (stored.gate if cls.options["gate"] else 0.0), 0.0

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        errors = 2 * cls._sizes(layer)["out"][0]  # half precision, one per row of A
        return errors + sum(
            rounded_bytes(size, cls.options["bits"]) for size in cls._sizes(layer).values()
        )

    @classmethod
    def extra_multiplications(cls, layer: Layer) -> int:
        return sum(rows * columns for rows, columns in cls._sizes(layer).values())

    @classmethod
    def _names(cls, layer: Layer) -> tuple[str, ...]:
        """The matrices that are approximated."""
        return ("gate", "up")[cls.options["gate"] : 2 if layer.gated else 1]

    @classmethod
    def _sizes(cls, layer: Layer) -> dict[str, tuple[int, int]]:
        """The shapes of A, "out", and B, "in"; rank 0 if nothing is approximated."""
        d_model, d_ff = layer.down_proj.weight.shape
        rank = min(cls.options["rank"], d_model) if cls._names(layer) else 0
        return {"out": (len(cls._names(layer)) * d_ff, rank), "in": (rank, d_model)}

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        parts: dict[str, list[np.ndarray]] = {}
        if not cls._names(calibration.layers[0]):
            return {}
        with progress("lowrank", len(calibration.layers)) as ticker:
            for layer, moment in zip(calibration.layers, calibration.input_moments, strict=True):
                for key, value in cls._factors(layer, Inputs(tensor(moment, layer.device))).items():
                    parts.setdefault(key, []).append(as_array(value.half()))
                ticker.advance()
        return {key: np.stack(values) for key, values in parts.items()}

    @classmethod
    def _factors(cls, layer: Layer, inputs: Inputs) -> dict[str, torch.Tensor]:
        names, bits = cls._names(layer), cls.options["bits"]
        weight = torch.cat([w.float() for w, _ in input_weights(layer)[-len(names) :]])
        out, inner = (rounded(f, bits) for f in inputs.truncate(weight, cls.options["rank"]))
        errors = inputs.root_mean_square(weight - out @ inner).chunk(len(names))
        return {"out": out, "in": inner} | {
            f"{name}.error": error for name, error in zip(names, errors, strict=True)
        }

    def approximate(self, index: int, weight: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.error" not in self.arrays:
            return weight
        out, inner = (self.tensor(key, index, weight).float() for key in ("out", "in"))
        half = out[-len(weight) :] if name == "up" else out[: len(weight)]
        return (half @ inner).to(weight.dtype)
