"""The server, by the clients that people use."""

import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from fallow.engine import Engine, Piece, Sampler, Stats
from fallow.errors import FallowError
from fallow.serving import limits
from fallow.serving.app import create_app
from fallow.serving.worker import Busy, Closing, Job, Worker

JSON = {"Content-Type": "application/json"}
HI = [{"role": "user", "content": "hi"}]


@contextmanager
def served(engine: Any, queue: int = 16, **options: Any) -> Iterator[str]:
    """The server in a thread; its address."""
    worker = Worker(engine, queue)
    config = uvicorn.Config(create_app(worker, "tiny", **options), port=0, log_level="error")
    server = uvicorn.Server(config)
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

    context, vocabulary_size = 10_000, 300

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stats = Stats()
        self.answered: list[int] = []  # first ids of prompts
        self.closed = 0

    def answer(self, ids: Any, max_tokens: int, *_: Any, **options: Any) -> Iterator[Piece]:
        self.answered.append(int(ids[0]))
        self.stats = Stats(prompt_tokens=len(ids), finish="length")
        try:
            for _ in range(max_tokens):
                time.sleep(0.01)
                yield Piece("a")
        except GeneratorExit:
            self.closed += 1
            raise


@pytest.fixture(scope="module")
def engine(talking: Path) -> Engine:
    return Engine(talking, threads=1)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as made:
        yield made


# Answers -----------------------------------------------------------------------------------------


def test_chat_is_what_the_engine_says(client: openai.OpenAI, engine: Engine) -> None:
    options: Any = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 9}
    answer = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    expected = "".join(engine.generate("hi", 9, chat=True))
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == engine.stats.finish == "length"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    for usage in (answer.usage, chunks[-1].usage):
        assert usage is not None
        assert usage.completion_tokens == 9
        assert usage.total_tokens == usage.prompt_tokens + 9
    assert len(answer.usage.sparsity["neurons_idle_per_layer"]) == 2  # type: ignore[union-attr]


def test_completions(client: openai.OpenAI, engine: Engine) -> None:
    options: Any = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(prompt="neuron 3", logprobs=2, **options).choices[0]
    assert whole.text == "".join(engine.generate("neuron 3", 8))
    assert whole.logprobs is not None
    said = engine.answer(engine.tokenizer.prompt("neuron 3"), 8, Sampler())
    ids = np.r_[engine.tokenizer.prompt("neuron 3"), [t.id for p in said for t in p.tokens]]
    assert whole.logprobs.token_logprobs == pytest.approx(engine.score(ids)[-8:], abs=0.01)
    assert all(len(each) == 2 for each in whole.logprobs.top_logprobs or [])
    for text, start in zip(
        whole.logprobs.tokens or [], whole.logprobs.text_offset or [], strict=True
    ):
        assert whole.text[start : start + len(text)] == text
    stop = whole.text[4:6]
    cut = client.completions.create(prompt="neuron 3", stop=[stop], **options).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    ids = engine.tokenizer.prompt("neuron 3").tolist()
    assert client.completions.create(prompt=ids, **options).choices[0].text == whole.text
    two = client.completions.create(prompt=["neuron 3", "the gate"], **options)
    assert [c.index for c in two.choices] == [0, 1]
    assert two.choices[0].text == whole.text
    pieces = client.completions.create(prompt="neuron 3", stream=True, logprobs=1, **options)
    assert "".join(c.choices[0].text for c in pieces) == whole.text


def test_sampling_repeats_with_its_seed(client: openai.OpenAI) -> None:
    def say(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=20, seed=seed, temperature=1.5
        )
        return answer.choices[0].message.content

    say(1)  # from here on the prompt is in the cache
    assert say(1) == say(1)
    assert len({say(seed) for seed in range(6)}) > 1


def test_the_next_turn_reads_only_what_is_new(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=6)
    said = first.choices[0].message.content or ""
    turns: Any = [*HI, {"role": "assistant", "content": said}, {"role": "user", "content": "so?"}]
    usage = client.chat.completions.create(model="tiny", messages=turns, max_tokens=1).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens - 1  # type: ignore[union-attr]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None
    for token in found.content or []:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert token.logprob > token.top_logprobs[1].logprob
    assert "".join(t.token for t in found.content or []) == answer.choices[0].message.content


def test_tokens_have_their_own_text_and_bytes(parrot: tuple[Path, Path]) -> None:
    """Their bytes make the answer, whose first one is a space; its pieces are those of Llama 2."""
    words = [" rests", *["\ufffd"] * 4, " re"]
    with served(Engine(parrot[1])) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client:
            options: Any = {"model": "tiny", "prompt": "neuron", "temperature": 0}
            for stream in (False, True):
                answer = client.completions.create(**options, logprobs=2, stream=stream)
                chunks = [c.choices[0] for c in answer] if stream else [answer.choices[0]]  # type: ignore
                assert "".join(c.text for c in chunks) == " rests🙂 re"
                found = [c.logprobs for c in chunks if c.logprobs]
                assert [t for each in found for t in each.tokens or []] == words
                offsets = [i for each in found for i in each.text_offset or []]
                assert offsets == [0, 6, 6, 6, 6, 7]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "neuron"}]}
        body |= {"temperature": 0, "logprobs": True, "top_logprobs": 2}
        template = "{{ messages[0].content }}"
        engine = Engine(parrot[1])
        engine.tokenizer = dataclasses.replace(engine.tokenizer, chat_template=template)
    with served(engine) as address:
        choice = httpx.post(f"{address}/v1/chat/completions", json=body).json()["choices"][0]
        content = choice["logprobs"]["content"]
        assert choice["message"]["content"] == " rests🙂 re"
        assert bytes(b for t in content for b in t["bytes"]) == " rests🙂 re".encode()
        assert [t["token"] for t in content] == words
        assert all(each["bytes"] is not None for t in content for each in t["top_logprobs"])


def test_control_tokens_in_a_prompt(parrot: tuple[Path, Path]) -> None:
    engine = Engine(parrot[1])
    with served(engine) as address:
        for parse_special, tokens in ((None, 2), (True, 2), (False, 4)):
            body = {"model": "tiny", "prompt": "neuron<s>", "temperature": 0, "max_tokens": 4}
            body["parse_special"] = parse_special
            answer = httpx.post(f"{address}/v1/completions", json=body).json()
            assert answer["usage"]["prompt_tokens"] == tokens
            assert (answer["choices"][0]["text"] == ".") == (tokens == 2)
        body["parse_special"] = 1
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 400


def test_langchain(address: str, engine: Engine) -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    options: Any = {"base_url": f"{address}/v1", "api_key": "any", "model": "tiny"}
    chat = ChatOpenAI(**options, temperature=0, max_completion_tokens=7)
    expected = "".join(engine.generate("hi", 7, chat=True))
    assert chat.invoke("hi").content == expected
    assert "".join(str(chunk.content) for chunk in chat.stream("hi")) == expected
    text = OpenAI(**options, temperature=0, max_tokens=7)
    assert text.batch(["neuron 3", "the gate"]) == [
        "".join(engine.generate(prompt, 7)) for prompt in ("neuron 3", "the gate")
    ]


def test_models_health_and_metrics(client: openai.OpenAI, address: str) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fallow"
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    metrics = httpx.get(f"{address}/metrics").text
    assert 'fallow_responses_total{path="/v1/models",status="200"}' in metrics
    assert "fallow_first_token_seconds_bucket" in metrics
    assert httpx.get(f"{address}/secret/path").status_code == 404
    metrics = httpx.get(f"{address}/metrics").text
    assert "secret" not in metrics


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"model": "gpt"}, 404, "there is no model 'gpt' here; this is 'tiny'"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ({"messages": [{"role": "user", "content": "neuron " * 140}]}, 400, "fills the context"),
        ({"messages": [{"role": "assistant", "content": "refuse"}]}, 400, "no such talk"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"temperature": -1}, 400, "temperature: "),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p: "),
        ({"n": 2}, 400, "n: "),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty: "),
        ({"logit_bias": {"3": 1}}, 400, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type: "),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
    ],
)
def test_bad_requests(address: str, change: dict[str, Any], code: int, said: str) -> None:
    body = json.dumps({"model": "tiny", "messages": HI} | change)
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == code
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[code]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 6000]
)
def test_garbage_is_refused(address: str, body: bytes) -> None:
    answer = httpx.post(f"{address}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert "message" in answer.json()["error"]


def test_another_kind_of_body(address: str) -> None:
    """What curl -d sends: also what a web page could send unasked."""
    answer = httpx.post(f"{address}/v1/completions", data={"model": "tiny"})
    assert answer.status_code == 400
    assert "send Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_token_outside_the_vocabulary(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="token id 300 is outside the vocabulary"):
        client.completions.create(model="tiny", prompt=[300])


def test_the_key(engine: Engine) -> None:
    with served(engine, api_key="secret") as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answer = httpx.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{address}/metrics").status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret") as client:
            assert [m.id for m in client.models.list()] == ["tiny"]


def test_large_and_slow_bodies(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    with served(engine, max_body=1000) as address:
        large = httpx.post(f"{address}/v1/completions", content=b"x" * 1001)
        assert large.status_code == 413
        assert large.json()["error"]["message"] == "the body has more than 1000 bytes"
        chunked = httpx.post(f"{address}/v1/completions", content=iter([b"x" * 600] * 2))
        assert chunked.status_code == 413
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"model"')
        assert connection.getresponse().status == 408
        connection.close()


# Order, load and the end -------------------------------------------------------------------------


def job(client: str, first: int, found: list[Any], tokens: int = 1) -> Job:
    return Job(client, np.array([first]), tokens, Sampler(), found.append)


def test_clients_take_turns() -> None:
    engine: Any = Slow(None)
    worker = Worker(engine, 10)
    found: list[Any] = []
    worker.submit(job("a", 0, found, 20))  # runs while the others come
    time.sleep(0.05)
    for client, first in (("a", 1), ("a", 2), ("b", 3), ("a", 4), ("c", 5)):
        worker.submit(job(client, first, found))
    while sum(isinstance(e, Stats) for e in found) < 6:
        time.sleep(0.01)
    assert engine.answered == [0, 1, 3, 5, 2, 4]
    worker.close(0)
    worker.join()


def test_a_full_queue_says_when_to_come_back() -> None:
    worker = Worker(Slow(None), 2)  # type: ignore[arg-type]
    found: list[Any] = []
    worker.submit(job("a", 0, found, 100))
    time.sleep(0.05)
    jobs = [job("a", i, found) for i in range(2)]
    worker.submit(*jobs)
    with pytest.raises(Busy) as error:
        worker.submit(job("b", 3, found))
    assert error.value.retry_after >= 1
    worker.cancel(jobs[0])
    assert worker.waiting == 1
    worker.close(0)
    worker.join()
    with pytest.raises(Closing):
        worker.submit(job("b", 4, found))
    assert sum(isinstance(e, Closing) for e in found) == 2  # what ran, and what waited


def test_an_engine_that_fails_does_not_end_the_thread(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Slow):
        def answer(self, ids: Any, *_: Any, **options: Any) -> Iterator[Piece]:
            raise (FallowError if ids[0] else KeyError)("broken")

    worker = Worker(Failing(None), 5)  # type: ignore[arg-type]
    found: list[Any] = []
    worker.submit(job("a", 0, found), job("a", 1, found))
    while len(found) < 2:
        time.sleep(0.01)
    assert [type(e) for e in found] == [KeyError, FallowError]
    assert "KeyError" in capsys.readouterr().err
    worker.close(0)
    worker.join()


def test_over_http_too_many_are_refused(engine: Engine) -> None:
    slow: Any = Slow(engine.tokenizer)
    with served(slow, queue=1) as address:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 60}
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(httpx.post(f"{address}/v1/completions", json=body))
            )
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(a.status_code for a in answers)
        assert codes == [200, 200, 429, 429, 429]
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine(engine: Engine, stream: bool) -> None:
    slow: Any = Slow(engine.tokenizer)
    with served(slow) as address:
        body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 5000, "stream": stream})
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            while not slow.answered:
                time.sleep(0.01)
            time.sleep(0.05)
        start = time.monotonic()
        while not slow.closed:
            assert time.monotonic() - start < 5
            time.sleep(0.01)
        short = body.replace("5000", "1").replace("true", "false")
        assert (
            httpx.post(f"{address}/v1/completions", content=short, headers=JSON).status_code == 200
        )


def test_shutdown_finishes_what_runs_and_fails_what_waits(talking: Path) -> None:
    command = [sys.executable, "-m", "fallow", "serve", str(talking), "--port", "0"]
    with subprocess.Popen(
        [*command, "--name", "tiny"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    ) as process:
        assert process.stderr is not None
        address = process.stderr.readline().split(" on ")[1].split("/v1")[0]
        outcomes: list[Any] = []

        def ask() -> None:
            body = {"model": "tiny", "prompt": "neuron", "max_tokens": 110, "temperature": 0}
            try:
                answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
                outcomes.append(answer.status_code)
            except httpx.HTTPError as error:
                outcomes.append(repr(error))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(timeout=30) == 0
        assert set(outcomes) <= {200, 503}, outcomes
        assert 200 in outcomes
        assert "Traceback" not in process.stderr.read()


def test_an_address_in_use_is_one_line(address: str, talking: Path) -> None:
    port = address.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "fallow", "serve", str(talking), "--port", port],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


# The schema --------------------------------------------------------------------------------------


def test_schemathesis(address: str, tmp_path: Path) -> None:
    """What the schema allows is answered as it says, and what it forbids is refused."""
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"),
            "run",
            f"{address}/openapi.json",
            "--max-examples=25",
            "--seed=0",
            "--exclude-checks=positive_data_acceptance",  # a prompt may be too long for the model
            "--no-color",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-4000:]
