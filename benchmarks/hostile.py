"""The step `hostile` of reliability.py: requests that mean harm, and what others notice of them.

Each kind is sent for SECONDS by SENDERS clients at once to a `fallow serve` of its own, while
another client asks for /health all the time.
"""

import http.client
import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from load import attacked, memory_mb

SECONDS, SENDERS, MEMORY_MB = 3.0, 4, 400
LINES = 300  # connections of the kinds that hold them
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

Send = Callable[[int], str]  # to a port; what became of it


def kinds() -> dict[str, Send]:
    """What is sent, by its name."""
    text = {"model": "model", "max_tokens": 1}
    hi = {"role": "user", "content": "hi"}
    return {
        "200,000 prompts": _post(COMPLETIONS, text | {"prompt": ["a"] * 200_000}),
        "as many prompts as are taken": _post(COMPLETIONS, text | {"prompt": ["a"] * 256}),
        "200,000 empty prompts": _post(COMPLETIONS, text | {"prompt": [""] * 200_000}),
        "a prompt of 900,000 letters": _post(COMPLETIONS, text | {"prompt": "a" * 900_000}),
        "a prompt of 500,000 letters": _post(COMPLETIONS, text | {"prompt": "a" * 500_000}),
        "a prompt of 500,000 spaces": _post(COMPLETIONS, text | {"prompt": " " * 500_000}),
        "a prompt of 100,000 signs": _post(COMPLETIONS, text | {"prompt": "\U0001f600" * 100_000}),
        "combining signs": _post(COMPLETIONS, text | {"prompt": "a" + "\u0301" * 200_000}),
        "150,000 token ids": _post(COMPLETIONS, text | {"prompt": [1] * 150_000}),
        "100,000 lists of ids": _post(COMPLETIONS, text | {"prompt": [[1]] * 100_000}),
        "ids that are no tokens": _post(COMPLETIONS, text | {"prompt": [10**9, -1]}),
        "ids of 300 digits": _post(COMPLETIONS, text | {"prompt": [10**300]}),
        "a context that is full": _post(COMPLETIONS, text | {"prompt": [1] * 5000}),
        "control tokens": _post(COMPLETIONS, text | {"prompt": "<|im_start|>" * 40_000}),
        "100,000 stop texts": _post(COMPLETIONS, text | {"prompt": "a", "stop": ["a"] * 100_000}),
        "a stop text of 900,000": _post(COMPLETIONS, text | {"prompt": "a", "stop": "a" * 900_000}),
        "answers without end": _post(COMPLETIONS, text | {"prompt": "a", "max_tokens": 10**9}),
        "20,000 messages": _post(CHAT, text | {"messages": [hi] * 20_000}),
        "as many messages as are taken": _post(CHAT, text | {"messages": [hi] * 2048}),
        "a message of 20,000 parts": _post(
            CHAT,
            text | {"messages": [hi | {"content": [{"type": "text", "text": "a"}] * 20_000}]},
        ),
        "a message of 900,000 letters": _post(
            CHAT, text | {"messages": [hi | {"content": "a" * 900_000}]}
        ),
        "a role of 900,000 letters": _post(
            CHAT, text | {"messages": [hi | {"role": "a" * 900_000}]}
        ),
        "10,000 unknown fields": _post(CHAT, text | {f"f{i}": i for i in range(10_000)}),
        "a user of 900,000 letters": _post(
            COMPLETIONS, text | {"prompt": "a", "user": "a" * 900_000}
        ),
        "temperatures that are none": _post(
            COMPLETIONS, text | {"prompt": "a", "temperature": 1e308}
        ),
        "deep brackets": _raw(COMPLETIONS, b"[" * 900_000),
        "deep objects": _raw(COMPLETIONS, b'{"a":' * 150_000),
        "an open string": _raw(COMPLETIONS, b'{"prompt": "' + b"a" * 900_000),
        "a number of 900,000 digits": _raw(COMPLETIONS, b'{"prompt": [' + b"1" * 900_000 + b"]}"),
        "a key 100,000 times": _raw(COMPLETIONS, b"{" + b'"a":1,' * 100_000 + b'"a":1}'),
        "bytes that are no text": _raw(COMPLETIONS, b"\xff\x00" * 450_000),
        "a body above the limit": _raw(COMPLETIONS, b" " * 20_000_000),
        "a body without end": _chunked,
        "a header of a megabyte": _lines(b"GET /health HTTP/1.1\r\nX: " + b"a" * 1_000_000),
        "100,000 headers": _lines(b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 100_000),
        "a path of a megabyte": _lines(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\n\r\n"),
        "no HTTP": _lines(b"\x16\x03\x01" + b"\x00" * 100_000),
        "1,000 requests at once": _lines(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000),
        "half a header, and silence": _held(b"POST /v1/completions HTTP/1.1\r\nHost: loc"),
        "half a body, and silence": _held(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        ),
        "connections, and silence": _held(b""),
        "answers that nobody reads": _held(_streamed()),
    }


def hostile(packed: Path) -> dict[str, dict[str, Any]]:
    return {name: _one(packed, send) for name, send in kinds().items()}


def _one(packed: Path, send: Send) -> dict[str, Any]:
    return attacked(packed, partial(_watched, send), "--memory", f"{MEMORY_MB}MB")


def _watched(send: Send, port: int, pid: int) -> dict[str, Any]:
    _post(COMPLETIONS, {"model": "model", "prompt": "a", "max_tokens": 1})(port)
    outcomes: Counter[str] = Counter()
    # In a process of its own: threads that send would keep each other waiting.
    context = multiprocessing.get_context("spawn")
    done, told = context.Event(), context.SimpleQueue()
    watcher = context.Process(target=watch, args=(port, done, told))
    watcher.start()
    told.get()  # it has begun
    before = _processor_seconds(pid)
    until = time.monotonic() + SECONDS

    def attack() -> None:
        while time.monotonic() < until:
            outcomes[send(port)] += 1

    threads = [threading.Thread(target=attack) for _ in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    health = told.get()
    watcher.join()
    used = _processor_seconds(pid) - before
    return {
        "outcomes": dict(outcomes.most_common()),
        "health_ms": {"median": 1e3 * statistics.median(health), "worst": 1e3 * max(health)},
        "peak_mb": memory_mb(pid, "VmHWM"),
        "processor_seconds": used,
    }


def watch(port: int, done: Any, told: Any) -> None:
    """Tells how long /health took, (n,) seconds, all the time until it is done."""
    health: list[float] = []
    while not done.is_set():
        start = time.monotonic()
        health.append(_health(port) - start)
        if len(health) == 1:
            told.put("begun")
        time.sleep(0.02)
    told.put(health)


def _health(port: int) -> float:
    """When /health was answered, by the clock; infinite if it was not."""
    address = ("127.0.0.2", 0)  # another client's than theirs who mean harm
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=address)
    try:
        connection.request("GET", "/health")
        return time.monotonic() if connection.getresponse().status == 200 else float("inf")
    except OSError:
        return float("inf")
    finally:
        connection.close()


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


# What is sent ------------------------------------------------------------------------------------


def _post(path: str, body: Any) -> Send:
    return _raw(path, json.dumps(body).encode())


def _raw(path: str, body: bytes) -> Send:
    def send(port: int) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read(1000)
            return str(answer.status)
        except TimeoutError:
            return "nothing in 10 s"
        except (OSError, http.client.HTTPException):
            return "closed"
        finally:
            connection.close()

    return send


def _chunked(port: int) -> str:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as line:
        line.sendall(head)
        for _ in range(2000):
            line.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        return "all was taken"
    return "closed"


def _lines(sent: bytes) -> Send:
    def send(port: int) -> str:
        answer = b""
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as line:
            with suppress(OSError):
                line.sendall(sent)
            answer = line.recv(4096)
        return answer[9:12].decode(errors="replace") if answer.startswith(b"HTTP") else "closed"

    return send


def _held(sent: bytes) -> Send:
    """Many connections that are left open for as long as the kind is sent."""

    def send(port: int) -> str:
        lines: list[socket.socket] = []
        try:
            for _ in range(LINES):
                with suppress(OSError):
                    lines.append(socket.create_connection(("127.0.0.1", port), 10))
                    lines[-1].sendall(sent)
            time.sleep(SECONDS)
            return f"{len(lines)} connections"
        finally:
            for line in lines:
                line.close()

    return send


def _streamed() -> bytes:
    body = json.dumps({"model": "model", "prompt": "a", "max_tokens": 400, "stream": True}).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
