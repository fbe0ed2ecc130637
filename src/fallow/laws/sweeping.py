"""A grid of trainings, one after another or as tasks of Ray; each goes on where it was stopped."""

import itertools
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fallow.common.errors import FallowError, UsageError
from fallow.common.files import write_json
from fallow.common.progress import console
from fallow.common.workers import results
from fallow.laws.curves import load_curve
from fallow.laws.fitting import fit_law
from fallow.laws.training import Settings, TrainReport, train

FEWEST_POINTS = 6  # of a curve that a limit is fitted to


@dataclass(frozen=True)
class Run:
    """One training of a sweep."""

    name: str
    text: Path
    settings: Settings


def read_config(path: str | Path) -> list[Run]:
    """The runs of a TOML file.

    `[base]` has the settings of `fallow law train` and `text`, a path from the file's folder;
    `[grid]` lists of values, of which every combination is a run; each `[[run]]`, in place of or
    besides a grid, a table of settings that differ from the base.

    Raises:
        FallowError: the file is missing or no TOML.
        UsageError: an unknown setting, or no text.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FallowError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FallowError(f"{path} is no TOML file: {error}") from error
    unknown = set(content) - {"base", "grid", "run"}
    if unknown:
        raise UsageError(f"{path}: unknown table {min(unknown)!r}; known: base, grid, run")
    base, grid, own = content.get("base", {}), content.get("grid", {}), content.get("run", [])
    tables = [base, grid, *own] if isinstance(own, list) else [None]
    if not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}: write [base], [grid] and [[run]], which are tables")
    changes = [dict(run) for run in own]
    if grid or not changes:
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UsageError(f"{path}: grid.{name} must be a list of values")
        combinations = itertools.product(*grid.values())
        changes += [dict(zip(grid, values, strict=True)) for values in combinations]
    return [_run(path, base, change) for change in changes]


def _run(path: Path, base: dict[str, Any], change: dict[str, Any]) -> Run:
    known = {field.name: field.type for field in fields(Settings)}
    values = base | change
    text = values.pop("text", None)
    if not isinstance(text, str):
        raise UsageError(f"{path}: base.text must name a file to train on")
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{path}: unknown setting {name!r}; known: {', '.join(known)}, text")
        wanted = type(getattr(Settings(), name))
        if wanted is int and isinstance(value, float) and value.is_integer():  # 4e7, say
            values[name] = int(value)
        elif type(value) not in ((int, float) if wanted is float else (wanted,)):
            raise UsageError(f"{path}: {name} is {value!r}, not of type {wanted.__name__}")
    settings = replace(Settings(), **values)
    try:
        settings.check()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    name = "-".join(f"{k}={Path(str(v)).stem}" for k, v in change.items()) or "base"
    return Run(name, path.parent / text, settings)


def sweep(
    config: str | Path, output: str | Path, *, workers: int = 1, device: str = "auto"
) -> list[dict[str, Any]]:
    """Trains every run of a config into a folder of its name, and gives one table.

    The table is in `sweep.json` too, and grows as runs finish.

    Raises:
        FallowError: as `train`. UsageError: as `read_config`, or two runs of one name.
    """
    runs, output = read_config(config), Path(output)
    names = [run.name for run in runs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"{config}: two runs are {min(twice)!r}; change one of them")
    parts = [(output / run.name, run.text, run.settings, device) for run in runs]
    table: dict[int, dict[str, Any]] = {}
    for number, report in results(train, parts, workers):
        run = runs[number]
        table[number] = _row(run, report)
        write_json(output / "sweep.json", [table[i] for i in sorted(table)])
        console.print(
            f"{run.name}: activation ratio {report.activation_ratio:.4f}, "
            f"{len(table)} of {len(runs)} runs",
            highlight=False,
        )
    return [table[i] for i in sorted(table)]


def _row(run: Run, report: TrainReport) -> dict[str, Any]:
    """A run's settings and result; its limit where the curve tells it."""
    curve = load_curve(report.curve, unit=1)
    row = {"run": run.name, "width_depth": run.settings.hidden_size / run.settings.layers}
    row |= asdict(run.settings) | report.to_json()
    row |= {"last_ratio": float(curve.ratio[-1]), "limit": None, "limit_interval": None}
    if len(curve) >= FEWEST_POINTS:
        law = fit_law(curve, run.settings.activation, draws=20)
        if law.identified:
            row |= {"limit": law.params["A0"], "limit_interval": law.intervals["A0"]}
    return row
