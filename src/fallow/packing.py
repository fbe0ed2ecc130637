"""Turns a model into a packed file: one GGUF that the engine runs, FFN laid out by neuron.

docs/packed.md describes the file. From a GGUF source every matrix but down_proj keeps its own
quantised bytes; down_proj is transposed, so that a neuron's weights lie together, and requantised
along its rows.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fallow import _core
from fallow.engine import PACKED_VERSION, Engine, check_runs
from fallow.errors import FallowError, UsageError
from fallow.evaluation import final_hidden, logits_of
from fallow.files import atomic_path, check_writable
from fallow.memory import COARSE_HEAD
from fallow.model import Model, find_model, load
from fallow.plan import Plan
from fallow.progress import console, note, progress
from fallow.quality import compare_logits
from fallow.shortlist import coarse_head
from fallow.taps import Layer, attach
from fallow.text import Text, load_text
from fallow.weights import StoredTensor, read_gguf

# What a packed dense model may differ from its source, per token of the self-check. Which type
# down_proj_t gets is chosen on as many windows of another text.
LARGEST_KL = 0.002  # nats
LARGEST_PPL_CHANGE = 0.2  # percent
CHECK_WINDOWS = 2
CHECK_CONTEXT = 512
# Neurons per layer whose rows of down_proj_t are kept as F16: those that rounding harms most. Some
# fire thousands of times louder than the rest, on attention sinks. On SmolLM2 four such rows per
# layer take Q8_0 from 0.0022 to 0.0003 nats, sixteen to 0.0002.
OUTLIERS = 8
OUTLIER_WINDOWS = 2
# Hidden states say how to round the coarse head: of windows from all over the calibration text and
# of some from the default text. On Qwen2.5-Coder and WikiText-2 logits are off by 0.94 nats
# (standard deviation) with 40 windows of 1024 of the Python reference, 0.87 without compensation,
# 0.60 with 16 of WikiText-2's validation text, 0.58 with 64 of 256; 0.59 with 32 of the reference
# beside them, which on code makes 0.78 of 0.95.
HEAD_CONTEXT, HEAD_WINDOWS, HEAD_DEFAULT_WINDOWS = 256, 64, 32
# Types for down_proj_t from a GGUF source, smallest first; the K types need rows of whole 256s.
DOWN_TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
DOWN_TYPES_NARROW = ("Q5_0", "Q5_1", "Q8_0")
QUANT_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "BF16", "F16", "F32")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@dataclass
class Matrix:
    """Weights (rows, cols) in stored bytes (rows, row_bytes)."""

    type: str
    shape: tuple[int, int]
    data: np.ndarray

    def rows(self, part: slice) -> "Matrix":
        data = self.data[part]
        return Matrix(self.type, (len(data), self.shape[1]), data)


@dataclass
class SelfCheck:
    """The packed dense model against its source, on text of the default corpus."""

    kl: float  # nats per token
    ppl_change_percent: float
    top1_agreement: float
    tokens: int

    @property
    def passed(self) -> bool:
        return self.kl <= LARGEST_KL and abs(self.ppl_change_percent) <= LARGEST_PPL_CHANGE

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.5f} nats/token, PPL {self.ppl_change_percent:+.3f} %, "
            f"top-1 agreement {self.top1_agreement:.2%} on {self.tokens} tokens"
        )


def pack(
    model: str | Path | Model,
    output: str | Path,
    *,
    plan: Plan | None = None,
    quant: str | None = None,
    down: str | None = None,
    shortlist: bool = False,
    text: str | Path | Text | None = None,
    n_threads: int | None = None,
) -> SelfCheck:
    """Writes a packed model, and compares it with its source before it gets its name.

    Args:
        plan: stored in the file, and used by the engine unless another is given.
        quant: type of all matrices, for a Hugging Face folder (default Q8_0). A GGUF keeps its own.
        down: type of down_proj_t; default: for a GGUF the smallest that passes the check on a part
            of the default calibration text, else that of `quant`.
        shortlist: add a coarse copy of the head (2 bits), by which a plan with a `head_margin`
            spares most tokens' exact logits.
        text: what the check reads, which has chosen nothing but may refuse a type; default: the
            evaluation half of the default text.

    Raises:
        FallowError: the file would not pass the check (nothing is written), a matrix has a type
            that the engine has no kernels for, the architecture's variant is not supported, or the
            engine cannot run the plan.
        UsageError: an unknown type.
    """
    if plan is not None:
        check_runs(plan)
    check_writable(output)
    packer = Packer(model, quant=quant, down=down, shortlist=shortlist, text=text, plan=plan)
    return packer.write(output, plan, n_threads)


class Packer:
    """A model made ready to be packed, once or with several plans. Arguments as for `pack`."""

    def __init__(
        self,
        model: str | Path | Model,
        *,
        quant: str | None = None,
        down: str | None = None,
        shortlist: bool = False,
        text: str | Path | Text | None = None,
        plan: Plan | None = None,  # of another model: refused before the work
    ) -> None:
        name = None if isinstance(model, Model) else str(model)
        text = load_text(text, "evaluation")
        self._source = _Source(load(model, "float32"), name)
        if plan is not None:
            self.model.rule(plan)
        for problem in self.model.tokenizer.chat_problems():
            note(problem)
        self._types = self._source.down_types(quant, down)
        self._matrices = self._source.matrices(quant)
        if shortlist:
            self._matrices |= self._source.coarse_head()
        self._reference = self._reference_on(text)

    @property
    def model(self) -> Model:
        """The source, float32."""
        return self._source.model

    @cached_property
    def _choice(self) -> "_Reference":
        """By which the type of down_proj_t is chosen: not the text whose figures are reported."""
        return self._reference_on(load_text(None, "calibration"), skip=OUTLIER_WINDOWS)

    def _reference_on(self, text: Text, skip: int = 0) -> "_Reference":
        return _Reference(self.model, text, self.context_length, skip)

    @property
    def context_length(self) -> int:
        """Tokens that the packed model is made for."""
        return self._source.context_length

    def add_coarse_head(self, text: Text, windows: np.ndarray) -> None:
        """Files written from now on have a coarse head, if there can be one for the model.

        Rounded for windows (n, context) of this text and, if it is another, for the default text.
        """
        if self._source.has_coarse_head:
            self._matrices |= self._source.coarse_head(text, windows)

    def leave_out_unused(self, plan: Plan | None) -> None:
        """Files written from now on have a coarse head only if the plan uses it."""
        if plan is None or plan.arrays["head_margin"][0] == 0:
            self._matrices = {k: v for k, v in self._matrices.items() if k not in COARSE_HEAD}

    def write(
        self, output: str | Path, plan: Plan | None = None, n_threads: int | None = None
    ) -> SelfCheck:
        """Writes the packed model, whole or not at all. Raises as `pack` does."""
        source, check = self._source, None
        n_threads = n_threads or os.cpu_count() or 1
        if plan is not None:
            source.model.rule(plan)  # fits this model
        with atomic_path(output) as temporary:
            for kind in self._types:
                _write(temporary, source, self._matrices, kind, plan)
                if kind != self._types[-1]:
                    chosen = self._choice.check(temporary, n_threads)
                    console.print(f"down_proj_t {kind}, to choose: {chosen}", highlight=False)
                    if not chosen.passed:
                        continue
                check = self._reference.check(temporary, n_threads)
                console.print(f"down_proj_t {kind}: {check}", highlight=False)
                if check.passed or not source.keeps_bytes:
                    self._types = (kind,)  # of further files
                    break
            assert check is not None
            if not check.passed and source.keeps_bytes:
                raise FallowError(
                    f"the packed model differs too much from {source.model.name} ({check}; at most "
                    f"{LARGEST_KL} nats and {LARGEST_PPL_CHANGE} %); nothing was written; try "
                    "--down q8_0, and please report this model"
                )
        return check


class _Source:
    """A loaded model, and where its quantised bytes are."""

    def __init__(self, model: Model, name: str | None) -> None:
        self.model = model
        self.config = model.module.config
        path = find_model(name) if name is not None else None
        self.gguf = read_gguf(path) if path is not None and path.is_file() else None
        problem = model.architecture.check(self.config)
        if problem:
            raise FallowError(f"{model.name} has {problem}, which the engine does not run")

    @property
    def keeps_bytes(self) -> bool:
        return self.gguf is not None

    def down_types(self, quant: str | None, down: str | None) -> tuple[str, ...]:
        for name in (quant, down):
            if name is not None and name.upper() not in QUANT_TYPES:
                known = ", ".join(t.lower() for t in QUANT_TYPES)
                raise UsageError(f"unknown type {name!r}; known: {known}")
        if down is not None:
            return (down.upper(),)
        if not self.keeps_bytes:
            return ((quant or "q8_0").upper(),)
        if quant is not None:
            raise UsageError("--quant is for Hugging Face folders; a GGUF keeps its own types")
        if self.config.hidden_size % 32:
            return ("F16",)
        return DOWN_TYPES if self.config.hidden_size % 256 == 0 else DOWN_TYPES_NARROW

    def matrices(self, quant: str | None) -> dict[str, Matrix]:
        """Every matrix but down_proj_t, under the engine's names."""
        if self.gguf is not None:
            stored = self._stored()
            return {name: _pick(stored, *where) for name, where in self._places()}
        kind = (quant or "q8_0").upper()
        parameters = dict(self.model.module.named_parameters(remove_duplicate=False))
        result = {}
        for name, (place, part) in self._places():
            values = parameters[place].detach().float().numpy()
            result[name] = quantize(values if part is None else values[part], kind)
        return result

    def _stored(self) -> dict[str, Matrix]:
        """The GGUF's matrices under the checkpoint's names, bytes as they are."""
        assert self.gguf is not None
        architecture, found = self.model.architecture, {}
        for tensor in self.gguf.tensors.values():
            name = architecture.hf_name(tensor.name)
            if name is None or len(tensor.shape) != 2:
                continue
            raw = tensor.data.reshape(tensor.shape[0], -1)
            # Reordering and splitting rows works on bytes as it does on values.
            for part, data in architecture.from_gguf(name, raw, self.config).items():
                found[part] = Matrix(tensor.type, (len(data), tensor.shape[1]), data)
        return found

    def _places(self) -> Iterator[tuple[str, tuple[str, slice | None]]]:
        """The engine's matrices, and the parameter or part of its rows that each is."""
        a, c = self.model.architecture, self.config
        yield "embed_tokens.weight", (f"{a.embed_tokens}.weight", None)
        if self.model.module.get_output_embeddings().weight is not self._embedding.weight:
            yield "lm_head.weight", ("lm_head.weight", None)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for i in range(len(self.model.layers)):
            here, there = f"layers.{i}", f"{a.layers}.{i}"
            if len(a.attention) == 2:  # q, k and v are one projection
                fused = f"{there}.{a.attention[0]}.weight"
                yield f"{here}.q_proj.weight", (fused, slice(0, q))
                yield f"{here}.k_proj.weight", (fused, slice(q, q + kv))
                yield f"{here}.v_proj.weight", (fused, slice(q + kv, q + 2 * kv))
            else:
                for name, path in zip("qkv", a.attention[:3], strict=True):
                    yield f"{here}.{name}_proj.weight", (f"{there}.{path}.weight", None)
            yield f"{here}.o_proj.weight", (f"{there}.{a.attention[-1]}.weight", None)
            if a.gate_up_proj is not None:
                fused, d_ff = f"{there}.{a.gate_up_proj}.weight", c.intermediate_size
                yield f"{here}.gate_proj.weight", (fused, slice(0, d_ff))
                yield f"{here}.up_proj.weight", (fused, slice(d_ff, 2 * d_ff))
            else:
                if a.gate_proj is not None:
                    yield f"{here}.gate_proj.weight", (f"{there}.{a.gate_proj}.weight", None)
                yield f"{here}.up_proj.weight", (f"{there}.{a.up_proj}.weight", None)

    @cached_property
    def _embedding(self) -> Any:
        return self.model.module.get_submodule(self.model.architecture.embed_tokens)

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.heads

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads

    def vectors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Norms, biases and tables, float32, under the engine's names."""
        a, module = self.model.architecture, self.model.module
        yield from self._norm("norm", module.get_submodule(a.final_norm))
        head = module.get_output_embeddings()
        if head.bias is not None:
            yield "lm_head.bias", _floats(head.bias)
        if a.embed_positions is not None:
            table: Any = module.get_submodule(a.embed_positions).weight
            rows = slice(a.first_position, a.first_position + self.context_length)
            yield "embed_positions", _floats(table[rows])
        for i, inv_freq in enumerate(self.ropes):
            yield f"rope.{i}.inv_freq", inv_freq
        for i, layer in enumerate(self.model.layers):
            for name, path in a.norms.items():
                yield from self._norm(f"layers.{i}.{name}", layer.block.get_submodule(path))
            yield f"layers.{i}.down_norm", layer.down_norm.numpy()
            for name, bias in self._biases(layer):
                yield f"layers.{i}.{name}.bias", bias

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
        moment, mean = torch.zeros(cols, cols), torch.zeros(cols)
        used = [] if windows is None else list(_spread(windows, HEAD_WINDOWS)[:, :HEAD_CONTEXT])
        default = load_text(None, "calibration")
        if text is None or text.sha256 != default.sha256:
            context = min(HEAD_CONTEXT, self.context_length)
            count = HEAD_DEFAULT_WINDOWS if used else HEAD_WINDOWS
            used += list(_spread(self.model.windows(default, context), count))
        n_tokens = sum(window.size for window in used)
        with progress("hidden states", len(used)) as ticker:
            for window in used:
                hidden = final_hidden(self.model, window).float()
                moment += hidden.T @ hidden / n_tokens
                mean += hidden.sum(dim=0) / n_tokens
                ticker.advance()
        codes, bias = coarse_head(weight.numpy(), moment.numpy(), mean.numpy())
        if head.bias is not None:
            bias = bias + _floats(head.bias)
        parts = Matrix("I8", codes.shape, codes), Matrix("F32", bias.shape, bias)
        return dict(zip(COARSE_HEAD, parts, strict=True))

    def _calibration_windows(self, limit: int) -> np.ndarray:
        """The first windows of the default calibration text, (n, context)."""
        context = min(CHECK_CONTEXT, self.context_length)
        return self.model.windows(load_text(None, "calibration"), context, at_most=limit)

    @cached_property
    def energy(self) -> np.ndarray:
        """Sum of inter² over some tokens of the calibration text, (L, d_ff)."""
        model = self.model
        total = torch.zeros(len(model.layers), model.intermediate_size)

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
        return total.numpy()

    def down_proj_t(self, layer: int, kind: str) -> tuple[Matrix, np.ndarray, Matrix | None]:
        """down_proj_t without its outlier neurons, those neurons, and their rows."""
        weight = self.model.layers[layer].down_proj.weight.detach().float().numpy()
        values = np.ascontiguousarray(weight.T)
        matrix = quantize(values, kind)
        n = self.n_outliers(kind)
        if n == 0:
            return matrix, np.empty(0, dtype=int), None
        harm = np.square(dequantize(matrix) - values).sum(axis=1) * self.energy[layer]
        neurons = np.sort(np.argsort(-harm)[:n])
        matrix.data[neurons] = 0  # zero bytes are zero weights in every type
        return matrix, neurons, quantize(values[neurons], "F16")

    def n_outliers(self, kind: str) -> int:
        return 0 if kind in ("F32", "F16", "BF16") else min(OUTLIERS, self.model.intermediate_size)

    def _norm(self, name: str, norm: Any) -> Iterator[tuple[str, np.ndarray]]:
        yield (
            f"{name}.weight",
            _floats(norm.weight) + np.float32(self.model.architecture.norm_offset),
        )
        if getattr(norm, "bias", None) is not None:
            yield f"{name}.bias", _floats(norm.bias)

    def _biases(self, layer: Layer) -> Iterator[tuple[str, np.ndarray]]:
        sizes = [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]
        split: dict[str, tuple[tuple[str, ...], Any]] = {
            "qkv_proj": (("q_proj", "k_proj", "v_proj"), np.cumsum(sizes)[:2]),
            "gate_up_proj": (("gate_proj", "up_proj"), [layer.down_proj.in_features]),
        }
        for name, projection in layer.projections.items():
            if projection.bias is None:
                continue
            names, cuts = split.get(name, ((name,), []))
            yield from zip(names, np.split(_floats(projection.bias), cuts), strict=True)

    @cached_property
    def _rotary(self) -> list[tuple[np.ndarray, float]]:
        """Each layer's inverse frequencies and its factor of cos and sin."""
        path = self.model.architecture.rotary
        if path is None:
            return []
        rotary = self.model.module.get_submodule(path)
        kinds = getattr(self.config, "layer_types", None) or [""] * len(self.model.layers)
        found = []
        for kind in kinds:
            prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
            scale = float(getattr(rotary, f"{prefix}attention_scaling"))
            found.append((_floats(getattr(rotary, f"{prefix}inv_freq")), scale))
        return found

    @cached_property
    def ropes(self) -> list[np.ndarray]:
        """The distinct inverse frequencies, (rotary_dim / 2,) each."""
        distinct: list[np.ndarray] = []
        for inv_freq, _ in self._rotary:
            if not any(np.array_equal(inv_freq, known) for known in distinct):
                distinct.append(inv_freq)
        return distinct

    @property
    def rope_of_layer(self) -> list[int]:
        if not self._rotary:
            return [0] * len(self.model.layers)
        return [
            next(i for i, known in enumerate(self.ropes) if np.array_equal(inv_freq, known))
            for inv_freq, _ in self._rotary
        ]

    @property
    def rope_scale(self) -> float:
        scales = {scale for _, scale in self._rotary} or {1.0}
        if len(scales) > 1:
            raise FallowError(f"{self.model.name} scales its rotary embeddings layer by layer")
        return scales.pop()

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
        names = ("hidden_activation", "hidden_act", "activation_function")
        name = next(n for n in (getattr(self.config, n, None) for n in names) if n is not None)
        if name not in _ACTIVATIONS:
            raise FallowError(
                f"{self.model.name} has the activation {name}; the engine knows "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

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

    def metadata(self) -> dict[str, Any]:
        """What the engine reads, without the prefix `fallow.`."""
        a, c, layer = self.model.architecture, self.config, self.model.layers[0]
        ropes = self.ropes
        return {
            "hidden_size": c.hidden_size,
            "intermediate_size": self.model.intermediate_size,
            "n_layers": len(self.model.layers),
            "n_heads": self.heads,
            "n_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.model.vocabulary_size,
            "context_length": self.context_length,
            "rotary_dim": 2 * len(ropes[0]) if ropes else 0,
            "rope_scale": self.rope_scale,
            "attention_scale": self.attention_scale,
            "embedding_scale": float(getattr(self._embedding, "embed_scale", 1.0)),
            "norm_eps": self.norm_eps,
            "layer_norm": a.layer_norm,
            "gated": layer.gated,
            "parallel": a.parallel,
            "activation": self.activation,
            "fused": a.gate_up_proj is not None,
            "sliding_window": self.sliding_windows,
            "rope": self.rope_of_layer,
        }


def _spread(windows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` windows from all over."""
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int)]


def _floats(values: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.detach().float().numpy())


def _pick(stored: dict[str, Matrix], name: str, part: slice | None) -> Matrix:
    if name not in stored:
        raise FallowError(f"the GGUF has no tensor for {name}")
    matrix = stored[name]
    if matrix.type not in _core.FORMATS:
        raise FallowError(
            f"{name} has the type {matrix.type}, which the engine does not run; use a file "
            "quantised with Q4_0 to Q8_0, Q2_K to Q6_K, F16 or BF16"
        )
    return matrix if part is None else matrix.rows(part)


def quantize(values: np.ndarray, kind: str) -> Matrix:
    """Float32 values (rows, cols) as a matrix of a ggml type.

    Raises:
        FallowError: the rows are not whole blocks of the type.
    """
    import gguf

    rows, cols = values.shape
    block, _ = _core.FORMATS[kind]
    if cols % block:
        raise FallowError(
            f"rows of {cols} weights are not whole blocks of {block} of {kind}; choose another "
            "type, such as bf16"
        )
    if kind in ("Q4_K", "Q5_K", "Q6_K"):
        flat = np.ascontiguousarray(values, dtype=np.float32).ravel()
        data = np.frombuffer(_core.quantize_k(kind, flat, os.cpu_count() or 1), dtype=np.uint8)
    else:
        data = gguf.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    return Matrix(kind, (rows, cols), data.reshape(rows, -1).copy())


def dequantize(matrix: Matrix) -> np.ndarray:
    """Float32 values (rows, cols) of a matrix."""
    data = np.ascontiguousarray(matrix.data).reshape(-1)
    return StoredTensor("matrix", matrix.shape, matrix.type, data).dequantize()


def _write(
    path: Path,
    source: _Source,
    matrices: dict[str, Matrix],
    down: str,
    plan: Plan | None,
) -> None:
    import gguf

    model, tokenizer = source.model, source.model.tokenizer
    writer = gguf.GGUFWriter(path, "fallow")
    writer.add_custom_alignment(4096)
    writer.add_uint32("fallow.version", PACKED_VERSION)
    writer.add_string("fallow.model", Path(model.name).name)
    writer.add_string("fallow.model_type", model.architecture.model_type)
    writer.add_string("fallow.fingerprint", model.fingerprint)
    for key, value in source.metadata().items():
        _add(writer, f"fallow.{key}", value)
    writer.add_string("tokenizer.huggingface.json", tokenizer.backend.to_str())
    writer.add_bool("tokenizer.ggml.add_bos_token", tokenizer.add_bos)
    if tokenizer.bos_id is not None:
        writer.add_uint32("tokenizer.ggml.bos_token_id", tokenizer.bos_id)
    if tokenizer.eos_ids:
        _add(writer, "fallow.eos_token_ids", list(tokenizer.eos_ids))
    writer.add_string("fallow.special_tokens", json.dumps(dict(tokenizer.special_tokens)))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    if plan is not None:
        writer.add_tensor("plan", np.frombuffer(plan.to_bytes(), dtype=np.int8))
    with progress(f"pack, down_proj_t {down}", len(model.layers)) as ticker:
        for name, values in source.vectors():
            writer.add_tensor(name, values)
        inputs = ("gate_proj", "up_proj") if model.layers[0].gated else ("up_proj",)
        for name, matrix in matrices.items():
            if not name.endswith(tuple(f".{part}.weight" for part in inputs)):
                _add_matrix(writer, name, matrix)
        outliers: list[int] = []
        for i in range(len(model.layers)):
            matrix, neurons, rows = source.down_proj_t(i, down)
            for part in inputs:
                name = f"layers.{i}.{part}.weight"
                _add_matrix(writer, name, matrices[name])
            _add_matrix(writer, f"layers.{i}.down_proj_t.weight", matrix)
            if rows is not None:
                _add_matrix(writer, f"layers.{i}.outliers.weight", rows)
            outliers += neurons.tolist()
            ticker.advance()
        writer.add_uint32("fallow.n_outliers", source.n_outliers(down))
        if outliers:
            _add(writer, "fallow.outliers", outliers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def _add_matrix(writer: Any, name: str, matrix: Matrix) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[matrix.type]
    writer.add_tensor(name, np.ascontiguousarray(matrix.data), raw_dtype=kind)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        from gguf import GGUFValueType

        writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    else:
        writer.add_string(key, value)


class _Reference:
    """The source's own logits on a text, computed once."""

    def __init__(self, model: Model, text: Text, context_length: int, skip: int = 0) -> None:
        """Of the text's windows the first CHECK_WINDOWS behind `skip`."""
        context = min(CHECK_CONTEXT, context_length)
        self.windows = model.windows(text, context, at_most=skip + CHECK_WINDOWS)[skip:]
        self.model = model
        with progress("self-check of the source", len(self.windows)) as ticker:
            self.hidden = []
            for window in self.windows:
                self.hidden.append(final_hidden(model, window))
                ticker.advance()

    def check(self, path: Path, n_threads: int) -> SelfCheck:
        # With the plan in the file: one that the engine cannot run is refused.
        engine = Engine(path, threads=n_threads, context=self.windows.shape[1])
        engine.use_plan(None)
        results = [
            compare_logits(
                window,
                logits_of(self.model, hidden),
                [engine.logits(window).__getitem__],
                self.model.vocabulary_size,
            )
            for window, hidden in zip(self.windows, self.hidden, strict=True)
        ]
        losses = np.array([[dense.loss, packed[0].loss] for dense, packed in results])
        difference = float((losses[:, 1] - losses[:, 0]).mean())
        return SelfCheck(
            kl=float(np.mean([packed[0].kl.mean() for _, packed in results])),
            ppl_change_percent=100 * float(np.expm1(difference)),
            top1_agreement=float(np.mean([packed[0].top1 for _, packed in results])),
            tokens=int(self.windows.size),
        )
