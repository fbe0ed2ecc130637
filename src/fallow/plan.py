"""The plan: the one file between calibration and whatever runs the model."""

import datetime
import json
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from fallow.common.errors import FallowError, in_one_line
from fallow.common.files import atomic_path, fits, parse_json

FORMAT = 1
_METADATA_KEY = "fallow_plan"
_SKETCH = "calibration_sketch"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


@dataclass
class Plan:
    """Which neurons may be inactive in one model, and how that was found.

    `arrays` are the rule's: `threshold.{tap}` (L,) in units of the value it cuts, or the one
    number of a per-token rule. Any plan may also have `head_margin` (1,), nats: logits that the
    coarse head of a packed model puts farther below the largest stay coarse, as do all but its
    `head_limit` (1,) largest. The file is safetensors; everything else is JSON in its metadata.
    """

    model: str
    fingerprint: str
    rule: str
    where: str
    knob: float
    knob_name: str
    arrays: dict[str, np.ndarray] = field(repr=False)
    target_sparsity: float | None = None
    target_ppl_increase: float | None = None  # percent
    # On held-out calibration text: sparsity of neurons, or of inputs weighted by parameters; PPL
    # change in percent with its paired standard error. A search for a loss judged itself by the
    # same windows, so that other text can be expected to lose a little more.
    achieved_sparsity: float | None = None
    achieved_ppl_increase: float | None = None
    achieved_ppl_increase_se: float | None = None
    calibration_text: str = ""
    calibration_sha256: str = ""
    # `Text.sketch` of it, (n,) uint64; empty in plans that were made without.
    calibration_sketch: np.ndarray = field(
        default_factory=lambda: np.empty(0, dtype=np.uint64), repr=False
    )
    calibration_tokens: int = 0
    dtype: str = ""
    date: str = field(default_factory=_today)
    fallow_version: str = field(default_factory=lambda: version("fallow"))
    format: int = FORMAT

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but arrays and sketch."""
        return {k: v for k, v in asdict(self).items() if k not in ("arrays", _SKETCH)}

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises FallowError if it cannot be written."""
        content = self.to_bytes()
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def to_bytes(self) -> bytes:
        """The file's content."""
        text = json.dumps(self.metadata, allow_nan=False)
        # safetensors writes the memory of an array as it lies, whatever its strides say.
        stored = self.arrays | {_SKETCH: self.calibration_sketch}
        arrays = {name: np.ascontiguousarray(array) for name, array in stored.items()}
        return save_arrays(arrays, metadata={_METADATA_KEY: text})

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan. Raises FallowError: missing, truncated, no plan, or a newer format."""
        path = Path(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise FallowError(f"cannot read plan {path}: no such file; check --plan") from error
        except OSError as error:
            raise FallowError(f"cannot read plan {path}: {error.strerror}; check --plan") from error
        return cls.from_bytes(content, str(path))

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "Plan":
        """The plan of a file's content; `where` names it in errors. Raises as `load` does."""
        try:
            arrays = load_arrays(content)
            header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # a type numpy lacks
            raise FallowError(
                f"plan {where} is truncated or no safetensors file ({in_one_line(error)}); "
                "calibrate again"
            ) from error
        text = (header.get("__metadata__") or {}).get(_METADATA_KEY)
        if text is None:
            raise FallowError(f"{where} is a safetensors file but no plan; make one with calibrate")
        try:
            metadata = dict(parse_json(text))
        except (ValueError, TypeError) as error:
            raise FallowError(f"plan {where} has damaged metadata; calibrate again") from error
        return cls._from_metadata(where, metadata, arrays)

    @classmethod
    def _from_metadata(
        cls, where: str, metadata: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> "Plan":
        version = metadata.get("format")
        if version != FORMAT:
            raise FallowError(
                f"plan {where} has format {in_one_line(version)}, this fallow reads {FORMAT}; "
                "calibrate again"
            )
        sketch = arrays.pop(_SKETCH, np.empty(0, dtype=np.uint64))
        if sketch.dtype != np.uint64 or sketch.ndim != 1:
            raise FallowError(f"plan {where}: array {_SKETCH} is damaged; calibrate again")
        known = {f.name: f.type for f in fields(cls) if f.name not in ("arrays", _SKETCH)}
        missing = {"model", "fingerprint", "rule", "where", "knob", "knob_name"} - set(metadata)
        if missing:
            raise FallowError(f"plan {where} lacks {', '.join(sorted(missing))}; calibrate again")
        for name in sorted(known.keys() & metadata.keys()):
            if not fits(metadata[name], known[name]):
                raise FallowError(
                    f"plan {where}: {name} cannot be {in_one_line(metadata[name])}; calibrate again"
                )
        for name, array in arrays.items():
            signed = name.partition(".")[0] not in (
                "threshold", "weight", "kept", "tau", "head_margin", "head_limit",
            )  # fmt: skip
            if not (np.isfinite(array) & (signed | (array >= 0))).all():
                raise FallowError(
                    f"plan {where}: array {name} has NaN, infinity or a negative value; "
                    "calibrate again"
                )
            if name in ("kept", "tau") and (array > 1).any():
                raise FallowError(f"plan {where}: array {name} exceeds 1; calibrate again")
        values = {k: v for k, v in metadata.items() if k in known}
        return cls(arrays=arrays, calibration_sketch=sketch, **values)

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raises FallowError if the plan was made for another model."""
        if self.fingerprint != fingerprint:
            raise FallowError(
                f"this plan is for {self.model} (fingerprint {self.fingerprint}), not for {name} "
                f"(fingerprint {fingerprint}); calibrate a plan for {name}"
            )
