"""How one architecture is described: where its FFN is, and how GGUF names its parts."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
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
    # Parameters are (n_experts, in, out), with a row of gate_proj and one of up_proj in turn, and
    # there are biases.
    is_transposed: bool = False

    def part(self, whole: torch.Tensor, half: int | None) -> torch.Tensor:
        """A view of a stacked parameter: (n_experts, out, in), or of a bias (n_experts, out).

        `half`: of gate_up_proj, 0 for gate_proj and 1 for up_proj; None: all of it.
        """
        if self.is_transposed and whole.ndim == 3:
            whole = whole.transpose(1, 2)
        if half is None:
            return whole
        return whole[:, half::2] if self.is_transposed else whole.chunk(2, dim=1)[half]


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
    # Projections of the attention, of which some layers may lack some; the last one is the output
    # projection.
    attention: tuple[str, ...] = LLAMA_ATTENTION
    layers: str = "model.layers"

    # What the engine needs besides: its names of the norms against paths in a layer, and the rest.
    norms: dict[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    norm_offset: float = 0.0  # added to the norms' weights
    final_norm: str = "model.norm"
    embed_tokens: str = "model.embed_tokens"
    embed_positions: str | None = None
    first_position: int = 0  # rows of embed_positions before that of position 0
    rotary: str | None = "model.rotary_emb"
    sinks: str | None = None  # of each head a logit that its softmax divides by besides
    layer_norm: bool = False  # LayerNorm; otherwise RMSNorm
    parallel: bool = False  # attention and FFN read the same norm
    interleaves_qkv: bool = False  # of a fused projection: q, k and v of one head after another
    partial_rotary: bool = False  # honours partial_rotary_factor
    config_keys: tuple[str, ...] = ()  # what transformers' config takes besides its attributes
    # Whether its class computes what a config says so, which most other classes pass over.
    computes: Callable[[str, Any], bool] = lambda name, value: False
    settings: dict[str, Any] = field(default_factory=dict)  # for transformers' class
    # The same of what a config.json says by other names than transformers' class knows.
    translate: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    left_out: str | None = None  # tensors of a layer whose names begin so, which nothing needs
    stored_as: dict[str, str] = field(default_factory=dict)  # parameters that files name so
    check: Callable[[Any], str | None] = lambda config: None  # what of a config cannot be packed
    by_names: bool = False  # found by its modules' names, and only tried (_by_names.py)

    # GGUF: no name if llama.cpp has no such architecture, no config if its files are not read.
    gguf_name: str | None = None
    gguf_block: dict[str, str] = field(default_factory=dict)
    gguf_global: dict[str, str] = field(default_factory=lambda: LLAMA_GLOBAL)
    gguf_config: Callable[[GgufFile], dict[str, Any]] | None = None
    from_gguf: Callable[[str, np.ndarray, Any], Tensors] = keep

    def find_layers(self, module: nn.Module) -> list[Layer]:
        """The decoder layers of a loaded model. Raises FallowError if some have no experts."""
        blocks = list(module.get_submodule(self.layers).children())
        attention = [path for path in self.attention if all(has_part(b, path) for b in blocks)]
        return [self._layer(block, attention) for block in blocks]

    def _layer(self, block: nn.Module, attention_paths: Iterable[str]) -> Layer:
        def get(path: str | None) -> Any:
            return None if path is None else block.get_submodule(path)

        attention = {_tap_name(path): get(path) for path in attention_paths}
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
        1), and its bias -> (`model.layers.3.mlp.experts.gate_up_proj_bias`, 1); None: all of it.
        """
        path, _, kind = name.rpartition(".")
        stem, _, part = path.rpartition(".")
        if self.experts is None or not stem.endswith(f".{self.experts.experts}"):
            return name, None
        ending = "" if kind == "weight" else f"_{kind}"
        if part == "down_proj":
            return f"{stem}.down_proj{ending}", None
        return f"{stem}.gate_up_proj{ending}", ("gate_proj", "up_proj").index(part)

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


def has_part(block: nn.Module, path: str) -> bool:
    """Whether a decoder layer has a module there."""
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _tap_name(path: str) -> str:
    name = path.rsplit(".", 1)[-1]  # Phi-2's and OPT's o_proj have other names, GPT-NeoX's all
    return {"dense": "o_proj", "out_proj": "o_proj", "query_key_value": "qkv_proj"}.get(name, name)


def _experts(get: Callable[[str | None], Any], paths: ExpertPaths) -> Experts:
    try:
        experts = get(paths.experts)
    except AttributeError as error:
        raise FallowError(
            "some of the model's layers have no experts (mlp_only_layers, decoder_sparse_step), "
            "which is not supported; give a model that has them in every layer"
        ) from error
    places: dict[str, tuple[str, int | None]] = {
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
        "down_proj": ("down_proj", None),
    }

    def parts(ending: str) -> dict[str, torch.Tensor]:
        return {
            name: paths.part(getattr(experts, place + ending), half)
            for name, (place, half) in places.items()
        }

    return Experts(
        module=experts,
        router=get(paths.router),
        **parts(""),
        biases=parts("_bias") if paths.is_transposed else {},
        shared=get(paths.shared),
        shared_gate=get(paths.shared_gate),
    )


KINDS_OF_LAYERS = "full_attention", "sliding_attention"


def layer_types(pattern: Iterable[bool] | int, n_layers: int) -> list[str]:
    """A config's layer_types from a GGUF's sliding_window_pattern.

    Of each layer whether it has a window, or every how many layers one sees the whole context.
    """
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(n_layers)]
    return [KINDS_OF_LAYERS[bool(one)] for one in pattern]


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
    return rows_of(file, "token_embd.weight")


def rows_of(file: GgufFile, name: str) -> int:
    """Rows of a tensor. Raises FallowError if there is none."""
    if name not in file.tensors:
        raise FallowError(f"GGUF {file.path} has no {name}; is it a whole language model?")
    return file.tensors[name].shape[0]


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
