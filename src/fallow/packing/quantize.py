"""Matrices in stored bytes, and how they are quantised."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fallow import _core
from fallow.checkpoints.weights import StoredTensor
from fallow.common.errors import FallowError, UsageError
from fallow.common.procfs import processors

# Types for down_proj_t from a GGUF source, smallest first; the K types need rows of whole 256s.
DOWN_TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
DOWN_TYPES_NARROW = ("Q5_0", "Q5_1", "Q8_0")
# Neurons per layer whose rows of down_proj_t are kept as F16: those that rounding harms most. Some
# have activations thousands of times larger than the rest, on attention sinks. On SmolLM2 four such
# rows per layer take Q8_0 from 0.0022 to 0.0003 nats, sixteen to 0.0002.
OUTLIERS = 8
QUANT_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "BF16", "F16", "F32")
# llama.cpp's file types that mix matrices of several types, and the type that most of them have.
FILE_TYPES = {"Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K"}


def quant_type(name: str) -> str:
    """The type that a name stands for, in either case: one of QUANT_TYPES, or of FILE_TYPES.

    Raises:
        UsageError: it is neither.
    """
    kind = FILE_TYPES.get(name.upper(), name.upper())
    if kind not in QUANT_TYPES:
        known = ", ".join((*QUANT_TYPES, *FILE_TYPES)).lower()
        raise UsageError(f"unknown type {name!r}; known: {known}")
    return kind


@dataclass
class Matrix:
    """Weights (rows, cols) in stored bytes (rows, row_bytes)."""

    type: str
    shape: tuple[int, int]
    data: np.ndarray

    def rows(self, part: slice | np.ndarray) -> "Matrix":
        data = self.data[part]
        return Matrix(self.type, (len(data), self.shape[1]), data)


def quantize(values: np.ndarray, kind: str) -> Matrix:
    """Float32 values (rows, cols) as a matrix of a ggml type.

    Raises:
        FallowError: the rows are not whole blocks of the type.
    """
    import gguf

    rows, cols = values.shape
    block, _ = _core.FORMATS[kind]
    if cols % block:
        raise FallowError(
            f"rows of {cols} weights are not whole blocks of {block} of {kind}; choose another "
            "type, such as bf16"
        )
    if kind in ("Q4_K", "Q5_K", "Q6_K"):
        flat = np.ascontiguousarray(values, dtype=np.float32).ravel()
        data = np.frombuffer(_core.quantize_k(kind, flat, processors()), dtype=np.uint8)
    else:
        data = gguf.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    return Matrix(kind, (rows, cols), data.reshape(rows, -1).copy())


def mxfp4(codes: np.ndarray, exponents: np.ndarray) -> Matrix:
    """A matrix of gpt-oss's checkpoint, (..., groups, 16) and (..., groups) uint8, as ggml's MXFP4.

    A byte of the checkpoint has two neighbours of a group's 32 weights, one of ggml's has two that
    are 16 apart.
    """
    weights = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], 32)
    apart = weights[..., :16] | weights[..., 16:] << 4
    groups = codes.shape[-2]
    data = np.concatenate((exponents[..., None], apart), axis=-1).reshape(-1, groups * 17)
    return Matrix("MXFP4", (len(data), groups * 32), data)


def dequantize(matrix: Matrix) -> np.ndarray:
    """Float32 values (rows, cols) of a matrix."""
    data = np.ascontiguousarray(matrix.data).reshape(-1)
    return StoredTensor("matrix", matrix.shape, matrix.type, data).dequantize()


def without_outliers(
    values: np.ndarray, kind: str, energy: np.ndarray, n: int
) -> tuple[Matrix, np.ndarray, Matrix]:
    """Rounds down_proj_t (d_ff, hidden), but for the n neurons that this would harm most.

    Args:
        energy: (d_ff,), the mean square of what each neuron puts out, up to a factor.

    Returns:
        The matrix with those neurons' rows zero, the neurons, ascending, and their rows in F16.
    """
    matrix = quantize(values, kind)
    harm = np.square(dequantize(matrix) - values).sum(axis=1) * energy
    neurons = np.sort(np.argsort(-harm)[:n])
    matrix.data[neurons] = 0  # zero bytes are zero weights in every type
    return matrix, neurons, quantize(values[neurons], "F16")


def add_matrix(writer: Any, name: str, matrix: Matrix) -> None:
    """To a `gguf.GGUFWriter`, bytes as they are."""
    import gguf

    kind = gguf.GGMLQuantizationType[matrix.type]
    writer.add_tensor(name, np.ascontiguousarray(matrix.data), raw_dtype=kind)
