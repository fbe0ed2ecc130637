"""Sparsity against quality for many rules at once: resumable, one table, one figure."""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fallow.calibration.calibrator import Calibrator, check_increase
from fallow.checkpoints.text import Text, check_no_leakage, load_text
from fallow.common.errors import UsageError
from fallow.common.files import JsonLines, atomic_path, fits, read_json, write_json, write_text
from fallow.common.metrics import perplexity, ppl_change_percent, window_error
from fallow.common.progress import console, log, progress
from fallow.common.tables import Table
from fallow.measure.evaluation import run_window
from fallow.measure.quality import SPARSITY_TAPS, WindowResult
from fallow.plan import Plan
from fallow.reference.model import Model
from fallow.rules._base import check_sparsity
from fallow.selectors import Arrays, Selector, find

# Plans evaluated on a window before results are saved: what Ctrl-C can lose. The dense model runs
# once per group.
PLANS_AT_ONCE = 8


@dataclass(frozen=True)
class Row:
    """A rule at a target: a sparsity, or a largest PPL increase in percent."""

    rule: str
    sparsity: float | None = None
    max_ppl_increase: float | None = None

    @property
    def key(self) -> str:
        if self.sparsity is not None:
            return f"{self.rule}-{self.sparsity:g}"
        return f"{self.rule}-ppl{self.max_ppl_increase:g}"


def make_rows(
    rules: Sequence[str], sparsities: Sequence[float], ppl_increases: Sequence[float] = ()
) -> list[Row]:
    """Every rule at every target, once; relu, which has no parameter, too.

    Raises:
        UsageError: unknown rule, sparsity outside [0, 1), an increase that is no positive
            percentage, or nothing asked for.
    """
    rows: list[Row] = []
    for rule in rules:
        searchable = find(rule).search is not None
        targets = sparsities if searchable else [0.0]
        rows += [Row(rule, sparsity=check_sparsity(s)) for s in targets]
        rows += [Row(rule, max_ppl_increase=check_increase(p)) for p in ppl_increases if searchable]
    rows = list(dict.fromkeys(rows))
    if not rows:
        raise UsageError("nothing to do: give --rules and --sparsities or --max-ppl-increases")
    return rows


class Store:
    """The folder of a run: plans, one result per (row, window) in `cells.jsonl`, and settings."""

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._check_settings(settings)
        self._file = JsonLines(self.folder / "cells.jsonl")
        whole = filter(_is_whole, self._file.found)
        self.cells = {(cell["row"], cell["window"]): cell for cell in whole}

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            write_json(path, settings)
            return
        found = read_json(path, "choose another --output folder")
        changed = [k for k, v in settings.items() if found.get(k) != v]
        if changed:
            raise UsageError(
                f"{self.folder} holds a run with another {', '.join(changed)}; "
                "choose another --output folder"
            )

    def add(self, cells: list[dict[str, Any]]) -> None:
        self._file.add(*cells)
        self.cells.update({(cell["row"], cell["window"]): cell for cell in cells})

    def is_missing(self, row: Row, windows: int) -> bool:
        """Whether one of so many windows is not measured under a row."""
        return any((row.key, w) not in self.cells for w in range(windows))

    def check_training(self, training: dict[str, str]) -> None:
        """Raises UsageError if results here are of another training of a row's selector."""
        for (key, _), cell in self.cells.items():
            if key in training and cell.get("training", "") != training[key]:
                raise UsageError(
                    f"{self.folder} holds results of another training of {key}; "
                    "give its --trained file, or another --output folder"
                )

    def plan_path(self, row: Row) -> Path:
        return plan_path(self.folder, row)


def plan_path(folder: Path, row: Row) -> Path:
    """Where a run keeps a row's plan; rows of selectors have none."""
    return folder / "plans" / f"{row.key}.plan"


def tradeoff(
    model: Model,
    rows: Sequence[Row],
    output: str | Path,
    *,
    calibration_text: str | Path | Text | None = None,
    text: str | Path | Text | None = None,
    context: int = 1024,
    windows: int | None = None,
    calibration_windows: int = 8,
    validation_windows: int = 4,
    allow_leakage: bool = False,
    trained: Sequence["Trained"] = (),
) -> Table:
    """Calibrates every row on one text and measures all of them on another, in the loop.

    Rows of the selectors in `trained`, files of `fallow select train`, take their scores from there
    and their budget from the row. Finished work in `output` is kept and not done again; Ctrl-C
    leaves a table of the windows that every row has. Writes `table.csv`, `table.json`,
    `tradeoff.png` and `tradeoff.svg`.

    Raises:
        UsageError: the folder holds a run with other settings, or both texts are the same.
        FallowError: a text has fewer windows, the model computes NaN, or a trained selector is
            for another.
    """
    counts = {"calibration": calibration_windows, "validation": validation_windows}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"--{name}-windows {count} is too few; give at least 1")
    source = load_text(text, "evaluation")
    scores = _trained_scores(model, trained, source, allow_leakage)
    calibration_source = load_text(calibration_text, "calibration")
    check_no_leakage(calibration_source.sha256, source, allow_leakage, calibration_source.sketch)
    cut = model.windows(source, context, windows)
    settings = {
        "model": model.name, "fingerprint": model.fingerprint, "dtype": model.dtype_name,
        "context": context, "text_sha256": source.sha256,
        "calibration_sha256": calibration_source.sha256,
        "calibration_windows": calibration_windows, "validation_windows": validation_windows,
        "energy_recall": "per token",  # older windows have another, and other bytes
    }  # fmt: skip
    store = Store(output, settings)
    training = {row.key: _training(row, scores) for row in rows}
    store.check_training(training)
    missing = [row for row in rows if store.is_missing(row, len(cut))]
    try:
        plans = _calibrate(
            model, missing, store, calibration_source, context, calibration_windows,
            validation_windows, scores,
        )  # fmt: skip
        _measure(model, missing, plans, cut, store, training)
    except KeyboardInterrupt:
        console.print(f"stopped; finished work is in {output}, the same command continues it")
        raise
    finally:
        table = summarise(rows, store.cells, len(cut))
        if table:
            write_table(table, store.folder)
    return table


class Trained(Protocol):
    """A selector that was trained: what `fallow select train` wrote."""

    selector: str
    arrays: Arrays
    calibration_sha256: str
    calibration_sketch: np.ndarray

    def check_model(self, fingerprint: str, name: str) -> None: ...


def _trained_scores(
    model: Model, trained: Sequence[Trained], text: Text, allow_leakage: bool
) -> dict[str, Arrays]:
    """The scores of trained selectors by their key: they do not depend on the budget."""
    found: dict[str, Arrays] = {}
    for each in trained:
        each.check_model(model.fingerprint, model.name)
        check_no_leakage(each.calibration_sha256, text, allow_leakage, each.calibration_sketch)
        found[_scores_key(each.selector)] = each.arrays
    return found


def _scores_key(name: str) -> str:
    found = find(name)
    return found.scores_key() if issubclass(found, Selector) else ""


def _training(row: Row, scores: dict[str, Arrays]) -> str:
    """A mark of the training that a row's selector has its scores from; "": none."""
    digest = hashlib.sha256()
    arrays = scores.get(_scores_key(row.rule), {})
    for name in sorted(arrays):
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()[:16] if arrays else ""


def _calibrate(
    model: Model,
    rows: Sequence[Row],
    store: Store,
    text: Text,
    context: int,
    windows: int,
    validation_windows: int,
    scores: dict[str, Arrays],
) -> dict[str, Plan | Selector]:
    """What runs, by the key of the row; plans, not selectors, are kept in the store."""
    found: dict[str, Plan | Selector] = {}
    calibrator = None
    for row in rows:
        path = store.plan_path(row)
        if path.exists():
            found[row.key] = Plan.load(path)
            continue
        if calibrator is None:
            calibrator = Calibrator(
                model, text, context=context, windows=windows, validation_windows=validation_windows
            )
            calibrator.calibration.cache.update(scores)
        if issubclass(find(row.rule), Selector):
            fitted = calibrator.fit(
                row.rule, sparsity=row.sparsity, max_ppl_increase=row.max_ppl_increase
            )
            assert isinstance(fitted, Selector)
            found[row.key] = fitted
            continue
        plan = calibrator.plan(
            row.rule,
            sparsity=row.sparsity,
            max_ppl_increase=row.max_ppl_increase,
            measure=row.max_ppl_increase is not None,
        )
        plan.save(path)
        found[row.key] = plan
    return found


def _measure(
    model: Model,
    rows: Sequence[Row],
    plans: dict[str, Plan | Selector],
    windows: np.ndarray,
    store: Store,
    training: dict[str, str],
) -> None:
    missing = [
        [row for row in rows if (row.key, w) not in store.cells] for w in range(len(windows))
    ]
    with progress("measure", sum(map(len, missing))) as ticker:
        for w, todo in enumerate(missing):
            for start in range(0, len(todo), PLANS_AT_ONCE):
                group = todo[start : start + PLANS_AT_ONCE]
                dense, results = run_window(model, windows[w], [plans[r.key] for r in group])
                store.add(
                    [
                        _cell(row, plans[row.key], w, dense, result)
                        | _bytes(model, row, result.achieved_sparsity)
                        | {"training": training[row.key]}
                        for row, result in zip(group, results, strict=True)
                    ]
                )
                for row, result in zip(group, results, strict=True):
                    figures = {"loss": result.loss, "dense_loss": dense.loss}
                    figures |= {"kl_to_dense": float(result.kl.mean())}
                    log(f"tradeoff {row.key}", w, figures)
                ticker.advance(len(group))


def _bytes(model: Model, row: Row, sparsity: float) -> dict[str, float]:
    """What a selector leaves of the FFN's bytes."""
    rule = find(row.rule)
    if not (issubclass(rule, Selector) and model.layers[0].gated):
        return {}
    choosing, multiplications = rule.cost(model.layers[0])
    return {
        "ffn_bytes": rule.ffn_bytes(1 - sparsity, model.layers[0]),
        "choosing_bytes": choosing,
        "choosing_multiplications": multiplications,
    }


def _cell(
    row: Row, plan: Plan | Selector, window: int, dense: WindowResult, result: WindowResult
) -> dict[str, Any]:
    sparsity = {tap: round(float(f.mean()), 5) for tap, f in result.sparsity.items()}
    return {
        "row": row.key,
        "window": window,
        "knob": plan.knob,
        "tokens": len(result.kl) + 1,
        "dense_loss": dense.loss,
        "loss": result.loss,
        "kl": float(result.kl.mean()),
        "top1": result.top1,
        "achieved_sparsity": round(result.achieved_sparsity, 5),
        "sparsity": sparsity,
        "recall": result.recall,
        "energy_recall": result.energy_recall,
    }


SELECTION = (
    "recall", "energy_recall", "ffn_bytes", "choosing_bytes", "choosing_multiplications",
)  # fmt: skip
_NUMBERS = ("knob", "tokens", "dense_loss", "loss", "kl", "top1", "achieved_sparsity")
_LARGEST_LOSS = 700.0  # nats: a larger one has no perplexity


def _is_whole(cell: Any) -> bool:
    """Whether a line of a file is what `_cell` makes; any other is measured again."""
    if not isinstance(cell, dict) or not isinstance(cell.get("sparsity"), dict):
        return False
    numbers = [*(cell.get(name) for name in _NUMBERS), *cell["sparsity"].values()]
    return (
        fits(cell.get("row"), str)
        and fits(cell.get("window"), int)
        and all(fits(value, float) and abs(value) < 1e18 for value in numbers)
        and max(cell["loss"], cell["dense_loss"]) < _LARGEST_LOSS
        and all(fits(cell.get(name), float | None) for name in SELECTION)
    )


def summarise(
    rows: Sequence[Row], cells: dict[tuple[str, int], dict[str, Any]], n_windows: int
) -> Table:
    """One line per row over those windows that every row has; the dense model first."""
    keys = [row.key for row in rows]
    windows = [w for w in range(n_windows) if all((key, w) in cells for key in keys)]
    if not windows:
        return Table()
    dense_loss = np.array([cells[keys[0], w]["dense_loss"] for w in windows])
    ppl, ppl_se = perplexity(dense_loss)
    table = Table([{"rule": "dense", "ppl": ppl, "ppl_se": ppl_se, "windows": len(windows)}])
    table += [_summarise_row(row, [cells[row.key, w] for w in windows]) for row in rows]
    return table


def _summarise_row(row: Row, cells: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    loss = np.array([c["loss"] for c in cells])
    ppl, ppl_se = perplexity(loss)
    # Paired with the dense loss of the same run of the same window.
    change, change_se = ppl_change_percent(loss, np.array([c["dense_loss"] for c in cells]))
    kl = np.array([c["kl"] for c in cells])
    return {
        "rule": row.rule,
        "where": find(row.rule).where,
        "target_sparsity": row.sparsity,
        "target_ppl_increase": row.max_ppl_increase,
        "knob": cells[0]["knob"],
        "achieved_sparsity": mean([c["achieved_sparsity"] for c in cells]),
        **{
            f"sparsity_{tap}": mean([c["sparsity"][tap] for c in cells])
            for tap in SPARSITY_TAPS
            if all(tap in c["sparsity"] for c in cells)
        },
        "ppl": ppl,
        "ppl_se": ppl_se,
        "ppl_change_percent": change,
        "ppl_change_se": change_se,
        "kl_to_dense": float(kl.mean()),
        "kl_se": window_error(kl),
        "top1_agreement": mean([c["top1"] for c in cells]),
        "windows": len(cells),
        **_selection(cells),
    }


def _selection(cells: list[dict[str, Any]]) -> dict[str, float]:
    """What rows of selectors, and of rules that keep k neurons per token, have besides."""
    return {
        key: float(np.mean([c[key] for c in cells]))
        for key in SELECTION
        if all(c.get(key) is not None for c in cells)
    }


def target_label(row: dict[str, Any]) -> str:
    """A table row's target for readers: "50%" or "+1 % PPL"."""
    if row["target_sparsity"] is not None:
        return f"{row['target_sparsity']:.0%}"
    return f"+{row['target_ppl_increase']:g} % PPL"


def write_table(table: list[dict[str, Any]], folder: Path) -> None:
    """table.csv and table.json; the figure if there is more than the dense row."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_text(folder / "table.csv", out.getvalue())
    write_json(folder / "table.json", table)
    _draw(table, folder)
    if any("ffn_bytes" in row for row in table):
        _draw_bytes([row for row in table if "ffn_bytes" in row], folder)


# One column of panels per kind of sparsity: they are not the same quantity.
_COLUMNS = {
    "inter": "neuron sparsity S(inter)",
    "input": "input sparsity of all projections",
    "experts": "experts left out",
}


def _draw(table: list[dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    present = [w for w in _COLUMNS if any(r["where"] == w for r in table[1:])]
    figure, axes = plt.subplots(
        2, len(present), figsize=(5.5 * len(present), 7), squeeze=False, sharey="row"
    )
    for column, where in enumerate(present):
        top, bottom = axes[0, column], axes[1, column]
        for rule in dict.fromkeys(r["rule"] for r in table[1:] if r["where"] == where):
            _draw_rule(top, bottom, [r for r in table if r["rule"] == rule])
        top.axhline(1, color="grey", linewidth=0.8, linestyle=":")  # +1 %
        top.set_yscale("symlog", linthresh=1)
        bottom.set_yscale("log")
        bottom.set_xlabel(_COLUMNS[where])
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
        top.legend(fontsize=8)
    axes[0, 0].set_ylabel("PPL change against dense, %")
    axes[1, 0].set_ylabel("KL to dense, nats/token")
    _save(figure, folder, "tradeoff")


def _draw_bytes(rows: list[dict[str, Any]], folder: Path) -> None:
    """What selectors read of the FFN against what they cost; the line joins the best of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5.5))
    for rule in dict.fromkeys(r["rule"] for r in rows):
        own = [r for r in rows if r["rule"] == rule]
        axis.errorbar(
            [r["ffn_bytes"] for r in own],
            [r["ppl_change_percent"] for r in own],
            [r["ppl_change_se"] or 0 for r in own],
            marker="o",
            markersize=4,
            linestyle="none",
            label=rule,
        )
    front = pareto_front(rows)
    axis.plot(
        [r["ffn_bytes"] for r in front],
        [r["ppl_change_percent"] for r in front],
        color="grey",
        linewidth=0.8,
        zorder=0,
    )
    axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")  # +1 %
    axis.set_yscale("symlog", linthresh=1)
    axis.set_xlabel("FFN bytes per token over the dense FFN's, choosing included")
    axis.set_ylabel("PPL change against dense, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, folder, "pareto")


def pareto_front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in both bytes and PPL change, by falling bytes."""
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (r["ffn_bytes"], r["ppl_change_percent"])):
        if not front or row["ppl_change_percent"] < front[-1]["ppl_change_percent"]:
            front.append(row)
    return front[::-1]


def _save(figure: Any, folder: Path, name: str) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    for kind in ("png", "svg"):
        with atomic_path(folder / f"{name}.{kind}") as temporary:
            figure.savefig(temporary, format=kind, dpi=150)
    plt.close(figure)


def _draw_rule(top: Any, bottom: Any, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda r: r["achieved_sparsity"])
    x = [r["achieved_sparsity"] for r in rows]
    style = {"marker": "o", "markersize": 3, "capsize": 2, "label": rows[0]["rule"]}
    for axis, value, error in (
        (top, "ppl_change_percent", "ppl_change_se"),
        (bottom, "kl_to_dense", "kl_se"),
    ):
        axis.errorbar(x, [r[value] for r in rows], [r[error] or 0 for r in rows], **style)
