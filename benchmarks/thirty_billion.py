"""Random weights in the shape of Qwen3-30B-A3B, 17 GB at 4 bits: a source GGUF, a packed model.

For speed alone: it says nothing. Weights are Gaussian, sizes those of Qwen3-30B-A3B; of the
vocabulary's 151936 tokens SmolLM2's have names. Both files hold blocks of the same types, not the
same values. Some experts are chosen more often than others, as in trained models: the embedding's
first column is a constant, which a router's row sees times a number that makes the expert liked or
not. Of successive tokens the experts are not more alike than that, which of real text they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import seven_billion
from seven_billion import SPREAD, RowPool

ROPE_BASE, CONTEXT = 1e6, 4096
# What the router sees of the constant, and how much experts differ in it.
CONSTANT, LIKING = 12.0, 0.03
MIXED = 0.004  # spread of o_proj's weights: more, and all tokens become alike in a few layers


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    hidden: int
    d_ff: int  # of an expert
    experts: int
    used: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim


WHOLE = Shape("qwen3-30b-a3b-shape", 48, 2048, 768, 128, 8, 32, 4, 128, 151936)
SMALL = Shape("small-experts-shape", 6, 512, 256, 32, 4, 8, 2, 64, 49152)  # to try things with
Tensor = tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]
"""Name, type, shape, and what makes the data."""


class Weights:
    """Random tensors of a shape, made when they are written."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.pool = shape, RowPool()
        self._random = np.random.default_rng(2)

    def quantised(self, name: str, kind: str, *dims: int, spread: float = SPREAD) -> Tensor:
        rows, width = int(np.prod(dims[:-1])), dims[-1]
        return name, kind, dims, lambda: self.pool.matrix(kind, rows, width, spread)

    def floats(self, name: str, *dims: int) -> Tensor:
        return name, "F32", dims, lambda: np.ones(dims, dtype=np.float32)

    def embedding(self, name: str) -> Tensor:
        from fallow.packing.quantize import quantize

        s = self.shape

        def make() -> np.ndarray:
            values = self._random.standard_normal((4096, s.hidden), dtype=np.float32)
            values[:, 0] = CONSTANT
            return quantize(values, "Q4_K").data[self._random.integers(0, 4096, s.vocabulary)]

        return name, "Q4_K", (s.vocabulary, s.hidden), make

    def router(self, name: str) -> Tensor:
        s = self.shape

        def make() -> np.ndarray:
            values = self._random.standard_normal((s.experts, s.hidden), dtype=np.float32) * SPREAD
            values[:, 0] = self._random.standard_normal(s.experts) * LIKING
            return values

        return name, "F32", (s.experts, s.hidden), make


def source_tensors(weights: Weights) -> Iterator[Tensor]:
    """As llama.cpp has them."""
    s = weights.shape
    yield weights.embedding("token_embd.weight")
    yield weights.quantised("output.weight", "Q6_K", s.vocabulary, s.hidden)
    yield weights.floats("output_norm.weight", s.hidden)
    for i in range(s.layers):
        here = f"blk.{i}"
        for name, width in {"attn": s.hidden, "ffn": s.hidden}.items():
            yield weights.floats(f"{here}.{name}_norm.weight", width)
        for name in ("q", "k"):
            yield weights.floats(f"{here}.attn_{name}_norm.weight", s.head_dim)
        for name, rows in {"q": s.q, "k": s.kv, "v": s.kv}.items():
            yield weights.quantised(f"{here}.attn_{name}.weight", "Q4_K", rows, s.hidden)
        yield weights.quantised(f"{here}.attn_output.weight", "Q4_K", s.hidden, s.q, spread=MIXED)
        yield weights.router(f"{here}.ffn_gate_inp.weight")
        for name in ("gate", "up"):
            tensor = f"{here}.ffn_{name}_exps.weight"
            yield weights.quantised(tensor, "Q4_K", s.experts, s.d_ff, s.hidden)
        yield weights.quantised(f"{here}.ffn_down_exps.weight", "Q4_K", s.experts, s.hidden, s.d_ff)


def packed_tensors(weights: Weights) -> Iterator[Tensor]:
    """As docs/packed.md has them."""
    s = weights.shape
    angles = ROPE_BASE ** (-np.arange(0, s.head_dim, 2) / s.head_dim)
    yield "rope.0.inv_freq", "F32", angles.shape, lambda: angles.astype(np.float32)
    yield weights.floats("rope.0.scale", 1)
    yield weights.floats("norm.weight", s.hidden)
    yield weights.embedding("embed_tokens.weight")
    yield weights.quantised("lm_head.weight", "Q6_K", s.vocabulary, s.hidden)
    for i in range(s.layers):
        here = f"layers.{i}"
        for name in ("attn_norm", "ffn_norm"):
            yield weights.floats(f"{here}.{name}.weight", s.hidden)
        for name in ("q_norm", "k_norm"):
            yield weights.floats(f"{here}.{name}.weight", s.head_dim)
        for name, rows in {"q": s.q, "k": s.kv, "v": s.kv}.items():
            yield weights.quantised(f"{here}.{name}_proj.weight", "Q4_K", rows, s.hidden)
        yield weights.quantised(f"{here}.o_proj.weight", "Q4_K", s.hidden, s.q, spread=MIXED)
        yield weights.router(f"{here}.router.weight")
        for e in range(s.experts):
            for name in ("gate_proj", "up_proj", "down_proj_t"):
                tensor = f"{here}.experts.{e}.{name}.weight"
                yield weights.quantised(tensor, "Q4_K", s.d_ff, s.hidden)


def make(shape: Shape, path: Path, kind: str) -> None:
    """Writes one of the two, "packed" or "source", tensor by tensor."""
    import gguf

    import fallow
    from fallow.checkpoints.catalog import ALIASES, resolve
    from fallow.checkpoints.weights import read_gguf
    from fallow.common.files import atomic_path

    weights = Weights(shape)
    with atomic_path(path) as temporary:
        if kind == "source":
            writer = gguf.GGUFWriter(temporary, "qwen3moe")
            _source_keys(writer, shape, read_gguf(resolve(ALIASES["smollm2"])))
            tensors = source_tensors(weights)
        else:
            small = path.with_name("small.gguf")
            fallow.pack("smollm2", small)
            writer = gguf.GGUFWriter(temporary, "fallow")
            writer.add_custom_alignment(4096)
            header = read_gguf(small)
            seven_billion.add_header(writer, header, metadata(shape, header))
            small.unlink()
            tensors = packed_tensors(weights)
        _write(writer, list(tensors))


def _write(writer: Any, tensors: list[Tensor]) -> None:
    import gguf

    from fallow.common.progress import progress

    for name, kind, dims, _ in tensors:
        raw = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[raw]
        n_bytes = int(np.prod(dims)) // block * size
        writer.add_tensor_info(name, dims, np.dtype(np.float32), n_bytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress("write", len(tensors)) as ticker:
        for _, _, _, make_data in tensors:
            writer.write_tensor_data(make_data())
            ticker.advance()
    writer.close()


def _source_keys(writer: Any, s: Shape, small: Any) -> None:
    writer.add_block_count(s.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(s.d_ff)
    writer.add_expert_feed_forward_length(s.d_ff)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.used)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(1e-6)
    seven_billion.add_tokenizer(writer, small, s.vocabulary)


def metadata(s: Shape, small: Any) -> dict[str, Any]:
    """The packed header, less the tokenizer; what does not depend on the shape as in `small`."""
    return seven_billion._metadata(small) | {
        "model": s.name,
        "model_type": "qwen3_moe",
        "hidden_size": s.hidden,
        "intermediate_size": s.d_ff,
        "n_layers": s.layers,
        "n_heads": s.heads,
        "n_kv_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocabulary,
        "rotary_dim": s.head_dim,
        "attention_scale": s.head_dim**-0.5,
        "norm_eps": 1e-6,
        "sliding_window": [0] * s.layers,
        "rope": [0] * s.layers,
        "n_experts": s.experts,
        "n_experts_used": s.used,
        "norm_experts": True,
        "shared_intermediate_size": 0,
    }
