"""Answers requests, as many at once as the engine has slots."""

import math
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fallow.common.errors import FallowError
from fallow.engine.answer import Answer, Piece
from fallow.engine.batch import Batch, Said
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler
from fallow.engine.stats import Stats
from fallow.plan import Plan

FIRST_GUESS = 5.0  # seconds that an answer takes, before one was given
TURN_SECONDS = 300.0  # that an answer may take while another client waits
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


class Overlong(FallowError):
    """The prompt alone took the whole turn."""

    def __init__(self, turn: float) -> None:
        super().__init__(
            f"others waited {turn:.0f} s while the prompt was read; shorten it, or send it later"
        )


@dataclass(eq=False)
class Job:
    """A request. `deliver` is called in the worker's thread: pieces, then Stats or an error."""

    client: str  # whoever asks; clients take turns
    ids: np.ndarray  # (T,), the prompt
    max_tokens: int
    sampler: Sampler | None  # None: no answer is wanted, but the embedding of `ids`
    deliver: Callable[[Piece | Stats | Exception], None]
    stop: Sequence[str] = ()
    top_logprobs: int | None = None
    echo: str | None = None  # the prompt's text, if it is wanted back
    cache: Hashable = ""  # whose prompts it may share: those of jobs that have the same here
    activity: bool = False  # which neurons each token used is told
    with_plan: bool = True
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Running:
    """A job that is being answered."""

    job: Job
    start: float = field(default_factory=time.monotonic)
    answer: Answer | None = None
    said: bool = False
    ends: float = math.inf  # when another client has waited for a whole turn


class Worker:
    """A thread with a bounded queue in front of it.

    Clients take turns, each with its oldest request, so that one with many does not keep another
    waiting; nor does one answer, for more than `turn` seconds. Where the queue is full, a client
    gets the place of one that has more.

    A job goes to the free slot that holds most of its prompt, of those that it may share, or to the
    one that was not used for longest. Answers with and without the plan are not made at once: the
    weights lie in another order for each. So a job that needs the other waits until none runs, and
    those behind it with it.
    """

    def __init__(self, engine: Engine, limit: int, turn: float = TURN_SECONDS) -> None:
        self.engine, self.limit, self.turn = engine, limit, turn
        self._plan = engine.plan
        self._reserved: Counter[str] = Counter()  # places of requests that are no jobs yet
        # Whose prompt each slot holds; first the one that was not used for longest.
        self._caches: dict[int, Hashable] = {}
        self._waiting: dict[str, deque[Job]] = {}  # clients in the order of their turns
        self._changed = threading.Condition()
        self._batch, self._running = Batch(engine), list[_Running]()
        self._closing = False
        self._deadline = math.inf  # of running answers, once closing
        self._seconds = FIRST_GUESS  # an answer takes, smoothed
        self._thread = threading.Thread(target=self._run, name="fallow-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values())) + self._reserved.total()

    @property
    def running(self) -> bool:
        return bool(self._running)

    @property
    def n_running(self) -> int:
        return len(self._running)

    def reserve(self, client: str, n: int) -> None:
        """Takes n places in the queue, for jobs that are yet to be made.

        Raises:
            Busy: the queue has no room for them.
            Closing: the server shuts down.
        """
        with self._changed:
            if self._closing:
                raise Closing
            # Where slots are free, as many of those that wait are about to run.
            while self.waiting + n > self.limit + self.engine.slots - len(self._running):
                if not self._drop_for(client, n):
                    raise self._busy()
            self._reserved[client] += n

    def release(self, client: str, n: int) -> None:
        """Gives back what was reserved."""
        with self._changed:
            self._reserved[client] -= n
            self._reserved += Counter()  # drops clients without any

    def submit(self, *jobs: Job, reserved: bool = False) -> None:
        """Takes all of the jobs of a client or none. `reserved`: `reserve` took their places.

        Raises:
            Busy: the queue has no room for them.
            Closing: the server shuts down.
        """
        client = jobs[0].client
        if not reserved:
            self.reserve(client, len(jobs))
        with self._changed:
            self.release(client, len(jobs))
            if self._closing:
                raise Closing
            self._waiting.setdefault(client, deque()).extend(jobs)
            self._changed.notify()

    def _drop_for(self, client: str, n: int) -> bool:
        """Drops the newest job of whoever has most, unless the client would then have as many."""
        held = Counter({other: len(line) for other, line in self._waiting.items()})
        held += self._reserved
        most = max(self._waiting, key=held.__getitem__, default=client)
        if held[most] - 1 < held[client] + n:
            return False
        job = self._waiting[most][-1]
        self.cancel(job)
        job.deliver(self._busy())
        return True

    def _busy(self) -> Busy:
        ahead = (self.waiting + len(self._running)) / self.engine.slots
        return Busy(self.waiting, max(1, math.ceil(ahead * self._seconds)))

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

    def _next(self) -> _Running | None:
        """The job whose turn it is. None: it has no slot yet, or there is none and will be none."""
        with self._changed:
            while not self._waiting and not self._running and not self._closing:
                self._changed.wait()
            if not self._waiting or len(self._running) == self.engine.slots:
                return None
            client, line = next(iter(self._waiting.items()))
            if self._running and self._plan_of(line[0]) is not self.engine.plan:
                return None
            running = _Running(line.popleft())
            del self._waiting[client]
            if line:
                self._waiting[client] = line  # behind the others
            self._running.append(running)
            return running

    def _plan_of(self, job: Job) -> Plan | None:
        return self._plan if job.with_plan else None

    def _run(self) -> None:
        while True:
            while (running := self._next()) is not None:
                try:
                    self._start(running)
                except Exception as error:
                    self._end(running, error)
            if not self._running:
                return
            for said in self._batch.round():
                self._deliver(next(r for r in self._running if r.answer is said.answer), said)
            self._end_what_must()

    def _start(self, running: _Running) -> None:
        job, engine = running.job, self.engine
        if self._plan_of(job) is not engine.plan:
            engine.use_plan(self._plan_of(job))
            # What is cached was read with the engine's plan, and tells, by its count and by the
            # time it saves, what a prompt was.
            self._caches.clear()
        slot = self._slot_for(job)
        if job.sampler is None:
            running.answer = engine.begin_embedding(job.ids, slot=slot)
        else:
            running.answer = engine.begin(
                job.ids, job.max_tokens, job.sampler, job.stop,
                slot=slot, reuse=slot in self._caches and self._caches[slot] == job.cache,
                top_logprobs=job.top_logprobs, echo=job.echo, activity=job.activity,
            )  # fmt: skip
        self._caches.pop(slot, None)
        self._caches[slot] = job.cache
        self._deliver(running, self._batch.add(running.answer))

    def _slot_for(self, job: Job) -> int:
        used = {r.answer.slot for r in self._running if r.answer}
        free = [slot for slot in range(self.engine.slots) if slot not in used]
        order = list(self._caches)

        def worth(slot: int) -> tuple[int, int]:
            if slot not in self._caches:
                return 0, len(order)
            mine = self._caches[slot] == job.cache
            return self.engine.cached(job.ids, slot) if mine else 0, -order.index(slot)

        return max(free, key=worth)

    def _deliver(self, running: _Running, said: Said) -> None:
        if not running.job.cancelled.is_set():
            for piece in said.pieces:
                if piece.says:
                    running.job.deliver(piece)
                    running.said = True
        if said.ended:
            self._end(running, said.error or said.answer.stats)

    def _end_what_must(self) -> None:
        """Ends what was cancelled, and what has taken its time."""
        now, late = time.monotonic(), list[_Running]()
        waiting = list(self._waiting)
        for running in list(self._running):
            others = any(client != running.job.client for client in waiting)
            running.ends = min(running.ends, now + self.turn) if others else math.inf
            if running.job.cancelled.is_set():
                self._break_off(running)
            elif now > self._deadline:
                self._break_off(running, Closing())
            elif now > running.ends:
                late.append(running)
        if late:  # one at a time: its slot is enough for whoever has waited
            has = Counter(running.job.client for running in self._running)
            longest = max(late, key=lambda running: has[running.job.client])
            self._break_off(longest, None if longest.said else Overlong(self.turn), "length")

    def _break_off(
        self, running: _Running, error: Exception | None = None, finish: str = ""
    ) -> None:
        assert running.answer is not None
        self._batch.drop(running.answer)
        running.answer.stats.finish = finish
        self._end(running, error or running.answer.stats)

    def _end(self, running: _Running, result: Stats | Exception) -> None:
        if isinstance(result, Exception) and not isinstance(result, FallowError):
            traceback.print_exception(result)  # a defect of ours must not end the thread
        with self._changed:
            self._running.remove(running)
        self._seconds += SMOOTHING * (time.monotonic() - running.start - self._seconds)
        running.job.deliver(result)
