"""Runs a model under a plan over a text and keeps which neurons were active."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from fallow.checkpoints.text import Text, load_text
from fallow.common.errors import UsageError
from fallow.common.progress import progress
from fallow.common.workers import results
from fallow.models.capture import non_finite_error
from fallow.models.devices import as_array, as_floats
from fallow.models.taps import Tap, attach, one_width
from fallow.patterns.store import Header, PatternStore, StoreWriter, chunks, write_window
from fallow.plan import Plan
from fallow.reference.model import Model, load

# What the published definition looks at: outputs of gate_proj, up_proj and down_proj.
PUBLISHED_TAPS = ("gate_pre", "up", "ffn_out")
WINDOWS_OF_A_TASK = 8  # what is done again if a worker dies


def collect(
    model: Model,
    plan: Plan,
    folder: str | Path,
    text: str | Path | Text | None = None,
    *,
    taps: tuple[str, ...] = ("inter",),
    context: int = 1024,
    windows: int | None = None,
    magnitudes: bool = False,
    workers: int = 1,
) -> PatternStore:
    """Active sets of a text's tokens: what the plan leaves other than zero, by tap and layer.

    The model runs with the plan in the loop, as it would in use. A run that was stopped goes on
    where it stopped.

    Args:
        taps: of FFN_TAPS; see fallow.models.taps.
        context, windows: tokens per window, and how many of the text's windows (None: all).
        magnitudes: also keep each token's out_norm, as energy recall needs it: two bytes per
            neuron.
        workers: processes of Ray that share the windows, each with a copy of the model.

    Raises:
        FallowError: the text has fewer windows, plan for another model, NaN, a folder that holds
            something else, or a full disk.
        UsageError: a tap that the model lacks, or magnitudes without `inter`.
    """
    plan.check_model(model.fingerprint, model.name)
    check_taps(model, taps)
    if magnitudes and "inter" not in taps:
        raise UsageError("--magnitudes are those of inter; add it to --taps")
    source = load_text(text, "evaluation")
    cut = model.windows(source, context, windows)
    header = Header(
        model=model.name,
        fingerprint=model.fingerprint,
        rule=plan.rule,
        knob=plan.knob,
        knob_name=plan.knob_name,
        text=source.name,
        text_sha256=source.sha256,
        n_layers=len(model.layers),
        context=context,
        n_windows=len(cut),
        widths={tap: tap_width(model, tap) for tap in taps},
        magnitudes=magnitudes,
    )
    writer = StoreWriter(folder, header, cut)
    left = np.array([i for i in range(len(cut)) if i not in writer.done], dtype=np.int64)
    own = model if workers == 1 else (model.name, model.dtype_name, model.device.type)
    size = 1 if workers == 1 else WINDOWS_OF_A_TASK
    numbers = [left[part] for part in chunks(len(left), size)]
    parts = [(own, plan, writer.folder, header, cut[some], some) for some in numbers]
    with progress("patterns", len(left)) as ticker:
        for _, finished in results(_collect_part, parts, workers):
            writer.finish(finished)
            ticker.advance(len(finished))
    return PatternStore(folder)


def check_taps(model: Model, taps: Sequence[str]) -> None:
    """Raises UsageError for a tap that the model lacks, and for none at all."""
    known = model.layers[0].ffn_taps
    if not taps:
        raise UsageError(f"no tap is asked for; this model has {', '.join(known)}")
    for tap in taps:
        if tap not in known:
            raise UsageError(f"unknown tap {tap!r}; this model has {', '.join(known)}")


def tap_width(model: Model, tap: str) -> int:
    """Values per token of one of FFN_TAPS.

    Raises:
        FallowError: layers differ in it.
    """
    if tap == "ffn_out":
        return model.layers[0].down_proj.out_features
    return one_width(model.layers)


def _collect_part(
    model: Model | tuple[str, str, str],
    plan: Plan,
    folder: Path,
    header: Header,
    windows: np.ndarray,
    numbers: np.ndarray,
) -> list[int]:
    """Writes the rows of some windows; the model itself, or in another process what to load."""
    if not isinstance(model, Model):
        model = _loaded(*model)
    taps = tuple(header.widths)
    recorder = Recorder(model, taps, header.magnitudes)
    with model.sparse(plan), attach(model.layers, {tap: recorder.tap(tap) for tap in taps}):
        for number, window in zip(numbers, windows, strict=True):
            model.hidden(window[None])
            write_window(folder, int(number), recorder.active, recorder.magnitudes)
    return [int(number) for number in numbers]


@lru_cache(maxsize=1)
def _loaded(name: str, dtype: str, device: str) -> Model:
    """A worker serves several parts with one copy."""
    return load(name, dtype, device)


class Recorder:
    """Keeps the last window's active sets: bool (T, width) by tap and layer."""

    def __init__(self, model: Model, taps: tuple[str, ...], magnitudes: bool = False) -> None:
        n_layers = len(model.layers)
        self._norms = [layer.down_norm for layer in model.layers] if magnitudes else []
        self.active: dict[str, list[np.ndarray]] = {t: [np.empty(0)] * n_layers for t in taps}
        self.magnitudes: list[np.ndarray] = [np.empty(0)] * n_layers if magnitudes else []

    def tap(self, name: str) -> Tap:
        def keep(layer: int, value: torch.Tensor) -> None:
            if not torch.isfinite(value).all():
                raise non_finite_error(name, layer, int((~torch.isfinite(value)).sum()))
            self.active[name][layer] = as_array(value != 0)
            if name == "inter" and self._norms:
                out_norm = value.abs().float() * self._norms[layer]
                norm = torch.linalg.vector_norm(out_norm, dim=1, keepdim=True).clamp_min(1e-30)
                self.magnitudes[layer] = as_floats(out_norm / norm)

        return keep
