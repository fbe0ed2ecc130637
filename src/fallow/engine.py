"""Runs packed models with the compiled core: no torch, no transformers."""

import ctypes
import os
import resource
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fallow import _core
from fallow.catalog import ALIASES, is_hub_id
from fallow.drafting import PASS_COST, STREAMED_COST, Lookup
from fallow.errors import FallowError, UsageError, in_one_line
from fallow.files import parse_json
from fallow.memory import (
    EMBEDDING,
    EMBEDDING_ROWS,
    HEAD,
    RANGE,
    RESERVE,
    SLOTS,
    Residency,
    head_rows,
    parse_size,
    parts_of,
    residencies,
)
from fallow.plan import Plan
from fallow.text import Text, cut_windows
from fallow.tokenizer import (
    Ids,
    TextStream,
    TextTokenizer,
    note_endless,
    tokenizer_from_json,
    usable,
)
from fallow.weights import GgufFile, StoredTensor, read_gguf

PACKED_VERSION = 2
DEFAULT_CONTEXT = 4096
BUDGET_CONTEXT = 1024  # under a memory budget
MOST_THREADS = 1024  # as csrc/engine_bindings.cpp has it
PREFILL_STEP = 512  # tokens of a prompt between which an answer can be stopped
ECHO_STEP = 32  # as many, of a prompt whose every token's logits are wanted: 20 MB of Qwen2.5's

# How the core finds a cut's threshold: csrc/engine/cuts.h, Cut::By.
_THRESHOLD, _TOPK, _TAIL = 1, 2, 3
_RULES = (
    "cats", "cett", "fat", "gate_tail", "gate_topk", "percentile", "relu", "tail", "teal", "topk",
    "two_stage", "wina",
)  # fmt: skip
_Cut = tuple[int, int, int, float, np.ndarray | None]
# Rules that rank by the norm of a neuron's output.
_BY_OUTPUT_NORM = ("topk", "tail", "cett", "two_stage")
# The engine's projections that a fused one of the checkpoint stands for.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def is_packed(path: str | Path) -> bool:
    """Whether a file is a GGUF that `fallow pack` made; False for anything else."""
    path = Path(path)
    if not path.is_file() or path.suffix == ".plan":
        return False
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            return False
    return "fallow.version" in read_gguf(path).metadata


def thread_count(threads: int | None) -> int:
    """All processors where no number is given. Raises UsageError for one that is out of range."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"--threads {threads} is outside 1 to {MOST_THREADS}")
    return threads or os.cpu_count() or 1


def check_runs(plan: Plan) -> None:
    """Raises FallowError for a plan that the engine cannot run, whatever model it is for."""
    if plan.rule.partition(":")[0] not in _RULES:
        raise FallowError(
            f"the engine cannot run plans of {plan.rule!r}; it runs {', '.join(_RULES)}"
        )
    for name in plan.arrays:
        if name.startswith("threshold."):
            tap = name.removeprefix("threshold.")
            for part in _FUSED.get(tap, (tap,)):
                _tap(part)


def _tap(name: str) -> int:
    if name not in _core.TAPS:
        raise FallowError(f"this plan cuts {name!r}, which the engine cannot; calibrate again")
    return _core.TAPS.index(name)


def packed_windows(
    path: str | Path, text: Text, context: int, limit: int | None = None
) -> np.ndarray:
    """As `Engine.windows`, for a text that is cut before an engine takes the memory."""
    return cut_windows(text, _tokenizer(read_gguf(path)), context, limit)


@dataclass
class Stats:
    """One answer's figures. Prefill and decode are never merged."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, what the cache held already
    new_tokens: int = 0
    finish: str = ""  # "stop": an end token or a stop text; "length": max_tokens; "": broken off
    ttft_ms: float = 0.0  # from the call to the first token
    prefill_tps: float = 0.0  # tokens per second, of those that were read
    decode_tps: float = 0.0
    bytes_per_token: float = 0.0  # weights and cache read per decoded token
    gbps: float = 0.0  # those bytes per second, 1e9
    sparsity_per_layer: list[float] = field(default_factory=list)  # neurons idle while decoding
    peak_rss_mb: float = 0.0
    logits_hash: str = ""  # of the last token's logits
    # Under a memory budget: read from the disk per token, and what was waited for it; of the bytes
    # that a token needs the share that was in memory; of reads the share that was there in time.
    disk_bytes_per_token: float = 0.0
    stall_ms_per_token: float = 0.0
    hit_rate: float = 1.0
    read_ahead_rate: float = 1.0
    drafted: int = 0  # tokens guessed ahead, in the lossless mode or under a memory budget
    accepted: int = 0  # of these, what the model said too

    @property
    def sparsity(self) -> float:
        """Share of neurons idle while decoding, mean of layers."""
        return float(np.mean(self.sparsity_per_layer)) if self.sparsity_per_layer else 0.0

    def to_json(self) -> dict[str, Any]:
        """All figures; of decoding None where no token was decoded, as an answer's first is not."""
        unknown = () if self.sparsity_per_layer else ("decode_tps", "bytes_per_token", "gbps")
        return dict(vars(self)) | dict.fromkeys(unknown)


@dataclass(frozen=True)
class TokenChoice:
    """A token of an answer. Log-probabilities are the model's own, before any sampling option."""

    id: int
    logprob: float | None = 0.0  # nats; None: nothing is before it
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and theirs


@dataclass(frozen=True)
class Piece:
    """A part of an answer; no text: nothing yet. `tokens` are those that the text is made of."""

    text: str = ""
    tokens: tuple[TokenChoice, ...] = ()


class Engine:
    """A packed model, ready to run. See `generate`, `logits`, `score`.

    Args:
        path: a file that `fallow pack` wrote.
        plan: which neurons may be idle; default: the plan packed with the model, if any.
            `plan=False` ignores that one.
        threads: default: all processors.
        context: tokens that the cache holds; default: the model's own, at most 4096, or 1024 with
            `memory`.
        kernels: one of `_core.KERNELS`, "portable" say; default: the fastest that runs here.
        memory: bytes that the process may take, or a size such as "800MB": weights that do not fit
            are read from the file for every pass over the model. Default: the file is mapped.
        reserve: bytes of `memory` that are left to the caller, for logits of many tokens say.

    Raises:
        FallowError: no packed model, damaged, the plan is for another model, or `memory` is less
            than what works here.
        UsageError: threads, context, kernels or memory out of range.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Plan | bool | None = None,
        threads: int | None = None,
        *,
        context: int | None = None,
        kernels: str = "",
        memory: int | str | None = None,
        reserve: int = 0,
    ) -> None:
        self.path = Path(path)
        self.memory = parse_size(memory) if isinstance(memory, str) else memory
        _refuse_unpacked(self.path)
        self.file = read_gguf(self.path)
        self._check_version()
        self.name = str(self.file.get("fallow.model", self.path.name))
        self.fingerprint = str(self.file.get("fallow.fingerprint", ""))
        self.threads = thread_count(threads)
        longest = self._count("fallow.context_length")
        if context is not None and not 1 <= context <= longest:
            raise UsageError(
                f"--context {context} is outside 1 to {longest}, what this model was made for"
            )
        if kernels and kernels not in _core.KERNELS:
            raise UsageError(
                f"kernels {kernels!r} do not run here; known: {', '.join(_core.KERNELS)}"
            )
        first = plan if isinstance(plan, Plan) else None if plan is False else self._packed_plan()
        # Under a budget the coarse head is in memory only if this plan uses it.
        self._coarse_head = memory is None or (first is not None and self._shortlist(first)[0] > 0)
        self.residency: Residency | None = None
        self._reserve = RESERVE + reserve
        self.disk_gbps: float | None = None  # at which it was loaded, with `memory`
        try:
            usual = DEFAULT_CONTEXT if self.memory is None else BUDGET_CONTEXT
            self._core = self._start(kernels, context or min(longest, usual))
        except ValueError as error:
            reason = in_one_line(error)
            raise FallowError(f"packed model {self.path}: {reason}; pack it again") from error
        except _core.DiskError as error:
            raise FallowError(str(error)) from error
        self._lock, self._process = threading.Lock(), os.getpid()
        self._held: list[int] = []  # the tokens that the cache holds
        self._user: object = None  # whose they are: a thread, or an answer
        self.use_plan(first)
        self.stats = Stats()  # of the last answer
        self.last_logits: np.ndarray | None = None

    def _start(self, kernels: str, context: int) -> Any:
        if self.memory is None:
            assert self.file.mapping is not None
            return _core.Engine(self.file.mapping, kernels, self.threads, context)
        _ = self.tokenizer  # reading it takes memory for a moment, in which weights lie afterwards
        header = min(self.file.offsets.values(), default=0)
        core = _core.Engine(os.fsencode(self.path), header, kernels, self.threads, context)
        self.file.forget_pages()
        _return_freed_memory()
        self.residency = found = self._choose_residency(context)
        start = time.perf_counter()
        for p in found.resident:  # one by one: between them Ctrl-C is answered
            core.load([(p.offset, p.size)])
        size = sum(p.size for p in found.resident)
        self.disk_gbps = size / (time.perf_counter() - start) / 1e9
        tied = HEAD not in self.file.tensors
        if found.head:
            core.rows_from_file(tied, True, found.head.part.offset, found.head.room, RANGE)
        if not tied:
            room = min(EMBEDDING_ROWS, core.vocab_size)
            core.rows_from_file(True, False, self.file.offsets[EMBEDDING], room, RANGE)
        if found.streamed:
            core.stream(
                [
                    (layer, [(p.matrix, p.offset, p.size) for p in parts])
                    for layer, parts in found.streamed.items()
                ],
                SLOTS,
            )
        return core

    def _choose_residency(self, context: int) -> Residency:
        """What of the weights fits, when all else is in memory already."""
        assert self.memory is not None
        taken = rss_bytes() + self._reserve
        options = residencies(
            parts_of(self.file, self._coarse_head),
            head_rows(self.file) if self._coarse_head else None,
        )
        found = next((r for r in options if taken + r.memory <= self.memory), None)
        if found is None:
            least = taken + min(r.memory for r in options)
            raise FallowError(
                f"--memory {self.memory / 1e6:.6g} MB is too little for {self.name} with a context "
                f"of {context} tokens; the least is {np.ceil(least / 1e6):.0f} MB"
            )
        return found

    @property
    def _streams(self) -> bool:
        """Whether every pass reads from the disk."""
        return self.residency is not None and bool(self.residency.streamed)

    def describe_memory(self) -> str:
        """One line: what a budget leaves in memory, what is read per pass, and what that allows."""
        if self.residency is None or self.memory is None or self.disk_gbps is None:
            return ""
        resident = sum(p.size for p in self.residency.resident)
        read = self.residency.pass_bytes
        line = f"memory {self.memory / 1e6:.0f} MB: {resident / 1e6:.0f} MB of weights stay"
        if head := self.residency.head:
            line += f", and {head.room} of the head's {head.n_rows} rows"
        if not read:
            return line if head else f"{line}, nothing is read from the disk"
        return (
            f"{line}, {read / 1e6:.0f} MB ({read / (read + resident):.0%}) are read per pass; "
            f"at {self.disk_gbps:.2f} GB/s at most {1e9 * self.disk_gbps / read:.1f} passes/s"
        )

    def _check_version(self) -> None:
        version = self.file.metadata.get("fallow.version")
        if version is None:
            raise FallowError(
                f"{self.path} is a GGUF file but not a packed model; make one with: "
                f"fallow pack {self.path} -o packed.gguf"
            )
        if version != PACKED_VERSION:
            raise FallowError(
                f"{self.path} was packed in format {version}, this fallow runs {PACKED_VERSION}; "
                "pack it again"
            )

    def _count(self, key: str) -> int:
        value = self.file.get(key)
        if not isinstance(value, int) or value < 1:
            raise FallowError(f"packed model {self.path}: {key} is {value!r}; pack it again")
        return value

    def _packed_plan(self) -> Plan | None:
        stored = self.file.tensors.get("plan")
        return None if stored is None else Plan.from_bytes(bytes(stored.data), f"in {self.path}")

    @property
    def context(self) -> int:
        return self._core.context

    @property
    def kernels(self) -> str:
        """Which instruction set's kernels run."""
        return self._core.kernels

    @property
    def vocabulary_size(self) -> int:
        return self._core.vocab_size

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return _tokenizer(self.file)

    def use_plan(self, plan: Plan | None) -> None:
        """Switches to another plan, or to the dense model, from the next token on.

        Raises:
            FallowError: the plan is for another model, or its arrays do not fit.
        """
        cuts = [] if plan is None else self._cuts(plan)
        shortlist = self._shortlist(plan) if plan is not None and self._coarse_head else (0.0, 0)
        with self._lock:
            self._core.set_cuts(cuts)
            self._core.set_shortlist(*shortlist)
            self.plan: Plan | None = plan

    def _shortlist(self, plan: Plan) -> tuple[float, int]:
        """Which logits are exact: nats below the coarse head's largest, 0: all; and how many."""
        arrays = [plan.arrays.get(name, np.zeros(1)) for name in ("head_margin", "head_limit")]
        for name, array in zip(("head_margin", "head_limit"), arrays, strict=True):
            self._check_array(plan, name, array, (1,))
        return float(arrays[0][0]), int(min(arrays[1][0], 2**31 - 1))

    def _cuts(self, plan: Plan) -> list[_Cut]:
        """The plan in the core's terms: (layer, tap, how, value, weights)."""
        plan.check_model(self.fingerprint, self.name)
        check_runs(plan)
        n_layers = self._core.n_layers
        cuts: list[_Cut] = []
        for name, array in sorted(plan.arrays.items()):
            if not name.startswith("threshold."):
                continue
            tap = name.removeprefix("threshold.")
            self._check_array(plan, name, array, (n_layers,))
            for part in _FUSED.get(tap, (tap,)):
                for layer, value in enumerate(array):
                    if value > 0 or plan.rule == "relu":  # 0 would skip only what is 0 anyway
                        weight = self._weight(plan, layer, part)
                        cuts.append((layer, _tap(part), _THRESHOLD, float(value), weight))
        per_token = {"kept": (_TOPK, lambda v: v < 1), "tau": (_TAIL, lambda v: v > 0)}
        for name, (how, cuts_something) in per_token.items():
            if name not in plan.arrays:
                continue
            self._check_array(plan, name, plan.arrays[name], (1,))
            value = float(plan.arrays[name][0])
            if cuts_something(value):
                for layer in range(n_layers):
                    for tap in self._taps_of(plan):
                        weight = self._weight(plan, layer, tap)
                        cuts.append((layer, _tap(tap), how, value, weight))
        return cuts

    def _check_array(
        self, plan: Plan, name: str, array: np.ndarray, shape: tuple[int, ...]
    ) -> None:
        if array.shape != shape:
            raise FallowError(
                f"this plan's array {name} has the shape {array.shape}, {self.name} needs {shape}; "
                "calibrate again"
            )

    def _taps_of(self, plan: Plan) -> tuple[str, ...]:
        if plan.where == "input":
            gate = ("gate_proj",) if self.file.get("fallow.gated") else ()
            return ("q_proj", "k_proj", "v_proj", "o_proj", *gate, "up_proj", "down_proj")
        return ("gate_act",) if "weight.gate_act" in plan.arrays else ("inter",)

    def _weight(self, plan: Plan, layer: int, tap: str) -> np.ndarray | None:
        """What multiplies magnitudes before they are compared; None: nothing."""
        if tap == "gate_act" and "weight.gate_act" in plan.arrays:
            return self._per_neuron(plan, "weight.gate_act", layer)
        down_norm = np.asarray(self._core.down_norm(layer), dtype=np.float32)
        if tap == "inter" and plan.rule.partition(":")[0] in _BY_OUTPUT_NORM:
            return down_norm
        if plan.rule == "wina":
            if not tap.endswith("_proj"):
                raise FallowError(f"this plan of wina cuts {tap!r}, no input; calibrate again")
            return self._column_norms(layer, tap)
        return None

    def _per_neuron(self, plan: Plan, name: str, layer: int) -> np.ndarray:
        if name not in plan.arrays:
            raise FallowError(f"this plan has no array {name}; calibrate again")
        array = plan.arrays[name]
        self._check_array(plan, name, array, (self._core.n_layers, self._core.intermediate_size))
        return np.ascontiguousarray(array[layer], dtype=np.float32)

    def _column_norms(self, layer: int, tap: str) -> np.ndarray:
        """||W[:, j]|| of a projection, or of the fused one that it is a part of, (in,)."""
        if tap == "down_proj":
            return np.asarray(self._core.down_norm(layer), dtype=np.float32)
        fused = self.file.get("fallow.fused", False)
        parts = next((p for p in _FUSED.values() if fused and tap in p), (tap,))
        squares = 0.0
        for part in parts:
            values = self.matrix(f"layers.{layer}.{part}").dequantize()
            squares = squares + np.square(values).sum(axis=0, dtype=np.float64)
        return np.sqrt(squares).astype(np.float32)

    def matrix(self, name: str) -> StoredTensor:
        """A matrix, `layers.0.up_proj` say, as it is stored."""
        return self.file.tensors[f"{name}.weight"]

    def reset(self, keep: int = 0) -> None:
        """Forgets what was read after the first `keep` tokens.

        Raises:
            FallowError: the engine was loaded before a fork.
        """
        with self._turn(threading.get_ident(), begins=True):
            del self._held[keep:]

    @contextmanager
    def _turn(self, user: object, begins: bool = False) -> Iterator[None]:
        """One step of a user at a time: a thread, or an answer. What it read must still be there.

        Raises:
            FallowError: another user has read since, or the engine was loaded before a fork.
        """
        if os.getpid() != self._process:
            raise FallowError(
                f"{self.name} was loaded before this process was forked from another; "
                "load it again here"
            )
        with self._lock:
            if begins or not self._held:
                self._user = user
            elif self._user != user:
                raise FallowError(
                    "this engine holds another text by now, of another answer or thread; "
                    "begin again, with reset() before forward(), or load an engine for each"
                )
            yield

    def windows(
        self, text: Text, context: int, limit: int | None = None, at_most: int | None = None
    ) -> np.ndarray:
        """The text as windows of token ids, (n, context): see `cut_windows`.

        Raises:
            FallowError: the text is shorter than one window, or has fewer than are asked for.
            UsageError: the context is longer than the cache, or no window is asked for.
        """
        if context > self.context:
            raise UsageError(
                f"--context {context} is longer than the {self.context} tokens this engine holds"
            )
        return cut_windows(text, self.tokenizer, context, limit, at_most)

    def forward(
        self, ids: Sequence[int] | np.ndarray, every: bool = False, dense: bool = False
    ) -> np.ndarray:
        """Reads more tokens; logits (T, vocabulary) of all of them, or (1, vocabulary) of the last.

        With `dense` the plan is left aside. Up to `_core.FEW` tokens have to the bit the logits
        that they have one by one, in less time.

        Raises:
            FallowError: an id outside the vocabulary, no ids, or the context is full.
        """
        with self._turn(threading.get_ident()):
            return self._read(ids, every, dense)

    def _read(
        self, ids: Sequence[int] | np.ndarray, every: bool = False, dense: bool = False
    ) -> np.ndarray:
        tokens = self._check_ids(ids)
        logits = np.empty((len(tokens) if every else 1, self._core.vocab_size), dtype=np.float32)
        try:
            self._core.forward(tokens, len(self._held), every, dense, logits)
        except _core.DiskError as error:
            raise FallowError(str(error)) from error
        # What the core holds beyond these, after Ctrl-C say, the next pass writes over.
        self._held += tokens.tolist()
        self.last_logits = logits[-1]
        return logits

    def _check_ids(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or len(tokens) == 0:
            raise FallowError("there are no tokens to read; give some text")
        bad = tokens[(tokens < 0) | (tokens >= self._core.vocab_size)]
        if len(bad):
            raise FallowError(
                f"token id {bad[0]} is outside the vocabulary of {self._core.vocab_size}"
            )
        if len(tokens) > self.context - len(self._held):
            raise FallowError(
                f"{len(tokens)} tokens after {len(self._held)} exceed the context of "
                f"{self.context}; shorten the prompt or raise --context"
            )
        return np.ascontiguousarray(tokens, dtype=np.int32)

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits (T, vocabulary), float32, of a text (T,) read from the start.

        Raises:
            FallowError: an id outside the vocabulary, no ids, or more than the context holds.
        """
        with self._turn(threading.get_ident(), begins=True):
            self._held.clear()
            return self._read(ids, every=True)

    def score(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-probability (T - 1,) of each token of a text after the first, nats.

        Raises:
            FallowError: logits are NaN or infinite.
        """
        logits = self.logits(ids)[:-1]
        top = logits.max(axis=1)
        check_largest(top)
        total = np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
        chosen = logits[np.arange(len(logits)), np.asarray(ids)[1:]]
        return chosen.astype(np.float64) - top - total

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
        lossless: bool = False,
        parse_special: bool = True,
    ) -> Iterator[str]:
        """Streams the continuation of a prompt, or with `chat` the answer to it, piece by piece.

        `stats` holds the figures when the stream ends. Reads from the start; ends at an end token,
        before a `stop` text, or after `max_tokens`. `lossless` gives the dense model's own text,
        whatever the plan, and reads ahead what earlier text lets guess (fallow.drafting).
        `parse_special`: control tokens in a text to continue, <|im_end|> say, are one token each;
        in a message, with `chat`, they are always text.

        Raises:
            FallowError: the prompt is empty or longer than the context.
            UsageError: a sampling option out of range.
        """
        sampler = Sampler(temperature, top_p, top_k, min_p, seed)
        if isinstance(prompt, str):
            ids: Ids = self.tokenizer.prompt(prompt, chat, parse_special)
        else:
            ids = prompt
        pieces = self.answer(ids, max_tokens, sampler, stop, lossless=lossless)
        return (piece.text for piece in pieces if piece.text)

    def answer(
        self,
        ids: Sequence[int] | np.ndarray,
        max_tokens: int,
        sampler: "Sampler",
        stop: Sequence[str] = (),
        *,
        lossless: bool = False,
        reuse: bool = False,
        top_logprobs: int | None = None,
        echo: str | None = None,
    ) -> Iterator[Piece]:
        """As `generate`, of a prompt (T,), with the tokens.

        Closing the iterator ends the answer; it gives pieces without text where that takes long.

        Args:
            reuse: leave out what the cache holds of the prompt, from an answer before. Rounding may
                then differ a little from that of a prompt that was read at once.
            top_logprobs: tell log-probabilities, and those of so many of the likeliest tokens.
            echo: give the prompt first: this text, which it was made of, and with `top_logprobs`
                its tokens, without a BOS that the text does not have. The last piece then has the
                end token, too, if there was one: so many tokens come as were read and picked.

        Raises:
            FallowError: the prompt is empty or longer than the context.
            UsageError: max_tokens below 1, or with `echo` below 0; or an empty stop text.
        """
        if max_tokens < (1 if echo is None else 0):
            raise UsageError("--max-new-tokens must be at least 1")
        if "" in stop:
            raise UsageError("a stop text is empty, with which every text begins; leave it out")
        tokens = np.asarray(ids)
        if len(tokens) + max_tokens > self.context:
            raise FallowError(
                f"prompt of {len(tokens)} tokens and {max_tokens} new ones exceed the context of "
                f"{self.context}; shorten the prompt or raise --context"
            )
        return self._stream(
            tokens, max_tokens, sampler, tuple(stop), lossless, reuse, top_logprobs, echo
        )

    def _stream(
        self,
        ids: np.ndarray,
        max_tokens: int,
        sampler: "Sampler",
        stop: tuple[str, ...],
        lossless: bool,
        reuse: bool,
        top_logprobs: int | None,
        echo: str | None,
    ) -> Iterator[Piece]:
        user, start = object(), time.perf_counter()
        tells = echo is not None and top_logprobs is not None
        with self._turn(user, begins=True):
            # The last token is always read: its logits are needed.
            read = _common(self._held, ids[:-1].tolist()) if reuse and not tells else 0
            del self._held[read:]
            self.stats = stats = Stats(prompt_tokens=len(ids), cached_tokens=read)
            self.reset_stats()
        told = top_logprobs if tells else None
        logits, choices = yield from self._read_prompt(user, ids, read, lossless, told)
        stats.ttft_ms = 1e3 * (time.perf_counter() - start)
        stats.prefill_tps = (len(ids) - stats.cached_tokens) / (stats.ttft_ms / 1e3)
        self.reset_stats()
        if echo is not None:
            yield Piece(echo, _without_added_bos(choices, echo, self.tokenizer))
        decode_start, ends = time.perf_counter(), set(self.tokenizer.eos_ids)
        if lossless or self._streams:
            tokens = self._verified(user, ids, logits, sampler, dense=lossless)
        else:
            tokens = self._picks(user, logits, sampler)
        text = _AnswerText(self.tokenizer, stop, ids)
        stats.finish = "" if max_tokens else "length"
        try:
            for token, row in tokens if max_tokens else ():
                if token in ends:
                    stats.finish = "stop"
                    rest = text.rest()
                    end = (_choice(token, row, top_logprobs),) if tells else ()
                    yield Piece(rest.text, rest.tokens + end)
                    break
                stats.new_tokens += 1
                full = stats.new_tokens == max_tokens
                piece = text.add(_choice(token, row, top_logprobs), full)
                if text.stopped or full:
                    stats.finish = "stop" if text.stopped else "length"
                yield piece
                if stats.finish:
                    break
        finally:
            if self._user is user:  # otherwise the counters are another's
                self._finish(time.perf_counter() - decode_start)
                self._user = threading.get_ident()

    def _read_prompt(
        self, user: object, ids: np.ndarray, read: int, dense: bool, top_logprobs: int | None
    ) -> Generator[Piece, None, tuple[np.ndarray, list[TokenChoice]]]:
        """Reads on after the first `read` tokens; gives empty pieces where that takes long.

        Returns:
            The last token's logits (vocabulary,), and with `top_logprobs`, where none was read
            before, a choice for every token.
        """
        step = len(ids) if self._streams else PREFILL_STEP  # streaming reads the file every time
        choices: list[TokenChoice] = []
        every = top_logprobs is not None
        if every:
            step, choices = ECHO_STEP, [TokenChoice(int(first), None) for first in ids[:1]]
        while True:
            with self._turn(user):
                rows = self._read(ids[read : read + step], every=every, dense=dense)
            read += step
            if every:
                after = ids[len(choices) : read + 1].tolist()  # of the last token nothing
                choices += [_choice(*each, top_logprobs) for each in zip(after, rows, strict=False)]
            if read >= len(ids):
                return rows[-1], choices
            yield Piece()

    def _picks(
        self, user: object, logits: np.ndarray, sampler: "Sampler"
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What the sampler picks of which logits; at first of these, the prompt's."""
        while True:
            token = sampler.pick(logits)
            yield token, logits
            with self._turn(user):
                logits = self._read([token])[0]

    def _verified(
        self, user: object, ids: np.ndarray, logits: np.ndarray, sampler: "Sampler", dense: bool
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As `_picks`, of the dense model if asked to, in passes that also read guesses."""
        lookup = Lookup(ids.tolist(), STREAMED_COST if self._streams else PASS_COST)
        token, row = sampler.pick(logits), logits
        while True:
            yield token, row
            lookup.add(token)
            with self._turn(user):
                position = len(self._held)
                guesses = lookup.propose(min(_core.FEW, self.context - position) - 1)
                start = time.perf_counter()
                rows = self._read([token, *guesses], every=True, dense=dense)
                seconds = time.perf_counter() - start
            self.stats.drafted += len(guesses)
            for held, row in enumerate(rows):
                token = sampler.pick(row)
                if held == len(guesses) or token != guesses[held]:
                    break
                self.stats.accepted += 1
                yield token, row
            lookup.learn(len(guesses), held, seconds)
            for guess in guesses[:held]:
                lookup.add(guess)
            with self._turn(user):
                del self._held[position + 1 + held :]

    def _finish(self, seconds: float) -> None:
        figures = self.core_stats()
        # Of the tokens that were read those that were wrong guesses count for nothing.
        decoded = figures["tokens"] - (self.stats.drafted - self.stats.accepted)
        if decoded:
            self.stats.decode_tps = decoded / seconds
            self.stats.bytes_per_token = figures["bytes_read"] / decoded
            self.stats.gbps = figures["bytes_read"] / seconds / 1e9
            self.stats.sparsity_per_layer = self.idle_neurons().tolist()
            for name, value in disk_figures(figures, decoded).items():
                setattr(self.stats, name, value)
        self.stats.peak_rss_mb = peak_rss_mb()
        self.stats.logits_hash = self.logits_hash()

    def reset_stats(self) -> None:
        self._core.reset_stats()

    def idle_neurons(self) -> np.ndarray:
        """Share of neurons per layer, (L,), that were zero in the tokens since `reset_stats`."""
        figures = self.core_stats()
        width = max(1, figures["tokens"]) * self._core.intermediate_size
        return 1 - np.array(figures["active"]) / width

    @property
    def dtype_name(self) -> str:
        """The type of gate_proj or, without one, up_proj: what most weights are."""
        name = "gate_proj" if self.file.get("fallow.gated") else "up_proj"
        return self.matrix(f"layers.0.{name}").type.lower()

    def core_stats(self) -> dict[str, Any]:
        """Counters of the core since `reset_stats`: see csrc/engine/runtime.h."""
        return self._core.stats()

    def logits_hash(self) -> str:
        """16 hex digits of the last token's logits: equal runs have equal hashes."""
        import hashlib

        return (
            ""
            if self.last_logits is None
            else hashlib.sha256(self.last_logits.tobytes()).hexdigest()[:16]
        )


def disk_figures(figures: dict[str, Any], tokens: int) -> dict[str, float]:
    """What `Stats` says of the disk, from the core's counters over some tokens."""
    disk = figures["disk"]
    return {
        "disk_bytes_per_token": disk["bytes"] / tokens,
        "stall_ms_per_token": 1e3 * figures["seconds"]["disk"] / tokens,
        "hit_rate": max(0.0, 1 - disk["bytes"] / figures["bytes_read"]),
        "read_ahead_rate": disk["in_time"] / disk["waits"] if disk["waits"] else 1.0,
    }


@dataclass
class Sampler:
    """Picks the next token. Filters apply in the order top_k, top_p, min_p."""

    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # the smallest set of tokens with this probability
    top_k: int = 0  # that many tokens; 0: all
    min_p: float = 0.0  # tokens at least this likely, relative to the likeliest
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature:g} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p:g} is outside (0, 1]")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} must be at least 0")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p {self.min_p:g} is outside [0, 1]")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} must be at least 0")
        self._random = np.random.default_rng(self.seed)

    def pick(self, logits: np.ndarray) -> int:
        """A token id from logits (vocabulary,).

        A logit of minus infinity is a token that is never picked.

        Raises:
            FallowError: NaN or infinity among them, or nothing but minus infinity.
        """
        best = int(np.argmax(logits))  # NaN counts as the largest
        check_largest(logits[best])
        if self.temperature == 0:
            return best
        order = np.argsort(-logits, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        below = logits[order].astype(np.float64) - logits[best]
        with np.errstate(over="ignore"):  # at tiny temperatures, where only the best is left
            p = np.exp(below / self.temperature)
        p /= p.sum()
        keep = max(1, int(np.searchsorted(np.cumsum(p), self.top_p)) + 1)
        keep = min(keep, max(1, int((p >= self.min_p * p[0]).sum())))
        p = p[:keep] / p[:keep].sum()
        return int(self._random.choice(order[:keep], p=p))


class _AnswerText:
    """The text of an answer as it grows. What a later token may change is held back."""

    def __init__(self, tokenizer: TextTokenizer, stop: tuple[str, ...], prompt: Ids = ()) -> None:
        self._stream, self._stop = TextStream(tokenizer, prompt), stop
        self._choices: list[TokenChoice] = []
        self._begins: list[int] = []  # at which character of the text each token does
        self._given, self._given_tokens = 0, 0  # characters, tokens
        self.stopped = False  # a stop text came

    def add(self, choice: TokenChoice, last: bool) -> Piece:
        """What one more token lets say; of the last token all."""
        self._choices.append(choice)
        self._begins.append(len(self._stream.text))
        text = self._stream.add(choice.id)
        # What was given has no stop text, nor the beginning of one at its end.
        found = (text.find(s, self._given) for s in self._stop)
        cut = min((i for i in found if i >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            tokens = sum(begin < cut for begin in self._begins)
            return self._give(text[:cut], tokens, last=True)
        if not last:
            text = text.rstrip("\ufffd")  # what a later byte may complete
            text = text[: len(text) - _stop_begun(text, self._stop)]
        return self._give(text, len(self._choices), last)

    def rest(self) -> Piece:
        """What is still held back."""
        return self._give(self._stream.text, len(self._choices), last=True)

    def _give(self, text: str, tokens: int, last: bool) -> Piece:
        if len(text) <= self._given and not last:
            return Piece()  # the tokens wait for their text
        piece = Piece(text[self._given :], tuple(self._choices[self._given_tokens : tokens]))
        self._given, self._given_tokens = max(self._given, len(text)), tokens
        return piece


def _choice(token: int, logits: np.ndarray, top: int | None) -> TokenChoice:
    """A token with its log-probability, and the `top` likeliest tokens with theirs."""
    if top is None:
        return TokenChoice(token)
    row = logits.astype(np.float64)
    check_largest(row.max())
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    best = np.argsort(-row, kind="stable")[:top]
    return TokenChoice(token, float(row[token]), tuple((int(i), float(row[i])) for i in best))


def check_largest(logits: np.ndarray) -> None:
    """Raises FallowError where the largest logit of a token is none to compute with."""
    if np.isnan(logits).any():
        raise FallowError("the model's logits are NaN; check the file with: fallow evaluate")
    if np.isinf(logits).any():
        raise FallowError("the model's logits are infinite; check the file with: fallow evaluate")


def _without_added_bos(
    choices: list[TokenChoice], text: str, tokenizer: TextTokenizer
) -> tuple[TokenChoice, ...]:
    """A prompt's tokens, less a BOS that its text does not have."""
    bos = tokenizer.bos_id
    added = (
        bos is not None
        and [choice.id for choice in choices[:1]] == [bos]
        and not text.startswith(tokenizer.backend.id_to_token(bos) or "")
    )
    return tuple(choices[added:])


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _stop_begun(text: str, stop: tuple[str, ...]) -> int:
    """The longest end of the text that may be the beginning of a stop text."""
    longest = 0
    for s in stop:
        for n in range(min(len(s) - 1, len(text)), longest, -1):
            if text.endswith(s[:n]):
                longest = n
                break
    return longest


def peak_rss_mb() -> float:
    """The process's largest resident memory so far, mapped files included, 1e6 bytes.

    From /proc where there is one: getrusage also counts the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def rss_bytes() -> int:
    """The process's resident memory now, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _refuse_unpacked(path: Path) -> None:
    """Raises FallowError for the name of a model that is still to be packed."""
    name = str(path)
    is_named = name in ALIASES or is_hub_id(name)
    if os.path.isdir(path) or (is_named and not os.path.exists(path)):
        raise FallowError(
            f"{name} is not a packed model; make one with: fallow pack {name} -o packed.gguf"
        )


def _tokenizer(file: GgufFile) -> TextTokenizer:
    key = "tokenizer.huggingface.json"
    try:
        with usable(f"the tokenizer of packed model {file.path}"):
            backend = tokenizer_from_json(file.get(key))
            del file.metadata[key]  # 14 MB of Qwen2.5's
            found = TextTokenizer(
                backend,
                bos_id=file.get("tokenizer.ggml.bos_token_id", None),
                eos_ids=tuple(file.get("fallow.eos_token_ids", ())),
                add_bos=bool(file.get("tokenizer.ggml.add_bos_token", False)),
                chat_template=file.get("tokenizer.chat_template", None),
                special_tokens=_special_tokens(file, backend),
            )
    finally:
        _return_freed_memory()
    note_endless(found, str(file.path))
    return found


def _special_tokens(file: GgufFile, backend: Any) -> dict[str, str]:
    key = "fallow.special_tokens"
    if key in file.metadata:
        return dict(parse_json(file.get(key)))
    # What files have that were packed before that key.
    ids = {"bos_token": file.get("tokenizer.ggml.bos_token_id", None)}
    ids["eos_token"] = next(iter(file.get("fallow.eos_token_ids", ())), None)
    return {name: backend.id_to_token(i) or "" for name, i in ids.items() if i is not None}


def _return_freed_memory() -> None:
    """glibc keeps what parsing the tokenizer took and freed: 60 MB for Qwen2.5."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
