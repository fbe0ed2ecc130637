"""Progress of long work, on stderr, so that stdout stays readable by programs; and who watches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

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


ProgressHook = Callable[[str, int, int | None], Any]
LogHook = Callable[[dict[str, float], int], Any]


_progress_hook: ContextVar[ProgressHook | None] = ContextVar("progress_hook", default=None)
_log_hook: ContextVar[LogHook | None] = ContextVar("log_hook", default=None)


@contextmanager
def watch(progress: ProgressHook | None = None, log: LogHook | None = None) -> Iterator[None]:
    """Tells two functions, inside the block and its thread, how far work is and what it finds.

    Args:
        progress: called as progress(work, done, total) when a work begins and at every step of it,
            in place of the bar on stderr; total is None where it is not known.
        log: called as log(figures, step), as trackers of runs are: `wandb.Run.log` and
            `mlflow.log_metrics` as they stand. Names begin with the work, "evaluate/loss" say;
            steps are windows, tries of a search, or steps of a training, from 0 in each work.
    """
    before = _progress_hook.get(), _log_hook.get()
    _progress_hook.set(progress or before[0])
    _log_hook.set(log or before[1])
    try:
        yield
    finally:
        _progress_hook.set(before[0])
        _log_hook.set(before[1])


def log(work: str, step: int, figures: Mapping[str, float | None]) -> None:
    """Gives figures of a work to whoever watches, without those that are None."""
    hook = _log_hook.get()
    if hook is not None:
        known = {f"{work}/{name}": float(v) for name, v in figures.items() if v is not None}
        hook(known, step)


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


class _Told:
    """For a function that was given to `watch`."""

    def __init__(self, hook: ProgressHook, total: int | None, text: str) -> None:
        self._hook, self._total, self._text, self._done = hook, total, text, 0
        self.advance(0)

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._hook(self._text, self._done, self._total)


@contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Ticker]:
    """A progress bar of `total` steps on a terminal, a line per tenth elsewhere; see `watch`."""
    hook = _progress_hook.get()
    if hook is not None:
        yield _Told(hook, total, text)
        return
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
