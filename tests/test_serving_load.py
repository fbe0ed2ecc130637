"""The server under load: whose turn it is, clients that go away, and the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engines import cutting_plan
from fallow.common.errors import FallowError
from fallow.engine.answer import Piece
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler
from fallow.engine.stats import Stats
from fallow.serving.worker import Busy, Closing, Job, Worker
from served import JSON, Slow, served


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


def test_with_slots_clients_take_turns_at_them() -> None:
    engine: Any = Slow(None, slots=2)
    worker = Worker(engine, 10)
    found: list[Any] = []
    worker.submit(job("a", 0, found, 20), job("a", 1, found, 60))
    time.sleep(0.1)
    assert worker.n_running == 2
    for client, first in (("a", 2), ("a", 3), ("b", 4), ("c", 5)):
        worker.submit(job(client, first, found, 2))
    while sum(isinstance(e, Stats) for e in found) < 6:
        time.sleep(0.01)
    assert engine.answered == [0, 1, 2, 4, 5, 3]
    worker.close(0)
    worker.join()


def test_one_of_a_clients_answers_makes_room() -> None:
    """Where another has waited for a turn, and no slot of another is longer in use."""
    engine: Any = Slow(None, slots=3)
    worker = Worker(engine, 10, turn=0.2)
    ends: dict[int, Any] = {}

    def told(client: str, first: int, tokens: int) -> Job:
        def deliver(event: Any) -> None:
            if not isinstance(event, Piece):
                ends[first] = event.finish

        return Job(client, np.array([first]), tokens, Sampler(), deliver)

    for client, first in (("b", 0), ("a", 1), ("a", 2)):
        worker.submit(told(client, first, 150))
    time.sleep(0.05)
    started = time.monotonic()
    worker.submit(told("c", 3, 1))
    while 3 not in ends:
        time.sleep(0.01)
    assert time.monotonic() - started < 1
    assert list(ends) == [1, 3]
    assert engine.closed == 1
    while len(ends) < 4:
        time.sleep(0.01)
    worker.close(0)
    worker.join()


def test_a_client_that_goes_away_in_a_step_leaves_the_others() -> None:
    engine: Any = Slow(None, slots=2)
    worker = Worker(engine, 10)
    left: list[Any] = []
    kept: list[Any] = []
    leaving = job("a", 0, left, 1000)
    worker.submit(leaving, job("a", 1, kept, 50))
    time.sleep(0.1)
    worker.cancel(leaving)
    said = len(left)
    while not kept or not isinstance(kept[-1], Stats):
        time.sleep(0.01)
    assert len(left) <= said + 2
    assert isinstance(left[-1], Stats)
    assert sum(isinstance(e, Piece) for e in kept) == 50
    worker.close(0)
    worker.join()


@pytest.fixture(scope="module")
def slotted(talking: Path) -> Engine:
    return Engine(talking, threads=2, slots=3)


def answers_of(worker: Worker, *jobs: dict[str, Any]) -> list[tuple[str, Stats]]:
    """What the answers to jobs say that come at once."""
    found: list[list[Any]] = [[] for _ in jobs]
    worker.submit(*(Job("a", sampler=Sampler(), deliver=found[i].append, **given)
                    for i, given in enumerate(jobs)))  # fmt: skip
    while not all(each and not isinstance(each[-1], Piece) for each in found):
        time.sleep(0.005)
    return [("".join(e.text for e in each[:-1]), each[-1]) for each in found]


def test_answers_do_not_depend_on_what_else_is_asked(slotted: Engine) -> None:
    """Greedy, of prompts that begin differently, in any number of slots."""
    prompts = [slotted.tokenizer.prompt(text) for text in ("neuron", "the gate of 7", "works 3, 5")]
    alone = ["".join(p.text for p in slotted.answer(ids, 30, Sampler())) for ids in prompts]
    worker = Worker(slotted, 20)
    jobs = [{"ids": ids, "max_tokens": 30, "cache": i} for i, ids in enumerate(prompts)]
    for _ in range(2):
        assert [text for text, _ in answers_of(worker, *jobs, *jobs[::-1])] == [
            *alone,
            *alone[::-1],
        ]
    worker.close(0)
    worker.join()


def test_a_job_goes_where_most_of_its_prompt_is(slotted: Engine) -> None:
    rng = np.random.default_rng(2)
    one, two = rng.integers(2, 300, 20), rng.integers(2, 300, 20)
    for slot in range(3):
        slotted.reset(slot=slot)
    worker = Worker(slotted, 20)

    def cached(*jobs: tuple[np.ndarray, str]) -> list[int]:
        given = [{"ids": ids, "max_tokens": 2, "cache": cache} for ids, cache in jobs]
        return [stats.cached_tokens for _, stats in answers_of(worker, *given)]

    assert cached((one, "x"), (two, "x")) == [0, 0]
    assert cached((np.r_[two, 5], "x"), (np.r_[one, 5], "x")) == [20, 20]
    assert cached((one, "y")) == [0]  # another's, in the slot that was not used yet
    assert cached((one, "y"), (two, "x"), (one, "x")) == [19, 19, 19]
    assert cached((one, "z"), (two, "z"), (one[1:], "z")) == [0, 0, 0]
    assert cached((one, "x")) == [0]  # nothing is left of it
    worker.close(0)
    worker.join()


def test_with_and_without_the_plan_take_turns(slotted: Engine) -> None:
    ids = slotted.tokenizer.prompt("neuron")
    dense = "".join(p.text for p in slotted.answer(ids, 20, Sampler()))
    slotted.use_plan(cutting_plan(slotted))
    cut = "".join(p.text for p in slotted.answer(ids, 20, Sampler()))
    assert cut != dense
    worker = Worker(slotted, 20)
    jobs = [{"ids": ids, "max_tokens": 20, "with_plan": bool(i % 3)} for i in range(6)]
    found = answers_of(worker, *jobs)
    assert [text for text, _ in found] == [cut if i % 3 else dense for i in range(6)]
    worker.close(0)
    worker.join()
    slotted.use_plan(None)


def test_a_full_queue_says_when_to_come_back() -> None:
    worker = Worker(Slow(None), 2)  # type: ignore[arg-type]
    found: list[Any] = []
    worker.submit(job("a", 0, found, 100))
    time.sleep(0.05)
    jobs = [job("a", i, found) for i in range(2)]
    worker.submit(*jobs)
    with pytest.raises(Busy) as error:
        worker.submit(job("a", 3, found))
    assert error.value.retry_after >= 1
    worker.submit(job("b", 4, found))  # one of its places
    assert worker.waiting == 2
    assert isinstance(found.pop(), Busy)
    with pytest.raises(Busy):
        worker.submit(job("c", 5, found))
    worker.cancel(jobs[0])
    assert worker.waiting == 1
    worker.close(0)
    worker.join()
    with pytest.raises(Closing):
        worker.submit(job("b", 6, found))
    assert sum(isinstance(e, Closing) for e in found) == 2  # what ran, and what waited


def test_an_engine_that_fails_does_not_end_the_thread(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(Slow):
        def begin(self, ids: Any, *_: Any, **options: Any) -> Any:
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
        client = httpx.Client(timeout=60)  # made in good time: that takes a while

        def ask() -> None:
            body = {"model": "tiny", "prompt": "neuron", "max_tokens": 110, "temperature": 0}
            try:
                answer = client.post(f"{address}/v1/completions", json=body)
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
        client.close()
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
