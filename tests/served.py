"""What tests of the server share: a server in a thread, and an engine as slow as they like."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fallow.engine.answer import Piece, Read
from fallow.engine.stats import Share, Stats
from fallow.serving.app import create_app
from fallow.serving.connections import listen
from fallow.serving.server import configured, room_for, run
from fallow.serving.worker import Worker

JSON = {"Content-Type": "application/json"}
HI = [{"role": "user", "content": "hi"}]


@contextmanager
def served(engine: Any, queue: int = 16, **options: Any) -> Iterator[str]:
    """The server in a thread; its address."""
    worker = Worker(engine, queue)
    app = create_app(worker, "tiny", **options)
    room = room_for(queue)
    sockets = listen("127.0.0.1", 0, room)
    server = uvicorn.Server(configured(app, room, 0))
    thread = threading.Thread(target=run, args=(server, sockets))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        worker.close(0)
        server.should_exit = True
        thread.join()
        worker.join()


class Slow:
    """Stands for an engine whose answers take as long as asked for: max_tokens of 10 ms."""

    context, vocabulary_size, plan = 10_000, 300, None

    def __init__(
        self, tokenizer: Any, piece: Piece | Exception | None = None, slots: int = 1
    ) -> None:
        self.tokenizer, self.slots = tokenizer, slots
        self.piece = piece or Piece("a")  # what it says all the time
        self.answered: list[int] = []  # first ids of prompts
        self.closed = 0
        self.reused: list[bool] = []  # whether what prompts before had read might be

    def begin(self, ids: Any, max_tokens: int, *_: Any, **options: Any) -> Any:
        self.answered.append(int(ids[0]))
        self.reused.append(options["reuse"])
        return _SlowAnswer(self, len(ids), max_tokens, options["slot"])

    def cached(self, ids: Any, slot: int) -> int:
        return 0

    def read(self, reads: list[Read]) -> None:
        time.sleep(0.01)

    def reset_stats(self) -> None:
        pass

    def core_stats(self) -> dict[str, Any]:
        return {}


class _SlowAnswer:
    lossless, alone, counters = False, True, Share()

    def __init__(self, engine: Slow, prompt_tokens: int, max_tokens: int, slot: int) -> None:
        self.engine, self.max_tokens, self.slot = engine, max_tokens, slot
        self.stats = Stats(prompt_tokens=prompt_tokens, finish="length")

    def steps(self) -> Iterator[Piece | Read]:
        try:
            for _ in range(self.max_tokens):
                yield Read(self, [0])  # type: ignore[arg-type]
                if isinstance(self.engine.piece, Exception):
                    raise self.engine.piece
                yield self.engine.piece
        except GeneratorExit:
            self.engine.closed += 1
            raise
