"""Files that are written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fallow.errors import FallowError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` if the block succeeds.

    Raises:
        FallowError: the folder cannot be written to or the disk is full; `path` is then untouched.
    """
    path = Path(path)
    temporary = None
    try:
        with _explained(path):
            _make_parent(path)
            # The suffix is kept because some writers (numpy, matplotlib) look at it.
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix
            )
            temporary = Path(name)
            os.fchmod(handle, 0o666 & ~_umask())
            os.close(handle)
            yield temporary
            os.replace(temporary, path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raises FallowError if `path` could not be written: called before long work, not after it."""
    path = Path(path)
    with _explained(path):
        _make_parent(path)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "its folder is a file" if isinstance(error, FileExistsError) else error.strerror
        raise FallowError(
            f"cannot write {path}: {reason}; choose a folder with space and write permission"
        ) from error


def _make_parent(path: Path) -> None:
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


class JsonLines:
    """A file of one JSON document per line, to which long work appends what it has finished.

    `found` is what it held: a last line that was cut off when a run was killed is passed over.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        self.found: list[Any] = []
        for line in text.splitlines():
            with suppress(ValueError):
                self.found.append(json.loads(line))
        if text and not text.endswith("\n"):
            self._append("\n")

    def add(self, *values: Any) -> None:
        """Raises FallowError if the file cannot be written."""
        self._append("".join(json.dumps(value, allow_nan=False) + "\n" for value in values))

    def _append(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise FallowError(f"cannot write {self._path}: {error.strerror}") from error
