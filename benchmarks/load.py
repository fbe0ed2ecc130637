"""The step `load` of reliability.py: many clients at one server, some of them rude.

Every request must be answered or refused, every answer must be the one to its own prompt, and the
server's memory must not grow.
"""

import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REQUESTS, CLIENTS, QUEUE = 1000, 50, 16
TOKENS = 12
PROMPTS = 60  # different ones; each is asked by many
GARBAGE = (
    b"",
    b"{",
    b"\x00\xff" * 40,
    b"[" * 5000,
    b'{"model": 1}',
    b'{"prompt": "a"' + b" " * 9000,
)
TRIES = 200  # of a request that is told to come back
RUDE = {"vanish": 0.1, "vanish early": 0.05, "garbage": 0.1, "stream": 0.35}  # the rest: plain


def load(packed: Path) -> dict[str, Any]:
    expected = answers(packed)
    return attacked(
        packed, lambda port, pid: _Load(port, pid, expected).all(), "--queue", str(QUEUE)
    )


def attacked(
    packed: Path, attack: Callable[[int, int], dict[str, Any]], *options: str
) -> dict[str, Any]:
    """What an attack on a server, by its port and process, finds, and how the server ends."""
    command = [sys.executable, "-m", "fallow", "serve", str(packed), "--port", "0"]
    command += ["--threads", "1", "--name", "model", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = ""
        while "/v1" not in line:
            line = server.stderr.readline()
            assert line, "the server does not start"
        # Whatever it says later must find room in the pipe.
        said: list[str] = []
        reader = threading.Thread(target=said.extend, args=(server.stderr,))
        reader.start()
        found = attack(int(line.split("/v1")[0].rpartition(":")[2]), server.pid)
        server.terminate()
        found["exit_code"] = server.wait(60)
        reader.join()
    return found | {"traceback": any("Traceback" in line for line in said)}


def memory_mb(pid: int, name: str) -> float:
    """A process's memory, 1e6 bytes: "RssAnon", no page of a file, or "VmHWM", the most it had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


def answers(packed: Path) -> dict[str, set[str]]:
    """Prompts that begin with different tokens, and what is right to say to each.

    The answer to a prompt that is in the cache may differ by rounding from the first one.
    """
    from fallow.engine.engine import Engine
    from fallow.engine.sampling import Sampler

    engine = Engine(packed, threads=1)
    found: dict[str, set[str]] = {}
    first: set[int] = set()
    for i in range(26 * 26):
        prompt = (
            f"{chr(65 + i % 26)}{chr(97 + i // 26)}, said the number {i * i + 3}, is a story of"
        )
        ids = engine.tokenizer.prompt(prompt)
        if ids[0] in first or len(found) == PROMPTS:
            continue
        first.add(int(ids[0]))
        found[prompt] = {
            "".join(p.text for p in engine.answer(ids, TOKENS, Sampler(), reuse=True))
            for _ in range(2)
        }
    return found


class _Load:
    def __init__(self, port: int, pid: int, expected: dict[str, set[str]]) -> None:
        self.port, self.pid, self.expected = port, pid, expected
        self.lock = threading.Lock()
        self.left = list(range(REQUESTS))
        self.outcomes: Counter[str] = Counter()
        self.memory: list[tuple[int, float]] = []

    def all(self) -> dict[str, Any]:
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(CLIENTS)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "requests": REQUESTS,
            "clients": CLIENTS,
            "seconds": time.perf_counter() - start,
            "outcomes": dict(sorted(self.outcomes.items())),
            "memory_mb": self.memory,
        }

    def client(self, number: int) -> None:
        rng = random.Random(number)
        while True:
            with self.lock:
                if not self.left:
                    return
                request = self.left.pop()
                if len(self.left) % 100 == 0:
                    self.memory.append((REQUESTS - len(self.left), memory_mb(self.pid, "RssAnon")))
            kind = rng.choices([*RUDE, "plain"], [*RUDE.values(), 1 - sum(RUDE.values())])[0]
            try:
                outcome = self.ask(kind, rng, request)
            except Exception as error:
                outcome = f"LOST: {type(error).__name__}"
            with self.lock:
                self.outcomes[outcome] += 1

    def ask(self, kind: str, rng: random.Random, request: int) -> str:
        prompt = rng.choice(list(self.expected))
        body = json.dumps(
            {"model": "model", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
            | {"stream": kind == "stream" or (kind == "vanish" and rng.random() < 0.5)}
        ).encode()
        if kind == "garbage":
            status, _ = self.post(rng.choice(GARBAGE))
            return f"garbage: {status}"
        if kind.startswith("vanish"):
            self.vanish(body, rng, whole=kind == "vanish")
            return "the client went away"
        for _ in range(TRIES):
            status, text = self.post(body)
            if status == 429:
                with self.lock:
                    self.outcomes["refused, asked again"] += 1
                time.sleep(rng.uniform(0.2, 1.0))
                continue
            if status != 200:
                return f"{kind}: {status}"
            said = _streamed(text) if kind == "stream" else _plain(text)
            return f"{kind}: right" if said in self.expected[prompt] else f"{kind}: WRONG"
        return f"{kind}: refused for good"

    def post(self, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(
                "POST", "/v1/completions", body, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def vanish(self, body: bytes, rng: random.Random, whole: bool) -> None:
        """Leaves in the middle of its own request, or of the answer."""
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        message = head + body
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            cut = len(message) if whole else rng.randrange(1, len(message))
            connection.sendall(message[:cut])
            time.sleep(rng.uniform(0, 0.3))


def _plain(text: bytes) -> str:
    return json.loads(text)["choices"][0]["text"]


def _streamed(text: bytes) -> str:
    events = [line[6:] for line in text.decode().split("\n") if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)
