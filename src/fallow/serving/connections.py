"""Connections: how many there may be, and how long one may keep the server waiting."""

import asyncio
import json
import socket
from collections import Counter
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fallow.serving.limits import error_body, network_of

HEADER_SECONDS = 10.0  # that a request's header may take to arrive
REST_SECONDS = 5.0  # that the rest of a body may take which nobody reads
WRITE_SECONDS = 60.0  # that a client may take to read what was sent
LARGEST_HEADER = 1 << 16  # bytes
BACKLOG = 2048  # connections that may wait to be taken
REFUSED_AT_ONCE = 256  # connections, before it is others' turn
_BODY = json.dumps(error_body(503, "there are too many connections; try again later")).encode()
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Room:
    """Connections that there may be: of one client, and of all together."""

    def __init__(self, of_one: int, of_all: int) -> None:
        self.of_one, self.of_all = of_one, of_all
        self._open: Counter[str] = Counter()

    def enter(self, client: str) -> bool:
        """Whether there is room for one more, which then counts."""
        if self._open[client] >= self.of_one or self._open.total() >= self.of_all:
            return False
        self._open[client] += 1
        return True

    def leave(self, client: str) -> None:
        self._open[client] -= 1
        self._open += Counter()  # drops clients without any


class Listener(socket.socket):
    """Listens where the given socket does, which it replaces, and lets in whom there is room for.

    It turns the others away itself: asyncio would first make a task, a transport and a protocol for
    each. 1200 connections at once took 143 ms of the processor, and so take 70.
    """

    def __init__(self, listening: socket.socket, room: Room) -> None:
        super().__init__(fileno=listening.detach())
        self._room = room

    def accept(self) -> tuple[socket.socket, Any]:
        """As a socket's; BlockingIOError also says that it is others' turn."""
        for _ in range(REFUSED_AT_ONCE):
            connection, address = super().accept()
            if self._room.enter(network_of(address[0])):
                return connection, address
            with suppress(OSError):
                connection.send(_REFUSAL)
            connection.close()
        raise BlockingIOError


def listen(host: str, port: int, room: Room) -> list[socket.socket]:
    """Sockets at every address of a host.

    Raises OSError: an address is not to be had.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [
        Listener(socket.create_server(address, family=family, backlog=BACKLOG), room)
        for family, address in dict.fromkeys((f[0], f[4]) for f in found)
    ]


class Connection(H11Protocol):
    """uvicorn's, which has a deadline only for what comes between requests.

    A Listener has found room for it.
    """

    def __init__(self, room: Room, **given: Any) -> None:
        super().__init__(**given)
        self._room = room
        self._reading: asyncio.TimerHandle | None = None  # until it has come
        self._writing: asyncio.TimerHandle | None = None  # until it has left

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing is called where anything waits
        self._expect(HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        self._room.leave(network_of(self.transport.get_extra_info("peername")[0]))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def _watch(self) -> None:
        """A deadline for a header that has begun, or for the rest of a body that nobody reads.

        Limits has that of a body that is read; uvicorn's own is for a connection that says nothing.
        """
        state = self.conn.their_state
        answered = self.cycle is not None and self.cycle.response_complete
        if state is h11.IDLE and self.timeout_keep_alive_task is None:
            self._expect(HEADER_SECONDS)
        elif state is h11.SEND_BODY and answered:
            self._expect(REST_SECONDS)
        elif self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _expect(self, seconds: float) -> None:
        if self._reading is None:  # what trickles in does not put it off
            self._reading = self.loop.call_later(seconds, self.transport.abort)
