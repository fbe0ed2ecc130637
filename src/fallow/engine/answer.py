"""An answer: the prompt read, tokens picked, and the text that they make."""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fallow import _core
from fallow.checkpoints.tokenizer import Ids, TextStream, TextTokenizer
from fallow.common.errors import FallowError
from fallow.engine.drafting import PASS_COST, STREAMED_COST, Lookup
from fallow.engine.process import peak_rss_mb
from fallow.engine.sampling import Sampler, TokenChoice, choice_of
from fallow.engine.stats import Activity, Counters, Stats, disk_figures, logits_hash

if TYPE_CHECKING:
    from fallow.engine.engine import Engine

PREFILL_STEP = 512  # tokens of a prompt between which an answer can be stopped
ECHO_STEP = 32  # as many, of a prompt whose every token's logits are wanted: 20 MB of Qwen2.5's


# A token, the logits that it was picked of, and what was used for it.
Pick = tuple[int, np.ndarray, Activity | None]


@dataclass(frozen=True)
class Piece:
    """A part of an answer; no text: nothing yet. `tokens` are those that the text is made of."""

    text: str = ""
    tokens: tuple[TokenChoice, ...] = ()
    embedding: np.ndarray | None = None  # (hidden_size,), of an `Embedding` the last piece's

    @property
    def says(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.text or self.tokens) or self.embedding is not None


@dataclass(eq=False)
class Read:
    """Tokens that an answer needs read before it goes on, which `Engine.read` does.

    Then `rows` are the logits, (T, vocabulary) of `every` token or (1, vocabulary) of the last, or
    if they are asked for the `hidden` states, (T, hidden_size), of every token. `active` are the
    neurons that were used, (T, L, neurons) bool, if the answer tells its activity.
    """

    answer: "Answer"
    ids: Sequence[int] | np.ndarray
    every: bool = False
    of_prompt: bool = False
    hidden: bool = False
    rows: np.ndarray = field(init=False)
    active: np.ndarray | None = field(init=False)


@dataclass(eq=False)
class Answer:
    """What `Engine.begin` was asked for. It reads as a user of its slot of its own."""

    engine: "Engine"
    ids: np.ndarray  # (T,), the prompt
    max_tokens: int
    sampler: Sampler
    stop: tuple[str, ...]
    lossless: bool
    reuse: bool
    top_logprobs: int | None
    echo: str | None
    activity: bool
    slot: int
    alone: bool = field(default=True, init=False)  # whether no other answer is being made
    stats: Stats = field(init=False)
    counters: Counters = field(init=False)
    _last: np.ndarray | None = field(default=None, init=False)  # logits (vocabulary,)
    _bytes_told: int = field(default=0, init=False)  # of those read since the prompt

    def __post_init__(self) -> None:
        self.stats, self.counters = Stats(prompt_tokens=len(self.ids)), self.engine

    def pieces(self) -> Iterator[Piece]:
        """The answer, as it is made, where no other is at the same time."""
        with closing(self.steps()) as steps:
            for step in steps:
                if isinstance(step, Read):
                    self.engine.read([step])
                else:
                    yield step

    def steps(self) -> Generator[Piece | Read]:
        """The answer, as it is made, and between its pieces what must be read first."""
        engine, ids, max_tokens = self.engine, self.ids, self.max_tokens
        echo, top_logprobs = self.echo, self.top_logprobs
        start = time.perf_counter()
        tells = echo is not None and top_logprobs is not None
        with engine._turn(self, self.slot, begins=True):
            # The last token is always read: its logits are needed.
            read = engine.cached(ids, self.slot) if self.reuse and not tells else 0
            del engine._held[self.slot][read:]
            engine.stats = stats = self.stats
            stats.cached_tokens = read
            self.counters.reset_stats()
        told = top_logprobs if tells else None
        logits, seen, choices = yield from self._read_prompt(read, told)
        stats.ttft_ms = 1e3 * (time.perf_counter() - start)
        stats.prefill_tps = (len(ids) - stats.cached_tokens) / (stats.ttft_ms / 1e3)
        self.counters.reset_stats()
        self.sampler.begin(ids, engine.vocabulary_size)
        if echo is not None:
            yield Piece(echo, _without_added_bos(choices, echo, engine.tokenizer))
        decode_start, ends = time.perf_counter(), set(engine.tokenizer.eos_ids)
        guesses = self.lossless or engine.streams
        tokens = self._verified(logits, seen) if guesses else self._picks(logits, seen)
        text = AnswerText(engine.tokenizer, self.stop, ids)
        stats.finish = "" if max_tokens else "length"
        try:
            for pick in tokens if max_tokens else ():
                if isinstance(pick, Read):
                    yield pick
                    continue
                token, row, seen = pick
                if token in ends:
                    stats.finish = "stop"
                    rest = text.rest()
                    end = (choice_of(token, row, top_logprobs),) if tells else ()
                    yield Piece(rest.text, rest.tokens + end)
                    break
                stats.new_tokens += 1
                full = stats.new_tokens == max_tokens
                piece = text.add(choice_of(token, row, top_logprobs, seen), full)
                if text.stopped or full:
                    stats.finish = "stop" if text.stopped else "length"
                yield piece
                if stats.finish:
                    break
        finally:
            self._end(time.perf_counter() - decode_start)

    def _end(self, decode_seconds: float | None = None) -> None:
        """Leaves the slot to this thread, where no other user has it by now."""
        with self.engine._lock:
            if self.engine._users[self.slot] is self:  # otherwise the counters are another's
                if decode_seconds is not None:
                    self._finish(decode_seconds)
                self.engine._users[self.slot] = threading.get_ident()

    def _read_prompt(
        self, read: int, top_logprobs: int | None
    ) -> Generator[Piece | Read, None, tuple[np.ndarray, Activity | None, list[TokenChoice]]]:
        """Reads on after the first `read` tokens; gives empty pieces where that takes long.

        Returns:
            The last token's logits (vocabulary,) and activity, and with `top_logprobs`, where none
            was read before, a choice for every token.
        """
        engine, ids = self.engine, self.ids
        step = len(ids) if engine.streams else PREFILL_STEP  # streaming reads the file every time
        choices: list[TokenChoice] = []
        every = top_logprobs is not None
        if every:
            step, choices = ECHO_STEP, [TokenChoice(int(first), None) for first in ids[:1]]
        while True:
            some = Read(self, ids[read : read + step], every, of_prompt=True)
            yield some
            rows, seen = self._result(some), self._activities(some)[-1]
            read += step
            if every:
                after = ids[len(choices) : read + 1].tolist()  # of the last token nothing
                choices += [
                    choice_of(*each, top_logprobs) for each in zip(after, rows, strict=False)
                ]
            if read >= len(ids):
                return rows[-1], seen, choices
            yield Piece()

    def _result(self, read: Read) -> np.ndarray:
        self._last = read.rows[-1]
        return read.rows

    def _activities(self, read: Read) -> list[Activity | None]:
        """Of the tokens read, or of a block of the prompt its last; None: not asked for."""
        if read.active is None:
            return [None] * _core.FEW
        first: int | None = None
        if not read.of_prompt:
            total = round(self.counters.core_stats()["bytes_read"])
            first, self._bytes_told = total - self._bytes_told, total
        return [
            Activity.of(neurons, self.engine.neurons, 0 if i and not read.of_prompt else first)
            for i, neurons in enumerate(read.active)
        ]

    def _picks(self, logits: np.ndarray, seen: Activity | None) -> Iterator[Pick | Read]:
        """What the sampler picks of which logits; at first of these, the prompt's."""
        while True:
            token = self.sampler.pick(logits)
            yield token, logits, seen
            read = Read(self, [token])
            yield read
            logits, seen = self._result(read)[0], self._activities(read)[0]

    def _verified(self, logits: np.ndarray, seen: Activity | None) -> Iterator[Pick | Read]:
        """As `_picks`, of the dense model if asked to, in passes that also read guesses.

        While other answers are made there are none: what they read takes their place.
        """
        engine, stats = self.engine, self.stats
        lookup = Lookup(self.ids.tolist(), STREAMED_COST if engine.streams else PASS_COST)
        token, row = self.sampler.pick(logits), logits
        while True:
            yield token, row, seen
            lookup.add(token)
            position, alone = len(engine._held[self.slot]), self.alone
            most = min(_core.FEW, engine.context - position) - 1
            guesses = lookup.propose(most) if alone else []
            start = time.perf_counter()
            read = Read(self, [token, *guesses], every=True)
            yield read
            rows, activities = self._result(read), self._activities(read)
            seconds = time.perf_counter() - start
            stats.drafted += len(guesses)
            for held, (row, seen) in enumerate(zip(rows, activities, strict=False)):
                token = self.sampler.pick(row)
                if held == len(guesses) or token != guesses[held]:
                    break
                stats.accepted += 1
                yield token, row, seen
            if alone:
                lookup.learn(len(guesses), held, seconds)
            for guess in guesses[:held]:
                lookup.add(guess)
            with engine._turn(self, self.slot):
                del engine._held[self.slot][position + 1 + held :]

    def _finish(self, seconds: float) -> None:
        stats, figures = self.stats, self.counters.core_stats()
        # Wrong guesses were read too, and count for nothing.
        decoded = figures["tokens"] - (stats.drafted - stats.accepted)
        if decoded:
            stats.decode_tps = decoded / seconds
            stats.bytes_per_token = figures["bytes_read"] / decoded
            stats.gbps = figures["bytes_read"] / seconds / 1e9
            stats.sparsity_per_layer = self.engine.idle_neurons(figures).tolist()
            for name, value in disk_figures(figures, decoded).items():
                setattr(stats, name, value)
        stats.peak_rss_mb = peak_rss_mb()
        stats.logits_hash = logits_hash(self._last)


class Embedding(Answer):
    """An answer that says nothing, but gives the text's embedding as its last piece.

    That is the mean over tokens of the hidden states after the last norm, of Euclidean length 1:
    llama.cpp's server, with `--embeddings --pooling mean`, and sentence-transformers' "mean" do so.
    """

    def steps(self) -> Generator[Piece | Read]:
        """As of any answer. Raises FallowError where the mean is 0, NaN or infinite."""
        engine, stats, start = self.engine, self.stats, time.perf_counter()
        with engine._turn(self, self.slot, begins=True):
            engine._held[self.slot].clear()
            engine.stats = stats
            self.counters.reset_stats()
        total = np.zeros(engine.hidden_size)
        try:
            for i in range(0, len(self.ids), PREFILL_STEP):
                read = Read(self, self.ids[i : i + PREFILL_STEP], of_prompt=True, hidden=True)
                yield read
                total += read.rows.sum(axis=0, dtype=np.float64)
                yield Piece()
            stats.prefill_tps = len(self.ids) / (time.perf_counter() - start)
            stats.peak_rss_mb = peak_rss_mb()
            length = float(np.linalg.norm(total))
            if not (np.isfinite(length) and length > 0):
                raise FallowError(
                    f"the mean of the model's hidden states has the length {length}; check the "
                    "file with: fallow evaluate"
                )
            stats.finish = "stop"
            yield Piece(embedding=(total / length).astype(np.float32))
        finally:
            self._end()


class AnswerText:
    """The text of an answer as it grows. What a later token may change is held back."""

    def __init__(self, tokenizer: TextTokenizer, stop: tuple[str, ...], prompt: Ids = ()) -> None:
        self._stream, self._stop = TextStream(tokenizer, prompt), stop
        # What is held back: text that the stream has settled, and tokens with the character of the
        # text at which each begins.
        self._held, self._tokens = "", deque[tuple[int, TokenChoice]]()
        self._given, self._ahead = 0, 0  # characters given, and of these not settled yet
        self.stopped = False  # a stop text came

    @property
    def is_cut(self) -> bool:
        """Whether the text ends within a character."""
        return bool(self._stream.tail)

    def add(self, choice: TokenChoice, last: bool) -> Piece:
        """What one more token lets say; of the last token all."""
        self._tokens.append((self._given + len(self._text()), choice))
        self._settle(self._stream.add(choice.id))
        text = self._text()
        if not last:
            tail = self._stream.tail  # what a later byte may complete
            text = text[: max(0, len(text) - (len(tail) - len(tail.rstrip("\ufffd"))))]
        # What was given has no stop text, nor the beginning of one at its end.
        cut = min((i for s in self._stop if (i := text.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            while self._tokens and self._tokens[-1][0] >= self._given + cut:
                self._tokens.pop()
            return self._give(text[:cut], last=True)
        if not last:
            text = text[: len(text) - _stop_begun(text, self._stop)]
        return self._give(text, last)

    def rest(self) -> Piece:
        """What is still held back."""
        return self._give(self._text(), last=True)

    def _text(self) -> str:
        """What is not given yet."""
        return self._held + self._stream.tail[self._ahead :]

    def _settle(self, text: str) -> None:
        if text:
            self._held += text[self._ahead :]
            self._ahead = 0

    def _give(self, text: str, last: bool) -> Piece:
        if not text and not last:
            return Piece()  # the tokens wait for their text
        self._given += len(text)
        self._ahead += max(0, len(text) - len(self._held))
        self._held = self._held[len(text) :]
        piece = Piece(text, tuple(choice for _, choice in self._tokens))
        self._tokens.clear()
        return piece


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


def common(a: list[int], b: list[int]) -> int:
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
