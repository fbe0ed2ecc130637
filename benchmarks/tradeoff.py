"""Quality against sparsity of every rule on the three real models.

Thresholds come from the WikiText-2 validation text, all figures from the WikiText-2 raw test text,
in windows of 1024 tokens. Hours on two cores, most of them the searches of `teal` and `wina`;
a stopped run continues where it was:

    python benchmarks/tradeoff.py smollm2 gemma3 qwen2.5-1.5b
    python benchmarks/tradeoff.py --others smollm2    # rules without rows there
    python benchmarks/tradeoff.py --report    # writes docs/results and the README's table
"""

import argparse
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("FALLOW_DATA", ROOT / "../shared/data"))
RESULTS = ROOT / "benchmarks" / "results" / "tradeoff"
RULES = (
    *("percentile", "cats", "fat", "act_topk", "topk", "topp", "tail", "cett"),
    *("scap", "teal_uniform", "teal", "teal_relative", "wina_uniform", "wina", "relu"),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "smollm2": {"sparsities": (0.3, 0.4, 0.5, 0.6, 0.7), "ppl": (), "windows": 40},
    "gemma3": {"sparsities": (0.3, 0.4, 0.5, 0.6, 0.7), "ppl": (), "windows": 40},
    "qwen2.5-1.5b": {"sparsities": (0.3, 0.5, 0.7), "ppl": (1.0,), "windows": 12},
}
# On few windows, so that they take minutes; those that are long to fit have theirs last.
OTHERS = ("topk", "act_topk", "topp", "scap", "teal_uniform")
LONG = ("teal:step=20", "wina:step=20")
OTHER_SPARSITIES, OTHER_WINDOWS = (0.5,), 4


def run_others(name: str) -> None:
    for rules in (OTHERS, (*OTHERS, *LONG)):
        measure(name, RESULTS / "others", rules, OTHER_SPARSITIES, (), OTHER_WINDOWS)


def run(name: str) -> None:
    settings = SETTINGS[name]
    measure(name, RESULTS, RULES, settings["sparsities"], settings["ppl"], settings["windows"])


def measure(
    name: str,
    results: Path,
    rules: Sequence[str],
    sparsities: Sequence[float],
    ppl_increases: Sequence[float],
    windows: int,
    trained: Sequence[Any] = (),
) -> None:
    """The trade-off of some rules on a model of `fallow models`, into a folder of that name.

    `trained`: files of `fallow select train` for some of the rules.
    """
    import fallow
    from fallow.calibration.tradeoff import make_rows, tradeoff

    folder = results / name
    folder.mkdir(parents=True, exist_ok=True)
    model = fallow.load(name)
    record_machine(folder / "machine.json")
    tradeoff(
        model,
        make_rows(rules, sparsities, ppl_increases),
        folder,
        calibration_text=DATA / "wikitext2" / "wiki.valid.detok.txt",
        text=DATA / "wikitext2" / "wiki.test.raw",
        windows=windows,
        trained=trained,
    )


def run_and_report(
    description: str | None, run: Callable[[str], None], report: Callable[[], str], document: str
) -> None:
    """A script's command line: models to run, and --report for docs/results/`document`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        run(name)
    if arguments.report:
        (ROOT / "docs" / "results" / document).write_text(report())


def keeper(folder: Path) -> Callable[[str, Callable[[], Any]], None]:
    """Records the machine, and gives a function that does a step unless result.json has it."""
    folder.mkdir(parents=True, exist_ok=True)
    record_machine(folder / "machine.json")
    path = folder / "result.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(key: str, do: Callable[[], Any]) -> None:
        if key not in result:
            result[key] = do()
            path.write_text(json.dumps(result, indent=1) + "\n")

    return keep


def record_machine(path: Path) -> None:
    """Where the results come from; of a run that was continued it may be several of each."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    before = [json.loads(path.read_text())] if path.exists() else []
    entry = {
        "processors": list(dict.fromkeys([*processors(*before), processor()])),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commits": list(dict.fromkeys([*_commits(*before), commit or "uncommitted"])),
    }
    if torch.cuda.is_available():
        entry["gpu"] = torch.cuda.get_device_name()
    path.write_text(json.dumps(entry, indent=1) + "\n")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name and, of an x86, family, model and stepping: virtual machines' names leave them out."""
    first, _, _ = cpuinfo.read_text().partition("\n\n")
    fields = dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.MULTILINE))
    numbers = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    said = [f"{name} {fields[key]}" for name, key in numbers.items() if key in fields]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(said) or 'model not recorded'})"


def processors(*wheres: dict[str, Any]) -> list[str]:
    """All that `record_machine` wrote of processors; once it was no more than their name."""
    found = [w.get("processors") or [f"{w['cpu']} (model not recorded)"] for w in wheres]
    return list(dict.fromkeys(chain.from_iterable(found)))


def _commits(*wheres: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(chain.from_iterable(where["commits"] for where in wheres)))


def machine_line(*wheres: dict[str, Any]) -> str:
    """What `record_machine` wrote, in words."""
    return (
        f"{', '.join(processors(*wheres))}, {wheres[0]['threads']} threads, "
        f"commits {', '.join(_commits(*wheres))}"
    )


INTRODUCTION = """# Sparsity against quality

Every rule at several sparsities; a target of +1 % PPL is the point where the rule costs that much
on held-out calibration text. Thresholds were fitted on the WikiText-2 validation text (8 windows; 4
more for a search), everything below was measured on the WikiText-2 raw test text, windows of 1024
tokens, the whole model in the loop. `benchmarks/tradeoff.py` does it; the result of every window is
in `benchmarks/results/tradeoff`.

- **target** is a sparsity of what the rule cuts: each of three outputs for `percentile`; the inputs
  of all seven projections, attention included, for the rules of `teal` and `wina`, those of the
  FFN's for `scap`; neurons for the others. **achieved**, measured here, is S(inter), and for rules
  of inputs the sparsity of those that they cut, weighted by parameters. Never compare the two kinds
  by sparsity alone.
- Changes are against the dense model on the same windows, ± one *paired* standard error over
  windows. KL is KL(dense || sparse) per token.
- `topk`, `tail` and `cett` choose by |inter| ||down_proj[:, i]||, and `topp` by |inter|, known only
  when `gate_proj` and `up_proj` are computed: they save `down_proj` alone. `cats`, `fat` and
  `act_topk` save `up_proj` and `down_proj`.
- How `teal`, `wina` and their variants differ from each other and from the papers is in
  [methods](../methods.md#rules). Rules that have no rows in the first tables have theirs under
  *other rules*, of few windows and at half alone, with `topk` beside them; rules without rows there
  (`teal` and `wina`, whose searches are long) were not measured yet.

On SmolLM2 `tail` fails at high sparsity through a few tokens: attention sinks (the first token, and
some "of", "the" and digits) have a neuron so large that the budget lets all others of their layer
go. In a trial on three windows (not in the results) at τ = 0.13 (S = 55 %) the loss rose by 0.21 to
0.30 nats; where tokens that would lose more than 90 % of a layer kept all of it, by 0.07 to 0.09,
at 54 %. On the other models `tail` does not fail. On Gemma-3-270M it costs least of the rules from
40 % on, 0.37 ± 0.15 % less than `topk` at 50 % (paired).

On Qwen2.5-Coder `cett` and `tail`, which let sparsity differ by layer and token, change PPL at 50 %
by +0.04 ± 0.11 and +0.29 ± 0.25 %, which 12 windows do not tell from no change, where `topk` costs
+0.83 ± 0.22 %. That is no proof of no loss. What the model predicts does change: KL is 0.0180 ±
0.0006 and 0.0242 ± 0.0008 nats, thirty errors from zero (`topk` 0.0199 ± 0.0006), and of the most
likely tokens 7 to 9 % are others.

Dense PPL of the first windows agrees with independent figures: SmolLM2 23.24 (4 windows, no BOS),
Qwen2.5-Coder 14.02 (3 windows, bfloat16, no BOS). For Gemma-3-270M it is 18.27 (4 windows, each BOS
and 1023 tokens of text; 18.31 with 1024), with logits equal to those of transformers' own GGUF
loader; an older figure of 18.65 could not be reproduced.
"""


def report() -> str:
    """The document, from the results on disk."""
    parts = [INTRODUCTION]
    for name in SETTINGS:
        parts += _section(RESULTS / name, name)
    for name in SETTINGS:
        parts += _section(RESULTS / "others" / name, f"{name}, other rules")
    return "\n".join(parts)


def _section(folder: Path, title: str) -> list[str]:
    """A run's part of the document; nothing if it has no table."""
    if not (folder / "table.json").exists():
        return []
    table = json.loads((folder / "table.json").read_text())
    run_settings = json.loads((folder / "run.json").read_text())
    where = json.loads((folder / "machine.json").read_text())
    dense = table[0]
    return [
        f"## {title}\n\nDense PPL {dense['ppl']:.2f} ± {dense['ppl_se']:.2f}, "
        f"{dense['windows']} windows of {run_settings['context']} tokens, "
        f"{run_settings['dtype']}; torch {where['torch']}, {machine_line(where)}.\n\n"
        f"![PPL and KL against sparsity](../../{folder.relative_to(ROOT)}/tradeoff.svg)\n\n"
        f"{markdown(table[1:])}\n"
    ]


def summary() -> str:
    """The README's table: PPL change in percent of each rule, per model and target sparsity."""
    tables = {
        name: json.loads((RESULTS / name / "table.json").read_text())
        for name in SETTINGS
        if (RESULTS / name / "table.json").exists()
    }
    columns = [(name, target) for name in tables for target in (0.3, 0.5, 0.7)]
    lines = [
        "| rule | " + " | ".join(f"{name} {target:.0%}" for name, target in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    measured = {row["rule"] for table in tables.values() for row in table}
    for rule in RULES[:-1]:  # relu cuts nothing here
        if rule not in measured:
            continue
        cells = []
        for name, target in columns:
            rows = tables[name][1:]
            row = next(
                (r for r in rows if (r["rule"], r["target_sparsity"]) == (rule, target)), None
            )
            if row is None:
                cells.append("")
                continue
            change, error = row["ppl_change_percent"], row["ppl_change_se"]
            cells.append("over +1000" if change > 1000 else f"{change:+.1f} ± {error:.1f}")
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    wheres = [json.loads((RESULTS / name / "machine.json").read_text()) for name in tables]
    described = "; ".join(
        f"{name}: PPL {table[0]['ppl']:.2f} ± {table[0]['ppl_se']:.2f}, "
        f"{table[0]['windows']} windows of 1024, commit {where['commits'][-1]}"
        for (name, table), where in zip(tables.items(), wheres, strict=True)
    )
    return (
        "\n".join(lines) + "\n\nPPL change in percent ± paired standard error, by target sparsity; "
        "thresholds from WikiText-2 validation, measured on WikiText-2 raw test. Dense: "
        f"{described}; {', '.join(processors(*wheres))}, {wheres[0]['threads']} threads, "
        f"torch {wheres[0]['torch']}."
    )


def update_readme(name: str, table: str) -> None:
    """Puts a table between the README's marks of this name."""
    path = ROOT / "README.md"
    head, _, rest = path.read_text().partition(f"<!-- {name} -->")
    _, _, tail = rest.partition(f"<!-- /{name} -->")
    path.write_text(f"{head}<!-- {name} -->\n{table}\n<!-- /{name} -->{tail}")


def markdown(rows: list[dict[str, Any]]) -> str:
    from fallow.calibration.tradeoff import target_label

    lines = [
        "| rule | target | parameter | achieved | S(x) | S(gate_act) | S(up) | S(inter) "
        "| PPL change % | KL nats/token | top-1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sparsity = " | ".join(
            f"{row.get(f'sparsity_{tap}', 0):.3f}" for tap in ("x", "gate_act", "up", "inter")
        )
        lines.append(
            f"| {row['rule']} | {target_label(row)} | {row['knob']:.4g} "
            f"| {row['achieved_sparsity']:.3f} "
            f"| {sparsity} | {row['ppl_change_percent']:+.2f} ± {row['ppl_change_se']:.2f} "
            f"| {row['kl_to_dense']:.4f} ± {row['kl_se']:.4f} | {row['top1_agreement']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*SETTINGS, []])
    parser.add_argument("--others", action="store_true", help="the rules of OTHERS and LONG")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write docs/results/tradeoff.md and the README's table",
    )
    arguments = parser.parse_args()
    for model_name in arguments.models:
        (run_others if arguments.others else run)(model_name)
    if arguments.report:
        (ROOT / "docs" / "results" / "tradeoff.md").write_text(report())
        update_readme("results", summary())
