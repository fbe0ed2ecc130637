"""One engine under several callers, Ctrl-C, forks, and a file that changes below it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import VOCABULARY, make_folder
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler
from fallow.packing.packer import pack

RNG = np.random.default_rng(5)
TEXTS = [RNG.integers(2, VOCABULARY, 40) for _ in range(3)]
LONG = RNG.integers(2, VOCABULARY, 8000)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("callers")
    folder = make_folder("llama", root / "model", max_position_embeddings=8192)
    pack(folder, root / "llama.gguf", quant="f32")
    return root / "llama.gguf"


@pytest.fixture
def engine(path: Path) -> Engine:
    return Engine(path, threads=2, context=8192)


# Several callers ----------------------------------------------------------------------------------


def test_threads_take_turns(engine: Engine) -> None:
    expected = [engine.logits(ids) for ids in TEXTS]

    def wrong(i: int) -> int:
        return sum(not np.array_equal(engine.logits(TEXTS[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(wrong, range(3))) == [0, 0, 0]


def test_an_answer_is_right_or_told_that_another_came(engine: Engine) -> None:
    alone = [list(engine.generate(ids, 30)) for ids in TEXTS]
    told = []

    def answer(i: int) -> bool:
        try:
            return list(engine.generate(TEXTS[i], 30)) == alone[i]
        except FallowError as error:
            told.append(str(error))
            return True

    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(answer, [*range(3)] * 10))
    assert all("another answer or thread" in message for message in told)


@pytest.mark.parametrize("lossless", [False, True])
def test_the_later_of_two_answers_goes_on(engine: Engine, lossless: bool) -> None:
    expected = "".join(engine.generate(TEXTS[1], 20))
    first = engine.answer(TEXTS[0], 20, Sampler(), lossless=lossless)
    next(first)
    second = engine.answer(TEXTS[1], 20, Sampler())
    next(second)
    with pytest.raises(FallowError, match="another answer or thread"):
        list(first)
    list(second)
    assert engine.stats.new_tokens == 20  # not touched by the end of the first
    assert "".join(engine.generate(TEXTS[1], 20)) == expected


def test_reading_on_is_for_the_thread_that_began(engine: Engine) -> None:
    expected = engine.forward(TEXTS[0])
    engine.reset()
    engine.forward(TEXTS[0][:20])

    def elsewhere() -> np.ndarray:
        with pytest.raises(FallowError, match=r"begin again, with reset\(\)"):
            engine.forward(TEXTS[1])
        engine.reset()
        return engine.forward(TEXTS[0])

    with ThreadPoolExecutor(1) as thread:
        np.testing.assert_array_equal(thread.submit(elsewhere).result(), expected)
    with pytest.raises(FallowError, match="another answer or thread"):
        engine.forward(TEXTS[0][20:])


def test_what_another_forgot_is_not_read_on(engine: Engine) -> None:
    """Although nothing is held then: the reader still believes in what it read."""
    engine.forward(TEXTS[0])
    with ThreadPoolExecutor(1) as thread:
        thread.submit(engine.reset).result()
    with pytest.raises(FallowError, match="another answer or thread"):
        engine.forward(TEXTS[1])
    pieces = engine.answer(TEXTS[0], 20, Sampler())
    next(pieces)
    engine.reset()
    with pytest.raises(FallowError, match="another answer or thread"):
        list(pieces)


def test_an_answer_may_be_read_by_several_threads(engine: Engine) -> None:
    """As a web server's pool does that iterates over it."""
    expected = list(engine.generate(TEXTS[0], 10))
    pieces = engine.generate(TEXTS[0], 10)
    found: list[str] = []
    for _ in range(len(expected)):
        thread = threading.Thread(target=lambda: found.append(next(pieces)))
        thread.start()
        thread.join()
    assert found == expected


# Passes that end early ----------------------------------------------------------------------------


class _Interrupted:
    """A core whose pass ends in Ctrl-C: before Python hears of the pass, or in its middle."""

    def __init__(self, core: Any, tokens: int) -> None:
        self._core, self._tokens = core, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def forward(self, ids: np.ndarray, *rest: Any) -> None:
        *others, logits = rest
        self._core.forward(ids[: self._tokens], *others, logits[: self._tokens])
        raise KeyboardInterrupt


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_after_an_interrupted_pass_the_next_is_right(engine: Engine, tokens: int) -> None:
    expected = engine.logits(TEXTS[0])
    engine.reset()
    engine.forward(TEXTS[0][:20])
    core = engine._core
    engine._core = _Interrupted(core, tokens)
    with pytest.raises(KeyboardInterrupt):
        engine.forward(TEXTS[1][:20], every=True)
    engine._core = core
    np.testing.assert_allclose(
        engine.forward(TEXTS[0][20:], every=True), expected[20:], rtol=0, atol=2e-3
    )


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """SIGINT to this process, as Ctrl-C sends it. A shell's background job ignores it otherwise."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, handler)


def test_ctrl_c_ends_a_long_pass(engine: Engine) -> None:
    expected = engine.logits(TEXTS[0])
    start = time.perf_counter()
    engine.logits(LONG)
    whole = time.perf_counter() - start
    start = time.perf_counter()
    with interrupt_after(whole / 10), pytest.raises(KeyboardInterrupt):
        engine.logits(LONG)
    assert time.perf_counter() - start < max(0.6 * whole, 0.5)
    np.testing.assert_array_equal(engine.logits(TEXTS[0]), expected)


# Forks --------------------------------------------------------------------------------------------


def _in_child(engine: Engine, queue: Any) -> None:
    calls: list[Callable[[], Any]] = [
        engine.reset,
        lambda: engine.logits(TEXTS[0]),
        lambda: list(engine.generate(TEXTS[0], 2)),
    ]
    for call in calls:
        try:
            call()
        except FallowError as error:
            queue.put(str(error))
    again = Engine(engine.path, threads=2)
    queue.put(again.logits(TEXTS[0]))


@pytest.mark.parametrize("memory", [None, "2GB"])
def test_a_forked_process_loads_its_own(path: Path, memory: str | None) -> None:
    engine = Engine(path, threads=2, memory=memory)
    expected = engine.logits(TEXTS[0])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(engine, queue))
    child.start()
    found = [queue.get(timeout=60) for _ in range(4)]
    child.join(60)  # its copy of the engine has no threads to wait for
    assert child.exitcode == 0
    assert all("loaded before this process was forked" in message for message in found[:3])
    np.testing.assert_array_equal(found[3], expected)
    np.testing.assert_array_equal(engine.logits(TEXTS[0]), expected)


def test_the_end_of_a_forked_process_waits_for_nobody(engine: Engine) -> None:
    pid = os.fork()
    if pid == 0:
        del engine.__dict__["_core"]  # what the end of the interpreter does
        os._exit(0)
    for _ in range(600):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child hangs")


# A file that changes ------------------------------------------------------------------------------

_CHANGED = """
import os, sys
import fallow.engine.engine
import numpy as np
from pathlib import Path
from fallow.engine.engine import Engine
from fallow.common.errors import FallowError

path, how, mapped = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "mapped"
if mapped:  # as where there is no room for a copy in memory
    fallow.engine.engine.available_bytes = lambda: 0
engine = Engine(path, threads=2)
if how != "cut at once":
    engine.logits(np.arange(2, 30))
if how == "replaced":
    Path("new").write_bytes(b"another file")
    os.replace("new", path)
elif how == "written":
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"x")
elif how == "emptied":
    path.write_bytes(b"")
else:
    os.truncate(path, path.stat().st_size // 2)
for _ in range(2):
    try:
        engine.logits(np.arange(2, 30))
        print("fine")
    except FallowError as error:
        print(error)
"""


def test_mapped_or_in_memory_is_the_same(
    engine: Engine, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fallow.engine.engine.available_bytes", lambda: 0)
    mapped = Engine(path, threads=2, context=8192)
    for ids in TEXTS:
        np.testing.assert_array_equal(mapped.logits(ids), engine.logits(ids))


@pytest.mark.parametrize("where", ["mapped", "in memory"])
@pytest.mark.parametrize("how", ["cut", "cut at once", "emptied", "written", "replaced"])
def test_a_file_that_changes(how: str, where: str, path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", _CHANGED, copy, how, where],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = f"{copy} was written to while it was running; start again"
    assert done.stdout.splitlines() == 2 * ["fine" if how == "replaced" else told], done.stderr
    assert done.returncode == 0
