"""Chat templates in a process of their own.

They are programs from files that others made: what takes too long or too much is killed.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from fallow.checkpoints import chat_template
from fallow.checkpoints.chat_template import Message
from fallow.common.errors import FallowError, in_one_line

SECONDS = 5.0  # that a template may take; those of models take milliseconds
MOST_MEMORY = 1 << 30  # bytes of addresses of that process
MOST_TEXT = 1 << 20  # characters that it may write, besides eight for each that it is given


class Excessive(FallowError):
    """A template takes more than it may, of whatever."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the model's chat template takes more than {what}; take it out of the model, "
            "or give it another"
        )


def render(
    template: str,
    conversation: Sequence[Message],
    special_tokens: Mapping[str, str],
    answer: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """What `chat_template.generate` makes of a conversation, within bounds.

    Raises:
        Excessive: the template exceeds them.
        FallowError: it refuses the conversation, or does not work, or a message is no JSON.
    """
    try:
        task = json.dumps([template, list(conversation), dict(special_tokens), answer, tools])
    except (TypeError, ValueError) as error:
        raise FallowError(f"a message is no text: {in_one_line(error)}") from error
    reply = _PROCESS.ask(task)
    if reply is None:
        raise Excessive(f"{SECONDS:g} s or {MOST_MEMORY >> 20} MiB")
    kind, text = reply
    if kind == "text":
        return text
    raise Excessive(text) if kind == "excess" else FallowError(text)


class _Process:
    """One, started when it is first needed, and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: one that was forked has no part in it

    def ask(self, task: str) -> list[str] | None:
        """What it replies; None where it does not."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            reply = b""
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            with suppress(OSError):  # it has died
                process.stdin.write(task.encode() + b"\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            timer.cancel()
            if reply.endswith(b"\n"):
                return json.loads(reply)
            self._end(process)
            return None

    def close(self) -> None:
        if self._running is not None and self._owner == os.getpid():
            self._end(self._running)

    def _started(self) -> subprocess.Popen[bytes]:
        process = self._running
        if process is None or self._owner != os.getpid() or process.poll() is not None:
            program = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as t; t.serve()"
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for an answer, not for the process
            )
            assert process.stdout is not None
            self._running, self._owner = process, os.getpid()
            if not process.stdout.readline():  # it is ready: to start is none of a template's time
                self._end(process)
                raise FallowError("the process for chat templates does not start; see above")
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what is left to write finds no reader
                    pipe.close()
        process.wait()
        self._running = None


_PROCESS = _Process()
atexit.register(_PROCESS.close)


# In that process ---------------------------------------------------------------------------------


def serve() -> None:
    """Answers tasks, a line each, until there are no more."""
    with suppress(ImportError, ValueError, OSError):  # a system that has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    print(flush=True)
    for line in sys.stdin.buffer:
        print(json.dumps(_reply(line)), flush=True)


def _reply(line: bytes) -> tuple[str, str]:
    template, *given = json.loads(line)
    most, pieces = MOST_TEXT + 8 * len(line), []
    try:
        for piece in chat_template.generate(template, *given):
            most -= len(piece)
            if most < 0:
                return "excess", f"{MOST_TEXT} characters besides eight for each that it is given"
            pieces.append(piece)
        return "text", "".join(pieces)
    except MemoryError:
        return "excess", f"{MOST_MEMORY >> 20} MiB"
    except FallowError as error:
        return "refused", str(error)
