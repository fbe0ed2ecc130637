"""Forward and backward pass as one CUDA graph, whose thousands of kernels are launched at once."""

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from fallow.common.errors import FallowError

WARM_UPS = 2
TOLERANCE = 1e-2  # of the KL; bfloat16 sums of another order differ by a thousandth


class Replay:
    """`learn` of token ids (n, context), recorded once and replayed with others of that shape.

    `wanted` is the KL that it gives for `ids` when it is not recorded.

    What `learn` adds to gradients it must add to the same tensors every time; so it finds them, and
    every weight, where they were when it was recorded.

    Raises:
        FallowError: it cannot be recorded, or gives something else when it is.
    """

    def __init__(
        self, learn: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, wanted: float
    ) -> None:
        self.ids = ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    learn(self.ids)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.kl = learn(self.ids)
            found = float(self(ids))
        except Exception as error:  # of CUDA's, or of a model that keeps more than keys and values
            raise FallowError(f"a training step cannot be recorded ({error})") from error
        if not math.isclose(found, wanted, rel_tol=TOLERANCE):
            raise FallowError(f"a recorded training step gives {found:.5f} nats, not {wanted:.5f}")

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids.copy_(ids)
        self.graph.replay()
        return self.kl


class _NoCache(DynamicLayer):
    """Keys and values of this call alone."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def no_cache(module: Any) -> dict[str, Any]:
    """Arguments with which a transformers model asks nothing of the device.

    Without a cache it looks whether positions begin anew inside a window, which waits for the
    device, or, while a graph is recorded, gives every window a mask that slows attention.
    """
    # transformers 5.17 has the old name, and 5.24 warns of it.
    name = "cache" if "cache" in signature(module.forward).parameters else "past_key_values"
    return {name: Cache([_NoCache() for _ in range(module.config.num_hidden_layers)])}
