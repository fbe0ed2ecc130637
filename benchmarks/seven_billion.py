"""Random weights in the shape of Mistral-7B, some 4 GB at 4 bits: a source GGUF and a packed model.

For speed alone: it says nothing. Weights are Gaussian, sizes those of Mistral-7B-v0.1 but for the
vocabulary and tokenizer, which are SmolLM2's; both files hold blocks of the same types, not the
same values. The packed plan has as many inactive neurons, and wants as many exact rows of the head,
as Qwen2.5-Coder's plan at +1 % PPL does; on random weights they are others for every token, which
no cache can foresee.
"""

from pathlib import Path
from typing import Any

import numpy as np

NAME, FINGERPRINT = "mistral-7b-shape", "random"
LAYERS, HIDDEN, D_FF, HEADS, KV_HEADS, CONTEXT = 32, 4096, 14336, 32, 8, 4096
HEAD_DIM = HIDDEN // HEADS
KV = HEAD_DIM * KV_HEADS
ROPE_BASE = 10000.0
SPREAD = 0.02  # of weights
IDLE_GATE, IDLE = 0.05, 0.45  # neurons left out after gate_proj, and after up_proj
EXACT_ROWS = 0.009  # of the head
UNUSED = 5  # the type of such tokens in GGUF
POOL = 4096  # different rows of a matrix; others are copies


class RowPool:
    """Rows of quantised Gaussian weights."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)
        self._rows: dict[tuple[str, int, float], Any] = {}

    def rows(self, kind: str, width: int, spread: float = SPREAD) -> Any:
        """All there are, POOL of them."""
        from fallow.packing.quantize import quantize

        if (kind, width, spread) not in self._rows:
            values = spread * self._random.standard_normal((POOL, width), dtype=np.float32)
            self._rows[kind, width, spread] = quantize(values, kind)
        return self._rows[kind, width, spread]

    def choose(self, rows: int) -> np.ndarray:
        return self._random.integers(0, POOL, rows)

    def matrix(self, kind: str, rows: int, width: int, spread: float = SPREAD) -> np.ndarray:
        return self.rows(kind, width, spread).data[self.choose(rows)]


def make(packed: Path, source: Path | None = None) -> None:
    """Writes the packed model, and the source too if it is given a name."""
    import fallow
    from fallow.checkpoints.catalog import ALIASES, resolve
    from fallow.checkpoints.weights import read_gguf

    small = packed.with_name("small.gguf")
    fallow.pack("smollm2", small)
    pool = RowPool()
    if source is not None:
        _write_source(source, read_gguf(resolve(ALIASES["smollm2"])), pool)
    _write_packed(packed, read_gguf(small), pool)
    small.unlink()


def _write_source(path: Path, small: Any, pool: RowPool) -> None:
    import gguf

    vocabulary = len(small.get("tokenizer.ggml.tokens"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(D_FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, small, vocabulary)

    def add(name: str, kind: str, rows: int, width: int) -> None:
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", pool.matrix(kind, rows, width), raw_dtype=raw)

    ones = np.ones(HIDDEN, dtype=np.float32)
    add("token_embd", "Q4_K", vocabulary, HIDDEN)
    add("output", "Q6_K", vocabulary, HIDDEN)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(LAYERS):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
        for name, rows in {"q": HIDDEN, "k": KV, "v": KV, "output": HIDDEN}.items():
            add(f"blk.{i}.attn_{name}", "Q4_K", rows, HIDDEN)
        add(f"blk.{i}.ffn_gate", "Q4_K", D_FF, HIDDEN)
        add(f"blk.{i}.ffn_up", "Q4_K", D_FF, HIDDEN)
        add(f"blk.{i}.ffn_down", "Q4_K", HIDDEN, D_FF)
    _finish(writer)


def _write_packed(path: Path, small: Any, pool: RowPool) -> None:
    import gguf

    from fallow.packing.coarse_head import coarse_head
    from fallow.packing.quantize import dequantize

    vocabulary = small.get("fallow.vocab_size")
    writer = gguf.GGUFWriter(path, "fallow")
    writer.add_custom_alignment(4096)
    add_header(writer, small, _metadata(small))
    ones = np.ones(HIDDEN, dtype=np.float32)

    def add(name: str, kind: str, data: np.ndarray) -> None:
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    chosen = pool.choose(vocabulary)
    head = pool.rows("Q6_K", HIDDEN)
    coarse, _ = coarse_head(
        dequantize(head), np.eye(HIDDEN, dtype=np.float32), np.zeros(HIDDEN, dtype=np.float32)
    )
    writer.add_tensor("plan", np.frombuffer(_plan().to_bytes(), dtype=np.int8))
    writer.add_tensor("norm.weight", ones)
    angles = ROPE_BASE ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    writer.add_tensor("rope.0.inv_freq", angles.astype(np.float32))
    writer.add_tensor("rope.0.scale", np.ones(1, dtype=np.float32))
    add("embed_tokens.weight", "Q4_K", pool.matrix("Q4_K", vocabulary, HIDDEN))
    add("lm_head.weight", "Q6_K", head.data[chosen])
    add("lm_head_coarse.codes", "I8", coarse[chosen])
    for i in range(LAYERS):
        here = f"layers.{i}"
        writer.add_tensor(f"{here}.attn_norm.weight", ones)
        writer.add_tensor(f"{here}.ffn_norm.weight", ones)
        writer.add_tensor(f"{here}.down_norm", np.ones(D_FF, dtype=np.float32))
        for name, rows in {"q": HIDDEN, "k": KV, "v": KV, "o": HIDDEN}.items():
            add(f"{here}.{name}_proj.weight", "Q4_K", pool.matrix("Q4_K", rows, HIDDEN))
        for name in ("gate_proj", "up_proj", "down_proj_t"):
            add(f"{here}.{name}.weight", "Q4_K", pool.matrix("Q4_K", D_FF, HIDDEN))
    _finish(writer)


def add_tokenizer(writer: Any, small: Any, vocabulary: int) -> None:
    """SmolLM2's tokenizer to a source GGUF, cut to a vocabulary or filled up with unused tokens."""
    tokens = list(small.get("tokenizer.ggml.tokens"))[:vocabulary]
    types = list(small.get("tokenizer.ggml.token_type"))[:vocabulary]
    known, more = set(tokens), vocabulary - len(tokens)
    merges = [m for m in small.get("tokenizer.ggml.merges") if m.replace(" ", "") in known]
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *(f"<unused {i}>" for i in range(more))])
    writer.add_token_types([*types, *[UNUSED] * more])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def add_header(writer: Any, small: Any, metadata: dict[str, Any]) -> None:
    """The header of a packed model, with the tokenizer of `small`."""
    from fallow.packing.writer import _add

    for key, value in metadata.items():
        _add(writer, f"fallow.{key}", value)
    writer.add_string("tokenizer.huggingface.json", small.get("tokenizer.huggingface.json"))
    _add(writer, "fallow.eos_token_ids", [2])


def _metadata(small: Any) -> dict[str, Any]:
    """The packed header, less the tokenizer; what does not depend on the shape as in `small`."""
    from fallow.engine.packed import PACKED_VERSION

    metadata = {
        "version": PACKED_VERSION,
        "model": NAME,
        "fingerprint": FINGERPRINT,
        "hidden_size": HIDDEN,
        "intermediate_size": D_FF,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "context_length": CONTEXT,
        "rotary_dim": HEAD_DIM,
        "attention_scale": HEAD_DIM**-0.5,
        "sliding_window": [0] * LAYERS,
        "rope": [0] * LAYERS,
        "n_outliers": 0,
    }
    for key in ("model_type", "vocab_size", "embedding_scale", "norm_eps"):
        metadata[key] = small.get(f"fallow.{key}")
    for key in ("layer_norm", "gated", "parallel", "activation", "fused"):
        metadata[key] = small.get(f"fallow.{key}")
    return metadata


def _plan() -> Any:
    """Thresholds by quantiles of what Gaussian weights make of a normed input, N(0, 1) each."""
    from fallow.plan import Cut, Plan

    random = np.random.default_rng(1)
    gate, up = SPREAD * HIDDEN**0.5 * random.standard_normal((2, 1_000_000))
    act = gate / (1 + np.exp(-gate))
    logits = np.sort(SPREAD * HIDDEN**0.5 * random.standard_normal((100, POOL)), axis=1)
    margin = logits[:, -1] - logits[:, -int(EXACT_ROWS * POOL)]
    thresholds = {"gate_act": np.quantile(np.abs(act), IDLE_GATE)}
    thresholds["inter"] = np.quantile(np.abs(act * up), IDLE)
    return Plan(
        model=NAME,
        fingerprint=FINGERPRINT,
        rule="two_stage",
        knob=0.0,
        knob_name="",
        cuts=tuple(
            Cut(tap, "threshold", np.full(LAYERS, value), "column_norm" if tap == "inter" else None)
            for tap, value in thresholds.items()
        ),
        head_margin=float(margin.mean()),
    )


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
