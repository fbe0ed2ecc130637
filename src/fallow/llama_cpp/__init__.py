"""Skipped neurons inside llama.cpp: a plugin for the library that is installed, not a fork.

    import fallow.llama_cpp
    fallow.llama_cpp.load(plan="packed.gguf")   # before any model; of `fallow optimize`, say
    llm = llama_cpp.Llama("model.gguf")

docs/how-to/llama-cpp.md
"""

import ctypes
import json
import os
from pathlib import Path
from typing import Any

from fallow.common.errors import FallowError
from fallow.llama_cpp.plugin import built, installed

_plugin: ctypes.CDLL | None = None


def load(plan: str | Path | None = None, memory: str | int | None = None) -> None:
    """Lets llama-cpp-python's models that are loaded from now on compute their FFNs here.

    Args:
        plan: what `fallow pack` or `optimize` made of the GGUF that is loaded next, or a file of
            `fallow llama pack`; None: that of the environment variable FALLOW_PLAN, or dense. May
            be called again with another. A model that the file was not made for runs dense, and a
            line on stderr says so.
        memory: what FFNs may take, bytes or "800MB" say; None: what FALLOW_MEMORY says, or all that
            they need. The other layers' weights are read from a packed model, for every pass. The
            rest of the model is llama.cpp's, and comes on top.

    Raises:
        FallowError: llama-cpp-python is not installed, the plugin was not built for this version
            of it (`fallow llama build`), the file is none of that kind, or the memory is too small.
    """
    global _plugin
    target = installed()
    if _plugin is None:
        path = built(target)
        import llama_cpp

        plugin = ctypes.CDLL(str(path))
        plugin.fallow_use_plan.restype = ctypes.c_char_p
        plugin.fallow_use_plan.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        plugin.fallow_statistics.restype = ctypes.c_char_p
        _use(plugin, plan, memory)
        # The registry that models look into is that of the library which llama_cpp itself loaded.
        register: Any = llama_cpp.llama_cpp._lib.ggml_backend_load
        register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        if not register(str(path).encode()):
            raise FallowError(f"{target.name} does not take the plugin; run: fallow llama build")
        _plugin = plugin
    _use(_plugin, plan, memory)


def _use(plugin: Any, plan: str | Path | None, memory: str | int | None) -> None:
    file = str(plan or os.environ.get("FALLOW_PLAN", ""))
    size = str(os.environ.get("FALLOW_MEMORY", "") if memory is None else memory)
    problem = plugin.fallow_use_plan(file.encode(), size.encode())
    if problem:
        raise FallowError(problem.decode(errors="replace"))


def statistics() -> list[dict[str, Any]]:
    """What was computed for each model that is loaded now, oldest first.

    Each has `plan` (whether one is followed), `tokens`, `bytes_per_token` of FFN weights that
    decode read (all tokens count, those of prompts read none), `inactive`, the share of neurons
    left out, `inactive_per_layer`, `fused`, the FFNs computed whole, and `apart`, products
    computed one by one, as under a LoRA adapter or a callback, `held`, the bytes of memory that it
    takes, and `disk_bytes`, those read ahead or waited for under a budget.
    """
    if _plugin is None:
        return []
    return [_readable(found) for found in json.loads(_plugin.fallow_statistics())]


def _readable(found: dict[str, Any]) -> dict[str, Any]:
    neurons, active, tokens = (found.pop(key) for key in ("neurons", "active", "tokens"))
    there = [t * n for t, n in zip(tokens, neurons, strict=False)]
    layers = [1 - a / n if n else 0.0 for a, n in zip(active, there, strict=True)]
    found["tokens"] = max(tokens, default=0)
    found["bytes_per_token"] = found.pop("bytes") / max(1, found["tokens"])
    found["inactive"] = 1 - sum(active) / sum(there) if any(there) else 0.0
    return found | {"inactive_per_layer": layers}
