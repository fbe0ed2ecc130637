"""How sparse a model is as it stands: magnitudes, zeros, firing frequencies."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow import _core
from fallow.checkpoints.text import Text, load_text
from fallow.common.files import atomic_path, write_json
from fallow.common.metrics import bin_edges
from fallow.common.progress import progress
from fallow.common.tables import Table
from fallow.models.capture import Histograms
from fallow.models.cuts import per_token_topk
from fallow.models.devices import as_array
from fallow.models.taps import Layer, attach, tap_names
from fallow.plan import ROUTER
from fallow.reference.model import Model, in_words

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
SMALL = (1e-6, 1e-4, 1e-3, 1e-2)  # |inter| <= these is reported beside exact zeros
ZERO_OUT_NORM = 1e-7  # zero test on |inter| ||down_proj[:, i]||, thunlp/SparsingLaw's
DEAD = 1e-3  # a neuron active on fewer tokens than this share is dead (as arXiv:2411.02335's)
TOP = 0.5  # firing is also counted as being among a token's top half by out_norm
STORED_BINS_PER_OCTAVE = 16
WINDOWS = 8  # of a text, where none are asked for


@dataclass(repr=False)
class Profile:
    """Statistics of a dense model on a text; arrays have one row per layer."""

    summary: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def save(self, folder: str | Path) -> None:
        """Writes profile.json and profile.npz. Raises FallowError if they cannot be written."""
        folder = Path(folder)
        with atomic_path(folder / "profile.npz") as temporary:
            np.savez_compressed(temporary, **self.arrays)  # type: ignore[arg-type]
        write_json(folder / "profile.json", self.summary)

    @property
    def layers(self) -> Table:
        """The summary's rows, one per layer."""
        return Table(self.summary["layers"])

    def to_frame(self) -> Any:
        """`layers` as a pandas DataFrame. Raises FallowError if pandas is not installed."""
        return self.layers.to_frame()

    def __repr__(self) -> str:
        told = self.summary
        return (
            f"<Profile of {told['model']} ({told['dtype']}): {told['natural_sparsity']:.1%} of "
            f"inter is zero in {len(told['layers'])} layers of "
            f"{in_words(row['neurons'] for row in told['layers'])} neurons; "
            f"{told['tokens']} tokens of {told['text']}>"
        )

    def _repr_html_(self) -> str:
        return self.layers._repr_html_()


class _Neurons:
    """Zero fractions of `inter` and `gate_act`, and how often each neuron fires."""

    def __init__(self, model: Model) -> None:
        mixture = model.layers[0].experts
        # Of a mixture each expert has neurons of its own, and tokens.
        self.model, sizes = model, model.intermediate_sizes
        shape = (len(sizes), mixture.count if mixture else 1, max(sizes))
        self.is_there = np.arange(max(sizes)) < np.array(sizes)[:, None, None]
        self.tokens = np.zeros(shape[:2], dtype=np.int64)
        self.small = np.zeros((shape[0], len(SMALL)), dtype=np.int64)
        self.zero_out_norm = np.zeros(shape[0], dtype=np.int64)
        self.fired = np.zeros(shape, dtype=np.int64)  # out_norm >= 1e-7
        self.in_top = np.zeros(shape, dtype=np.int64)

    def add(self, index: int, inter: torch.Tensor) -> None:
        layer = self.model.layers[index]
        place = index, layer.experts.current if layer.experts else 0
        magnitude = inter.abs().float()
        out_norm = magnitude * layer.of_tapped(layer.down_norm)
        fires = out_norm >= ZERO_OUT_NORM
        self.tokens[place] += len(inter)
        for i, epsilon in enumerate(SMALL):
            self.small[index, i] += int((magnitude <= epsilon).sum())
        self.zero_out_norm[index] += int((~fires).sum())
        self.fired[place][: layer.d_ff] += as_array(fires.sum(dim=0))
        top = out_norm > per_token_topk(out_norm, TOP)
        self.in_top[place][: layer.d_ff] += as_array(top.sum(dim=0))

    def share_of_tokens(self, counts: np.ndarray) -> np.ndarray:
        """Counts of neurons over the tokens that reach each, (L, d_ff); 0 if none does.

        Of a mixture (L, n_experts * d_ff). Rows of layers with fewer neurons end in NaN.
        """
        shares = counts / np.maximum(self.tokens, 1)[:, :, None]
        shares = np.where(self.is_there, shares, np.nan)
        return np.asarray(shares.reshape(len(shares), -1))


def profile(
    model: Model,
    text: str | Path | Text | None = None,
    *,
    context: int = 1024,
    windows: int | None = None,
) -> Profile:
    """Measures weights and activations of the dense model; memory does not grow with the text.

    Args:
        text: a file, or None for the evaluation half of the default text.
        windows: how many of the text's windows, from the first; None: 8, or all of fewer.

    Raises:
        FallowError: the text has fewer windows; NaN, naming tensor and layer.
    """
    source = load_text(text, "evaluation")
    cut = model.windows(source, context, windows, at_most=WINDOWS)
    layer = model.layers[0]
    # Inputs that several projections share are tapped at the first one: x, and that of q, k and v.
    attention = list(layer.attention)
    names = [n for n in ("x", *layer.ffn_taps) if n in tap_names(layer) and n != ROUTER]
    names += [*attention[:1], *attention[-1:]]
    tapped = {"x": next(iter(layer.ffn_inputs))} if "x" in names else {}
    histograms = {name: Histograms(name, len(model.layers)) for name in names}
    neurons = _Neurons(model)
    taps = {tapped.get(name, name): h.add for name, h in histograms.items()}
    with progress("profile", len(cut)) as ticker:
        for window in cut:
            with attach(model.layers, taps), attach(model.layers, {"inter": neurons.add}):
                model.hidden(window[None])
            ticker.advance()
    return _summarise(model, source, cut, histograms, _weight_histograms(model), neurons)


def _weight_histograms(model: Model) -> dict[str, Histograms]:
    found: dict[str, Histograms] = {}
    for index, layer in enumerate(model.layers):
        for name, weight in _weights(layer):
            found.setdefault(name, Histograms(name, len(model.layers))).add(index, weight)
    return found


def _weights(layer: Layer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in layer.projections.items():
        yield name, module.weight
    if (mixture := layer.experts) is not None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            for weight in getattr(mixture, name):
                yield name, weight


def _summarise(
    model: Model,
    text: Text,
    windows: np.ndarray,
    magnitudes: dict[str, Histograms],
    weights: dict[str, Histograms],
    neurons: _Neurons,
) -> Profile:
    values = neurons.tokens.sum(axis=1) * model.intermediate_sizes  # (L,) values of inter
    fired = neurons.share_of_tokens(neurons.fired)
    in_top = neurons.share_of_tokens(neurons.in_top)
    mixture, unused = model.layers[0].experts, (neurons.tokens == 0).sum(axis=1).tolist()
    layers: list[dict[str, Any]] = []
    for i in range(len(model.layers)):
        layers.append(
            {
                "layer": i,
                "neurons": model.layers[i].d_ff,  # of a mixture those of one expert
                "zeros": {
                    name: int(magnitudes[name].zeros[i]) / int(magnitudes[name].counts[i].sum())
                    for name in ("gate_act", "inter")
                },
                "inter_at_most": {
                    f"{epsilon:g}": int(neurons.small[i, j]) / int(values[i])
                    for j, epsilon in enumerate(SMALL)
                },
                "out_norm_below_1e-7": int(neurons.zero_out_norm[i]) / int(values[i]),
                "dead_neurons": int((fired[i] < DEAD).sum()),
                "rarely_in_top_half": int((in_top[i] < DEAD).sum()),
                **({} if mixture is None else {"unused_experts": unused[i]}),
                "magnitude_quantiles": _quantiles(magnitudes, i),
                "weight_quantiles": _quantiles(weights, i),
            }
        )
    summary = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "architecture": model.architecture.model_type,
        "dtype": model.dtype_name,
        "text": text.name,
        "text_sha256": text.sha256,
        "tokens": int(windows.size),
        "context": int(windows.shape[1]),
        "natural_sparsity": float(np.mean([row["zeros"]["inter"] for row in layers])),
        "layers": layers,
    }
    arrays: dict[str, np.ndarray] = {
        "edges": bin_edges()[:: _group()],
        "firing_frequency": fired.astype(np.float32),
        "top_half_frequency": in_top.astype(np.float32),
    }
    if mixture is not None:
        arrays["expert_frequency"] = (neurons.tokens / windows.size).astype(np.float32)
    for kind, histograms in (("magnitude", magnitudes), ("weight", weights)):
        for name, h in histograms.items():
            counts = h.counts.reshape(len(h.counts), -1, _group()).sum(axis=2)
            arrays[f"{kind}.{name}"] = counts
            total = counts.sum(axis=1, keepdims=True)
            arrays[f"{kind}_cdf.{name}"] = (counts.cumsum(axis=1) / total).astype(np.float32)
    return Profile(summary, arrays)


def _group() -> int:
    return _core.HISTOGRAM_BINS_PER_OCTAVE // STORED_BINS_PER_OCTAVE


def _quantiles(histograms: dict[str, Histograms], layer: int) -> dict[str, dict[str, float]]:
    return {
        name: {f"{q:g}": h.quantile(layer, q) for q in QUANTILES} for name, h in histograms.items()
    }
