"""Answers requests one after another: an engine holds one conversation at a time."""

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fallow.common.errors import FallowError
from fallow.engine.answer import Piece
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler
from fallow.engine.stats import Stats

FIRST_GUESS = 5.0  # seconds that an answer takes, before one was given
SMOOTHING = 0.2  # weight of the last answer in the mean that Retry-After is of


class Busy(FallowError):
    """The queue is full; `retry_after` whole seconds may help."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after} s")
        self.retry_after = retry_after


class Closing(FallowError):
    """The server shuts down."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; send the request again later")


@dataclass(eq=False)
class Job:
    """A request. `deliver` is called in the worker's thread: pieces, then Stats or an error."""

    client: str  # whoever asks; clients take turns
    ids: np.ndarray  # (T,), the prompt
    max_tokens: int
    sampler: Sampler
    deliver: Callable[[Piece | Stats | Exception], None]
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    echo: str | None = None  # the prompt's text, if it is wanted back
    activity: bool = False  # which neurons each token used is told
    with_plan: bool = True
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """A thread with a bounded queue in front of it.

    Clients take turns, each with its oldest request, so that one with many does not keep another
    waiting.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self._plan = engine.plan
        self._waiting: dict[str, deque[Job]] = {}  # clients in the order of their turns
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closing = False
        self._deadline = math.inf  # of the running answer, once closing
        self._seconds = FIRST_GUESS  # an answer takes, smoothed
        self._thread = threading.Thread(target=self._run, name="fallow-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> bool:
        return self._running is not None

    def submit(self, *jobs: Job) -> None:
        """Takes all of the jobs or none.

        Raises:
            Busy: the queue has no room for them.
            Closing: the server shuts down.
        """
        with self._changed:
            if self._closing:
                raise Closing
            waiting = self.waiting
            if waiting + len(jobs) > self.limit:
                ahead = waiting + (self._running is not None)
                raise Busy(waiting, max(1, math.ceil(ahead * self._seconds)))
            for job in jobs:
                self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drops a job whose client has gone; a running one ends at its next token."""
        job.cancelled.set()
        with self._changed:
            line = self._waiting.get(job.client)
            if line and job in line:
                line.remove(job)
                if not line:
                    del self._waiting[job.client]

    def close(self, grace: float) -> None:
        """Fails what waits, and what runs after `grace` seconds. Returns at once."""
        with self._changed:
            self._closing = True
            self._deadline = time.monotonic() + grace
            left = [job for line in self._waiting.values() for job in line]
            self._waiting.clear()
            self._changed.notify()
        for job in left:
            job.deliver(Closing())

    def join(self, timeout: float | None = None) -> None:
        """Waits until the thread has ended, after `close`."""
        self._thread.join(timeout)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if not self._waiting:
                return None
            client, line = next(iter(self._waiting.items()))
            job = line.popleft()
            del self._waiting[client]
            if line:
                self._waiting[client] = line  # behind the others
            self._running = job
            return job

    def _run(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            try:
                job.deliver(self._answer(job))
            except FallowError as error:
                job.deliver(error)
            except Exception as error:  # a defect of ours must not end the thread
                traceback.print_exc()
                job.deliver(error)
            seconds = time.monotonic() - start
            self._seconds += SMOOTHING * (seconds - self._seconds)
            self._running = None

    def _answer(self, job: Job) -> Stats:
        plan = self._plan if job.with_plan else None
        if self.engine.plan is not plan:
            self.engine.use_plan(plan)
            self.engine.reset()  # what the cache holds was read with the other plan
        pieces: Any = self.engine.answer(
            job.ids, job.max_tokens, job.sampler, job.stop,
            reuse=True, top_logprobs=job.top_logprobs, echo=job.echo, activity=job.activity,
        )  # fmt: skip
        for piece in pieces:
            if job.cancelled.is_set():
                pieces.close()
                break
            if time.monotonic() > self._deadline:
                pieces.close()
                raise Closing
            if piece.text or piece.tokens:
                job.deliver(piece)
        return self.engine.stats
