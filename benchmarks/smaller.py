"""Files of fewer bits that llama.cpp makes of a GGUF: memory.py's other way into a small budget.

They are made of the file that is packed, not of the weights that it was made of, which are not
here.
"""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from engine import TEST, THREADS, VALIDATION

TYPES = ("Q3_K_M", "Q3_K_S", "Q2_K", "IQ2_M", "IQ2_XS")  # llama.cpp's names, by size
IMPORTANCE_WINDOWS, CONTEXT = 16, 1024


def make(name: str, source: Path, folder: Path) -> dict[str, Path]:
    """A file of each type in a folder, unless it is there."""
    found = {kind: folder / f"{kind}.gguf" for kind in TYPES}
    missing = {kind: path for kind, path in found.items() if not path.exists()}
    weights = importance(name) if missing else {}
    for kind, path in missing.items():
        quantize(source, path, kind, weights)
    return found


def importance(name: str, windows: int = IMPORTANCE_WINDOWS) -> dict[str, np.ndarray]:
    """Mean square of each input of a GGUF's matrices on the validation text, (inputs,) float32.

    llama.cpp's "importance matrix"; types of two bits cannot be made without one.
    """
    import torch

    import fallow
    from fallow.checkpoints.text import load_text
    from fallow.models.taps import attach

    model = fallow.load(name, "float32")
    block = model.architecture.gguf_block
    names = {path.split(".")[-1]: key for key, path in block.items() if path.endswith("_proj")}
    sums: dict[str, torch.Tensor] = {}

    def add(projection: str, layer: int, value: torch.Tensor) -> None:
        key = f"blk.{layer}.{names[projection]}.weight"
        sums[key] = sums.get(key, 0) + value.flatten(0, -2).double().square().sum(0)

    taps = {p: lambda layer, value, p=p: add(p, layer, value) for p in model.layers[0].projections}
    with attach(model.layers, taps):
        for window in model.windows(load_text(VALIDATION, "calibration"), CONTEXT, windows):
            model.hidden(window[None])
    tokens = windows * CONTEXT
    return {key: (total / tokens).float().numpy() for key, total in sums.items()}


def quantize(source: Path, path: Path, kind: str, weights: dict[str, np.ndarray]) -> None:
    import llama_cpp

    def entry(key: str, values: np.ndarray) -> Any:
        data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        return llama_cpp.llama_model_imatrix_data(key.encode(), data, len(values))

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread, params.allow_requantize = THREADS, True
    entries = [entry(*item) for item in weights.items()]
    end = llama_cpp.llama_model_imatrix_data()  # without a name
    table = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries, end)
    params.imatrix = table
    part = path.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(part).encode(), params):
        raise SystemExit(f"llama.cpp makes no {kind} of {source}")
    part.rename(path)


def quality(name: str, files: dict[str, Path], windows: int) -> dict[str, dict[str, float]]:
    """PPL change in percent against the source, weights in float32, on the test text."""
    import fallow
    from fallow.checkpoints.text import load_text
    from fallow.common.metrics import ppl_change_percent
    from fallow.measure.evaluation import window_losses

    def losses(model: str | Path) -> np.ndarray:
        loaded = fallow.load(model, "float32")
        cut = loaded.windows(load_text(TEST, "evaluation"), CONTEXT, windows)
        return window_losses(loaded, cut, None)

    dense, found = losses(name), {}
    for kind, path in files.items():
        change, error = ppl_change_percent(losses(path), dense)
        found[kind] = {
            "mb": path.stat().st_size / 1e6, "ppl_change_percent": change, "ppl_change_se": error,
        }  # fmt: skip
    return found
