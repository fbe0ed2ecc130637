"""Runs packed models with the compiled core: no torch, no transformers."""

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fallow import _core
from fallow.checkpoints.text import Text, cut_windows
from fallow.checkpoints.tokenizer import Ids, TextTokenizer
from fallow.checkpoints.weights import StoredTensor, read_gguf
from fallow.common.errors import FallowError, UsageError, in_one_line
from fallow.common.procfs import processors
from fallow.common.progress import note
from fallow.engine.answer import Answer, Embedding, Piece, Read, common
from fallow.engine.cuts import core_cuts
from fallow.engine.grammar import Grammars
from fallow.engine.memory import (
    EMBEDDING,
    EMBEDDING_ROWS,
    HEAD,
    PER_LAYER,
    RANGE,
    RESERVE,
    SLOTS,
    Residency,
    cache_bytes,
    experts_of,
    head_rows,
    in_batches,
    parse_size,
    parts_of,
    residencies,
)
from fallow.engine.packed import RUNNING_VERSIONS, packed_tokenizer, refuse_unpacked
from fallow.engine.process import available_bytes, return_freed_memory, rss_bytes
from fallow.engine.sampling import Sampler, check_largest
from fallow.engine.stats import Stats, logits_hash
from fallow.plan import Plan

DEFAULT_CONTEXT = 4096
BUDGET_CONTEXT = 1024  # under a memory budget
USUAL_SLOTS = 4  # as of llama.cpp's server
SLOTS_SHARE = 0.1  # of the memory, which their caches may take if nobody says how many
MOST_THREADS = MOST_SLOTS = 1024  # as csrc/engine_bindings.cpp has them


def thread_count(threads: int | None) -> int:
    """All that this process may use where no number is given.

    Raises:
        UsageError: the number is out of range.
    """
    usable = processors()
    if threads is None:
        return usable
    if not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"--threads {threads} is outside 1 to {MOST_THREADS}")
    if threads > usable:
        note(
            f"{threads} threads are more than this process has processors, {usable}; "
            "that is slower, often by far"
        )
    return threads


@contextmanager
def _told_of_disk() -> Iterator[None]:
    """Makes one line of what the core says of weights that cannot be read."""
    try:
        yield
    except _core.DiskError as error:
        raise FallowError(str(error)) from error


class Engine:
    """A packed model, ready to run. See `generate`, `logits`, `score`.

    It holds one text or, in as many slots, several, whose next tokens `forward_together` reads.

    Args:
        path: a file that `fallow pack` wrote.
        plan: which neurons may be inactive; default: the plan packed with the model, if any.
            `plan=False` ignores that one.
        threads: default: all processors that this process may use.
        context: tokens that the cache holds; default: the model's own, at most 4096, or 1024 with
            `memory`.
        skip_zeros: neurons that a ReLU makes exactly zero are not read; the answer is the same.
            With a predictor in the file (`fallow pack --predictor`) the gate, too, is read of those
            alone that it predicts, and the answer is nearly the same.
        kernels: one of `_core.KERNELS`, "avx2" say; default: the fastest that runs here.
        memory: bytes that the process may take, or a size such as "800MB": weights that do not fit
            are read from the file for every pass over the model. Default: all is in memory, in huge
            pages, or mapped where the file is more than half of the memory that is left.
        reserve: bytes of `memory` that are left to the caller, for logits of many tokens say.
        slots: texts that are held at once, each in a cache of `context` tokens; None: 4, or as many
            as take a tenth of `memory`, or of what the machine has left.

    Raises:
        FallowError: no packed model, damaged, the plan is for another model, or `memory` is less
            than what works here; or the system does not allow so many threads.
        UsageError: threads, context, kernels, memory or slots out of range.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Plan | bool | None = None,
        threads: int | None = None,
        *,
        context: int | None = None,
        skip_zeros: bool = True,
        kernels: str = "",
        memory: int | str | None = None,
        reserve: int = 0,
        slots: int | None = 1,
    ) -> None:
        self.path = Path(path)
        self.memory = parse_size(memory) if isinstance(memory, str) else memory
        refuse_unpacked(self.path)
        self.file = read_gguf(self.path)
        self._check_version()
        self.name = str(self.file.get("fallow.model", self.path.name))
        self.fingerprint = str(self.file.get("fallow.fingerprint", ""))
        self.threads = thread_count(threads)
        if slots is not None and not 1 <= slots <= MOST_SLOTS:
            raise UsageError(f"--slots {slots} is outside 1 to {MOST_SLOTS}")
        if kernels and kernels not in _core.KERNELS:
            raise UsageError(
                f"--kernels {kernels!r} do not run here; known: {', '.join(_core.KERNELS)}"
            )
        longest = self._count("fallow.context_length")
        if context is not None and not 1 <= context <= longest:
            raise UsageError(
                f"--context {context} is outside 1 to {longest}, what this model was made for"
            )
        first = plan if isinstance(plan, Plan) else None if plan is False else self._packed_plan()
        # Under a budget the coarse head is in memory only if this plan uses it.
        lists = first is not None and first.head_margin > 0
        self._coarse_head = memory is None or lists
        self.residency: Residency | None = None
        usual = DEFAULT_CONTEXT if self.memory is None else BUDGET_CONTEXT
        context = context or min(longest, usual)
        self.slots = self._usual_slots(context) if slots is None else slots
        # Every answer more has its logits, and those of the pass before.
        logits = 2 * 4 * (self.slots - 1) * self._count("fallow.vocab_size")
        self._reserve = RESERVE + reserve + logits
        self.disk_gbps: float | None = None  # at which it was loaded, with `memory`
        try:
            self._core = self._start(kernels, context)
        except ValueError as error:
            reason = in_one_line(error)
            raise FallowError(f"packed model {self.path}: {reason}; pack it again") from error
        except (_core.DiskError, _core.ThreadError) as error:
            raise FallowError(str(error)) from error
        # An answer that is dropped may end inside a step of another, in the same thread.
        self._lock, self._process = threading.RLock(), os.getpid()
        # Of each slot the tokens that its cache holds, and whose they are: a thread's or answer's.
        self._held: list[list[int]] = [[] for _ in range(self.slots)]
        self._users: list[object] = [None] * self.slots
        self._core.set_skips_zeros(skip_zeros)
        self.use_plan(first)
        self.stats = Stats()  # of the last answer
        self.last_logits: np.ndarray | None = None

    def __repr__(self) -> str:
        if "last_logits" not in vars(self):  # what __init__ sets last
            return f"<Engine of {vars(self).get('path')}, which was not loaded>"
        size = sum(tensor.data.nbytes for tensor in self.file.tensors.values())
        slots = f"{self.slots} slots of " if self.slots > 1 else "context of "
        budget = "" if self.memory is None else f", within {self.memory / 1e6:.6g} MB"
        plan = "dense" if self.plan is None else f"plan {self.plan.rule} at {self.plan.knob:.4g}"
        return (
            f"<Engine of {self.name}: {self.n_parameters / 1e6:.4g} million parameters in "
            f"{size / 1e6:.4g} MB ({self.dtype_name}), {self.threads} threads, {slots}"
            f"{self.context} tokens{budget}, {plan}>"
        )

    def _usual_slots(self, context: int) -> int:
        for key in ("n_layers", "n_kv_heads", "head_dim"):
            self._count(f"fallow.{key}")  # cache_bytes relies on them
        room = SLOTS_SHARE * (self.memory if self.memory is not None else available_bytes())
        return max(1, min(USUAL_SLOTS, int(room / max(1, cache_bytes(self.file, context)))))

    def _start(self, kernels: str, context: int) -> Any:
        if self.memory is None:
            (mapping,) = self.file.mappings  # a packed model in parts is refused
            # Twice, since others want memory too.
            rows = self.file.tensors.get(PER_LAYER)  # are not copied
            size = mapping.data.nbytes - (0 if rows is None else rows.data.nbytes)
            copy = 2 * size <= available_bytes()
            return _core.Engine(mapping, kernels, self.threads, context, self.slots, copy)
        _ = self.tokenizer  # reading it takes memory for a moment, in which weights lie afterwards
        header = self.file.header_bytes
        path = os.fsencode(self.path)
        core = _core.Engine(path, header, kernels, self.threads, context, self.slots)
        self.file.forget_pages()
        return_freed_memory()
        self.residency = found = self._choose_residency(context)
        start = time.perf_counter()
        for parts in in_batches(found.resident):  # between them Ctrl-C is answered
            core.load([(p.offset, p.size) for p in parts])
        size = sum(p.size for p in found.resident)
        self.disk_gbps = size / (time.perf_counter() - start) / 1e9
        tied = HEAD not in self.file.tensors
        if found.head:
            core.rows_from_file(tied, True, found.head.part.offset, found.head.room, RANGE)
        if not tied:
            room = min(EMBEDDING_ROWS, core.vocab_size)
            core.rows_from_file(True, False, self.file.tensors[EMBEDDING].offset, room, RANGE)
        if PER_LAYER in self.file.tensors:
            room = min(EMBEDDING_ROWS, core.vocab_size)
            core.rows_per_layer_from_file(self.file.tensors[PER_LAYER].offset, room, RANGE)
        if found.experts:
            core.cache_experts(found.experts.room)
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
            experts_of(self.file),
            self.memory - taken,
        )
        found = next((r for r in options if taken + r.memory <= self.memory), None)
        if found is None:
            least = taken + min(r.memory for r in options)
            slots = f" in each of {self.slots} slots" if self.slots > 1 else ""
            raise FallowError(
                f"--memory {self.memory / 1e6:.6g} MB is too little for {self.name} with a context "
                f"of {context} tokens{slots}; the least is {np.ceil(least / 1e6):.0f} MB"
            )
        return found

    @property
    def streams(self) -> bool:
        """Whether every pass reads the same from the disk."""
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
        if experts := self.residency.experts:
            return (
                f"{line}, and {experts.room} of {experts.count} experts ({experts.size / 1e6:.3g} "
                f"MB each); a token uses {experts.used}, those that are not there are read at "
                f"{self.disk_gbps:.2f} GB/s"
            )
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
        if not isinstance(version, int) or version not in RUNNING_VERSIONS:
            known = ", ".join(map(str, RUNNING_VERSIONS))
            raise FallowError(
                f"{self.path} was packed in format {in_one_line(version)}, "
                f"this fallow runs {known}; pack it again"
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
    def n_parameters(self) -> int:
        """The source's: weights, biases and norms, without what packing adds."""
        return sum(
            math.prod(tensor.shape)
            for name, tensor in self.file.tensors.items()
            if name.endswith((".weight", ".bias", ".sinks"))
            and not name.endswith((".outliers.weight", "_coarse.bias"))
        )

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

    @property
    def hidden_size(self) -> int:
        return self._core.hidden_size

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return packed_tokenizer(self.file)

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocabulary_size)

    def use_plan(self, plan: Plan | None) -> None:
        """Switches to another plan, or to none, from the next token on.

        Under none an engine still leaves out what needs no plan: exact zeros, and what a predictor
        in the file takes for some.

        Raises:
            FallowError: the plan is for another model, or its arrays do not fit.
        """
        cuts = [] if plan is None else core_cuts(self, plan)
        margin, limit = 0.0, 0
        if plan is not None and self._coarse_head:
            margin, limit = plan.head_margin, min(plan.head_limit, 2**31 - 1)
        with self._lock:
            self._core.set_cuts(cuts)
            self._core.set_shortlist(margin, limit)
            self.plan: Plan | None = plan

    def matrix(self, name: str) -> StoredTensor:
        """A matrix, `layers.0.up_proj` say, as it is stored."""
        return self.file.tensors[f"{name}.weight"]

    def reset(self, keep: int = 0, slot: int = 0) -> None:
        """Forgets what was read in a slot after the first `keep` tokens.

        Raises:
            FallowError: the engine was loaded before a fork.
            UsageError: there is no such slot.
        """
        self._check_slot(slot)
        with self._turn(threading.get_ident(), slot, begins=True):
            del self._held[slot][keep:]

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise UsageError(f"slot {slot} is outside 0 to {self.slots - 1}, what this engine has")

    @contextmanager
    def _turn(self, user: object, slot: int = 0, begins: bool = False) -> Iterator[None]:
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
            if begins or self._users[slot] is None:
                self._users[slot] = user
            elif self._users[slot] != user:
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
        self,
        ids: Sequence[int] | np.ndarray,
        every: bool = False,
        dense: bool = False,
        exact: bool = False,
        record: bool = False,
        slot: int = 0,
    ) -> np.ndarray:
        """Reads more tokens; logits (T, vocabulary) of all of them, or (1, vocabulary) of the last.

        Up to `_core.FEW` tokens have to the bit the logits that they have one by one, in less time.

        Args:
            dense: every neuron is computed; the plan and a predictor in the file are left aside.
            exact: more tokens have logits as near to those as a block of tokens comes, to measure
                quality; otherwise they are read as a prompt is, which is faster.
            record: `active_neurons` then tells which neurons were used.
            slot: whose text goes on.

        Raises:
            FallowError: an id outside the vocabulary, no ids, or the context is full.
            UsageError: there is no such slot.
        """
        self._check_slot(slot)
        with self._turn(threading.get_ident(), slot):
            return self._read(ids, every, dense, exact, record, slot)

    def forward_together(
        self,
        ids: Sequence[int] | np.ndarray,
        slots: Sequence[int],
        dense: bool = False,
        record: bool = False,
    ) -> np.ndarray:
        """Reads one more token in each of several slots; logits (n, vocabulary).

        They are to the bit those of `forward`, token by token, but up to `_core.FEW` tokens share
        every pass over the weights.

        Args:
            dense: as for `forward`.
            record: so, too.

        Raises:
            FallowError: an id outside the vocabulary, no ids, or a slot's context is full.
            UsageError: a slot that there is not, one twice, or not one for each token.
        """
        for slot in slots:
            self._check_slot(slot)
        if len(set(slots)) != len(slots) or len(slots) != len(ids):
            raise UsageError(f"{len(ids)} tokens need as many different slots")
        with self._lock:
            for slot in slots:
                with self._turn(threading.get_ident(), slot):
                    self._check_ids(ids[slots.index(slot) :][:1], len(self._held[slot]))
            return self._read_together(ids, slots, dense, record)[0]

    def _read_together(
        self, ids: Sequence[int] | np.ndarray, slots: Sequence[int], dense: bool, record: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits (n, vocabulary) and, if recorded, the active neurons (n, L, neurons)."""
        tokens = np.ascontiguousarray(ids, dtype=np.int32)
        logits = np.empty((len(tokens), self._core.vocab_size), dtype=np.float32)
        places = [(slot, len(self._held[slot])) for slot in slots]
        most, active = min(_core.FEW, self.context), []
        with _told_of_disk():
            for i in range(0, len(tokens), most):
                part = slice(i, i + most)
                self._core.forward_together(tokens[part], places[part], dense, record, logits[part])
                active += [self.active_neurons()] if record else []
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            self._held[slot].append(token)
        self.last_logits = logits[-1]
        return logits, np.concatenate(active) if record else None

    def read(self, reads: Sequence[Read]) -> None:
        """Reads what answers ask for: of one answer any tokens, of several one of each.

        Raises:
            FallowError: another user has read since in an answer's slot, or the disk failed.
        """
        answers = [read.answer for read in reads]
        record, dense = any(a.activity for a in answers), answers[0].lossless
        with self._lock:
            for answer in answers:
                with self._turn(answer, answer.slot):
                    pass
            if len(reads) == 1:
                (read,) = reads
                slot = answers[0].slot
                if read.hidden:
                    read.rows = self._read_hidden(read.ids, slot)
                else:
                    read.rows = self._read(read.ids, read.every, dense, False, record, slot)
                read.active = self.active_neurons() if record else None
                return
            ids = [int(read.ids[0]) for read in reads]
            rows, active = self._read_together(ids, [a.slot for a in answers], dense, record)
        for i, read in enumerate(reads):
            read.rows = rows[i : i + 1]
            read.active = None
            if active is not None and read.answer.activity:
                read.active = active[i : i + 1]

    def cached(self, ids: np.ndarray, slot: int = 0) -> int:
        """Of a prompt (T,), all but its last token, how many a slot holds from the first on."""
        return common(self._held[slot], ids[:-1].tolist())

    def _read(
        self,
        ids: Sequence[int] | np.ndarray,
        every: bool = False,
        dense: bool = False,
        exact: bool = False,
        record: bool = False,
        slot: int = 0,
    ) -> np.ndarray:
        held = self._held[slot]
        tokens = self._check_ids(ids, len(held))
        logits = np.empty((len(tokens) if every else 1, self._core.vocab_size), dtype=np.float32)
        with _told_of_disk():
            self._core.forward(tokens, slot, len(held), every, dense, exact, record, logits)
        # What the core holds beyond these, after Ctrl-C say, the next pass writes over.
        held += tokens.tolist()
        self.last_logits = logits[-1]
        return logits

    def _read_hidden(self, ids: Sequence[int] | np.ndarray, slot: int) -> np.ndarray:
        held = self._held[slot]
        tokens = self._check_ids(ids, len(held))
        hidden = np.empty((len(tokens), self.hidden_size), dtype=np.float32)
        with _told_of_disk():
            self._core.hidden_states(tokens, slot, len(held), hidden)
        held += tokens.tolist()
        return hidden

    def _check_ids(
        self, ids: Sequence[int] | np.ndarray, held: int = 0, new: int = 0
    ) -> np.ndarray:
        """Ids (T,), int32, for which there is room behind `held` tokens and before `new` ones."""
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or len(tokens) == 0:
            raise FallowError("there are no tokens to read; give some text")
        bad = tokens[(tokens < 0) | (tokens >= self._core.vocab_size)]
        if len(bad):
            raise FallowError(
                f"token id {bad[0]} is outside the vocabulary of {self._core.vocab_size}"
            )
        if held + len(tokens) + new > self.context:
            after = f" after {held}" if held else ""
            before = f" and {new} new ones" if new else ""
            raise FallowError(
                f"{len(tokens)} tokens{after}{before} exceed the context of {self.context}; "
                "shorten the text or raise --context"
            )
        return np.ascontiguousarray(tokens, dtype=np.int32)

    def logits(self, ids: Sequence[int] | np.ndarray, exact: bool = True) -> np.ndarray:
        """Logits (T, vocabulary), float32, of a text (T,) read from the start.

        Args:
            exact: as for `forward`.

        Raises:
            FallowError: an id outside the vocabulary, no ids, or more than the context holds.
        """
        with self._turn(threading.get_ident(), begins=True):
            self._held[0].clear()
            return self._read(ids, every=True, exact=exact)

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

    def embed(self, text: str | Sequence[int] | np.ndarray) -> np.ndarray:
        """A text's embedding, (hidden_size,), of Euclidean length 1: see `Embedding`.

        Raises:
            FallowError: the text is empty or longer than the context, or the model computes NaN.
        """
        ids: Ids = self.tokenizer.prompt(text) if isinstance(text, str) else text
        pieces = self.begin_embedding(ids).pieces()
        return next(piece.embedding for piece in pieces if piece.embedding is not None)

    def hidden(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Hidden states (T, hidden_size), float32, after the last norm, of a text (T,).

        Where a model multiplies its logits by a factor, as Granite does, so are these.

        Raises:
            FallowError: an id outside the vocabulary, no ids, or more than the context holds.
        """
        with self._turn(threading.get_ident(), begins=True):
            self._held[0].clear()
            return self._read_hidden(ids, 0)

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
        *,
        repeat_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        json_schema: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """Streams the continuation of a prompt, or with `chat` the answer to it, piece by piece.

        `stats` holds the figures when the stream ends. Reads from the start; ends at an end token,
        before a `stop` text, or after `max_tokens`. `lossless` gives the dense model's own text,
        whatever the plan, and reads ahead what earlier text lets guess (fallow.engine.drafting).
        `parse_special`: control tokens in a text to continue, <|im_end|> say, are one token each;
        in a message, with `chat`, they are always text. Sampler says what sampling options do;
        `json_schema` lets only tokens come with which the answer is a value of that schema.

        Raises:
            FallowError: the prompt is empty or longer than the context, or the schema is not taken.
            UsageError: a sampling option out of range.
        """
        sampler = Sampler(
            temperature, top_p, top_k, min_p, seed, repeat_penalty, presence_penalty,
            frequency_penalty, logit_bias or {},
            None if json_schema is None else self.grammars.of_schema(json_schema),
        )  # fmt: skip
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
        sampler: Sampler,
        stop: Sequence[str] = (),
        *,
        lossless: bool = False,
        reuse: bool = False,
        top_logprobs: int | None = None,
        echo: str | None = None,
        activity: bool = False,
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
            activity: tell with every token of the answer which neurons were active for it.

        Raises:
            FallowError: the prompt is empty or longer than the context.
            UsageError: max_tokens below 1, or with `echo` below 0; or an empty stop text.
        """
        return self.begin(
            ids, max_tokens, sampler, stop, lossless=lossless, reuse=reuse,
            top_logprobs=top_logprobs, echo=echo, activity=activity,
        ).pieces()  # fmt: skip

    def begin(
        self,
        ids: Sequence[int] | np.ndarray,
        max_tokens: int,
        sampler: Sampler,
        stop: Sequence[str] = (),
        *,
        slot: int = 0,
        lossless: bool = False,
        reuse: bool = False,
        top_logprobs: int | None = None,
        echo: str | None = None,
        activity: bool = False,
    ) -> Answer:
        """As `answer`, for a `Batch` of answers in different slots.

        Raises:
            FallowError, UsageError: as `answer`; or there is no such slot.
        """
        self._check_slot(slot)
        if max_tokens < (1 if echo is None else 0):
            raise UsageError("--max-new-tokens must be at least 1")
        if "" in stop:
            raise UsageError("a stop text is empty, with which every text begins; leave it out")
        tokens = self._check_ids(ids, new=max_tokens)
        return Answer(
            self, tokens, max_tokens, sampler, tuple(stop), lossless, reuse, top_logprobs, echo,
            activity, slot,
        )  # fmt: skip

    def begin_embedding(self, ids: Sequence[int] | np.ndarray, *, slot: int = 0) -> Embedding:
        """Of a text (T,), for a `Batch`.

        Raises:
            FallowError: the text is empty, longer than the context, or has an id outside the
                vocabulary.
            UsageError: there is no such slot.
        """
        self._check_slot(slot)
        tokens = self._check_ids(ids)
        return Embedding(self, tokens, 0, Sampler(), (), False, False, None, None, False, slot)

    def reset_stats(self) -> None:
        self._core.reset_stats()

    def idle_neurons(self, figures: dict[str, Any] | None = None) -> np.ndarray:
        """Share of neurons per layer, (L,), that were zero in the tokens since `reset_stats`.

        `figures`: or in those that these counters are of.
        """
        return 1 - self._share_of_neurons("active", figures)

    @property
    def neurons(self) -> list[int]:
        """How many each layer has; of a mixture those of all its experts."""
        return self._core.neurons

    def active_neurons(self) -> np.ndarray:
        """Neurons that were not zero in the last pass, (T, L, neurons) bool, if it recorded them.

        Of each of its tokens; where it read more than `_core.FEW`, of the last. All of a layer's
        where none is left out; of a mixture of experts all those of the experts that were chosen,
        whatever a rule leaves out inside them. Rows of narrower layers end in False.
        """
        layers, neurons = self._core.n_layers, max(self.neurons)
        rows = np.frombuffer(self._core.active_neurons(), dtype=np.uint8)
        bits = np.unpackbits(rows.reshape(-1, layers, -(-neurons // 8)), axis=2, bitorder="little")
        return bits[..., :neurons].astype(bool)

    def idle_in_experts(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a mixture: share of its experts left out by tokens, and of those used of neurons.

        Per layer, (L,) each, since `reset_stats`, without an expert that all tokens share.
        """
        uses, figures = self.expert_uses().sum(axis=1), self.core_stats()
        d_ff, tokens = self.file.get("fallow.intermediate_size"), max(1, figures["tokens"])
        shared = tokens * self.file.get("fallow.shared_intermediate_size", 0)
        active = np.array(figures["active"]) - shared
        return 1 - uses / (tokens * self.n_experts), 1 - active / np.maximum(uses * d_ff, 1)

    def predicted_neurons(self) -> np.ndarray:
        """Share of neurons per layer, (L,), whose gate was read because it was predicted to matter.

        Of all tokens since `reset_stats`, while prompts are read without: call it after the prompt.
        Zeros where the file has no predictor.
        """
        return self._share_of_neurons("predicted")

    def _share_of_neurons(self, which: str, figures: dict[str, Any] | None = None) -> np.ndarray:
        figures = figures or self.core_stats()
        width = max(1, figures["tokens"]) * np.array(self.neurons)
        return np.array(figures[which]) / width

    def expert_uses(self) -> np.ndarray:
        """Tokens that chose each expert since `reset_stats`, (L, n_experts)."""
        uses = np.array(self.core_stats()["expert_uses"], dtype=np.int64)
        return uses.reshape(-1, max(1, self.n_experts))

    @property
    def dtype_name(self) -> str:
        """The type of gate_proj or, without one, up_proj: what most weights are."""
        name = "gate_proj" if self.file.get("fallow.gated") else "up_proj"
        ffn = "layers.0.experts.0" if self.n_experts else "layers.0"
        return self.matrix(f"{ffn}.{name}").type.lower()

    @property
    def n_experts(self) -> int:
        """Of a layer; 0: the model is no mixture of experts."""
        return int(self.file.get("fallow.n_experts", 0))

    def core_stats(self) -> dict[str, Any]:
        """Counters of the core since `reset_stats`: see csrc/engine/runtime.h."""
        return self._core.stats()

    def logits_hash(self) -> str:
        """16 hex digits of the last token's logits: equal runs have equal hashes."""
        return logits_hash(self.last_logits)
