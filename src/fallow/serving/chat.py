"""A conversation in the terminal: `fallow run`."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text as Styled

from fallow.common.errors import FallowError, UsageError
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler
from fallow.engine.stats import Stats

HELP = """/stats   show sparsity and speed while the model answers, or stop to
/dense   run the dense model, or the plan again
/system TEXT   begin again with this system message
/reset   begin again
/quit    leave, as Ctrl-D does; Ctrl-C ends an answer"""


class Conversation:
    """What was said, and answers to what is said next.

    The oldest exchange is forgotten where the context would not hold `max_tokens` more; the system
    message stays.
    """

    def __init__(
        self, engine: Engine, sampler: Sampler, max_tokens: int, system: str | None = None
    ) -> None:
        if max_tokens < 1:
            raise UsageError("--max-new-tokens must be at least 1")
        self.engine, self.sampler, self.max_tokens = engine, sampler, max_tokens
        self.plan = engine.plan
        self.forgotten = 0  # exchanges
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        self.system = system
        if system:
            self.messages.append({"role": "system", "content": system})

    @property
    def dense(self) -> bool:
        return self.engine.plan is None

    def toggle_dense(self) -> None:
        """Switches between the plan and the dense model, from the next answer on.

        Raises:
            FallowError: there is no plan.
        """
        if self.plan is None:
            raise FallowError("there is no plan to leave; give one with --plan")
        self.engine.use_plan(None if self.engine.plan is not None else self.plan)

    def answer(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. Closed early, what was said of it counts as said.

        Raises:
            FallowError: the text alone exceeds the context, or the template refuses it.
        """
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            pieces = self.engine.answer(self._fitting(), self.max_tokens, self.sampler, reuse=True)
            for piece in pieces:
                if piece.text:
                    said.append(piece.text)
                    yield piece.text
        except FallowError:
            self.messages.pop()
            raise
        finally:
            if self.messages and self.messages[-1]["role"] == "user" and said:
                self.messages.append({"role": "assistant", "content": "".join(said)})

    def _fitting(self) -> list[int]:
        """The prompt's ids, after the oldest exchanges were forgotten if they had to be."""
        first = 1 if self.system else 0
        kept = list(self.messages)
        while True:
            ids = self.engine.tokenizer.chat(kept).tolist()
            if len(ids) + self.max_tokens <= self.engine.context:
                self.forgotten += (len(self.messages) - len(kept)) // 2
                self.messages = kept
                return ids
            if len(kept) < first + 3:
                raise FallowError(
                    f"this and an answer of {self.max_tokens} tokens exceed the context of "
                    f"{self.engine.context}; say less, or give fewer --max-new-tokens or a larger "
                    "--context"
                )
            del kept[first : first + 2]


def figures(stats: Stats) -> str:
    """One line of what was measured. An answer's first token is the prompt's: none is decoded."""
    parts = [f"{stats.new_tokens} token{'' if stats.new_tokens == 1 else 's'}"]
    if stats.sparsity_per_layer:
        parts.append(f"{stats.decode_tps:.1f} tok/s")
        parts.append(f"{stats.bytes_per_token / 1e6:.0f} MB/token")
        parts.append(f"{stats.sparsity:.0%} of neurons inactive")
    if stats.ttft_ms:
        parts.append(f"first after {stats.ttft_ms:.0f} ms")
    if stats.drafted:
        parts.append(f"{stats.accepted} of {stats.drafted} guesses held")
    if stats.cached_tokens:
        kept = f"{stats.cached_tokens} of {stats.prompt_tokens}"
        parts.append(f"{kept} prompt tokens kept from before")
    return ", ".join(parts)


def chat(conversation: Conversation, show_stats: bool = False) -> None:
    """Reads lines until the end of input, and answers them on stdout."""
    screen = _Screen(conversation, show_stats)
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then has history and editing
    screen.note(f"{conversation.engine.name}; /help tells the commands")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("/quit", "/exit"):
            return
        if line:
            try:
                screen.do(line)
            except FallowError as error:
                screen.note(f"error: {error}")


class _Rate:
    """Figures of an answer while it grows, from its first piece on."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._first: tuple[int, float] | None = None  # tokens, time

    def describe(self) -> str:
        tokens, now = self._engine.stats.new_tokens, time.perf_counter()
        if self._first is None:
            self._first = tokens, now
        decoded = tokens - self._first[0]
        if not decoded:  # the first token comes from the prompt's pass
            return ""
        inactive = float(self._engine.idle_neurons().mean())
        return f"{decoded / (now - self._first[1]):.1f} tok/s, {inactive:.0%} of neurons inactive"


class _Screen:
    """What the user sees."""

    def __init__(self, conversation: Conversation, show_stats: bool) -> None:
        self.conversation, self.show_stats = conversation, show_stats
        self.console = Console(highlight=False, markup=False, emoji=False)
        self.notes = Console(stderr=True, highlight=False, markup=False, emoji=False, style="dim")

    def note(self, text: str) -> None:
        self.notes.print(text, soft_wrap=True)

    def do(self, line: str) -> None:
        """A command, or something to answer."""
        if not line.startswith("/"):
            self.answer(line)
            return
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.note(HELP),
            "stats": self._stats,
            "dense": self._dense,
            "system": lambda text: self._reset(text.strip() or None),
            "reset": lambda _: self._reset(self.conversation.system),
        }
        if name not in commands:
            raise FallowError(f"unknown command /{name}; /help tells the commands")
        commands[name](rest)

    def _stats(self, _: str) -> None:
        self.show_stats = not self.show_stats
        self.note(f"stats {'on' if self.show_stats else 'off'}")
        if self.show_stats and self.conversation.engine.stats.new_tokens:
            self.note(figures(self.conversation.engine.stats))

    def _dense(self, _: str) -> None:
        self.conversation.toggle_dense()
        self.note("the dense model" if self.conversation.dense else "the plan")

    def _reset(self, system: str | None) -> None:
        self.conversation.reset(system)
        self.note("begun again")

    def answer(self, line: str) -> None:
        """Prints it as it comes; Ctrl-C ends it."""
        forgotten = self.conversation.forgotten
        pieces = self.conversation.answer(line)
        live = self.show_stats and self.console.is_terminal
        try:
            with self._live() if live else self._plain() as say:
                for piece in pieces:
                    say(piece)
        except KeyboardInterrupt:
            self.note("ended")
        finally:
            pieces.close()  # type: ignore[attr-defined]
        if self.conversation.forgotten > forgotten:
            self.note("the oldest part of the conversation no longer fits and was forgotten")
        if self.show_stats:
            self.note(figures(self.conversation.engine.stats))

    @contextmanager
    def _plain(self) -> Iterator[Callable[[str], None]]:
        def say(piece: str) -> None:
            print(piece, end="", flush=True)

        try:
            yield say
        finally:
            print(flush=True)

    @contextmanager
    def _live(self) -> Iterator[Callable[[str], None]]:
        """Whole lines scroll by; the last one and the figures below it are drawn anew."""
        line, rate = "", _Rate(self.conversation.engine)
        try:
            with Live(console=self.console, transient=True, auto_refresh=False) as view:

                def say(piece: str) -> None:
                    nonlocal line
                    *whole, line = (line + piece).split("\n")
                    for each in whole:
                        view.console.print(Styled(each))
                    below = Styled(rate.describe(), style="dim")
                    view.update(Group(Styled(line), below), refresh=True)

                yield say
        finally:  # what Live has drawn goes with it, on Ctrl-C too
            self.console.print(Styled(line))
