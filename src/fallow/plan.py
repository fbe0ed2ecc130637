"""The plan: the one file between calibration and whatever runs the model."""

import datetime
import json
import tempfile
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fallow.errors import FallowError
from fallow.files import atomic_path

FORMAT = 1
_METADATA_KEY = "fallow_plan"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


@dataclass
class Plan:
    """Which neurons may be left idle in one model, and how that was found.

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
    calibration_tokens: int = 0
    dtype: str = ""
    date: str = field(default_factory=_today)
    fallow_version: str = field(default_factory=lambda: version("fallow"))
    format: int = FORMAT

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but the arrays."""
        return {k: v for k, v in asdict(self).items() if k != "arrays"}

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises FallowError if it cannot be written."""
        content = self.to_bytes()
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def to_bytes(self) -> bytes:
        """The file's content."""
        text = json.dumps(self.metadata, allow_nan=False)
        # safetensors writes the memory of an array as it lies, whatever its strides say.
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        return save(arrays, metadata={_METADATA_KEY: text})

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "Plan":
        """The plan of a file's content; `where` names it in errors. Raises as `load` does."""
        with tempfile.NamedTemporaryFile(suffix=".plan") as file:
            file.write(content)
            file.flush()
            return cls.load(file.name)

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan. Raises FallowError: missing, truncated, no plan, or a newer format."""
        path = Path(path)
        if not path.is_file():
            raise FallowError(f"cannot read plan {path}: no such file; check --plan")
        try:
            with safe_open(path, framework="numpy") as file:
                text = (file.metadata() or {}).get(_METADATA_KEY)
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except OSError as error:
            raise FallowError(f"cannot read plan {path}: {error.strerror or error}") from error
        except SafetensorError as error:
            raise FallowError(
                f"plan {path} is truncated or no safetensors file ({error}); calibrate again"
            ) from error
        if text is None:
            raise FallowError(f"{path} is a safetensors file but no plan; make one with calibrate")
        try:
            metadata = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise FallowError(f"plan {path} has damaged metadata; calibrate again") from error
        return cls._from_metadata(path, metadata, arrays)

    @classmethod
    def _from_metadata(
        cls, path: Path, metadata: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> "Plan":
        version = metadata.get("format")
        if version != FORMAT:
            raise FallowError(
                f"plan {path} has format {version}, this fallow reads {FORMAT}; calibrate again"
            )
        known = {f.name for f in fields(cls)} - {"arrays"}
        missing = {"model", "fingerprint", "rule", "where", "knob", "knob_name"} - set(metadata)
        if missing:
            raise FallowError(f"plan {path} lacks {', '.join(sorted(missing))}; calibrate again")
        for name, array in arrays.items():
            signed = name.partition(".")[0] not in (
                "threshold", "weight", "kept", "tau", "head_margin", "head_limit",
            )  # fmt: skip
            if not (np.isfinite(array) & (signed | (array >= 0))).all():
                raise FallowError(
                    f"plan {path}: array {name} has NaN, infinity or a negative value; "
                    "calibrate again"
                )
        return cls(arrays=arrays, **{k: v for k, v in metadata.items() if k in known})

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raises FallowError if the plan was made for another model."""
        if self.fingerprint != fingerprint:
            raise FallowError(
                f"this plan is for {self.model} (fingerprint {self.fingerprint}), not for {name} "
                f"(fingerprint {fingerprint}); calibrate a plan for {name}"
            )
