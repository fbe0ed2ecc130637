"""The top bits of the weights choose; the rest is read for the chosen neurons alone."""

from typing import ClassVar

import torch

from fallow.selectors._base import Approximate, Bits

# As Q4_K stores gate_proj and up_proj.
GROUP, STORED_BITS = 32, 4


class LowBit(Approximate):
    """Reads the top `gate` and `up` bits of the stored weights to choose; 4: all of them.

    Stored weights are rounded to 4 bits between the smallest and the largest of each group of 32
    along a row, as Q4_K does. A value of the top bits stands for the middle of the stored values
    that share it.
    """

    name = "lowbit"
    known = "after the top bits of gate and up: saves their rest, and down_proj"
    options: ClassVar[dict[str, int]] = {"gate": 4, "up": 2}
    option_range = (1, STORED_BITS)

    @classmethod
    def first_bits(cls, stored: Bits) -> tuple[float, float]:
        unread = {name: STORED_BITS - bits for name, bits in cls.options.items()}
        return stored.gate - unread["gate"], stored.up - unread["up"]

    def approximate(self, index: int, weight: torch.Tensor, name: str) -> torch.Tensor:
        bits = self.options[name]
        return weight if bits == STORED_BITS else top_bits(weight, bits)


def top_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """W (out, in) with the top `bits` of the 4 that each weight is stored in."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % GROUP))
    groups = padded.reshape(rows, -1, GROUP)
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    step = (high - low) / (2**STORED_BITS - 1)
    stored = ((groups - low) / step.clamp_min(1e-30)).round()
    shared = 2 ** (STORED_BITS - bits)
    middle = (stored / shared).floor() * shared + (shared - 1) / 2
    return (low + middle * step).reshape(rows, -1)[:, :columns].to(weight.dtype)


RULE = LowBit
