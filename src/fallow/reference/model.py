"""A model as fallow sees it: transformers' implementation, its layers, its tokenizer."""

import ctypes
import math
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from fallow.checkpoints.catalog import find_model
from fallow.checkpoints.text import Text, cut_windows
from fallow.checkpoints.tokenizer import (
    TextTokenizer,
    note_endless,
    tokenizer_from_folder,
    tokenizer_from_gguf,
)
from fallow.checkpoints.weights import (
    GgufFile,
    StoredTensor,
    fingerprint,
    read_gguf,
    read_safetensors,
)
from fallow.common.errors import FallowError, UsageError, in_one_line
from fallow.common.files import read_json
from fallow.common.progress import note
from fallow.engine.answer import AnswerText
from fallow.engine.grammar import Grammars
from fallow.engine.sampling import Sampler, TokenChoice
from fallow.models import (
    ROPE_TENSORS,
    TEXT_NAMES,
    Architecture,
    activate,
    by_gguf_name,
    by_model_type,
    check_config,
    check_gguf_keys,
    check_gguf_type,
    check_logits,
    check_names,
    check_wrapper,
    devices,
    text_config,
    text_name,
    told,
)
from fallow.models.cuts import cut_taps
from fallow.models.devices import as_floats, enough_memory
from fallow.models.taps import Layer, Tap, attach
from fallow.plan import Plan
from fallow.selectors import Selector

# Products of float32 that stay float32: 512 x 512 of N(0, 1) differ by less than this between
# libraries, while bfloat16 inputs would differ by 1e-1.
FLOAT32_ERROR = 1e-3


def use_fastest_float32() -> None:
    """Lets torch use oneDNN for float32 products where that is as exact as the default.

    The default is MKL, which runs at half speed on AMD. oneDNN is reached by allowing bfloat16
    inside float32 products; on processors without a matrix unit it computes in float32 all the
    same (measured on EPYC 9005: KL to MKL's result 1e-9 nats), elsewhere the check here fails.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:  # an older torch
        return
    matmul.fp32_precision = "bf16"
    if _largest_error() > FLOAT32_ERROR:
        matmul.fp32_precision = "ieee"


@cache
def _largest_error() -> float:
    """Of a product in float32; asked once, as it takes as long as a small model's loading."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float((nn.functional.linear(a, b.T) - exact).abs().max())


@contextmanager
def in_bfloat16(device: torch.device) -> Iterator[None]:
    """Products in bfloat16 where the device has them: for statistics, not for figures.

    Qwen2.5-Coder-1.5B reads 122 tokens/s so and 68 in float32 (Zen 4, two threads). Logits are
    float32 all the same.
    """
    enabled = devices.has_bfloat16(device.type)
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        yield


def keep_freed_memory() -> None:
    """Lets glibc reuse large freed blocks instead of returning them to the kernel.

    Every evaluation step frees and takes tensors of 6 to 256 MB; faulting their pages in again
    took two thirds of the time (measured on SmolLM2: 3.6 against 1.0 s to compare four plans).
    """
    trim_threshold, mmap_threshold, limit = -1, -3, 1 << 30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library; slower, nothing else
    mallopt(mmap_threshold, limit)
    mallopt(trim_threshold, 2 * limit - 1)


def quieten_transformers() -> None:
    """What transformers would warn about is checked and reported by fallow itself."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# "auto" is float32 up to this many weights (4 GB), bfloat16 beyond.
AUTO_FLOAT32_WEIGHTS = 1_000_000_000


@dataclass(repr=False)
class Model:
    """A loaded model. `module` is transformers' own; nothing in it is patched or copied."""

    name: str
    module: Any = field(repr=False)  # transformers' model; its attributes are not typed
    tokenizer: TextTokenizer = field(repr=False)
    architecture: Architecture = field(repr=False)
    fingerprint: str
    layers: list[Layer] = field(init=False, repr=False)
    logit_scale: float = field(init=False, repr=False)  # logits are head(hidden) times this
    logit_softcap: float = field(init=False, repr=False)  # c: and then c tanh(logit / c); 0: none
    changed: set[str] = field(default_factory=set, repr=False)  # parameters, by an adapter

    def __repr__(self) -> str:
        layer = self.layers[0]
        mixture = "" if layer.experts is None else f" in each of {layer.experts.count} experts"
        return (
            f"<Model {self.name}: {self.architecture.model_type}, {len(self.layers)} layers of "
            f"{in_words(self.intermediate_sizes)} neurons{mixture}, {self.dtype_name} on "
            f"{self.device.type}>"
        )

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)
        self.layers = self.architecture.find_layers(self.module)
        self.refresh_head()
        config = self.module.config
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1)  # Cohere's
        self.logit_scale /= float(getattr(config, "logits_scaling", None) or 1)
        self.logit_softcap = float(getattr(config, "final_logit_softcapping", None) or 0)

    def to(self, device: str) -> Self:
        """Brings the model to a device, "cpu" or "cuda", and returns it.

        Raises:
            FallowError: the device's memory is too small.
        """
        with enough_memory():
            self.module.to(device)
            self.layers = self.architecture.find_layers(self.module)  # norms are kept in them
            self.refresh_head()
        return self

    def refresh_head(self) -> None:
        """To be called when the head's weights have changed."""
        # float32: logits rounded to bfloat16 would add 1e-3 nats of noise to KL.
        head = self.module.get_output_embeddings()
        self._head_weight = head.weight.detach().float()
        self._head_bias = None if head.bias is None else head.bias.detach().float()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self._head_weight.device

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def intermediate_sizes(self) -> list[int]:
        """Neurons of each layer; of a mixture those of one expert."""
        return [layer.d_ff for layer in self.layers]

    @property
    def vocabulary_size(self) -> int:
        return self._head_weight.shape[0]

    def windows(
        self, text: Text, context: int, limit: int | None = None, at_most: int | None = None
    ) -> np.ndarray:
        """The text as windows of token ids, (n, context): see `cut_windows`.

        Raises:
            FallowError: the text is shorter than one window, or has fewer than are asked for.
            UsageError: the context is longer than the model's, or no window is asked for.
        """
        longest = self.module.config.max_position_embeddings
        if context > longest:
            raise UsageError(
                f"--context {context} is longer than the {longest} tokens the model was made for; "
                "give a smaller one"
            )
        return cut_windows(text, self.tokenizer, context, limit, at_most)

    def hidden(self, ids: np.ndarray) -> torch.Tensor:
        """Final hidden states of token ids (B, T): (B, T, d_model), after the last norm.

        Raises:
            FallowError: the device's memory is too small.
        """
        with torch.inference_mode(), enough_memory():
            given = devices.tensor(np.ascontiguousarray(ids), self.device)
            return self.module.base_model(input_ids=given, use_cache=False).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary), float32, of final hidden states (..., d_model)."""
        with torch.inference_mode(), torch.autocast(hidden.device.type, enabled=False):
            products = nn.functional.linear(hidden.float(), self._head_weight, self._head_bias)
            return self.logits_of_products(products)

    def logits_of_products(self, products: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary) of what the head's weights make of hidden states."""
        if self.logit_scale != 1:
            products = products * self.logit_scale
        if self.logit_softcap:
            products = self.logit_softcap * torch.tanh(products / self.logit_softcap)
        return products

    def taps(self, choice: Plan | Selector | None) -> dict[str, Tap]:
        """The taps that set what a plan or a selector leaves out to zero; None: nothing.

        Raises:
            FallowError: the plan is for another model, or does not fit it.
        """
        if choice is None:
            return {}
        if isinstance(choice, Selector):
            return choice.taps(self.layers)
        choice.check_model(self.fingerprint, self.name)
        return cut_taps(choice.cuts, self.layers, self.name)

    @contextmanager
    def sparse(self, choice: Plan | Selector | None) -> Iterator[None]:
        """Runs the model with what is left out set to zero inside the block; None: dense."""
        with attach(self.layers, self.taps(choice)):
            yield

    def generate(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        chat: bool = False,
        *,
        parse_special: bool = True,
        repeat_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        json_schema: Mapping[str, Any] | None = None,
        plan: Plan | None = None,
    ) -> Iterator[str]:
        """As `Engine.generate`, here under `plan`: the same options, and the same sampler.

        A reference: nothing is skipped, masked values are computed and set to zero.

        Raises:
            FallowError: the prompt is empty or longer than the model's context, logits are NaN or
                infinite, or the schema is not taken.
            UsageError: an option out of range.
        """
        width = self.module.config.get_text_config().vocab_size
        sampler = Sampler(
            temperature, top_p, top_k, min_p, seed, repeat_penalty, presence_penalty,
            frequency_penalty, logit_bias or {},
            None if json_schema is None else Grammars(self.tokenizer, width).of_schema(json_schema),
        )  # fmt: skip
        if isinstance(prompt, str):
            prompt = self.tokenizer.prompt(prompt, chat, parse_special)
        ids = np.asarray(prompt)
        limit = self.module.config.max_position_embeddings
        if len(ids) == 0:
            raise FallowError("the prompt is empty; give some text")
        if len(ids) + max_tokens > limit:
            raise FallowError(
                f"prompt of {len(ids)} tokens and {max_tokens} new ones exceed the model's "
                f"context of {limit}; shorten the prompt"
            )
        if max_tokens < 1:
            raise UsageError("--max-new-tokens must be at least 1")
        sampler.begin(ids, width)
        text = AnswerText(self.tokenizer, tuple(stop), ids)
        return self._continue(ids, max_tokens, sampler, text, self.taps(plan))

    def _continue(
        self,
        ids: np.ndarray,
        max_tokens: int,
        sampler: Sampler,
        text: AnswerText,
        taps: dict[str, Tap],
    ) -> Iterator[str]:
        given = devices.tensor(ids, self.device)[None]
        held: dict[str, Any] = {}
        for n in range(1, max_tokens + 1):
            # What is attached is so for a step only: between pieces the caller may use the model.
            with torch.inference_mode(), attach(self.layers, taps), enough_memory():
                read = self.module.base_model(input_ids=given, use_cache=True, **held)
                logits = self.logits(read.last_hidden_state[0, -1])
            name = "cache" if "cache" in read else "past_key_values"  # of older transformers
            held = {name: read[name]}
            token = sampler.pick(as_floats(logits))
            ends = token in self.tokenizer.eos_ids
            piece = text.rest() if ends else text.add(TokenChoice(token), n == max_tokens)
            if piece.text:
                yield piece.text
            if ends or text.stopped:
                return
            given = devices.tensor(np.array([[token]]), self.device)


def in_words(sizes: Iterable[int]) -> str:
    """Sizes of layers: "6144", or "6144 or 12288" where they differ."""
    return " or ".join(map(str, sorted({*sizes})))


def load(model: str | Path | Model, dtype: str = "auto", device: str = "cpu") -> Model:
    """Loads a model: an alias, a Hugging Face folder, a .gguf file, or a hub id (org/name).

    `dtype` is float32, bfloat16, float16, or auto: float32 up to 1e9 weights, bfloat16 beyond, on
    every `device`: cpu, cuda, or auto, a GPU if there is one. A loaded model is returned as it is.

    Raises:
        FallowError: not found, not installed, truncated, of an unknown architecture, or too large
            for the device's memory.
        UsageError: unknown dtype or device, or a GPU that is not there.
    """
    if isinstance(model, Model):
        return model
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    device = devices.device_named(device)
    path = find_model(str(model))
    name = str(model)
    use_fastest_float32()
    keep_freed_memory()
    quieten_transformers()
    found = _load_folder(name, path, dtype) if path.is_dir() else _load_gguf(name, path, dtype)
    note_endless(found.tokenizer, name)
    return found if device == "cpu" else found.to(device)


def _torch_dtype(dtype: str, n_weights: int) -> torch.dtype:
    if dtype == "auto":
        dtype = "float32" if n_weights <= AUTO_FLOAT32_WEIGHTS else "bfloat16"
    return DTYPES[dtype]


def _load_gguf(name: str, path: Path, dtype: str) -> Model:
    file, where = read_gguf(path), f"GGUF {path}"
    if "fallow.version" in file.metadata:
        raise FallowError(
            f"{path} is packed already; give the model that it was packed from, "
            f"{file.get('fallow.model')}"
        )
    check_gguf_type(file)
    has_experts = bool(file.metadata.get(f"{file.architecture}.expert_count"))  # not asked for yet
    architecture = by_gguf_name(file.architecture, where, has_experts)
    assert architecture.gguf_config is not None
    with _refusing(f"{where}: transformers cannot build {architecture.hf_class}"):
        try:
            found = architecture.gguf_config(file)
            # Some are of each layer, for which transformers takes lists.
            config = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}
            check_gguf_keys(file)
            check_config(architecture, config, where)
            _check_size(architecture, config, file.tensors.values(), where)
            module = _empty_module(architecture, config)
            _fill(module, architecture, file, _torch_dtype(dtype, n_weights(file.tensors.values())))
        finally:  # a file that changed meanwhile says why names are missing
            file.check_unchanged()
    return Model(name, module, tokenizer_from_gguf(file), architecture, fingerprint(file.tensors))


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Makes one line that begins so of whatever transformers raises of a config or weights."""
    try:
        yield
    except (FallowError, ModuleNotFoundError):
        raise
    except Exception as error:
        raise FallowError(f"{what}: {in_one_line(error)}") from error


def n_weights(tensors: Collection[StoredTensor]) -> int:
    """Of MXFP4 a folder has bytes of two weights each."""
    pairs = [t for t in tensors if t.type == "U8" and t.name.endswith("_blocks")]
    return sum(math.prod(tensor.shape) for tensor in (*tensors, *pairs))


def _check_size(
    architecture: Architecture,
    config: dict[str, Any],
    tensors: Collection[StoredTensor],
    where: str,
) -> None:
    """Refuses a config of a far larger model than the weights are, before it takes any memory.

    Raises:
        FallowError: more layers than tensors, or more than twice as many weights.
    """
    import transformers

    n_layers, stored = config.get("num_hidden_layers"), n_weights(tensors)
    if isinstance(n_layers, int) and n_layers > len(tensors):
        raise FallowError(f"{where} describes {n_layers} layers, but has {len(tensors)} tensors")
    hf_class = getattr(transformers, architecture.hf_class)
    with torch.device("meta"):
        module = hf_class(hf_class.config_class(**config | told(architecture, config)))
    described = sum(parameter.numel() for parameter in module.parameters())
    if described > 2 * stored:
        raise FallowError(f"{where} describes {described} weights, but has {stored}")


def _empty_module(architecture: Architecture, config: dict[str, Any]) -> Any:
    """The model without weights: parameters on the meta device, buffers computed."""
    import transformers
    from accelerate import init_empty_weights

    hf_class = getattr(transformers, architecture.hf_class)
    with init_empty_weights(include_buffers=False):
        return hf_class(hf_class.config_class(**config | told(architecture, config)))


def _fill(module: Any, architecture: Architecture, file: GgufFile, dtype: torch.dtype) -> None:
    expected = {name: p.detach() for name, p in module.named_parameters()}  # without values
    needed = {*expected} - {"lm_head.weight"}
    stored = module.state_dict()
    expected |= {name: b for name, b in module.named_buffers() if name in stored}  # Gemma 4's
    state: dict[str, torch.Tensor] = {}
    halves: set[tuple[str, int]] = set()
    for tensor in file.tensors.values():
        if tensor.name in ROPE_TENSORS:  # in the config
            continue
        hf_name = architecture.hf_name(tensor.name)
        if hf_name is not None and _is_unused(module, hf_name):
            continue
        if hf_name is None:
            raise FallowError(
                f"GGUF {file.path} has a tensor {tensor.name} that {architecture.model_type} "
                "models do not have"
            )
        parts = architecture.from_gguf(hf_name, tensor.dequantize(), module.config)
        for part, array in parts.items():
            name, half = architecture.stacked(part)
            target: Any = expected.get(name, array)  # of unknown names below
            experts = architecture.experts if name != part and name in expected else None
            if experts is not None:
                target = experts.part(target, half)
            if target.shape != array.shape:
                raise FallowError(
                    f"GGUF {file.path}: tensor {tensor.name} gives {part} the shape "
                    f"{array.shape}, expected {tuple(target.shape)}"
                )
            values = torch.from_numpy(array)
            if experts is None:
                state[name] = values.to(dtype)
                continue
            if name not in state:
                state[name] = torch.full(expected[name].shape, torch.nan, dtype=dtype)
            experts.part(state[name], half).copy_(values)
            if half is not None:
                halves.add((name, half))
    for name, half in sorted(halves):
        if (name, 1 - half) not in halves:
            raise FallowError(f"GGUF {file.path} has only one of the two halves of {name}")
    unknown = sorted(set(state) - set(expected))
    missing = sorted(needed - set(state))
    if unknown or missing:
        raise FallowError(
            f"GGUF {file.path} does not fit {architecture.model_type}: "
            f"missing {missing[:3] or 'nothing'}, unexpected {unknown[:3] or 'nothing'}"
        )
    module.load_state_dict(state, assign=True, strict=False)
    module.tie_weights()


def _load_folder(name: str, folder: Path, dtype: str) -> Model:
    architecture, tensors = inspect_folder(folder)
    torch_dtype = _torch_dtype(dtype, n_weights(tensors.values()))
    module = pretrained(folder, architecture, torch_dtype)
    if architecture.by_names:
        check_names(architecture, module, str(folder / "config.json"))
    model = Model(name, module, _load_tokenizer(folder), architecture, fingerprint(tensors))
    if architecture.by_names:
        check_logits(model)
        note(
            f"{architecture.model_type} models are found by their modules' names: measured and "
            "calibrated; fallow's engine does not run them, llama.cpp does (fallow llama)"
        )
    return model


def inspect_folder(folder: Path) -> tuple[Architecture, dict[str, StoredTensor]]:
    """The architecture of a Hugging Face folder, and its tensors as they are stored.

    Raises:
        FallowError: config.json or weights are missing or damaged, or do not fit each other.
    """
    path = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise FallowError(
            f"{folder} has an adapter; give its model, and the adapter to pack --lora"
        )
    config = read_json(path, "download it again")
    text = text_config(config, str(path))
    if not isinstance(text.get("model_type"), str):
        raise FallowError(f"{path} is not a model's config; download it again")
    architecture = by_model_type(text["model_type"], str(path))
    tensors = text_tensors(folder)
    with _refusing(f"{path} is not usable"):
        check_wrapper(config, str(path))
        check_config(architecture, text, str(path))
        _check_size(architecture, text, tensors.values(), str(folder))
    return architecture, tensors


def text_tensors(folder: Path) -> dict[str, StoredTensor]:
    """A folder's tensors by the names that they have in its text model; others are left out.

    Raises:
        FallowError: config.json or weights are missing or damaged.
    """
    config = read_json(folder / "config.json", "download it again")
    has_more = text_config(config, str(folder)) is not config
    names = ((text_name(t.name) if has_more else t.name, t) for t in read_safetensors(folder))
    return {name: tensor for name, tensor in names if name is not None}


def pretrained(folder: Path, architecture: Architecture, dtype: torch.dtype | str) -> Any:
    """transformers' model of a folder that `inspect_folder` found in order.

    Raises:
        FallowError: transformers cannot load it, or a tensor is missing or of another shape.
    """
    import transformers

    whole = read_json(folder / "config.json", "download it again")
    config, hf_class = text_config(whole, str(folder)), getattr(transformers, architecture.hf_class)
    settings = told(architecture, config)
    if config is not whole:
        names = {f"^{re.escape(stored)}": own for stored, own in TEXT_NAMES.items()}
        settings = {"config": hf_class.config_class(**config | settings), "key_mapping": names}
    with _refusing(f"transformers cannot load {folder}"):
        module, info = hf_class.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            **settings,
        )
    _check_loading(folder, info)
    _check_use(folder, architecture, module)
    if config is not whole:
        _note_left_out(folder)
    activate(architecture, config, module)
    return module


def _check_use(folder: Path, architecture: Architecture, module: Any) -> None:
    """Refuses what transformers passes over: weights that are no floats, or that nobody asks for.

    Raises:
        FallowError: such a weight; buffers and what lies outside the decoder may be of any kind.
    """
    used = dict(module.named_parameters(remove_duplicate=False))
    prefix = f"{module.base_model_prefix}."  # may be left out in files
    left_out = 0
    for stored, tensor in text_tensors(folder).items():
        name = architecture.read_as(stored)
        name = name if name in used else prefix + name.removeprefix(prefix)
        is_float = tensor.type in ("F32", "F16", "BF16", "F64")
        if name in used and not is_float:
            raise FallowError(
                f"{folder}: tensor {tensor.name} has the type {tensor.type}; give a folder with "
                "weights in F32, F16 or BF16"
            )
        if architecture.left_out and f".{architecture.left_out}" in name:
            left_out += 1
            continue
        if _is_unused(module, name):
            continue
        is_weight = is_float and name.endswith((".weight", ".bias"))
        if name not in used and is_weight and name.startswith(f"{architecture.layers}."):
            raise FallowError(
                f"{folder} has a tensor {tensor.name} that {architecture.model_type} models of "
                "its config.json do not have"
            )
    if left_out:
        note(f"{left_out} tensors {architecture.left_out}* of {folder} are not needed")


def _is_unused(module: Any, name: str) -> bool:
    """Whether transformers' class passes over a tensor: keys of layers that take other layers'."""
    found = module.base_model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, name) for pattern in found)


def _note_left_out(folder: Path) -> None:
    names = [tensor.name for tensor in read_safetensors(folder)]
    others = [name.removeprefix("model.") for name in names if text_name(name) is None]
    parts = ", ".join(sorted({name.partition(".")[0] for name in others}))
    note(f"{folder} is read as its text model; {len(others)} tensors are left out: {parts}")


def _check_loading(folder: Path, info: dict[str, Any]) -> None:
    if info["mismatched_keys"]:
        key, found, expected = sorted(info["mismatched_keys"])[0]
        raise FallowError(
            f"{folder}: tensor {key} has the shape {tuple(found)}, expected {tuple(expected)}"
        )
    if info["missing_keys"]:
        raise FallowError(
            f"{folder} lacks the tensors {', '.join(sorted(info['missing_keys'])[:3])}"
        )


def _load_tokenizer(folder: Path) -> TextTokenizer:
    """The folder's own tokenizer.json; older folders without one are converted."""
    if (folder / "tokenizer.json").exists():
        return tokenizer_from_folder(folder)
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with tempfile.TemporaryDirectory() as scratch:
            converted.save_pretrained(scratch)
            return tokenizer_from_folder(Path(scratch), folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, FallowError) as error:
        raise FallowError(f"{folder} has no usable tokenizer; add its tokenizer.json") from error
