"""How one architecture is described: where its FFN is, and how GGUF names its parts."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from fallow.checkpoints.weights import GgufFile
from fallow.common.errors import FallowError
from fallow.models._rope import rope_parameters
from fallow.models.taps import Experts, Ffn, Layer

# GGUF names of the llama family's tensors, per block and outside the blocks, against the
# checkpoint's own. https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LLAMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
# Of queries and keys, in models that norm them: the engine's names, and GGUF's.
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
QK_NORMS_BLOCK = {f"attn_{name}": path for name, path in QK_NORMS.items()}
LLAMA_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")

# Of a mixture of experts: in GGUF their gate_proj and up_proj are apart, in transformers fused.
EXPERTS_BLOCK = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}

# torch's grouped products want rows of whole 16 bytes.
EXPERTS_SETTINGS = {"experts_implementation": "eager"}
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w[123])\.weight$")

Tensors = dict[str, np.ndarray]


def keep(name: str, values: np.ndarray, config: Any) -> Tensors:
    """The GGUF tensor is the checkpoint's own."""
    return {name: values}


@dataclass(frozen=True)
class ExpertPaths:
    """Where the parts of a mixture of experts are, as module paths in a decoder layer."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    shared: str | None = None
    shared_gate: str | None = None
    stored_as: dict[str, str] = field(default_factory=dict)  # parts of names that files have so


@dataclass(frozen=True)
class Architecture:
    """A decoder architecture of transformers that fallow can look into.

    Module paths are relative to a decoder layer. Exactly one of `gate_up_proj` (fused) and
    `up_proj` is set; `gate_proj` is None for a fused or a non-gated FFN.
    """

    model_type: str  # config.json's
    hf_class: str  # class in transformers
    act: str = "mlp.act_fn"
    gate_proj: str | None = "mlp.gate_proj"
    up_proj: str | None = "mlp.up_proj"
    gate_up_proj: str | None = None
    down_proj: str = "mlp.down_proj"
    experts: ExpertPaths | None = None  # in place of the FFN's paths above
    attention: tuple[str, ...] = LLAMA_ATTENTION  # the last one is the output projection
    layers: str = "model.layers"

    # What the engine needs besides: its names of the norms against paths in a layer, and the rest.
    norms: dict[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    norm_offset: float = 0.0  # added to the norms' weights
    final_norm: str = "model.norm"
    embed_tokens: str = "model.embed_tokens"
    embed_positions: str | None = None
    first_position: int = 0  # rows of embed_positions before that of position 0
    rotary: str | None = "model.rotary_emb"
    layer_norm: bool = False  # LayerNorm; otherwise RMSNorm
    parallel: bool = False  # attention and FFN read the same norm
    interleaves_qkv: bool = False  # of a fused projection: q, k and v of one head after another
    partial_rotary: bool = False  # honours partial_rotary_factor
    config_keys: tuple[str, ...] = ()  # what transformers' config takes besides its attributes
    soft_caps: bool = False  # of attention scores and logits, which other classes pass over
    settings: dict[str, Any] = field(default_factory=dict)  # for transformers' class
    # The same of what a config.json says by other names than transformers' class knows.
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    left_out: str | None = None  # tensors of a layer whose names begin so, which nothing needs
    stored_as: dict[str, str] = field(default_factory=dict)  # parameters that files name so
    check: Callable[[Any], str | None] = lambda config: None  # what of a config cannot be packed
    by_names: bool = False  # found by its modules' names, and only tried (_by_names.py)

    # GGUF: None if llama.cpp has no such architecture.
    gguf_name: str | None = None
    gguf_block: dict[str, str] = field(default_factory=dict)
    gguf_global: dict[str, str] = field(default_factory=lambda: LLAMA_GLOBAL)
    gguf_config: Callable[[GgufFile], dict[str, Any]] | None = None
    from_gguf: Callable[[str, np.ndarray, Any], Tensors] = keep

    def find_layers(self, module: nn.Module) -> list[Layer]:
        """The decoder layers of a loaded model."""
        return [self._layer(block) for block in module.get_submodule(self.layers).children()]

    def _layer(self, block: nn.Module) -> Layer:
        def get(path: str | None) -> Any:
            return None if path is None else block.get_submodule(path)

        names = [path.rsplit(".", 1)[-1] for path in self.attention]
        if names:
            names[-1] = "o_proj"  # Phi-2 calls it dense, OPT out_proj
        if len(names) == 2:
            names[0] = "qkv_proj"  # GPT-NeoX calls it query_key_value
        attention = {name: get(path) for name, path in zip(names, self.attention, strict=True)}
        if (paths := self.experts) is not None:
            found = _experts(get, paths)
            return Layer(block, attention, None, found)
        ffn = Ffn(
            act=get(self.act),
            down_proj=get(self.down_proj),
            gate_proj=get(self.gate_proj),
            up_proj=get(self.up_proj),
            gate_up_proj=get(self.gate_up_proj),
        )
        return Layer(block, attention, ffn)

    def stacked(self, name: str) -> tuple[str, int | None]:
        """The parameter that a tensor of a GGUF's is, and of a fused one which half.

        `model.layers.3.mlp.experts.up_proj.weight` -> (`model.layers.3.mlp.experts.gate_up_proj`,
        1); None: all of it.
        """
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        if self.experts is None or not stem.endswith(f".{self.experts.experts}"):
            return name, None
        if part == "down_proj":
            return f"{stem}.down_proj", None
        return f"{stem}.gate_up_proj", ("gate_proj", "up_proj").index(part)

    def read_as(self, name: str) -> str:
        """Of a folder's tensor the parameter that transformers makes of it, or a part of."""
        if self.experts is None:
            return name
        for own, stored in self.experts.stored_as.items():
            name = name.replace(stored, own)
        if found := _ONE_EXPERT.search(name):  # which are stacked
            part = "down_proj" if found[1] in ("down_proj", "w2") else "gate_up_proj"
            name = f"{name[: found.start()]}.experts.{part}"
        return name

    def hf_name(self, gguf_name: str) -> str | None:
        """`blk.3.ffn_gate.weight` -> `model.layers.3.mlp.gate_proj.weight`; None if unknown."""
        stem, _, kind = gguf_name.rpartition(".")
        if stem in self.gguf_global:
            return f"{self.gguf_global[stem]}.{kind}"
        prefix, _, rest = stem.partition(".")
        index, _, part = rest.partition(".")
        if prefix == "blk" and index.isdigit() and part in self.gguf_block:
            return f"{self.layers}.{index}.{self.gguf_block[part]}.{kind}"
        return None


def _experts(get: Callable[[str | None], Any], paths: ExpertPaths) -> Experts:
    try:
        experts = get(paths.experts)
    except AttributeError as error:
        raise FallowError(
            "some of the model's layers have no experts (mlp_only_layers, decoder_sparse_step), "
            "which is not supported; give a model that has them in every layer"
        ) from error
    return Experts(
        router=get(paths.router),
        gate_up_proj=experts.gate_up_proj,
        down_proj=experts.down_proj,
        shared=get(paths.shared),
        shared_gate=get(paths.shared_gate),
    )


def expert_config(file: GgufFile, count: str = "num_experts") -> dict[str, Any]:
    """What a mixture of experts adds to `llama_config`."""
    return {
        count: file.get("{arch}.expert_count"),
        "num_experts_per_tok": file.get("{arch}.expert_used_count"),
    }


def llama_config(
    file: GgufFile, partial_rotary: bool = False, layer_norm: str | None = None
) -> dict[str, Any]:
    """transformers' config of a llama-like model from GGUF metadata.

    `layer_norm`: what the config calls the epsilon of a model that has LayerNorm.
    """
    eps_name = layer_norm or "rms_norm_eps"
    eps_key = f"{{arch}}.attention.layer_norm_{'' if layer_norm else 'rms_'}epsilon"
    heads, dim = file.get("{arch}.attention.head_count"), head_dim(file)
    rotary_dim = file.get("{arch}.rope.dimension_count", dim)
    if rotary_dim != dim and not partial_rotary:
        raise FallowError(
            f"GGUF {file.path}: {file.architecture}.rope.dimension_count is {rotary_dim} of {dim}; "
            f"{file.architecture} models rotate whole heads"
        )
    return {
        "vocab_size": vocabulary_size(file),
        "hidden_size": file.get("{arch}.embedding_length"),
        "intermediate_size": file.get("{arch}.feed_forward_length"),
        "num_hidden_layers": file.get("{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("{arch}.attention.head_count_kv", heads),
        "head_dim": dim,
        eps_name: file.get(eps_key),
        "rope_parameters": rope_parameters(file, rotary_dim, dim),
        "max_position_embeddings": file.get("{arch}.context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id", None),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id", None),
    }


def vocabulary_size(file: GgufFile) -> int:
    """Rows of the embedding. Raises FallowError if there is none."""
    if "token_embd.weight" not in file.tensors:
        raise FallowError(
            f"GGUF {file.path} has no token_embd.weight; is it a whole language model?"
        )
    return file.tensors["token_embd.weight"].shape[0]


def head_dim(file: GgufFile) -> int:
    """Numbers of a head's query, key and value. Raises FallowError if values have another count."""
    hidden, heads = file.get("{arch}.embedding_length"), file.get("{arch}.attention.head_count")
    found: int = file.get("{arch}.attention.key_length", hidden // heads)
    if file.get("{arch}.attention.value_length", found) != found:
        raise FallowError(
            f"GGUF {file.path}: {file.architecture}.attention.value_length is not {found}, the "
            "length of keys; such models are not supported"
        )
    return found


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the reordering of q and k rows in GGUF files of the llama family.

    GGUF pairs neighbouring rows for RoPE, transformers row i with row i + head_dim / 2.
    """
    rows = values.shape[0]
    paired = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)


def unpermute_qk(name: str, values: np.ndarray, config: Any) -> Tensors:
    if ".q_proj." in name:
        values = unpermute(values, config.num_attention_heads)
    elif ".k_proj." in name:
        values = unpermute(values, config.num_key_value_heads)
    return {name: values}
