"""Where tensors are: the core computes on the CPU, torch itself on every other device."""

import torch


def on_cpu(value: torch.Tensor) -> bool:
    """Whether the core can read the tensor; otherwise torch computes the same on its device."""
    return value.is_cpu
