"""The folder of a model's finished parts, from which a stopped report goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fallow.common.errors import FallowError, UsageError
from fallow.common.files import read_json, write_json

_REMEDY = "remove it, or choose another --work folder"


class Parts:
    """`run.json`: what all parts were made with; `<part>.json`: its own settings, and its value."""

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        """Raises UsageError if the folder's parts were made with other settings."""
        self.folder = Path(folder)
        path = self.folder / "run.json"
        if not path.exists():
            write_json(path, settings)
        elif changed := _differences(read_json(path, _REMEDY), settings):
            raise UsageError(
                f"{self.folder} holds parts of a report with another {changed}; {_REMEDY}"
            )

    def load(self, name: str, settings: dict[str, Any]) -> Any:
        """A part's value, None if it is not finished.

        Raises:
            UsageError: it was made with other settings.
            FallowError: the file is damaged.
        """
        path = self._path(name)
        if not path.exists():
            return None
        found = read_json(path, _REMEDY)
        made_with, value = found.get("settings"), found.get("value")
        if not isinstance(made_with, dict) or found.get("sha256") != _digest(value):
            raise FallowError(f"{path} is damaged; {_REMEDY}")
        if changed := _differences(made_with, settings):
            raise UsageError(f"{path} was made with another {changed}; {_REMEDY}")
        return value

    def save(self, name: str, settings: dict[str, Any], value: Any) -> None:
        part = {"settings": settings, "value": value, "sha256": _digest(value)}
        write_json(self._path(name), part)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The settings that differ, by name."""
    return ", ".join(name for name, value in wanted.items() if found.get(name) != value)
