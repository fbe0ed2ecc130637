"""Matrices in few bits."""

import numpy as np
import torch

from fallow.models.devices import as_array, tensor

# As Q4_K stores gate_proj and up_proj.
GROUP, STORED_BITS = 32, 4


def top_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """W (out, in) with the top `bits` of the 4 that each weight is stored in."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % GROUP))
    groups = padded.reshape(rows, -1, GROUP)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    step = (high - low) / (2**STORED_BITS - 1)
    stored = ((groups - low) / step.clamp_min(1e-30)).round()
    top = (stored / 2 ** (STORED_BITS - bits)).floor().long()
    sums = stored.new_zeros(2**bits).scatter_add_(0, top.flatten(), stored.flatten())
    means = sums / torch.bincount(top.flatten(), minlength=2**bits).clamp_min(1)
    return (low + means[top] * step).reshape(rows, -1)[:, :columns].to(weight.dtype)


def rounded(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """A matrix (rows, columns) in 4 bits as weights are stored, or in 8, one scale per row."""
    if bits == STORED_BITS:
        return top_bits(matrix, STORED_BITS)
    step = matrix.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / (2 ** (bits - 1) - 1)
    return (matrix / step).round() * step


def rounded_bytes(size: tuple[int, int], bits: int) -> int:
    """Bytes of a rounded matrix (rows, columns), with 16 bits of scales per group or row."""
    rows, columns = size
    groups = -(-columns // GROUP) if bits == STORED_BITS else 1
    return rows * (-(-columns * bits // 8) + 2 * groups)


def to_int8(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (rows, columns) as int8 and a float32 scale per row: value = int8 * scale."""
    scale = (matrix.detach().abs().amax(dim=1) / 127).clamp_min(1e-30)
    values = (matrix.detach() / scale[:, None]).round().to(torch.int8)
    return as_array(values), as_array(scale.float())


def from_int8(
    arrays: dict[str, np.ndarray], name: str, index: int, device: torch.device
) -> torch.Tensor:
    """A layer's matrix, float32, from the arrays `name` and `name`.scale."""
    values, scale = (tensor(arrays[key][index], device) for key in (name, f"{name}.scale"))
    return values.float() * scale[:, None]
