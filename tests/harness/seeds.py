"""Whole files that are to be damaged, and what a target of damage is."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Target:
    """Whole files, and what reads them.

    `use` is given a folder in which one of the `files` (patterns) is damaged. What it writes there
    is thrown away if `writes`. `names` are words by which a refusal may name the file besides its
    path or the folder's.
    """

    seeds: list[Path]  # folders
    use: Callable[[Path], None]
    files: tuple[str, ...] = ("*",)
    writes: bool = False
    names: tuple[str, ...] = ()


# What is read ------------------------------------------------------------------------------------


class Seeds:
    """Tiny models and what fallow makes of them, written once into a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder of that name, made whole on first use."""
        folder = self.root / name
        if not folder.exists():
            part = self.root / f".{name.replace('/', '.')}"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            make(part)
            folder.parent.mkdir(parents=True, exist_ok=True)
            part.rename(folder)
        return folder

    def model(self, name: str = "llama", **changes: Any) -> Path:
        from conftest import make_folder

        key = "-".join([name, *(f"{k}={v}" for k, v in changes.items())])
        return self.made(f"models/{key}", lambda folder: make_folder(name, folder, **changes))

    @cache  # noqa: B019
    def loaded(self, name: str = "llama") -> Any:
        import fallow

        return fallow.load(self.model(name))

    def packed(self, key: str, source: Path, **options: Any) -> Path:
        from fallow.packing.packer import pack

        return self.made(f"packed/{key}", lambda to: pack(source, to / "packed.gguf", **options))

    @cache  # noqa: B019
    def engine(self) -> Any:
        from fallow.engine.engine import Engine

        folder = self.packed("llama", self.model(), quant="f32")
        return Engine(folder / "packed.gguf", plan=False, threads=1, context=16)

    @cache  # noqa: B019
    def calibrator(self) -> Any:
        from conftest import TEXT
        from fallow.calibration.calibrator import Calibrator
        from fallow.checkpoints.text import Text

        model, text = self.loaded(), Text("calibration", TEXT)
        return Calibrator(model, text, context=32, windows=4, validation_windows=2)

    def plan(self, rule: str) -> Any:
        knob = {"knob": 0.0} if rule == "relu" else {"sparsity": 0.5}
        return self.calibrator().plan(rule, measure=False, **knob)

    def text(self) -> Any:
        from conftest import OTHER_TEXT
        from fallow.checkpoints.text import Text

        return Text("evaluation", OTHER_TEXT)


IDS = np.array([1, 2])
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
