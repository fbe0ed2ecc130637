"""A small network of the FFN's input, trained to know which neurons will matter."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

import fallow
from fallow.common import tagged
from fallow.common.errors import FallowError, UsageError, in_one_line
from fallow.models.capture import Calibration
from fallow.models.devices import as_array
from fallow.models.taps import Layer
from fallow.plan import today
from fallow.selectors import find
from fallow.selectors._base import Arrays, Bits, Seen, Selector, input_weights
from fallow.selectors._rounding import from_int8, to_int8
from fallow.selectors._svd import Inputs

Network = dict[str, torch.Tensor]
"""One layer's network: `in` (rank, d_model), `out` (n d_ff, rank), `noise` (n d_ff,)."""


class Learned(Selector):
    """Keeps the k neurons with the largest score of a trained bottleneck x -> rank -> d_ff:

        sqrt(act(x G'ᵀ)² + s_g²) sqrt((x U'ᵀ)² + s_u²) ||down_proj[:, i]||

    [G'; U'] = `out` `in` is of the rank given and starts as the activation-aware truncated SVD of
    gate_proj and up_proj (arXiv:2403.07378 3.2); s², `noise`, is what the truncation leaves of
    their values' variance, so that the score is the expected output and not the predicted one's.
    With gate=1 the exact gate is known and the network is for up_proj alone.

    The published predictors (DejaVu, arXiv:2310.17157 4; ShadowLLM, arXiv:2406.16635) go from the
    bottleneck to d_ff by one matrix. Of equal size, trained alike, a ReLU or SiLU network of that
    form lost 1.4 times the energy on SmolLM2 (layer 15; 11 against 7.6 %): |act(g) u| is even in u
    and a product, which a sum over 128 hidden values fits badly.
    """

    paper = "ours (docs/methods.md); arXiv:2310.17157"
    known = "before gate: saves gate_proj, up_proj and down_proj; gate=1: all but gate_proj"
    options: ClassVar[dict[str, int]] = {"rank": 64, "gate": 0, **Selector.options}
    option_ranges: ClassVar[dict[str, range]] = {
        "rank": range(1, 1025),
        "gate": range(2),
        **Selector.option_ranges,
    }

    def __init__(self, knob: float, arrays: Arrays) -> None:
        super().__init__(knob, arrays)
        self._made: dict[int, Network] = {}

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        return (stored.gate if cls.options["gate"] else 0.0), 0.0

    @classmethod
    def extra_bytes(cls, layer: Layer) -> int:
        d_model, d_ff = layer.down_proj.weight.shape
        rank, rows = min(cls.options["rank"], d_model), len(predicted(layer, cls.options)) * d_ff
        return rank * (d_model + rows) + 2 * (rank + 2 * rows)  # scales and noise as float16

    @classmethod
    def learn_scores(cls, calibration: Calibration) -> Arrays:
        raise UsageError(
            f"selector {cls.name} needs training: run fallow select train, "
            "and give what it writes to fallow select compare with --trained"
        )

    def score(self, index: int, layer: Layer, seen: Seen) -> torch.Tensor:
        if index not in self._made:
            self._made[index] = {
                "in": from_int8(self.arrays, "in", index, layer.device),
                "out": from_int8(self.arrays, "out", index, layer.device),
                "noise": self.tensor("noise", index, seen.x),
            }
        return log_score(self._made[index], layer, self.options, seen.x, seen.gate_act).exp()


def predicted(layer: Layer, options: dict[str, int]) -> tuple[str, ...]:
    """What a layer's network predicts: "gate", "up" or both.

    Raises:
        UsageError: gate=1 for an FFN without a gate.
    """
    if layer.gated:
        return ("up",) if options["gate"] else ("gate", "up")
    if options["gate"]:
        raise UsageError("this model's FFN has no gate to know; leave out gate=1")
    return ("gate",)


def log_score(
    network: Network,
    layer: Layer,
    options: dict[str, int],
    x: torch.Tensor,
    gate_act: torch.Tensor,
) -> torch.Tensor:
    """log of the predicted out_norm (T, d_ff), for x (T, d_model) and gate_act (T, d_ff)."""
    parts = predicted(layer, options)
    values = nn.functional.linear(nn.functional.linear(x.float(), network["in"]), network["out"])
    found = layer.down_norm.clamp_min(1e-30).log()
    if options["gate"]:
        found = found + gate_act.float().abs().clamp_min(1e-30).log()
    biases = dict(zip(("gate", "up"), (b for _, b in input_weights(layer)), strict=False))
    for name, value, noise in zip(
        parts, values.chunk(len(parts), dim=1), network["noise"].chunk(len(parts)), strict=True
    ):
        bias = biases[name]
        value = value if bias is None else value + bias.float()
        value = layer.act(value) if name == "gate" else value
        found = found + (value.square() + noise.exp()).log() / 2
    return found


def initial(
    layer: Layer, options: dict[str, int], moment: torch.Tensor
) -> tuple[Network, torch.Tensor]:
    """The untrained network: the truncated SVD of the weights on inputs with E[x xᵀ] = `moment`.

    Its `in` reads x times the matrix returned besides, (d_model, d_model), which gives all
    directions unit variance, so that training treats them alike (of the energy that SmolLM2's layer
    15 loses at rank 74 it leaves 7.8 % instead of 8.2 %).
    """
    weights = dict(zip(("gate", "up"), (w for w, _ in input_weights(layer)), strict=False))
    weight = torch.cat([weights[name].float() for name in predicted(layer, options)])
    inputs = Inputs(moment)
    out, inner = inputs.white(weight, options["rank"])
    left = (inputs.root_mean_square(weight).square() - out.square().sum(dim=1)).clamp_min(1e-8)
    # act passes on a part of the gate's error, about half of its standard deviation.
    share = torch.ones_like(left)
    if "gate" in predicted(layer, options):
        share[: layer.down_proj.in_features] = 0.25
    return {"in": inner, "out": out, "noise": (left * share).log()}, inputs.inverse.T


def arrays_of(networks: list[Network]) -> Arrays:
    """The selector's arrays, both matrices as int8 with a scale per row."""
    parts: dict[str, list[np.ndarray]] = {}
    for network in networks:
        for name in ("in", "out"):
            values, scale = to_int8(network[name])
            parts.setdefault(name, []).append(values)
            parts.setdefault(f"{name}.scale", []).append(scale)
        parts.setdefault("noise", []).append(as_array(network["noise"]).copy())
    return {name: np.stack(values) for name, values in parts.items()}


FORMAT = 1
_METADATA_KEY, _SKETCH = "fallow_trained", "calibration_sketch"
_KIND, _REMEDY = "trained selector", "train again with fallow select train"


def name_of(options: str = "") -> str:
    """The name by which the selector is found, with options such as "rank=3:gate=1"."""
    return ":".join(filter(None, (Learned.__module__, Learned.__name__, options)))


@dataclass
class Trained:
    """Networks for one model, and how they were trained: what `fallow select train` writes."""

    model: str
    fingerprint: str
    selector: str  # its full name, options included
    knob: float
    arrays: Arrays = field(repr=False)
    target_sparsity: float | None = None
    # On held-out text: sparsity of neurons; PPL change in percent and its paired standard error.
    achieved_sparsity: float | None = None
    achieved_ppl_increase: float | None = None
    achieved_ppl_increase_se: float | None = None
    calibration_text: str = ""
    calibration_sha256: str = ""
    # `Text.sketch` of it, (n,) uint64.
    calibration_sketch: np.ndarray = field(
        default_factory=lambda: np.empty(0, dtype=np.uint64), repr=False
    )
    calibration_tokens: int = 0
    dtype: str = ""
    date: str = field(default_factory=today)
    fallow_version: str = field(default_factory=lambda: fallow.__version__)
    format: int = FORMAT

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but arrays and sketch."""
        own = (f.name for f in fields(self) if f.name not in ("arrays", _SKETCH))
        return {name: getattr(self, name) for name in own}

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises FallowError if it cannot be written."""
        arrays = self.arrays | {_SKETCH: self.calibration_sketch}
        tagged.write(path, tagged.to_bytes(_METADATA_KEY, self.metadata, arrays))

    @classmethod
    def load(cls, path: str | Path) -> "Trained":
        """Reads a file. Raises FallowError: missing, truncated, or none of a trained selector."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise FallowError(
                f"cannot read trained selector {path}: {error.strerror}; check --trained"
            ) from error
        metadata, arrays = tagged.from_bytes(
            content, _METADATA_KEY, str(path), _KIND, (_REMEDY, "make one with fallow select train")
        )
        try:
            return cls._from_metadata(metadata, arrays)
        except (ValueError, UsageError) as error:
            raise FallowError(f"{_KIND} {path}: {error}; {_REMEDY}") from error

    @classmethod
    def _from_metadata(cls, metadata: dict[str, Any], arrays: Arrays) -> "Trained":
        """Raises ValueError or UsageError for whatever is not understood."""
        found = metadata.get("format")
        if found != FORMAT:
            raise ValueError(f"it has format {in_one_line(found)}, this fallow reads {FORMAT}")
        known = tuple(f for f in fields(cls) if f.name not in ("arrays", _SKETCH))
        values = tagged.check_fields(metadata, known, {"model", "fingerprint", "selector", "knob"})
        sketch = tagged.take_sketch(arrays, _SKETCH)
        _check_arrays(arrays, _options(metadata["selector"]))
        return cls(arrays=arrays, calibration_sketch=sketch, **values)

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raises FallowError if the networks were trained for another model."""
        if self.fingerprint != fingerprint:
            raise FallowError(
                f"this trained selector is for {self.model} (fingerprint {self.fingerprint}), not "
                f"for {name} (fingerprint {fingerprint}); train one for {name}"
            )


def _options(name: str) -> dict[str, int]:
    """The options of a trained selector's name, which is never taken for a module to import.

    Raises:
        ValueError: another selector, or no such options.
    """
    own = name_of()
    if name != own and not name.startswith(f"{own}:"):
        raise ValueError(f"{in_one_line(name)} is no selector that is trained")
    return find(name).options


def _check_arrays(arrays: Arrays, options: dict[str, int]) -> None:
    """Raises ValueError unless these are the arrays of `arrays_of`, all for the same networks."""
    kinds = {
        "in": (np.int8, 3), "in.scale": (np.float32, 2), "out": (np.int8, 3),
        "out.scale": (np.float32, 2), "noise": (np.float32, 2),
    }  # fmt: skip
    if arrays.keys() != kinds.keys():
        raise ValueError(f"it has the arrays {in_one_line(', '.join(sorted(arrays)))}")
    for name, (dtype, axes) in kinds.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != axes or not np.isfinite(array).all():
            raise ValueError(f"array {name} is damaged")
    n, rows, rank = arrays["out"].shape
    shapes = {"in": (n, rank, arrays["in"].shape[2]), "in.scale": (n, rank)}
    shapes |= {"out.scale": (n, rows), "noise": (n, rows)}
    if any(arrays[name].shape != shape for name, shape in shapes.items()) or (
        rank != min(options["rank"], arrays["in"].shape[2])
    ):
        raise ValueError("its arrays do not fit each other")
