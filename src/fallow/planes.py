"""Matrices in two planes: the upper bits of every weight, and what makes them whole.

Reading the first plane alone gives a coarse row, for neurons that matter little to a token. Types
are those whose blocks end in nibbles: a block's first plane holds what stands before them and their
upper two bits, the second their lower two (csrc/planes.h).
"""

import numpy as np

# Bytes of a block before its nibbles, and of these.
PLANE_TYPES = {
    "Q4_0": (2, 16),
    "Q4_1": (4, 16),
    "Q5_0": (6, 16),
    "Q5_1": (8, 16),
    "Q4_K": (16, 128),
    "Q5_K": (48, 128),
}
# The upper two bits of both nibbles of a byte, and the lower two.
UPPER, LOWER = 0xCC, 0x33
# What stands for the lower bits of coarse rows of gate_proj and up_proj: 1 and 2 by turns in two
# rows, 2 and 1 in the next two (csrc/planes.h says why).
COARSE = (0x69, 0x69, 0x96, 0x96)


def split_planes(kind: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The planes of rows (n, bytes) of a type of `PLANE_TYPES`, (n, base) and (n, rest) bytes."""
    header, nibbles = PLANE_TYPES[kind]
    blocks = data.reshape(len(data), -1, header + nibbles)
    first, second = np.split(blocks[..., header:], 2, axis=-1)
    upper = (first & UPPER) >> 2 | second & UPPER
    lower = first & LOWER | (second & LOWER) << 2
    base = np.concatenate([blocks[..., :header], upper], axis=-1)
    return base.reshape(len(data), -1), lower.reshape(len(data), -1)


def coarse_rows(kind: str, data: np.ndarray) -> np.ndarray:
    """All rows (n, bytes) of gate_proj or up_proj as their first planes alone are read."""
    base, rest = split_planes(kind, data)
    fill = np.resize(np.array(COARSE, dtype=np.uint8), (len(rest), 1))
    return join_planes(kind, base, np.broadcast_to(fill, rest.shape))


def join_planes(kind: str, base: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The rows (n, bytes) that `split_planes` made these of."""
    header, nibbles = PLANE_TYPES[kind]
    blocks = base.reshape(len(base), -1, header + nibbles // 2)
    upper, lower = blocks[..., header:], rest.reshape(len(base), -1, nibbles // 2)
    first = (upper & LOWER) << 2 | lower & LOWER
    second = upper & UPPER | (lower & UPPER) >> 2
    joined = np.concatenate([blocks[..., :header], first, second], axis=-1)
    return joined.reshape(len(base), -1)
