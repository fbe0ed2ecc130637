"""The file that llama.cpp's models get beside their own: down_proj by neuron, and a plan.

docs/packed.md describes it. The plugin (csrc/ggml_plugin) maps it, and takes it for a model whose
FFN weights are, byte by byte, those that it was made for. A packed model has the same besides what
the engine reads, so that it can stand in for such a file.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fallow import _core
from fallow.checkpoints.weights import GgufFile, StoredTensor, fingerprint, read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import atomic_path, check_writable
from fallow.common.progress import note, progress
from fallow.engine.cuts import BY
from fallow.engine.cuts import Cut as _Cut
from fallow.models.devices import as_floats
from fallow.packing.quantize import (
    OUTLIERS,
    Matrix,
    add_matrix,
    quant_type,
    quantize,
    without_outliers,
)
from fallow.packing.source import Source
from fallow.plan import COLUMN_NORM, FFN_TAPS, Cut, Plan

VERSION = 1
PARTS = ("gate", "up", "down")
# Inputs of an FFN's projections, which have no tap of their own.
_INPUTS = ("gate_proj", "up_proj", "down_proj")
_DEFAULT_DOWN = ("Q6_K", "Q8_0", "F16")  # rows of whole 256s, of whole 32s, and others


def pack_ffns(
    model: str | Path,
    output: str | Path,
    *,
    packed: str | Path | None = None,
    plan: Plan | None = None,
    down: str | None = None,
) -> None:
    """Writes what the plugin needs to skip neurons of a GGUF that llama.cpp runs.

    Args:
        model: the GGUF, of any architecture with dense FFNs.
        packed: what `fallow pack` or `optimize` made of it: down_proj_t is taken from there, in
            the type that passed its self-check, and the plan unless another is given.
        plan: what to skip; None, and none in `packed`: only what a ReLU makes zero.
        down: without `packed`, the type of down_proj_t; default Q6_K, or where rows are no
            multiples of 256 Q8_0. How far that is from the model, `verify` tells.

    Raises:
        FallowError: the file has no dense FFNs, `packed` is of another model, or the plan cuts
            what the plugin does not compute.
        UsageError: an unknown type, or one given beside `packed`.
    """
    check_writable(output)
    down = None if down is None else quant_type(down)
    if down is not None and packed is not None:
        raise UsageError("--down is for models without --packed, which has its own type")
    file = read_gguf(model)
    layers = [_ffn_of(file, i) for i in range(_count_layers(file))]
    _check_sizes(layers, str(model))
    source = _Packed(read_gguf(packed), layers) if packed is not None else None
    if plan is None and source is not None:
        plan = source.plan
    elif plan is not None and plan.fingerprint != fingerprint(file.tensors):
        note(
            f"the plan was made on {plan.model} in another form than {model}; whether their "
            "weights are the same, fallow llama verify tells"
        )
    for left_out in () if plan is None else _left_out(plan):
        note(left_out)
    with atomic_path(output) as temporary:
        _write(temporary, layers, source, plan, down)
        _core.check_ffn_file(np.memmap(temporary, np.uint8, "r"))


def add_to_packed(
    writer: Any, source: Source, matrices: dict[str, Matrix], plan: Plan | None
) -> None:
    """Adds to a packed model what lets the plugin take it for the GGUF that it is packed from.

    Nothing where the plugin could not: no such GGUF, FFNs of other kinds or with other bytes, or
    cuts that it does not make. `fallow llama pack` then says which of these it is.
    """
    if source.gguf is None or source.model.changed:
        return
    try:
        layers = [_ffn_of(source.gguf, i) for i in range(_count_layers(source.gguf))]
        _check_sizes(layers, source.model.name)
        hidden = layers[0]["up"].shape[1]
        cuts: list[_Cut] = []
        if plan is not None:
            norms = [as_floats(layer.down_norm) for layer in source.model.layers]
            cuts = list(_cuts(plan, norms, hidden, "gate" in layers[0]))
    except FallowError:
        return
    for i, tensors in enumerate(layers):
        for part in tensors.keys() - {"down"}:
            own = matrices.get(f"layers.{i}.{part}_proj.weight")
            if own is None or not _are_same_bytes(tensors[part].data, own.data):
                return
    writer.add_uint32("fallow.ffn.version", VERSION)
    _add_marks(writer, layers)
    _add_cuts(writer, cuts)
    left_out = [] if plan is None else list(_left_out(plan))
    if any(".gate_coarse." in name for name in matrices):
        left_out.append("the predictor before the gates is left out: gates are read whole")
    _add_notes(writer, left_out)


def _check_sizes(layers: list[dict[str, StoredTensor]], name: str) -> None:
    if len({tensors["up"].shape for tensors in layers}) > 1:
        raise FallowError(f"{name} has FFNs of several sizes, which the plugin runs dense")


class _Packed:
    """down_proj_t and outliers of a packed model, which must be of these FFNs."""

    def __init__(self, file: GgufFile, layers: list[dict[str, StoredTensor]]) -> None:
        self.file = file
        if "fallow.version" not in file.metadata:
            raise FallowError(f"{file.path} is not a packed model; make one with: fallow pack")
        if file.get("fallow.n_layers") != len(layers) or not self._has_inputs_of(layers):
            raise FallowError(f"{file.path} was packed from another model")

    def _has_inputs_of(self, layers: list[dict[str, StoredTensor]]) -> bool:
        """Whether gate_proj and up_proj, which keep their bytes, are these."""
        for i, tensors in enumerate(layers):
            for part in tensors.keys() - {"down"}:
                own = self._tensor(i, f"{part}_proj.weight")
                if not _are_same_bytes(tensors[part].data, own.data):
                    return False
        return True

    @property
    def plan(self) -> Plan | None:
        found = self.file.tensors.get("plan")
        return None if found is None else Plan.from_bytes(found.data.tobytes(), str(self.file.path))

    @property
    def outliers(self) -> list[int]:
        return self.file.numbers("fallow.outliers", [])

    def matrix(self, layer: int, name: str) -> Matrix:
        found = self._tensor(layer, f"{name}.weight")
        rows, cols = found.shape
        return Matrix(found.type, (rows, cols), found.data.reshape(rows, -1))

    def _tensor(self, layer: int, name: str) -> StoredTensor:
        key = f"layers.{layer}.{name}"
        if key not in self.file.tensors:
            raise FallowError(f"{self.file.path} has no tensor {key}")
        return self.file.tensors[key]


def _are_same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8))


def _count_layers(file: GgufFile) -> int:
    found = [re.fullmatch(r"blk\.(\d+)\.ffn_up\.weight", name) for name in file.tensors]
    numbers = sorted(int(m[1]) for m in found if m)
    if not numbers:
        experts = any("_exps." in name for name in file.tensors)
        raise FallowError(
            f"{file.path} has {'a mixture of experts' if experts else 'no dense FFNs'}, of which "
            "the plugin computes nothing"
        )
    if numbers != list(range(len(numbers))):
        raise FallowError(f"{file.path} has dense FFNs in some layers only, which is not supported")
    return len(numbers)


def _ffn_of(file: GgufFile, layer: int) -> dict[str, StoredTensor]:
    names = {part: f"blk.{layer}.ffn_{part}.weight" for part in PARTS}
    found = {part: file.tensors[name] for part, name in names.items() if name in file.tensors}
    if "down" not in found:
        raise FallowError(f"{file.path} has no tensor {names['down']}")
    shape = found["up"].shape
    if found["down"].shape != shape[::-1] or found.get("gate", found["up"]).shape != shape:
        raise FallowError(
            f"{file.path} has gate and up in one tensor, {names['up']}; the plugin computes such "
            "FFNs dense"
        )
    return found


def _write(
    path: Path,
    layers: list[dict[str, StoredTensor]],
    source: _Packed | None,
    plan: Plan | None,
    down: str | None,
) -> None:
    import gguf
    from gguf import GGUFValueType as Kind

    d_ff, hidden = layers[0]["up"].shape
    kind = down or _DEFAULT_DOWN[(hidden % 256 != 0) + (hidden % 32 != 0)]
    writer = gguf.GGUFWriter(path, "fallow")
    writer.add_custom_alignment(64)
    for key, value in (
        ("version", VERSION),
        ("n_layers", len(layers)),
        ("hidden_size", hidden),
        ("intermediate_size", d_ff),
    ):
        writer.add_uint32(f"fallow.ffn.{key}", value)
    norms = []
    if source is not None:
        outliers, n_outliers = source.outliers, len(source.outliers) // len(layers)
    else:
        outliers, n_outliers = [], 0 if kind in ("F32", "F16", "BF16") else min(OUTLIERS, d_ff)
    with progress("FFNs", len(layers)) as ticker:
        for i, tensors in enumerate(layers):
            values = np.ascontiguousarray(tensors["down"].dequantize().T)
            norms.append(np.sqrt(np.square(values, dtype=np.float64).sum(axis=1)))
            if source is not None:
                matrix = source.matrix(i, "down_proj_t")
                rows = source.matrix(i, "outliers") if n_outliers else None
            elif n_outliers == 0:
                matrix, rows = quantize(values, kind), None
            else:
                matrix, neurons, rows = without_outliers(values, kind, _energy(tensors), n_outliers)
                outliers += neurons.tolist()
            add_matrix(writer, f"layers.{i}.down_proj_t.weight", matrix)
            if rows is not None:
                add_matrix(writer, f"layers.{i}.outliers.weight", rows)
            ticker.advance()
    _add_marks(writer, layers)
    writer.add_uint32("fallow.ffn.n_outliers", n_outliers)
    if outliers:
        writer.add_key_value("fallow.ffn.outliers", outliers, Kind.ARRAY, Kind.UINT32)
    if plan is not None:
        _add_cuts(writer, list(_cuts(plan, norms, hidden, "gate" in layers[0])))
        _add_notes(writer, list(_left_out(plan)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_marks(writer: Any, layers: list[dict[str, StoredTensor]]) -> None:
    """What tells the model's FFN weights from another's."""
    from gguf import GGUFValueType as Kind

    marks = [
        _core.fingerprint(tensors[part].data.reshape(-1)) if part in tensors else 0
        for tensors in layers
        for part in PARTS
    ]
    writer.add_key_value("fallow.ffn.fingerprints", marks, Kind.ARRAY, Kind.UINT64)


def _add_cuts(writer: Any, cuts: list[_Cut]) -> None:
    from gguf import GGUFValueType as Kind

    if not cuts:
        return
    for key, column, sub in (
        ("layer", 0, Kind.UINT32),
        ("tap", 1, Kind.UINT32),
        ("by", 2, Kind.UINT32),
        ("value", 3, Kind.FLOAT64),
    ):
        column_of = [cut[column] for cut in cuts]
        writer.add_key_value(f"fallow.ffn.cuts.{key}", column_of, Kind.ARRAY, sub)
    for i, cut in enumerate(cuts):
        if cut[4] is not None:
            writer.add_tensor(f"cuts.{i}.weight", np.ascontiguousarray(cut[4], dtype=np.float32))


def _add_notes(writer: Any, notes: list[str]) -> None:
    """What the plugin says when it takes the file: what it leaves out of it."""
    if notes:
        writer.add_string("fallow.ffn.note", "; ".join(notes))


def _left_out(plan: Plan) -> Iterator[str]:
    if plan.head_margin > 0:
        yield "the plan's shortlist is left out: llama.cpp computes its own head"


def _energy(tensors: dict[str, StoredTensor]) -> np.ndarray:
    """How loud neurons would be if inputs had no direction, (d_ff,), since none are known here."""
    squares = [
        np.square(tensors[part].dequantize(), dtype=np.float64).sum(axis=1)
        for part in ("gate", "up")
        if part in tensors
    ]
    return np.prod(squares, axis=0)


def _cuts(plan: Plan, down_norms: list[np.ndarray], hidden: int, gated: bool) -> Iterator[_Cut]:
    """A plan's cuts. `down_norms`, (d_ff,) per layer: ||W_down[:, i]||."""
    for cut in plan.cuts:
        parts = ("gate_proj", "up_proj") if cut.tap == "gate_up_proj" else (cut.tap,)
        if cut.tap not in FFN_TAPS and parts[0] not in _INPUTS:
            raise FallowError(f"the plan cuts {cut.tap}, which llama.cpp computes by itself")
        if not gated:
            raise FallowError("the FFNs have no gate: the plugin leaves out only what a ReLU does")
        of_neurons = cut.tap in FFN_TAPS[:-1] or cut.tap == "down_proj"
        width = len(down_norms[0]) if of_neurons else hidden
        cut.check_layers([width] * len(down_norms), "this model")
        for layer in np.flatnonzero(cut.leaves_out).tolist():
            weight = _weight(cut, layer, down_norms)
            for part in parts:
                tap = _core.TAPS.index(part)
                yield layer, tap, BY[cut.kind], float(cut.value[layer]), weight


def _weight(cut: Cut, layer: int, down_norms: list[np.ndarray]) -> np.ndarray | None:
    if isinstance(cut.weight, np.ndarray):
        return cut.weight[layer]
    if cut.weight != COLUMN_NORM:
        return None
    if cut.tap in _INPUTS[:2] or cut.tap == "gate_up_proj":
        raise FallowError(f"the plan weighs inputs of {cut.tap}; the plugin weighs neurons alone")
    return down_norms[layer].astype(np.float32)
