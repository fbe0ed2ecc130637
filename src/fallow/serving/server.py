"""Listens, and shuts down without losing a request."""

import asyncio
import gc
import os
import re
import signal
import socket
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from fallow.common.errors import FallowError, UsageError
from fallow.common.progress import console
from fallow.engine.engine import Engine
from fallow.serving.app import create_app
from fallow.serving.connections import BACKLOG, LARGEST_HEADER, Connection, Room, listen
from fallow.serving.worker import TURN_SECONDS, Worker

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
CONNECTIONS = 32  # that a client may have besides two for each place in the queue
CLOSE_SECONDS = 5.0  # for responses to leave, after the last answer has ended


def serve(
    engine: Engine,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8080,
    queue: int = 16,
    api_key: str | None = None,
    max_body: int = 1 << 20,
    grace: float = 30.0,
    cors: Sequence[str] = (),
    turn: float = TURN_SECONDS,
) -> None:
    """Serves until SIGINT or SIGTERM; then what waits fails and what runs has `grace` seconds.

    An answer may take `turn` seconds while another client waits. Without a key a server on the
    loopback interface answers by its names alone.

    Raises:
        FallowError: the address is not to be had.
        UsageError: one of `cors` is no origin, or the key is empty.
    """
    if api_key is not None and not all(key.strip() for key in api_key.split(",")):
        raise UsageError("the API key is empty; give one, or leave out --api-key (FALLOW_API_KEY)")
    for origin in cors:
        # A browser sends just these parts; anything else would never be found equal.
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
            raise UsageError(
                f"--cors {origin} is no origin; give one such as http://localhost:3000, or '*'"
            )
    room = room_for(queue)
    try:
        sockets = listen(host, port, room)
    except OSError as error:
        raise FallowError(
            f"cannot listen on {host}:{port}; it is in use or not allowed, choose another --port"
        ) from error
    _ = engine.tokenizer  # read now, not while the first request keeps all others waiting
    worker = Worker(engine, queue, turn)
    is_local = host.strip("[]") in (name.strip("[]") for name in LOOPBACK)
    if api_key is None and not is_local:
        console.print(
            f"warning: whoever reaches {host}:{port} may use this server; give it an --api-key",
            highlight=False,
        )
    hosts = LOOPBACK if is_local and api_key is None else ()
    app = create_app(worker, name, api_key, max_body, cors, hosts)
    server = _Server(configured(app, room, grace), worker, grace)
    # What is loaded stays: collections, which large bodies cause, need not look through it again (a
    # body of 100,000 lists kept all others waiting for 101 ms, and so for 46).
    gc.collect()
    gc.freeze()
    try:
        run(server, sockets)
    finally:
        gc.unfreeze()
        worker.close(0)
        worker.join(CLOSE_SECONDS)


def room_for(queue: int) -> Room:
    """Room for the connections of a server where so many requests may wait."""
    of_one = CONNECTIONS + 2 * queue  # those that wait, and some to be told that they cannot
    return Room(of_one, 4 * of_one)


def configured(app: FastAPI, room: Room, grace: float) -> uvicorn.Config:
    """How uvicorn serves the application."""
    protocol: Any = partial(Connection, room)
    return uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        backlog=BACKLOG,
        log_level="warning",
        access_log=False,
        # Whom uvicorn believes is told by this variable. By itself it would believe this machine,
        # so that whoever asks from here had as many addresses, and turns, as he likes.
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,
        timeout_graceful_shutdown=int(grace + CLOSE_SECONDS),
        h11_max_incomplete_event_size=LARGEST_HEADER,
    )


def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
    """Serves in the loop that calls accept of the sockets, as uvloop and Windows' own do not."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(server.serve(sockets))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float) -> None:
        super().__init__(config)
        self._worker, self._grace = worker, grace
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            for server in self.servers:
                for listening in server.sockets:
                    host, port = listening.getsockname()[:2]
                    console.print(
                        f"serving {self._worker.engine.name} on http://{host}:{port}/v1, "
                        f"a chat in the browser on http://{host}:{port}/, Ctrl-C ends",
                        soft_wrap=True,
                        highlight=False,
                    )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # As uvicorn's, which would also end the process by the signal after the shutdown.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
        if self._loop is not None:  # not here: the signal may have come while a lock is held
            self._loop.call_soon_threadsafe(self._worker.close, self._grace)
