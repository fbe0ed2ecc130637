"""What tests of the server share: a server in a thread, and an engine as slow as they like."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from fallow.engine.answer import Piece
from fallow.engine.stats import Stats
from fallow.serving.app import create_app
from fallow.serving.server import configured
from fallow.serving.worker import Worker

JSON = {"Content-Type": "application/json"}
HI = [{"role": "user", "content": "hi"}]


@contextmanager
def served(engine: Any, queue: int = 16, **options: Any) -> Iterator[str]:
    """The server in a thread; its address."""
    worker = Worker(engine, queue)
    app = create_app(worker, "tiny", **options)
    server = uvicorn.Server(configured(app, "127.0.0.1", 0, 0, queue))
    thread = threading.Thread(target=server.run)
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

    def __init__(self, tokenizer: Any, piece: Piece | Exception | None = None) -> None:
        self.tokenizer = tokenizer
        self.piece = piece or Piece("a")  # what it says all the time
        self.stats: Any = Stats()
        self.answered: list[int] = []  # first ids of prompts
        self.closed = 0
        self.reused: list[bool] = []  # whether what prompts before had read might be

    def answer(self, ids: Any, max_tokens: int, *_: Any, **options: Any) -> Iterator[Piece]:
        self.answered.append(int(ids[0]))
        self.reused.append(options["reuse"])
        self.stats = Stats(prompt_tokens=len(ids), finish="length")
        try:
            for _ in range(max_tokens):
                time.sleep(0.01)
                if isinstance(self.piece, Exception):
                    raise self.piece
                yield self.piece
        except GeneratorExit:
            self.closed += 1
            raise
