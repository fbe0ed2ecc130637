"""The plan: the one file between calibration and whatever runs the model (docs/plan.md).

A plan is numbers alone. It names no code, and whoever runs it needs to know of no rule.
"""

import datetime
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

import fallow
from fallow.common import tagged
from fallow.common.errors import FallowError, in_one_line
from fallow.common.tables import Table, plus_minus

FORMAT = 2
_METADATA_KEY = "fallow_plan"
_SKETCH = "calibration_sketch"

NEURON_TAPS = ("gate_pre", "gate_act", "up", "inter")
FFN_TAPS = (*NEURON_TAPS, "ffn_out")
ROUTER = "router"  # of a mixture of experts
# Projections by the name of their input; a model has some of them fused, or not.
PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj",
    "gate_proj", "up_proj", "gate_up_proj", "down_proj",
)  # fmt: skip
KINDS = {  # of cuts: their values
    "threshold": np.float32, "topk": np.float64, "tail": np.float64, "mass": np.float64,
}  # fmt: skip
COLUMN_NORM = "column_norm"


@dataclass(frozen=True, eq=False, repr=False)
class Cut:
    """Values v of one tap with |v_i| * weight_i <= threshold are inactive: they become zero.

    Args:
        tap: one of FFN_TAPS, or of PROJECTIONS for that projection's input, or "router": of a
            mixture of experts, the square roots of the shares that a token's experts have of it.
        kind: what `value` says of each layer. "threshold": the threshold itself; below 0 nothing
            is cut. "topk": k / width, and the threshold is each token's smallest that leaves at
            most k scores above it. "tail": τ, and it is each token's largest score with
            Σ score² up to it <= τ² Σ score². "mass": m, with Σ score up to it <= m Σ score.
        value: (L,), or one number for all layers.
        weight: (L, width), or "column_norm": of the projection W that reads the tap (down_proj,
            for values of the FFN) ||W[:, i]||. None: 1. Of a mixture's neurons the width is
            n_experts * d_ff, expert after expert, though each expert is cut by itself. Where
            layers differ in their width it is that of the widest, and the others' rows end in
            zeros; a list of rows, each as wide as its layer, becomes that.

    Raises:
        ValueError: not such a cut.
    """

    tap: str
    kind: str
    value: Any  # np.ndarray from here on
    weight: np.ndarray | list[np.ndarray] | str | None = None  # no list from here on

    def __post_init__(self) -> None:
        if self.tap not in (*FFN_TAPS, *PROJECTIONS, ROUTER):
            raise ValueError(f"nothing can be cut at {in_one_line(self.tap)}")
        if self.kind not in KINDS:
            raise ValueError(f"a cut of {self.tap} has the unknown kind {in_one_line(self.kind)}")
        value = np.asarray(self.value, dtype=KINDS[self.kind])
        object.__setattr__(self, "value", value)
        if value.ndim > 1 or not np.isfinite(value).all():
            raise ValueError(f"the {self.kind} of {self.tap} is no finite number per layer")
        if self.kind != "threshold" and not ((value >= 0) & (value <= 1)).all():
            raise ValueError(f"the {self.kind} of {self.tap} is outside 0 to 1")
        if isinstance(self.weight, str):
            if self.weight != COLUMN_NORM or self.tap in ("ffn_out", ROUTER):
                raise ValueError(f"{in_one_line(self.weight)} is no weight of {self.tap}")
        elif self.weight is not None:
            weight = self.weight
            weight = padded(weight) if isinstance(weight, list) else np.asarray(weight, np.float32)
            object.__setattr__(self, "weight", weight)
            if weight.ndim != 2 or not (np.isfinite(weight) & (weight >= 0)).all():
                raise ValueError(f"the weight of {self.tap} has NaN, infinity or a negative value")

    def __repr__(self) -> str:
        low, high = self.value.min(), self.value.max()
        value = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        weight = "" if self.weight is None else ", weighted"
        weight = f", times {COLUMN_NORM}" if isinstance(self.weight, str) else weight
        layers = f" in {self.value.size} layers" if self.value.ndim else ""
        return f"<Cut of {self.tap} by {self.kind} {value}{layers}{weight}>"

    @property
    def leaves_out(self) -> np.ndarray:
        """Of which layers it can leave out values, (L,) bool."""
        if self.kind == "threshold":
            return self.value >= 0
        return self.value < 1 if self.kind == "topk" else self.value > 0

    def of_layers(self, n: int) -> "Cut":
        """The same with a value for each of n layers.

        Raises:
            ValueError: it has as many for another number of layers.
        """
        if self.value.ndim and len(self.value) != n:
            raise ValueError(f"the {self.kind} of {self.tap} has {len(self.value)} layers, not {n}")
        if isinstance(self.weight, np.ndarray) and len(self.weight) != n:
            raise ValueError(f"the weight of {self.tap} has {len(self.weight)} layers, not {n}")
        return Cut(self.tap, self.kind, np.broadcast_to(self.value, n), self.weight)

    def check_layers(self, widths: Sequence[int], name: str) -> None:
        """Raises FallowError unless it is for layers of these widths, as the model `name` has."""
        n, width = len(widths), max(widths)
        if len(self.value) != n:
            raise FallowError(
                f"the plan's {self.kind} of {self.tap} is for {len(self.value)} layers, {name} has "
                f"{n}; calibrate again"
            )
        if isinstance(self.weight, np.ndarray) and self.weight.shape != (n, width):
            raise FallowError(
                f"the plan's weight of {self.tap} has the shape {self.weight.shape}, {name} needs "
                f"{(n, width)}; calibrate again"
            )


def padded(rows: Sequence[np.ndarray], fill: float = 0) -> np.ndarray:
    """Rows of layers, (width,) each, as (L, widest) float32; narrower ones end in `fill`."""
    found = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.float32)
    for into, row in zip(found, rows, strict=True):
        into[: len(row)] = row
    return found


def today() -> str:
    """The date, as files have it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


@dataclass(repr=False)
class Plan:
    """Which values may be inactive in one model, and how that was found.

    Raises:
        ValueError: two cuts of one tap, or cuts of different numbers of layers.
    """

    model: str
    fingerprint: str
    rule: str  # for people: nothing looks it up
    knob: float
    knob_name: str
    cuts: tuple[Cut, ...]
    # Logits that the coarse head of a packed model puts this far below its largest stay coarse, in
    # nats, as do all but its `head_limit` largest; 0: none.
    head_margin: float = 0.0
    head_limit: int = 0
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
    calibration_sketch: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    calibration_tokens: int = 0
    dtype: str = ""
    date: str = field(default_factory=today)
    fallow_version: str = field(default_factory=lambda: fallow.__version__)
    format: int = FORMAT

    def __post_init__(self) -> None:
        self.cuts = tuple(self.cuts)
        taps = [cut.tap for cut in self.cuts]
        twice = next((tap for tap in taps if taps.count(tap) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is cut twice")
        for cut in self.cuts:
            cut.of_layers(self.n_layers)

    def __repr__(self) -> str:
        found = f"<Plan of {self.rule} at {self.knob:.4g} for {self.model}: "
        found += ", ".join(repr(cut)[1:-1] for cut in self.cuts) or "nothing is cut"
        if self.head_margin:
            found += f", shortlist of the head within {self.head_margin:.3g} nats"
        if self.achieved_sparsity is not None:
            found += f"; held out: sparsity {self.achieved_sparsity:.3f}"
        if self.achieved_ppl_increase is not None:
            change = (self.achieved_ppl_increase, self.achieved_ppl_increase_se)
            found += f", {plus_minus(*change, sign='+')} % PPL"
        return f"{found}>"

    @property
    def layers(self) -> Table:
        """What is cut in every layer, a row each: "inter.topk" and the like."""
        cuts = {f"{cut.tap}.{cut.kind}": cut.of_layers(self.n_layers).value for cut in self.cuts}
        return Table(
            {"layer": i} | {name: float(value[i]) for name, value in cuts.items()}
            for i in range(self.n_layers)
        )

    def to_frame(self) -> Any:
        """`layers` as a pandas DataFrame. Raises FallowError if pandas is not installed."""
        return self.layers.to_frame()

    def _repr_html_(self) -> str:
        return self.layers._repr_html_()

    @property
    def n_layers(self) -> int:
        """Of how many layers the cuts are; 0: there are none."""
        return self.cuts[0].value.size if self.cuts else 0

    def cut(self, tap: str) -> Cut | None:
        """What is cut at a tap, if anything is."""
        return next((cut for cut in self.cuts if cut.tap == tap), None)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Projections whose inputs are cut."""
        return tuple(cut.tap for cut in self.cuts if cut.tap in PROJECTIONS)

    @property
    def cuts_neurons(self) -> bool:
        """Whether values of neurons are cut, not only inputs or experts."""
        return any(cut.tap in NEURON_TAPS for cut in self.cuts)

    @property
    def where(self) -> str:
        """ "input": inputs of projections are cut; "experts"; "inter": neurons."""
        if self.inputs:
            return "input"
        return "inter" if self.cut(ROUTER) is None else "experts"

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the cuts, by their names in the file."""
        found = {}
        for cut in self.cuts:
            found[f"{cut.tap}.{cut.kind}"] = cut.value
            if isinstance(cut.weight, np.ndarray):
                found[f"{cut.tap}.weight"] = cut.weight
        return found

    @property
    def metadata(self) -> dict[str, Any]:
        """Everything but arrays and sketch."""
        cuts = [
            {
                "tap": cut.tap,
                "kind": cut.kind,
                "weight": "array" if isinstance(cut.weight, np.ndarray) else cut.weight,
            }
            for cut in self.cuts
        ]
        own = (f.name for f in fields(self) if f.name not in ("cuts", _SKETCH))
        return {name: getattr(self, name) for name in own} | {"cuts": cuts}

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all. Raises FallowError if it cannot be written."""
        tagged.write(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's content."""
        arrays = self.arrays | {_SKETCH: self.calibration_sketch}
        return tagged.to_bytes(_METADATA_KEY, self.metadata, arrays)

    @property
    def sha256(self) -> str:
        """Of the file's content: by it results name the plan that they were measured with."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads a plan. Raises FallowError: missing, truncated, no plan, or another format."""
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
        remedies = ("calibrate again", "make one with calibrate")
        metadata, arrays = tagged.from_bytes(content, _METADATA_KEY, where, "plan", remedies)
        if metadata.get("format") != FORMAT:
            raise FallowError(
                f"plan {where} has format {in_one_line(metadata.get('format'))}, this fallow reads "
                f"{FORMAT}; make it anew: {_command(metadata)}"
            )
        try:
            return cls._from_metadata(metadata, arrays)
        except ValueError as error:
            raise FallowError(f"plan {where}: {error}; calibrate again") from error

    @classmethod
    def _from_metadata(cls, metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> "Plan":
        """Raises ValueError for whatever is not understood."""
        known = tuple(f for f in fields(cls) if f.name not in ("cuts", _SKETCH))
        needed = {"model", "fingerprint", "rule", "knob", "knob_name", "cuts"}
        values = tagged.check_fields(metadata, known, needed)
        sketch = tagged.take_sketch(arrays, _SKETCH)
        plan = cls(cuts=_cuts(metadata["cuts"], arrays), calibration_sketch=sketch, **values)
        if plan.head_margin < 0 or plan.head_limit < 0:
            raise ValueError("head_margin or head_limit is negative")
        return plan

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raises FallowError if the plan was made for another model."""
        if self.fingerprint != fingerprint:
            raise FallowError(
                f"this plan is for {self.model} (fingerprint {self.fingerprint}), not for {name} "
                f"(fingerprint {fingerprint}); calibrate a plan for {name}"
            )


def _cuts(described: Any, arrays: dict[str, np.ndarray]) -> tuple[Cut, ...]:
    """The cuts of a file. Raises ValueError for whatever is not understood."""
    arrays = dict(arrays)

    def take(name: str, dtype: Any, axes: int) -> np.ndarray:
        array = arrays.pop(name, None)
        if array is None:
            raise ValueError(f"array {name} is missing")
        if array.dtype != dtype or array.ndim != axes:
            raise ValueError(f"array {name} is {array.dtype} {array.shape}")
        return array

    if not isinstance(described, list):
        raise ValueError("cuts is no list")
    cuts = []
    for each in described:
        if not isinstance(each, dict) or each.keys() != {"tap", "kind", "weight"}:
            raise ValueError(f"a cut is {in_one_line(each)}")
        tap, kind, weight = each["tap"], each["kind"], each["weight"]
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"a cut has the unknown kind {in_one_line(kind)}")
        value = take(f"{tap}.{kind}", KINDS[kind], 1)
        if weight == "array":
            weight = take(f"{tap}.weight", np.float32, 2)
        elif weight not in (None, COLUMN_NORM):
            raise ValueError(f"{in_one_line(weight)} is no weight of {in_one_line(tap)}")
        cuts.append(Cut(tap, kind, value, weight))
    if arrays:
        raise ValueError(f"array {in_one_line(sorted(arrays)[0])} belongs to no cut")
    return tuple(cuts)


def _command(metadata: dict[str, Any]) -> str:
    """What makes a plan like that of another format."""
    model, rule = (in_one_line(metadata.get(key, "MODEL")) for key in ("model", "rule"))
    target, increase = (metadata.get(f"target_{k}") for k in ("sparsity", "ppl_increase"))
    if rule == "two_stage" and metadata.get("knob") == 0:  # what optimize wrote
        return f"fallow optimize {shlex.quote(model)}"
    option, value = "knob", metadata.get("knob")
    if target is not None:
        option, value = "sparsity", target
    elif increase is not None:
        option, value = "max-ppl-increase", increase
    return (
        f"fallow calibrate {shlex.quote(model)} --rule {shlex.quote(rule)} "
        f"--{option} {in_one_line(value)} -o PLAN"
    )
