"""The command line. Every command is a function here; the work is done elsewhere."""

import io
import os
import signal
import sys
import threading
import warnings
from typing import Annotated, Any

import typer

import fallow

# Each adds its commands to the app, in the order of the help.
# isort: off
from fallow.cli import (  # noqa: F401
    answering,
    laws,
    models,
    doctor,
    rules,
    profile,
    report,
    neurons,
    packed,
    llama,
    patterns,
    plans,
    adapt,
    quality,
    selectors,
    serving,
)

# isort: on
from fallow.cli._shared import app
from fallow.common.errors import FallowError, exceeded_limit

__all__ = ["EXTRAS", "app", "main"]


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(f"fallow {fallow.__version__}")
        raise typer.Exit


_VERSION = typer.Option(
    "--version", callback=_tell_version, is_eager=True, help="Show the version and exit."
)


@app.callback()
def before_commands(version: Annotated[bool, _VERSION] = False) -> None:
    """What may come before a command's name."""


# The extras, and those of their packages that a command may lack.
EXTRAS = {
    "lab": ("torch", "transformers", "accelerate", "scipy", "matplotlib", "huggingface_hub"),
    "ray": ("ray",),
    "report": ("plotly",),
    "harness": ("lm_eval",),
    "server": ("fastapi", "uvicorn", "prometheus_client", "llguidance"),
}

INTERRUPTED = 130  # what Typer makes of Ctrl-C: 128 + SIGINT, as in shells


def main() -> None:
    """Entry point: one line for an error, exit code 2 for usage and 1 for the rest."""
    _prepare_streams()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(prog_name="fallow", standalone_mode=False)
        sys.stdout.flush()
    except FallowError as error:
        limit = exceeded_limit(error)
        _fail(str(error) if limit is None else f"{error}: {limit}", error.exit_code)
    except Exception as error:
        _quit_for_limit(exceeded_limit(error))
        _fail_otherwise(error)
    else:
        if code == INTERRUPTED:
            _quit_for_limit(_thread_limit())  # OpenBLAS raises SIGINT when it cannot start threads
            _fail("interrupted", INTERRUPTED)
        sys.exit(code or 0)


def _fail_otherwise(error: Exception) -> None:
    """Ends with one line about an error that is none of ours; raises it if that is a defect."""
    try:
        raise error
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, has in EXTRAS.items() if package in has), None)
        if extra is None:
            raise
        _fail(f"this command needs {error.name}; install it with: pip install 'fallow[{extra}]'", 1)
    except BrokenPipeError:
        _discard_output()
        sys.exit(1)
    except OSError as error:  # the disk that stdout goes to is full, say
        _discard_output()
        where = "cannot write the output" if error.filename is None else error.filename
        _fail(f"{where}: {error.strerror or error}", 1)
    except Exception as error:
        # Typer's own usage errors, whose class is private to it.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if not message():  # no arguments at all: the help was printed
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = "fallow" if context is None else context.command_path
        _fail(f"{message().rstrip('.')}; see: {command} --help", 2)


def _quit_for_limit(limit: str | None) -> None:
    """Ends with one line if a limit of the machine was reached."""
    if limit is None:
        return
    # What was half-built complains as it is taken down: asyncio of sockets that it never had.
    sys.unraisablehook = lambda _: None
    warnings.simplefilter("ignore")
    _fail(limit, 1)


def _thread_limit() -> str | None:
    """The limit that keeps this process from starting one more thread; None if it can."""
    try:
        threading.Thread(target=lambda: None).start()
    except RuntimeError as error:
        return exceeded_limit(error)
    return None


def _terminate(number: int, _frame: Any) -> None:
    """Ends the process as an error would, so that what is half-written is taken away."""
    sys.exit(128 + number)


def _prepare_streams() -> None:
    """Gives closed streams a place, and lets stdout print any text whatever the locale.

    Without a place of its own the next file that is opened would take a stream's number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """What is left to print cannot be: not even when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
