"""Where tensors are: the core computes on the CPU, torch itself on every other device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from fallow import _core
from fallow.common.errors import FallowError, UsageError

_T = TypeVar("_T")
DEVICES = ("auto", "cpu", "cuda")


def device_named(name: str) -> str:
    """ "cpu" or "cuda"; "auto" is a GPU if there is one.

    Raises:
        UsageError: an unknown device, or a GPU that is not there.
    """
    there = torch.cuda.is_available()
    if name not in DEVICES:
        raise UsageError(f"unknown device {name!r}; known: {', '.join(DEVICES)}")
    if name == "cuda" and not there:
        raise UsageError("--device cuda, but torch finds no GPU here; give --device cpu")
    return "cuda" if there and name != "cpu" else "cpu"


def on_cpu(value: torch.Tensor) -> bool:
    """Whether the core can read the tensor; otherwise torch computes the same on its device."""
    return value.is_cpu


def has_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 have instructions of their own."""
    if device == "cpu":
        return "bf16" in _core.KERNELS[0]
    return torch.cuda.is_bf16_supported(including_emulation=False)


def tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on a device; on the CPU a view of it."""
    return torch.from_numpy(array).to(device)


def as_array(value: torch.Tensor) -> np.ndarray:
    """A numpy view of a tensor, or a copy from its device."""
    return value.detach().cpu().numpy()


def as_floats(value: torch.Tensor) -> np.ndarray:
    """A float32 numpy view (or copy) of a tensor, C-contiguous."""
    return as_array(value.detach().float().contiguous())


@contextmanager
def enough_memory() -> Iterator[None]:
    """Raises FallowError, with the remedy, where the device runs out of memory in the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FallowError(
            "the GPU has too little memory free; give a smaller --context, --dtype bfloat16, or "
            "--device cpu"
        ) from error


def in_halves(work: Callable[[slice], _T], part: slice) -> Iterator[tuple[slice, _T]]:
    """What `work` makes of a part, or of its halves if they alone fit the device's memory.

    Raises:
        FallowError: not even one item fits.
    """
    try:
        found = work(part)
    except torch.OutOfMemoryError:
        if part.stop - part.start <= 1:
            with enough_memory():
                raise
    else:
        yield part, found
        return
    torch.cuda.empty_cache()
    middle = (part.start + part.stop) // 2
    yield from in_halves(work, slice(part.start, middle))
    yield from in_halves(work, slice(middle, part.stop))
