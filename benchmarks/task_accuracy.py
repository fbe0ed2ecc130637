"""Zero-shot tasks at a CETT of three losses, as Table 1 of arXiv:2411.02335 has them.

The paper's losses are +1, +5 and +10 % of PPL, at one CETT for all layers. CETTs come from the
curve of rule `cett` in benchmarks/results/tradeoff, thresholds from the WikiText-2 validation text.
Tasks are read by the engine. A stopped run continues with the next task:

    python benchmarks/task_accuracy.py smollm2
    python benchmarks/task_accuracy.py --report    # writes docs/results/tasks.md
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine import TEST, VALIDATION
from tradeoff import DATA, ROOT, keeper, machine_line, run_and_report
from tradeoff import RESULTS as TRADEOFF

RESULTS = ROOT / "benchmarks" / "results" / "task_accuracy"
LOSSES = (1, 5, 10)  # percent of PPL
READING = ("lambada_openai_test",)
COMMONSENSE = ("arc_easy_test", "piqa_val", "winogrande_dev")
ITEMS = 200  # the first of each task
CONTEXT, CALIBRATION_WINDOWS, PPL_WINDOWS = 1024, 8, 8
THREADS = 1  # nothing here is timed
PUBLISHED = {"commonsense": (-0.16, -0.50, -0.45), "reading": (-0.30, -2.21, -3.64)}  # Table 1


def run(name: str) -> None:
    from fallow.measure.tasks import load_task, score_items

    folder = RESULTS / name
    keep = keeper(folder)
    keep("plans", lambda: plans(name, folder))
    engine, found = None, [None, *(plan_path(folder, loss) for loss in LOSSES)]
    for task in (*READING, *COMMONSENSE):
        path = DATA / "tasks" / f"{task}.jsonl"

        def answers(path: Path = path) -> list[str]:
            """Of the dense model and at each loss, an item a digit: 1 is right."""
            nonlocal engine
            engine = engine or packed(name, folder)
            items = load_task(path, ITEMS)
            loaded = [each and _plan(each) for each in found]
            scores = [score_items(engine, plan, items, path) for plan in loaded]
            return ["".join(str(int(right)) for right in row) for row in scores]

        keep(task, answers)


def plans(name: str, folder: Path) -> list[dict[str, float]]:
    """Fits and keeps the plan of each loss; its sparsity, and what it costs on the test text."""
    import fallow
    from fallow.calibration.calibrator import Calibrator
    from fallow.checkpoints.text import load_text
    from fallow.common.metrics import ppl_change_percent
    from fallow.measure.evaluation import run_window

    model = fallow.load(name)
    calibrator = Calibrator(model, VALIDATION, context=CONTEXT, windows=CALIBRATION_WINDOWS)
    made = []
    for loss in LOSSES:
        made.append(calibrator.plan("cett", knob=cett_for(name, loss), measure=False))
        made[-1].save(plan_path(folder, loss))
    windows = model.windows(load_text(TEST, "evaluation"), CONTEXT, PPL_WINDOWS)
    results = [run_window(model, window, made) for window in windows]
    dense = np.array([d.loss for d, _ in results])
    rows = []
    for i, plan in enumerate(made):
        cells = [r[i] for _, r in results]
        change, error = ppl_change_percent(np.array([c.loss for c in cells]), dense)
        sparsity = float(np.mean([c.achieved_sparsity for c in cells]))
        rows.append(
            {"cett": plan.knob, "sparsity": sparsity}
            | {"ppl_change_percent": change, "ppl_change_se": error}
        )
    return rows


def cett_for(name: str, loss: float) -> float:
    """Where the trade-off's curve passes a loss (%); between its points linear in logarithms."""
    table = json.loads((TRADEOFF / name / "table.json").read_text())
    curve = [(r["ppl_change_percent"], r["knob"]) for r in table if r["rule"] == "cett"]
    losses, cetts = np.log(np.array(sorted(curve))).T
    return float(np.exp(np.interp(np.log(loss), losses, cetts)))


def plan_path(folder: Path, loss: float) -> Path:
    return folder / f"cett-{loss:g}.plan"


def _plan(path: Path) -> Any:
    from fallow.plan import Plan

    return Plan.load(path)


def packed(name: str, folder: Path) -> Any:
    import fallow

    path = folder / "packed.gguf"
    if not path.exists():
        fallow.pack(name, path)
    return fallow.Engine(path, threads=THREADS, context=CONTEXT)


INTRODUCTION = f"""# Tasks at a stated loss

Accuracy with rule `cett`, one CETT for all layers, where it costs +1, +5 and +10 % of PPL: what
Table 1 of arXiv:2411.02335 has, the mean of ten models that were trained for it.
`benchmarks/task_accuracy.py` does it. CETTs are read off the curve of `cett` in
[tradeoff](tradeoff.md); **PPL** is what they cost on the first {PPL_WINDOWS} windows of the
WikiText-2 raw test text, which are among those that the curve is of. Tasks are zero-shot, the first
{ITEMS} items of each, by the packed model: accuracy dense, then its change in points at each loss,
± one standard error of the paired difference. The paper averages several tasks of either kind,
which need not be these.
"""


def report() -> str:
    lines = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*/result.json")):
        result = json.loads(path.read_text())
        where = json.loads(path.with_name("machine.json").read_text())
        lines += [f"## {path.parent.name}\n", f"{machine_line(where)}.\n", *_table(result)]
    return "\n".join(lines) + "\n"


def _table(result: dict[str, Any]) -> list[str]:
    heads = [f"+{loss:g} %" for loss in LOSSES]
    cells = [
        f"CETT {r['cett']:.4f}, {r['sparsity']:.1%} inactive, "
        f"PPL {r['ppl_change_percent']:+.2f} ± {r['ppl_change_se']:.2f} %"
        for r in result["plans"]
    ]
    lines = [
        f"| task | dense | {' | '.join(heads)} |",
        "|---" * (len(LOSSES) + 2) + "|",
        f"| | | {' | '.join(cells)} |",
    ]
    for kind, tasks in (("commonsense", COMMONSENSE), ("reading", READING)):
        found = [task for task in tasks if task in result]
        right = {t: np.array([[int(c) for c in row] for row in result[t]]) for t in found}
        changes = {t: [change(row, r[0]) for row in r[1:]] for t, r in right.items()}
        for task in found:
            shown = " | ".join(f"{c:+.1f} ± {e:.1f}" for c, e in changes[task])
            lines.append(f"| {task} | {100 * right[task][0].mean():.1f} | {shown} |")
        if len(found) == len(tasks):
            means = [np.array([changes[t][i] for t in found]).T for i in range(len(LOSSES))]
            shown = " | ".join(
                f"**{c.mean():+.2f} ± {np.linalg.norm(e) / len(e):.2f}**" for c, e in means
            )
            theirs = " | ".join(f"{value:+.2f}" for value in PUBLISHED[kind])
            lines += [f"| {kind}, mean | | {shown} |", f"| {kind}, published | | {theirs} |"]
    return lines


def change(right: np.ndarray, dense: np.ndarray) -> tuple[float, float]:
    """Points, and the standard error of the paired difference."""
    from fallow.common.metrics import standard_error

    difference = 100 * (right - dense)
    return float(difference.mean()), standard_error(difference) or 0.0


if __name__ == "__main__":
    run_and_report(__doc__, run, report, "tasks.md")
