"""Files that are written whole or not at all, and what is read back of them."""

import errno
import json
import math
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from fallow.common.errors import FallowError, in_one_line

if TYPE_CHECKING:
    import numpy as np

_PREFIX = 40  # characters of a name that its temporary one begins with: names have 255 bytes


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
            _refuse_other_than_files(path)
            # The suffix is kept because some writers (numpy, matplotlib) look at it.
            handle, name = tempfile.mkstemp(
                dir=path.parent, prefix=f".{path.stem[:_PREFIX]}.", suffix=path.suffix
            )
            temporary = Path(name)
            os.fchmod(handle, 0o666 & ~_umask())
            os.close(handle)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, and gives it that name if the block succeeds.

    Raises:
        FallowError: the folder is there and not empty, or cannot be written.
    """
    folder = Path(folder)
    temporary = None
    try:
        with _explained(folder):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise FallowError(f"{folder} is there already; choose another name")
            _make_parent(folder)
            prefix = f".{folder.name[:_PREFIX]}."
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            os.replace(temporary, folder)
            sync(folder.parent)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | Path) -> None:
    """Raises FallowError if `path` could not be written: called before long work, not after it."""
    path = Path(path)
    with _explained(path):
        _make_parent(path)
        _refuse_other_than_files(path)
        tempfile.TemporaryFile(dir=path.parent).close()


def _refuse_other_than_files(path: Path) -> None:
    """Raises FallowError for folders and devices, OSError for a name that no file can have."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise FallowError(f"cannot write {path}: it is there and no file; choose another name")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise FallowError(
            f"cannot write {path}: {reason}; choose a folder with space and write permission"
        ) from error


def _reason(error: Exception) -> str | None:
    """Why a file cannot be written; None of an error that does not say so."""
    if isinstance(error, FileExistsError):
        return "its folder is a file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # When the disk is full numpy says "8 requested and 4 written", torch "unexpected pos".
    is_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    # By its name: every command imports this module, few need safetensors.
    is_safetensors = type(error).__name__ == "SafetensorError"
    is_written = isinstance(error, OSError) or is_torch or is_safetensors
    return "the disk is full, or fails" if is_written else None


def sync(path: Path) -> None:
    """Puts a file, or a folder's names, on the disk: a rename may survive what it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what this file system's folders say
            raise
    finally:
        os.close(handle)


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
    write_text(path, to_json(value, indent=1) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """A JSON document; NaN and infinity, for which JSON has no word, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice, of which readers take the first or the last."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found


def parse_json(text: str | bytes) -> Any:
    """A JSON document. Raises ValueError for anything else, such as one nested too deeply.

    Raises:
        DuplicateKeyError: an object in it has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FallowError: it cannot be read, or holds no object; with the `remedy`.
    """
    try:
        found = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise FallowError(f"cannot read {path}: {error.strerror}") from error
    except DuplicateKeyError as error:
        raise FallowError(f"{path} is damaged: {in_one_line(error)}; {remedy}") from error
    except ValueError as error:
        raise FallowError(f"{path} is damaged; {remedy}") from error
    if not isinstance(found, dict):
        raise FallowError(f"{path} is damaged; {remedy}")
    return found


def claim(path: str | Path, settings: dict[str, Any], what: str) -> None:
    """Writes the settings of work that a folder is for, or compares them with those it has.

    Raises:
        FallowError: the folder is of `what` ("training", say) with others.
    """
    path = Path(path)
    if not path.exists():
        write_json(path, settings)
        return
    found = read_json(path, f"delete {path.parent} to begin again")
    changed = [k for k, v in settings.items() if found.get(k) != v]
    if changed:
        raise FallowError(
            f"{path.parent} is of a {what} with another {', '.join(changed)}; choose another "
            "--output, or delete it"
        )


def fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read has a field's type, such as `int`, `float | None` or `list`.

    A whole number is a float too, True is no number, and neither infinity nor NaN is one.
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (get_origin(kind) or kind,)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (type(value) in kinds or float in kinds) and abs(value) <= sys.float_info.max
    return type(value) in kinds


def check_sums(path: Path) -> None:
    """Raises ValueError if an archive such as torch writes is damaged: torch looks at no sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # whatever zipfile makes of it
        raise ValueError("no whole archive") from error
    if damaged is not None:
        raise ValueError(f"{damaged} is damaged")


def read_array(path: str | Path, remedy: str) -> "np.ndarray":
    """The array in a .npy file, mapped.

    Raises:
        FallowError: it cannot be read, or holds no array of numbers; with the `remedy`.
    """
    import numpy as np  # here, since every command imports this module

    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # whatever numpy's parser of the header raises
        raise FallowError(f"cannot read {path}; {remedy}") from error
    if found.dtype.kind not in "biuf":
        raise FallowError(f"{path} holds no array of numbers; {remedy}")
    return found


class JsonLines:
    """A file of one JSON document per line, to which long work appends what it has finished.

    `found` is what it held. A line without an end was cut off when a run was killed, and what is
    no JSON was left behind by a machine that lost power: both are passed over.

    Raises:
        FallowError: the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            data = self._path.read_bytes() if self._path.exists() else b""
        except OSError as error:
            raise FallowError(f"cannot read {path}: {error.strerror}") from error
        *lines, rest = data.split(b"\n")
        self.found: list[Any] = []
        for line in lines:
            with suppress(ValueError):
                self.found.append(parse_json(line))
        self._whole = len(data) - len(rest) if rest else None  # bytes of whole lines, if one is cut

    def add(self, *values: Any) -> None:
        """Puts them on the disk. Raises FallowError if the file cannot be written."""
        lines = "".join(to_json(value) + "\n" for value in values).encode()
        try:
            if self._whole is not None:
                os.truncate(self._path, self._whole)
                self._whole = None
            with self._path.open("ab", buffering=0) as file:
                # Until all of it is there, what a full disk left of it is none of the lines.
                self._whole = file.tell()
                while lines:
                    lines = lines[file.write(lines) :]
                os.fsync(file.fileno())
            self._whole = None
        except OSError as error:
            raise FallowError(f"cannot write {self._path}: {error.strerror}") from error
