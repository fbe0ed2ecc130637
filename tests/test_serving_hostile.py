"""The server beside clients that mean harm: what requests cost, and what neighbours notice."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.requests import Request

from fallow.common.errors import FallowError
from fallow.engine.answer import Piece
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler
from fallow.engine.stats import Stats
from fallow.serving import connections, limits, server
from fallow.serving import schemas as api
from fallow.serving.worker import Job, Worker
from served import HI, JSON, Slow, served


@contextmanager
def watched(address: str) -> Iterator[list[float]]:
    """How long /health takes all the while, seconds."""
    found: list[float] = []
    done = threading.Event()

    def watch() -> None:
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                start = time.monotonic()
                assert client.get(f"{address}/health").status_code == 200
                found.append(time.monotonic() - start)
                time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


# What a request costs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "param", "said"),
    [
        ("completions", {"prompt": ["a"] * (api.MOST_PROMPTS + 1)}, "prompt", "at most 256 of"),
        ("completions", {"prompt": [[1]] * (api.MOST_PROMPTS + 1)}, "prompt", "at most 256 of"),
        ("completions", {"prompt": [1] * (api.MOST_IDS + 1)}, "prompt", "at most 131072 token"),
        ("completions", {"prompt": "a" * (api.MOST_CHARACTERS + 1)}, "prompt", "at most 524288"),
        ("completions", {"prompt": "a", "stop": "a" * 257}, "stop", "of 1 to 256 characters"),
        ("completions", {"prompt": "a", "stop": ["a", "a" * 257]}, "stop", "of 1 to 256"),
        ("completions", {"prompt": "a", "user": "a" * 513}, "user", "at most 512 characters"),
        ("completions", {f"f{i}": i for i in range(101)}, None, "has too many fields; at most 100"),
        ("completions", {"prompt": "a", "cache_salt": "a" * 513}, "cache_salt", "at most 512"),
        ("chat/completions", {"messages": HI * 2049}, "messages", "too many entries; at most 2048"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a" * (api.MOST_CHARACTERS + 1)}]},
            "messages.0.content",
            "is too long; at most 524288",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2049}]},
            "messages.0.content",
            "too many entries; at most 2048",
        ),
    ],
)
def test_too_much_is_refused_before_it_is_read(
    engine: Engine, path: str, change: dict[str, Any], param: str | None, said: str
) -> None:
    class Untouched:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"the tokenizer's {name} was asked for")

    with served(Slow(Untouched()), queue=1000) as address:
        body = {"model": "tiny"} | change
        answer = httpx.post(f"{address}/v1/{path}", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]


def of_values(n: int) -> list[Any]:
    """As few lists as hold so many values, commas and brackets in texts aside."""
    return [["a,[{", 1] * (n // 2)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([[1]] * (limits.MOST_CONTAINERS - 1), None),
        ([[1]] * limits.MOST_CONTAINERS, "has more than 16384 lists and objects"),
        ([{"a": []}] * (limits.MOST_CONTAINERS // 2), "has more than 16384 lists and objects"),
        (of_values(limits.MOST_VALUES), None),
        (of_values(limits.MOST_VALUES + 2), "has more than 262144 values"),
        ("[{," * limits.MOST_VALUES, None),
        (['\\"[{,\\'] * (limits.MOST_CONTAINERS + 1), None),
        ([1] * api.MOST_IDS, None),
    ],
)
def test_a_body_is_counted_before_it_is_parsed(value: Any, said: str | None) -> None:
    assert limits.excess(json.dumps(value).encode()) == said


def test_texts_hide_nothing_in_other_encodings() -> None:
    """In UTF-16 a quotation mark behind a backslash looks like the end of a text."""
    hidden = ['"'] + [[]] * limits.MOST_CONTAINERS
    for encoding in ("utf-8", "utf-16", "utf-32"):
        body = json.dumps(hidden).encode(encoding)
        assert json.loads(body) == hidden
        assert "lists and objects" in (limits.excess(body) or "")


@pytest.mark.parametrize("path", ["completions", "chat/completions", "embeddings"])
def test_what_has_too_much_is_not_parsed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    parsed: list[bytes] = []
    parse = Request.json

    async def counting(request: Request) -> Any:
        parsed.append(await request.body())
        return await parse(request)

    monkeypatch.setattr(Request, "json", counting)
    with served(engine) as address:
        body = json.dumps({"model": "tiny", "prompt": [[1]] * 100_000}).encode()
        answer = httpx.post(f"{address}/v1/{path}", content=body, headers=JSON, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == (
            f"the body has more than {limits.MOST_CONTAINERS} lists and objects"
        )
        assert parsed == []
        body = json.dumps({"model": "tiny", "prompt": [1, 2], "max_tokens": 1}).encode()
        httpx.post(f"{address}/v1/{path}", content=body, headers=JSON, timeout=60)
        assert parsed == [body]


def test_small_requests_are_answered_between_large_bodies() -> None:
    """There are so many rounds of the event loop between two; the next test says what for."""

    async def rounds_between() -> list[int]:
        gate = limits.Limits(None, 0, None, (), ())  # type: ignore[arg-type]
        now, found = 0, []

        async def parse() -> None:
            await gate.wait_to_parse(1 << 20)
            found.append(now)

        bodies = [asyncio.create_task(parse()) for _ in range(4)]
        while not all(body.done() for body in bodies):
            await asyncio.sleep(0)
            now += 1
        return found

    found = asyncio.run(rounds_between())
    assert min(np.diff(found)) >= limits.LAPS


def test_health_waits_for_one_body_at_most(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bytes] = []
    parse = Request.json

    async def slow(request: Request) -> Any:
        begun.append(await request.body())
        time.sleep(0.3)  # as a parser does: it holds the event loop
        return await parse(request)

    monkeypatch.setattr(Request, "json", slow)
    with served(engine) as address, httpx.Client(timeout=60) as client:
        body = json.dumps({"model": "tiny", "user": "a" * limits.LARGE}).encode()
        post = partial(httpx.post, f"{address}/v1/completions", content=body, headers=JSON)
        threads = [threading.Thread(target=post) for _ in range(5)]
        for thread in threads:
            thread.start()
        while len(begun) < 2:
            time.sleep(0.01)
        assert client.get(f"{address}/health").status_code == 200  # over a new connection
        assert len(begun) <= 3
        for thread in threads:
            thread.join()
    assert len(begun) == 5


def test_a_flood_of_prompts_leaves_the_server_quick(address: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": ["a"] * 200_000}).encode()
    with watched(address) as health:
        for _ in range(10):
            start = time.monotonic()
            answer = httpx.post(f"{address}/v1/completions", content=body, headers=JSON, timeout=60)
            assert time.monotonic() - start < 2
            assert answer.status_code == 400
    assert max(health) < 1


def test_what_finds_no_place_is_not_encoded(engine: Engine) -> None:
    encoded: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine.tokenizer, name)

        def prompt(self, text: str, **options: Any) -> np.ndarray:
            encoded.append(text)
            time.sleep(1)
            return engine.tokenizer.prompt(text, **options)

    with served(Slow(Counting()), queue=1) as address:  # and one that runs
        body = {"model": "tiny", "max_tokens": 1}

        def ask(text: str) -> None:
            httpx.post(f"{address}/v1/completions", json=body | {"prompt": text})

        threads = [threading.Thread(target=ask, args=(text,)) for text in "ab"]
        for thread in threads:
            thread.start()
        while httpx.get(f"{address}/health").json()["waiting"] < 2:
            time.sleep(0.01)
        answer = httpx.post(f"{address}/v1/completions", json=body | {"prompt": "c"})
        assert answer.status_code == 429
        for thread in threads:
            thread.join()
        # Neither a refused prompt nor one that was answered keeps its place.
        assert (
            httpx.post(f"{address}/v1/completions", json=body | {"prompt": []}).status_code == 400
        )
        assert httpx.get(f"{address}/health").json()["waiting"] == 0
        assert sorted(encoded) == ["a", "b"]


def test_a_prompt_that_cannot_be_read_gives_its_place_back(engine: Engine) -> None:
    with served(engine, queue=1) as address:
        for _ in range(3):
            for path, field in (("completions", "prompt"), ("embeddings", "input")):
                body = {"model": "tiny", field: "neuron " * 140}
                assert httpx.post(f"{address}/v1/{path}", json=body).status_code == 400
        assert httpx.get(f"{address}/health").json()["waiting"] == 0


def test_others_run_while_a_long_text_is_encoded(engine: Engine) -> None:
    text, gaps, done = "neuron rests. " * 40_000, [0.0], threading.Event()

    def tick() -> None:
        last = time.monotonic()
        while not done.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    ids = engine.tokenizer.encode(text)
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    assert max(gaps) < seconds / 2
    short = engine.tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert ids.tolist() == short


def test_the_memory_of_what_waits_is_bounded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODIES", 2)
    with served(Slow(engine.tokenizer), max_body=1000) as address:
        body = {"model": "tiny", "prompt": "a", "metadata": {"a": "b" * 550}, "max_tokens": 100}

        def ask() -> int:
            return httpx.post(f"{address}/v1/completions", json=body).status_code

        codes: list[int] = []
        threads = [threading.Thread(target=lambda: codes.append(ask())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(codes) == [200, 200, 200, 503]  # 640 bytes each, of 2000
        assert ask() == 200


# What neighbours notice --------------------------------------------------------------------------


def ask(address: str, key: str = "", address_of: str = "", **fields: Any) -> Any:
    """An answer to a prompt of token ids, of a client with that key, or behind a proxy."""
    headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": address_of}
    body = {"model": "tiny", "prompt": [5, 6, 7, 8, 9], "max_tokens": 2, "temperature": 0} | fields
    answer = httpx.post(
        f"{address}/v1/completions",
        json=body,
        headers={name: value for name, value in headers.items() if value.strip() != "Bearer"},
        timeout=60,
    )
    assert answer.status_code == 200
    return answer.json()


def cached(answer: Any) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_another_key_tells_nothing_of_a_prompt(engine: Engine) -> None:
    with served(engine, api_key="one, another") as address:
        first = ask(address, "one")
        assert cached(ask(address, "one")) == 4
        guess = ask(address, "another")
        assert cached(guess) == 0
        assert guess["choices"] == first["choices"]
        assert cached(ask(address, "one")) == 0  # nor that its own was there before
        assert cached(ask(address, "one")) == 4
        assert cached(ask(address, "one", cache_salt="mine")) == 0
        assert cached(ask(address, "one", cache_salt="mine")) == 4
        assert cached(ask(address, "another", cache_salt="mine")) == 0


def test_without_a_key_addresses_are_apart(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    with served(engine) as address:
        ask(address, address_of="10.0.0.1")
        assert cached(ask(address, address_of="10.0.0.1")) == 4
        assert cached(ask(address, address_of="10.0.0.2")) == 0
        ask(address, address_of="2001:db8:1:1::1")
        assert cached(ask(address, address_of="2001:db8:1:1:ffff::2")) == 4  # of one site
        assert cached(ask(address, address_of="2001:db8:1:2::1")) == 0
    monkeypatch.delenv("FORWARDED_ALLOW_IPS")
    with served(engine) as address:  # nobody is believed unasked
        ask(address, address_of="10.0.0.1")
        assert cached(ask(address, address_of="10.0.0.2")) == 4


def test_a_prompt_that_fails_leaves_nothing_to_share() -> None:
    """The engine refuses it before it forgets what it held, which is still another's."""

    class Refusing(Slow):
        def begin(self, ids: Any, *given: Any, **options: Any) -> Any:
            if ids[0] == 1:
                raise FallowError("too long")
            return super().begin(ids, *given, **options)

    engine: Any = Refusing(None)
    found: list[Any] = []
    worker = Worker(engine, 10)
    for first, cache in ((0, "a"), (1, "b"), (2, "b"), (3, "b")):
        job = Job("x", np.array([first]), 1, Sampler(), found.append, cache=cache)
        worker.submit(job)
    while sum(isinstance(e, Stats | FallowError) for e in found) < 4:
        time.sleep(0.01)
    assert engine.reused == [False, False, True]
    worker.close(0)
    worker.join()


# Turns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["key", "address"])
def test_names_that_a_client_gives_itself_are_no_turns(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    slow: Any = Slow(engine.tokenizer)
    options: Any = {"api_key": "one,another"} if by == "key" else {}
    with served(slow, **options) as address:
        threads = []
        for waiting, (who, first) in enumerate([(1, 0), (1, 1), (1, 2), (1, 3), (2, 4), (2, 5)]):
            key = ("one", "another")[who - 1] if by == "key" else ""
            fields = {"prompt": [first], "user": f"u{first}", "max_tokens": 1 if first else 300}
            # With keys an address of its own does not help, nor does the same one hinder.
            source = f"10.0.0.{first if by == 'key' else who}"
            threads.append(threading.Thread(target=ask, args=(address, key, source), kwargs=fields))
            threads[-1].start()
            while httpx.get(f"{address}/health").json()["waiting"] < waiting or not slow.answered:
                time.sleep(0.01)
        for thread in threads:
            thread.join()
    assert slow.answered == [0, 1, 4, 2, 5, 3]


@pytest.mark.parametrize(
    ("waiting", "piece", "outcome"),
    [
        ("b", Piece("a"), "length"),
        ("a", Piece("a"), "all"),  # its own
        (None, Piece("a"), "all"),
        ("b", Piece(), "others waited 0 s while the prompt was read"),
    ],
)
def test_an_answer_ends_when_others_have_waited_long(
    waiting: str | None, piece: Piece, outcome: str
) -> None:
    worker = Worker(Slow(None, piece), 10, turn=0.2)  # type: ignore[arg-type]
    found: list[Any] = []
    unread: list[Any] = []
    n = 100
    worker.submit(Job("a", np.array([0]), n, Sampler(), found.append))
    time.sleep(0.05)
    if waiting:
        worker.submit(Job(waiting, np.array([1]), 1, Sampler(), unread.append))
    while not found or not isinstance(found[-1], Stats | FallowError):
        time.sleep(0.01)
    said = sum(isinstance(e, Piece) for e in found)
    if outcome == "length":
        assert found[-1].finish == "length"
        assert 10 <= said < 60
    elif outcome == "all":
        assert said == n
    else:
        assert outcome in str(found[-1])
    worker.close(0)
    worker.join()


# Half-sent requests, and many connections ---------------------------------------------------------


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def seconds_until_closed(connection: socket.socket, trickle: bytes = b"") -> float:
    """Sends a byte now and then, and reads, until the server has had enough."""
    start = time.monotonic()
    connection.settimeout(0.05)
    while time.monotonic() - start < 15:
        try:
            connection.sendall(trickle)
            if connection.recv(1000) == b"":
                break
        except TimeoutError:
            continue
        except OSError:  # reset
            break
    return time.monotonic() - start


HALF_SENT = {
    "nothing": b"",
    "a header": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-A: ",
    "a second header": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\n",
    "a body that nobody reads": b"POST /no HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
    "a body": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n",
}


@pytest.mark.parametrize("trickle", [b"", b"a"])
@pytest.mark.parametrize("sent", HALF_SENT)
def test_half_sent_requests_have_a_deadline(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, sent: str, trickle: bytes
) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.6)
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.6)
    monkeypatch.setattr(connections, "REST_SECONDS", 0.6)
    with served(engine) as address, connect(address) as connection:
        connection.sendall(HALF_SENT[sent])
        trickle = b"" if sent == "nothing" else trickle
        assert 0.3 < seconds_until_closed(connection, trickle) < 6


def test_a_client_that_does_not_read_is_left(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.5)
    slow: Any = Slow(engine.tokenizer, Piece("a" * 500_000))
    with served(slow) as address, connect(address) as connection:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 5000, "stream": True})
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        start = time.monotonic()
        while not slow.closed:
            assert time.monotonic() - start < 15
            time.sleep(0.01)


def test_connections_have_a_number(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 3)
    made: list[int] = []

    class Counted(connections.Connection):
        def __init__(self, *given: Any, **named: Any) -> None:
            made.append(1)
            super().__init__(*given, **named)

    monkeypatch.setattr(server, "Connection", Counted)
    with served(Slow(engine.tokenizer), queue=1) as address:  # 3, and 2 for its place
        idle = [connect(address) for _ in range(5)]
        time.sleep(0.2)
        answer = httpx.get(f"{address}/health")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"].startswith("there are too many connections")
        assert len(made) == 5
        for connection in idle:
            connection.close()
        time.sleep(0.2)
        assert httpx.get(f"{address}/health").status_code == 200


def test_one_client_leaves_room_for_others() -> None:
    room = connections.Room(of_one=2, of_all=3)
    assert [room.enter(name) for name in "aaabb"] == [True, True, False, True, False]
    room.leave("a")
    assert room.enter("b")
    assert not room.enter("a")


def test_a_site_is_one_client() -> None:
    for one, other in (
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::ffff:0:0:1"),
        ("fe80::1%eth0", "fe80::2"),
    ):
        assert limits.network_of(one) == limits.network_of(other)
    for one, other in (("10.0.0.1", "10.0.0.2"), ("2001:db8::1", "2001:db8:0:1::1"), ("", "a")):
        assert limits.network_of(one) != limits.network_of(other)
