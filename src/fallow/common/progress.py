"""Progress of long work, on stderr, so that stdout stays readable by programs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Names of files may look like markup or an emoji: model[1].gguf, a:cat:b.
console = Console(stderr=True, markup=False, emoji=False)


def note(text: str) -> None:
    """One line on stderr that something is not as it might be."""
    console.print(f"note: {text}", soft_wrap=True, highlight=False, markup=False)


class Ticker(Protocol):
    def advance(self, steps: int = 1) -> None: ...


class _Bar:
    def __init__(self, bar: Progress, total: int | None, text: str) -> None:
        self._bar = bar
        self._task = bar.add_task(text, total=total)

    def advance(self, steps: int = 1) -> None:
        self._bar.advance(self._task, steps)


class _Lines:
    """For logs: one line per tenth of the work."""

    def __init__(self, total: int | None, text: str) -> None:
        self._total, self._text, self._done, self._tenth = total, text, 0, 0

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._total and self._done * 10 // self._total > self._tenth:
            self._tenth = self._done * 10 // self._total
            console.print(f"{self._text}: {self._done}/{self._total}", highlight=False)


@contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Ticker]:
    """A progress bar of `total` steps on a terminal, a line per tenth elsewhere."""
    if not console.is_terminal:
        yield _Lines(total, text)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(bar, total, text)
