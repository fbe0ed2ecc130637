"""What is packed: matrices and vectors by the engine's names, and what a model says of itself."""

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fallow import _core
from fallow.checkpoints.catalog import find_model
from fallow.checkpoints.text import Text, load_text
from fallow.checkpoints.weights import read_gguf, read_safetensors
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import fits, read_json
from fallow.common.progress import note, progress
from fallow.engine.memory import COARSE_HEAD
from fallow.measure.evaluation import final_hidden
from fallow.models import FatRelu, activation_key, has_part
from fallow.models.devices import as_array, as_floats
from fallow.models.taps import Layer, attach
from fallow.packing.coarse_head import coarse_head
from fallow.packing.quantize import (
    DOWN_TYPES,
    DOWN_TYPES_NARROW,
    OUTLIERS,
    QUANT_TYPES,
    Matrix,
    mxfp4,
    quantize,
    without_outliers,
)
from fallow.packing.selfcheck import CHECK_CONTEXT
from fallow.reference.model import Model, in_bfloat16

OUTLIER_WINDOWS = 2
# Hidden states say how to round the coarse head: of windows from all over the calibration text and
# of some from the default text. On Qwen2.5-Coder and WikiText-2 logits are off by 0.94 nats
# (standard deviation) with 40 windows of 1024 of the Python reference, 0.87 without compensation,
# 0.60 with 16 of WikiText-2's validation text, 0.58 with 64 of 256; 0.59 with 32 of the reference
# beside them, which on code makes 0.78 of 0.95. In bfloat16, on WikiText-2 and code: 0.62 and 0.72
# with 64 and 32 windows, 0.65 and 0.73 with half as many in half the time, 0.70 and 0.77 with a
# quarter.
HEAD_CONTEXT, HEAD_WINDOWS, HEAD_DEFAULT_WINDOWS = 256, 32, 16
ADAPTED_FILE = "adapted.json"  # of a folder that `fallow adapt` wrote
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "fatrelu": "fatrelu",
    "drelu": "drelu",
}
_SWIGLU_OAI = ("swiglu_alpha", "swiglu_limit")


Rows = slice | np.ndarray | None  # of a matrix; None: all


class RoundedDown(NamedTuple):
    """down_proj_t of an FFN without its outlier neurons, those neurons, and their rows."""

    ffn: str  # the engine's name
    matrix: Matrix
    neurons: np.ndarray
    rows: Matrix | None


class Source:
    """A loaded model, and where its quantised bytes are."""

    def __init__(self, model: Model, name: str | None) -> None:
        self.model = model
        self.config = model.module.config
        path = find_model(name) if name is not None else None
        self.gguf = read_gguf(path) if path is not None and path.is_file() else None
        self._adapted = _adapted_types(path)
        self._folder = path if path is not None and path.is_dir() else None
        self._rounded_to, self._rounded = "", dict[int, list[RoundedDown]]()
        problem = model.architecture.check(self.config)
        if problem:
            raise FallowError(f"{model.name} has {problem}, which the engine does not run")

    @property
    def keeps_bytes(self) -> bool:
        return self.gguf is not None

    def down_types(self, quant: str | None, down: str | None) -> tuple[str, ...]:
        """Types to try for down_proj_t, in turn; `quant` and `down` are of QUANT_TYPES.

        Raises:
            UsageError: `quant` is given for a GGUF.
        """
        if down is not None:
            return (down.upper(),)
        if not self.keeps_bytes:
            stated = self._adapted.get(self._down_name, "q8_0")  # the same in every layer
            return ((quant or stated).upper(),)
        if quant is not None:
            raise UsageError("--quant is for Hugging Face folders; a GGUF keeps its own types")
        if self.config.hidden_size % 32:
            return ("F16",)
        return DOWN_TYPES if self.config.hidden_size % 256 == 0 else DOWN_TYPES_NARROW

    def stored_types(self) -> dict[str, str]:
        """What a GGUF's matrices are written in, by the parameters' names; {} for a folder."""
        if self.gguf is None:
            return {}
        return {name: matrix.type for name, matrix in self._stored().items()}

    def matrices(self, quant: str | None) -> dict[str, Matrix]:
        """Every matrix but down_proj_t, under the engine's names."""
        stored = {} if self.gguf is None else self._stored()
        parameters = dict(self.model.module.named_parameters(remove_duplicate=False))
        result = {}
        for name, (place, part) in self._places():
            matrix = None if self.gguf is None else pick(stored, place, part)
            if matrix is not None and place not in self.model.changed:
                result[name] = matrix
                continue
            values = as_floats(parameters[place])
            stated = quant or self._adapted.get(place, "q8_0")
            kind = matrix.type if matrix else stated.upper()
            if kind not in QUANT_TYPES:  # Q2_K or Q3_K
                kind = _larger_type(values.shape[1])
            result[name] = quantize(values if part is None else values[part], kind)
        if quant is None and self._folder is not None:
            stored = self._stored_mxfp4(self._folder)
        return result | dict(self._expert_inputs(stored, quant))

    def _expert_inputs(
        self, stored: dict[str, Matrix], quant: str | None
    ) -> Iterator[tuple[str, Matrix]]:
        """gate_proj and up_proj of all experts but shared ones, under the engine's names."""
        a, d_ff = self.model.architecture, self.model.layers[0].d_ff
        for i, layer in enumerate(self.model.layers):
            if layer.experts is None or a.experts is None:
                continue
            halves = {"gate_proj": layer.experts.gate_proj, "up_proj": layer.experts.up_proj}
            for part, values in halves.items():
                all_rows = stored.get(f"{a.layers}.{i}.{a.experts.experts}.{part}.weight")
                if all_rows is None:
                    rows = as_floats(values).reshape(-1, values.shape[2])
                    all_rows = quantize(rows, (quant or "q8_0").upper())
                for e in range(layer.experts.count):
                    matrix = all_rows.rows(slice(e * d_ff, (e + 1) * d_ff))
                    yield f"layers.{i}.experts.{e}.{part}.weight", matrix

    def _stored_mxfp4(self, folder: Path) -> dict[str, Matrix]:
        """A folder's gate_proj and up_proj of experts that are MXFP4, named as `_stored` does."""
        found, tensors = dict[str, Matrix](), {t.name: t for t in read_safetensors(folder)}
        for name, blocks in tensors.items():
            if name.endswith(".gate_up_proj_blocks"):
                scales = tensors[name.removesuffix("_blocks") + "_scales"]
                codes = blocks.data.reshape(blocks.shape)  # (n_experts, 2 d_ff, groups, 16)
                exponents = scales.data.reshape(scales.shape)
                for half, part in enumerate(("gate_proj", "up_proj")):
                    place = name.replace("gate_up_proj_blocks", f"{part}.weight")
                    found[place] = mxfp4(codes[:, half::2], exponents[:, half::2])
        return found

    def _stored(self) -> dict[str, Matrix]:
        """The GGUF's matrices under the checkpoint's names, bytes as they are."""
        assert self.gguf is not None
        architecture, found = self.model.architecture, dict[str, Matrix]()
        replaced: dict[tuple[str, str], list[str]] = {}
        for tensor in self.gguf.tensors.values():
            name = architecture.hf_name(tensor.name)
            if name is None or len(tensor.shape) < 2:
                continue
            rows, cols = (
                math.prod(tensor.shape[:-1]),
                tensor.shape[-1],
            )  # experts' one below another
            if tensor.type not in _core.FORMATS:
                kind = _larger_type(cols)
                replaced.setdefault((tensor.type, kind), []).append(tensor.name)
                values = tensor.dequantize().reshape(rows, cols)
                for part, data in architecture.from_gguf(name, values, self.config).items():
                    found[part] = quantize(np.ascontiguousarray(data), kind)
                continue
            raw = tensor.data.reshape(rows, -1)
            # Reordering and splitting rows works on bytes as it does on values.
            for part, data in architecture.from_gguf(name, raw, self.config).items():
                found[part] = Matrix(tensor.type, (len(data), cols), data)
        for (stored, kind), names in replaced.items():
            note(
                f"tensors in {stored} ({len(names)}, {names[0]} first) are written in {kind}, "
                f"which is larger: the engine does not compute with {stored}"
            )
        return found

    def _places(self) -> Iterator[tuple[str, tuple[str, Rows]]]:
        """The engine's matrices, and the parameter or part of its rows that each is."""
        a, c = self.model.architecture, self.config
        yield "embed_tokens.weight", (f"{a.embed_tokens}.weight", None)
        if self.per_layer_input:
            for name in ("embed_tokens_per_layer", "per_layer_model_projection"):
                yield f"{name}.weight", (f"model.{name}.weight", None)
        if self.model.module.get_output_embeddings().weight is not self._embedding.weight:
            yield "lm_head.weight", ("lm_head.weight", None)
        for i in range(len(self.model.layers)):
            here, there = f"layers.{i}", f"{a.layers}.{i}"
            if self._is_fused:  # q, k and v are one projection
                fused = f"{there}.{a.attention[0]}.weight"
                for name, rows in zip("qkv", self._fused_rows, strict=True):
                    yield f"{here}.{name}_proj.weight", (fused, rows)
            else:
                for name, path in self._qkv(i).items():
                    yield f"{here}.{name}.weight", (f"{there}.{path}.weight", None)
            yield f"{here}.o_proj.weight", (f"{there}.{a.attention[-1]}.weight", None)
            if self.per_layer_input:
                for name in ("per_layer_input_gate", "per_layer_projection"):
                    yield f"{here}.{name}.weight", (f"{there}.{name}.weight", None)
            if a.experts is not None:
                if (shared := a.experts.shared) is not None:
                    for part in ("gate_proj", "up_proj"):
                        place = f"{there}.{shared}.{part}.weight"
                        yield f"{here}.shared_expert.{part}.weight", (place, None)
            elif a.gate_up_proj is not None:
                fused, d_ff = f"{there}.{a.gate_up_proj}.weight", c.intermediate_size
                yield f"{here}.gate_proj.weight", (fused, slice(0, d_ff))
                yield f"{here}.up_proj.weight", (fused, slice(d_ff, 2 * d_ff))
            else:
                if a.gate_proj is not None:
                    yield f"{here}.gate_proj.weight", (f"{there}.{a.gate_proj}.weight", None)
                yield f"{here}.up_proj.weight", (f"{there}.{a.up_proj}.weight", None)

    @property
    def _is_fused(self) -> bool:
        return len(self.model.architecture.attention) == 2

    def _qkv(self, layer: int) -> dict[str, str]:
        """Of what is not fused the paths of q_proj, k_proj and v_proj, those that a layer has."""
        block = self.model.layers[layer].block
        paths = zip("qkv", self.model.architecture.attention, strict=False)
        return {f"{name}_proj": path for name, path in paths if has_part(block, path)}

    @cached_property
    def _fused_rows(self) -> list[np.ndarray]:
        """The rows of q, k and v in a projection that is all three."""
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        rows = np.arange(sum(sizes))
        if self.model.architecture.interleaves_qkv:  # head by head
            heads = rows.reshape(self.heads, 3, self.head_dim)
            return [heads[:, i].reshape(-1) for i in range(3)]
        return np.split(rows, np.cumsum(sizes)[:2])

    @cached_property
    def _embedding(self) -> Any:
        return self.model.module.get_submodule(self.model.architecture.embed_tokens)

    @property
    def per_layer_input(self) -> int:
        """Values of an input that each layer has of its own; 0: there is none."""
        return getattr(self.config, "hidden_size_per_layer_input", None) or 0

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Of a model whose q, k and v are one projection, as head_dim is."""
        return getattr(self.config, "num_key_value_heads", None) or self.heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads

    @cached_property
    def kv_layers(self) -> list[int]:
        """Of each layer whose keys and values it reads: its own, or those of the last one of its
        kind that has some."""
        n = len(self.model.layers)
        first = n - (getattr(self.config, "num_kv_shared_layers", None) or 0)
        kinds = getattr(self.config, "layer_types", None) or [""] * n
        return [
            i if i < first else max(j for j in range(first) if kinds[j] == kinds[i])
            for i in range(n)
        ]

    def _attention_metadata(self) -> dict[str, Any]:
        """Heads, of each layer too where layers differ in them."""
        n = len(self.model.layers)
        if self._is_fused:
            heads, dims, are_keys = [self.kv_heads] * n, [self.head_dim] * n, [0] * n
        else:
            dims = [self._rows_of(i, "q_proj") // self.heads for i in range(n)]
            kept_by = self.kv_layers
            heads = [self._rows_of(kept_by[i], "k_proj") // dims[i] for i in range(n)]
            are_keys = [int("v_proj" not in self._qkv(i)) for i in kept_by]
        rotary = [2 * len(self.ropes[rope][0]) for rope in self.rope_of_layer if self.ropes]
        found: dict[str, Any] = {
            "n_kv_heads": max(heads),
            "head_dim": max(dims),
            "rotary_dim": max(rotary, default=0),
        }
        each = {"layer_n_kv_heads": heads, "layer_head_dim": dims, "layer_rotary_dim": rotary}
        found |= {name: values for name, values in each.items() if len(set(values)) > 1}
        if self.kv_layers != list(range(n)):
            found["kv_layer"] = self.kv_layers
        return found | ({"values_are_keys": are_keys} if any(are_keys) else {})

    def _rows_of(self, layer: int, name: str) -> int:
        found: Any = self.model.layers[layer].block.get_submodule(self._qkv(layer)[name])
        return found.out_features

    def vectors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Norms, biases and tables, float32, under the engine's names."""
        a, module = self.model.architecture, self.model.module
        # A factor of the logits is one of what the head reads.
        for name, values in self._norm("norm", module.get_submodule(a.final_norm)):
            yield name, values * np.float32(self.model.logit_scale)
        if self.per_layer_input:
            name = "per_layer_projection_norm"
            yield from self._norm(name, module.get_submodule(f"model.{name}"))
        head = module.get_output_embeddings()
        if head.bias is not None:
            yield "lm_head.bias", as_floats(head.bias)
        if a.embed_positions is not None:
            table: Any = module.get_submodule(a.embed_positions).weight
            rows = slice(a.first_position, a.first_position + self.context_length)
            yield "embed_positions", as_floats(table[rows])
        for i, (inv_freq, scale) in enumerate(self.ropes):
            yield f"rope.{i}.inv_freq", inv_freq
            yield f"rope.{i}.scale", np.array([scale], dtype=np.float32)
        for i, layer in enumerate(self.model.layers):
            for name, path in a.norms.items():
                if name in ("k_norm", "v_norm") and self.kv_layers[i] != i:
                    continue
                if name == "v_norm":  # without a weight
                    size = self._rows_of(i, "q_proj") // self.heads
                    yield f"layers.{i}.v_norm.weight", np.ones(size, dtype=np.float32)
                    continue
                yield from self._norm(f"layers.{i}.{name}", layer.block.get_submodule(path))
            if self.per_layer_input:
                name = "post_per_layer_input_norm"
                yield from self._norm(f"layers.{i}.{name}", layer.block.get_submodule(name))
            if (scalar := getattr(layer.block, "layer_scalar", None)) is not None:
                yield f"layers.{i}.layer_scalar", as_floats(scalar)
            yield f"layers.{i}.down_norm", as_floats(layer.down_norm)
            if (experts := layer.experts) is not None:
                # Who is chosen hangs on small differences.
                yield f"layers.{i}.router.weight", as_floats(experts.router.weight)
                if getattr(experts.router, "bias", None) is not None:
                    yield f"layers.{i}.router.bias", as_floats(experts.router.bias)
                for name, biases in experts.biases.items():
                    yield f"layers.{i}.{name}.bias", as_floats(biases)
                if experts.shared_gate is not None:
                    yield (
                        f"layers.{i}.shared_expert_gate.weight",
                        as_floats(experts.shared_gate.weight),
                    )
            for name, bias in self._biases(i, layer):
                yield f"layers.{i}.{name}.bias", bias
            if a.sinks is not None:
                yield f"layers.{i}.sinks", as_floats(layer.block.get_parameter(a.sinks))

    @property
    def _down_name(self) -> str:
        return f"{self.model.architecture.layers}.0.{self.model.architecture.down_proj}.weight"

    @property
    def has_coarse_head(self) -> bool:
        """Whether the head's rows are whole bytes of two-bit weights."""
        return bool(self.model.module.get_output_embeddings().weight.shape[1] % 4 == 0)

    def coarse_head(
        self, text: Text | None = None, windows: np.ndarray | None = None
    ) -> dict[str, Matrix]:
        """A copy of the head in two bits, rounded for hidden states of some text.

        Of windows (n, context) of `text`, and of the default text unless this is it.

        Raises:
            FallowError: its rows are not whole bytes.
        """
        head = self.model.module.get_output_embeddings()
        weight = head.weight.detach()
        cols = weight.shape[1]
        if not self.has_coarse_head:
            raise FallowError(
                f"{self.model.name} has {cols} hidden units, no multiple of 4: there is no "
                "coarse head for it; pack without --shortlist"
            )
        moment, mean = (torch.zeros(s, device=weight.device) for s in ((cols, cols), cols))
        used = [] if windows is None else list(spread(windows, HEAD_WINDOWS)[:, :HEAD_CONTEXT])
        default = load_text(None, "calibration")
        if text is None or text.sha256 != default.sha256:
            context = min(HEAD_CONTEXT, self.context_length)
            count = HEAD_DEFAULT_WINDOWS if used else HEAD_WINDOWS
            used += list(spread(self.model.windows(default, context), count))
        n_tokens = sum(window.size for window in used)
        with progress("hidden states", len(used)) as ticker, in_bfloat16(weight.device):
            for window in used:
                hidden = final_hidden(self.model, window).float()
                moment += hidden.T @ hidden / n_tokens
                mean += hidden.sum(dim=0) / n_tokens
                ticker.advance()
        codes, bias = coarse_head(*map(as_array, (weight, moment, mean)))
        if head.bias is not None:
            bias = bias + as_floats(head.bias)
        parts = Matrix("I8", codes.shape, codes), Matrix("F32", bias.shape, bias)
        return dict(zip(COARSE_HEAD, parts, strict=True))

    def _calibration_windows(self, limit: int) -> np.ndarray:
        """The first windows of the default calibration text, (n, context)."""
        context = min(CHECK_CONTEXT, self.context_length)
        return self.model.windows(load_text(None, "calibration"), context, at_most=limit)

    @cached_property
    def energy(self) -> list[np.ndarray]:
        """Sum of inter² over some tokens of the calibration text, per layer (d_ff,)."""
        model = self.model
        total = [torch.zeros(n, device=model.device) for n in model.intermediate_sizes]

        def add(layer: int, value: torch.Tensor) -> None:
            total[layer] += value.float().square().sum(dim=0)

        windows = self._calibration_windows(OUTLIER_WINDOWS)
        with (
            progress("outlier neurons", len(windows)) as ticker,
            attach(model.layers, {"inter": add}),
        ):
            for window in windows:
                model.hidden(window[None])
                ticker.advance()
        return [as_array(of_layer) for of_layer in total]

    def down_proj_ts(self, layer: int, kind: str) -> list[RoundedDown]:
        """down_proj_t of each FFN of a layer."""
        if kind != self._rounded_to:  # of one kind they are kept, to be written again with a plan
            self._rounded_to, self._rounded = kind, {}
        if layer not in self._rounded:
            self._rounded[layer] = self._round_down_projs(layer, kind)
        return self._rounded[layer]

    def _round_down_projs(self, layer: int, kind: str) -> list[RoundedDown]:
        here, experts = f"layers.{layer}", self.model.layers[layer].experts
        if experts is None:
            return [self._round_down_proj(layer, kind)]
        names = {f"{here}.experts.{e}": w for e, w in enumerate(experts.down_proj.detach())}
        if experts.shared is not None:
            names[f"{here}.shared_expert"] = experts.shared.down_proj.weight
        none = np.empty(0, dtype=int)
        return [
            RoundedDown(name, quantize(as_floats(weight.T), kind), none, None)
            for name, weight in names.items()
        ]

    def _round_down_proj(self, layer: int, kind: str) -> RoundedDown:
        name = f"layers.{layer}"
        weight = as_floats(self.model.layers[layer].down_proj.weight)
        values = np.ascontiguousarray(weight.T)
        n = self.n_outliers(kind)
        if n == 0:
            return RoundedDown(name, quantize(values, kind), np.empty(0, dtype=int), None)
        return RoundedDown(name, *without_outliers(values, kind, self.energy[layer], n))

    def n_outliers(self, kind: str) -> int:
        if kind in ("F32", "F16", "BF16") or self.model.layers[0].experts is not None:
            return 0
        return min(OUTLIERS, *self.model.intermediate_sizes)

    def _norm(self, name: str, norm: Any) -> Iterator[tuple[str, np.ndarray]]:
        yield (
            f"{name}.weight",
            as_floats(norm.weight) + np.float32(self.model.architecture.norm_offset),
        )
        if getattr(norm, "bias", None) is not None:
            yield f"{name}.bias", as_floats(norm.bias)

    def _biases(self, index: int, layer: Layer) -> Iterator[tuple[str, np.ndarray]]:
        paths = {} if self._is_fused else self._qkv(index)
        parts: dict[str, Any] = {n: layer.block.get_submodule(p) for n, p in paths.items()}
        for name, projection in (parts | layer.projections).items():
            if projection.bias is None:
                continue
            bias = as_floats(projection.bias)
            if name == "qkv_proj":
                for part, rows in zip("qkv", self._fused_rows, strict=True):
                    yield f"{part}_proj", bias[rows]
            elif name == "gate_up_proj":
                yield from zip(("gate_proj", "up_proj"), np.split(bias, 2), strict=True)
            else:
                yield name, bias

    @cached_property
    def _rotary(self) -> list[tuple[np.ndarray, float]]:
        """Each layer's inverse frequencies and its factor of cos and sin."""
        path = self.model.architecture.rotary
        if path is None:
            return []
        rotary = self.model.module.get_submodule(path)
        kinds = getattr(self.config, "layer_types", None) or [""] * len(self.model.layers)
        turns = getattr(self.config, "no_rope_layers", None) or [1] * len(
            kinds
        )  # SmolLM3's; 0: not
        found = []
        for kind, turn in zip(kinds, turns, strict=True):
            prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
            scale = float(getattr(rotary, f"{prefix}attention_scaling"))
            inv_freq = as_floats(getattr(rotary, f"{prefix}inv_freq"))
            found.append((inv_freq, scale) if turn else (np.zeros_like(inv_freq), 1.0))
        return found

    @cached_property
    def ropes(self) -> list[tuple[np.ndarray, float]]:
        """The distinct inverse frequencies, (rotary_dim / 2,) each, and factors of cos and sin."""
        distinct: list[tuple[np.ndarray, float]] = []
        for rope in self._rotary:
            if not any(_is_same(rope, known) for known in distinct):
                distinct.append(rope)
        return distinct

    @property
    def rope_of_layer(self) -> list[int]:
        if not self._rotary:
            return [0] * len(self.model.layers)
        return [
            next(i for i, known in enumerate(self.ropes) if _is_same(rope, known))
            for rope in self._rotary
        ]

    @property
    def context_length(self) -> int:
        """Up to where the frequencies hold; stretched ones change beyond the original context."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        longest = self.config.max_position_embeddings
        # Gemma 3 has parameters for each kind of layer.
        for one in (parameters, *parameters.values()):
            if isinstance(one, dict) and one.get("rope_type") in ("longrope", "dynamic"):
                longest = min(longest, one.get("original_max_position_embeddings") or longest)
        return int(longest)

    @property
    def sliding_windows(self) -> list[int]:
        """Tokens that each layer looks back on, itself included; 0: all."""
        window = getattr(self.config, "sliding_window", None) or 0
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            return [window] * len(self.model.layers)
        return [window if kind == "sliding_attention" else 0 for kind in kinds]

    @property
    def activation(self) -> str:
        if hasattr(self.config, "swiglu_limit"):  # beside which hidden_act has no effect
            return "swiglu_oai"
        key = activation_key(self.model.architecture)
        assert key is not None
        name = getattr(self.config, key)
        if name not in _ACTIVATIONS:
            raise FallowError(
                f"{self.model.name} has the activation {name}; the engine knows "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def _activation_numbers(self) -> dict[str, float]:
        if self.activation == "swiglu_oai":
            return {name: float(getattr(self.config, name)) for name in _SWIGLU_OAI}
        ffn = self.model.layers[0].ffn
        act = ffn.act if ffn is not None else None
        return {"activation_threshold": act.threshold} if isinstance(act, FatRelu) else {}

    @property
    def norm_eps(self) -> float:
        norm = self.model.module.get_submodule(self.model.architecture.final_norm)
        return float(getattr(norm, "eps", None) or norm.variance_epsilon)

    @property
    def attention_scale(self) -> float:
        for module in self.model.layers[0].block.modules():
            if hasattr(module, "scaling"):
                scaling: Any = module.scaling
                return float(scaling)
        raise FallowError(f"{self.model.name}: its attention has no scaling")

    @property
    def embedding_scale(self) -> float:
        scale = getattr(self._embedding, "embed_scale", 1.0)
        return float(getattr(self.config, "embedding_multiplier", None) or scale)

    def metadata(self) -> dict[str, Any]:
        """What the engine reads, without the prefix `fallow.`."""
        a, c, layer = self.model.architecture, self.config, self.model.layers[0]
        return {
            "hidden_size": c.hidden_size,
            "intermediate_size": max(sizes := self.model.intermediate_sizes),
            **({"layer_intermediate_size": sizes} if len({*sizes}) > 1 else {}),
            "n_layers": len(self.model.layers),
            "n_heads": self.heads,
            **self._attention_metadata(),
            "vocab_size": self.model.vocabulary_size,
            "context_length": self.context_length,
            "attention_scale": self.attention_scale,
            "embedding_scale": self.embedding_scale,
            "residual_scale": float(getattr(c, "residual_multiplier", 1.0)),
            **self._temperature(),
            "attention_softcap": float(getattr(c, "attn_logit_softcapping", None) or 0),
            "logit_softcap": self.model.logit_softcap,
            "norm_eps": self.norm_eps,
            "layer_norm": a.layer_norm,
            "gated": layer.gated,
            "parallel": a.parallel,
            "activation": self.activation,
            **self._activation_numbers(),
            "fused": a.gate_up_proj is not None,
            "sliding_window": self.sliding_windows,
            "rope": self.rope_of_layer,
            **({"hidden_size_per_layer_input": n} if (n := self.per_layer_input) else {}),
            **self._expert_metadata(),
        }

    def _temperature(self) -> dict[str, Any]:
        """How queries grow with their position (Llama 4's attention temperature)."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if not (scale := rope.get("llama_4_scaling_beta")):
            return {}
        return {
            "temperature_scale": float(scale),
            "temperature_length": rope["original_max_position_embeddings"],
        }

    def _expert_metadata(self) -> dict[str, Any]:
        if (experts := self.model.layers[0].experts) is None:
            return {}
        shared = experts.shared
        return {
            "n_experts": experts.count,
            "n_experts_used": experts.used,
            "norm_experts": experts.is_normed,
            "shared_intermediate_size": 0 if shared is None else shared.down_proj.in_features,
        }


def _adapted_types(path: Path | None) -> dict[str, str]:
    """What an adapted folder's weights were rounded to in training, by their names.

    Raises:
        FallowError: its `adapted.json` is damaged.
    """
    file = None if path is None else path / ADAPTED_FILE
    if file is None or not file.is_file():
        return {}
    found: Any = read_json(file, "adapt the model again").get("types")
    if not fits(found, dict) or not all(v in QUANT_TYPES for v in found.values()):
        raise FallowError(f"{file} is damaged; adapt the model again")
    return dict(found)


def _larger_type(cols: int) -> str:
    """In which to write what is of a type that nothing here quantises to."""
    return "Q8_0" if cols % 256 else "Q6_K"


def _is_same(rope: tuple[np.ndarray, float], other: tuple[np.ndarray, float]) -> bool:
    return rope[1] == other[1] and np.array_equal(rope[0], other[0])


def spread(windows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` windows from all over."""
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]


def pick(stored: dict[str, Matrix], name: str, part: Rows) -> Matrix:
    if name not in stored:
        raise FallowError(f"the GGUF has no tensor for {name}")
    matrix = stored[name]
    return matrix if part is None else matrix.rows(part)
