"""Reports: models measured part by part, and one HTML file that shows them."""

import hashlib
import re
import shlex
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

import fallow
from fallow.checkpoints.text import load_text
from fallow.common.errors import UsageError
from fallow.common.files import check_writable, write_text
from fallow.common.progress import console
from fallow.common.tables import plus_minus
from fallow.plan import Plan
from fallow.reference.model import load
from fallow.reporting.figures import (
    Section,
    card_section,
    comparison_section,
    distribution_section,
    natural_section,
    neurons_section,
    plan_section,
    plans_side_by_side,
    results_section,
    sample_section,
    side_by_side,
    timed_points,
    tradeoff_section,
)
from fallow.reporting.measure import (
    COMPARED,
    EXAMPLE_PPL_INCREASE,
    EXAMPLE_RULE,
    Request,
    check_request,
    load_sample,
    measure,
)
from fallow.reporting.results import Results, read_results, speed_headlines

RULES, SPARSITIES = ("topk", "cats", "tail"), (0.3, 0.5, 0.7)
_HERE = Path(__file__).parent


@dataclass
class Chapter:
    """What the page shows of one model, or of results that are of none."""

    name: str
    id: str
    sections: list[Section]


def report(
    models: Sequence[str],
    output: str | Path,
    *,
    text: str | Path | None = None,
    calibration_text: str | Path | None = None,
    context: int = 1024,
    windows: int | None = None,
    rules: Sequence[str] = RULES,
    sparsities: Sequence[float] = SPARSITIES,
    plans: Sequence[str | Path] = (),
    sample: str | Path | None = None,
    compare: tuple[str, str] | None = None,
    results: Sequence[str | Path] = (),
    work: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Measures models and writes one HTML file that shows what was found.

    Finished parts are kept in the folder `work` (None: `<output>.work`), so that a stopped report
    goes on. docs/report.md tells how each number is made.

    Args:
        text: what models are measured on; None: the evaluation half of the default text.
        windows: of `text`, and for neurons of `calibration_text`; None: 8, or all of fewer.
        rules: of the trade-off.
        sparsities: of the trade-off.
        plans: plan files for the one model, of which the first is shown token by token; none: an
            example is calibrated.
        sample: a text file to show token by token.
        compare: two texts whose active neurons are compared.
        device: what models run on: see `load`.
        results: files of what `fallow bench --json` and `fallow optimize --json` printed.

    Returns:
        The main figures of each model, or of one under each of several plans.

    Raises:
        UsageError: a plan with several models, or the folder's parts have other settings.
        FallowError: a file, a text or a plan cannot be used, a text has fewer windows, or a model
            computes NaN.
    """
    output, models = Path(output), list(dict.fromkeys(models))
    plans = list(dict.fromkeys(map(str, plans)))
    if plans and len(models) > 1:
        raise UsageError("--plan is for one model; give one model, or leave out --plan")
    request = Request(
        text=load_text(text, "evaluation"),
        calibration_text=load_text(calibration_text, "calibration"),
        context=context, windows=windows, rules=tuple(rules), sparsities=tuple(sparsities),
        plans=tuple(map(Plan.load, plans)),
        sample=load_sample(sample), compare=compare or COMPARED,
    )  # fmt: skip
    check_request(request)
    timed = read_results(results)
    check_writable(output)
    options = {
        "--output": output, "--text": text, "--calibration-text": calibration_text,
        "--context": context, "--windows": windows, "--rules": ",".join(rules),
        "--sparsities": ",".join(f"{s:g}" for s in sparsities), "--plan": plans, "--sample": sample,
        "--compare": compare, "--results": results, "--work": work, "--dtype": dtype,
    }  # fmt: skip
    return _write(output, models, (dtype, device), request, work, options, timed)


def _write(
    output: Path,
    models: list[str],
    kind: tuple[str, str],
    request: Request,
    work: str | Path | None,
    options: dict[str, Any],
    results: Results,
) -> list[dict[str, Any]]:
    """Measures the models, one after the other, and writes the page; their main figures.

    `kind` is what `load` takes besides a model's name.
    """
    folder = Path(f"{output}.work") if work is None else Path(work)
    chapters: list[Chapter] = []
    found: list[dict[str, Any]] = []
    tables: list[list[dict[str, Any]]] = []
    for name in models:
        parts = _measured(name, kind, request, folder)
        used = {"--windows": parts["tradeoff"][0]["windows"]}
        commands = _Commands(name, models, options | used)
        plans = _named_plans(parts, options["--plan"])
        sections = _sections(parts, plans, results, commands)
        chapters.append(Chapter(name, f"model-{len(chapters)}", sections))
        found += [_main_figures(parts, *plan) for plan in plans]
        tables.append(parts["tradeoff"])
    if len(models) > 1:
        together = side_by_side([*zip(found, tables, strict=True)], commands.report())
        chapters.insert(0, Chapter("Models", "models", [together]))
    if results.bars:
        section = results_section(results.bars, _Commands(models[0], models, options).report())
        chapters.append(Chapter("Results", "results", [section]))
    headlines = [*map(_headline, found), *speed_headlines(results.bars)]
    write_text(output, render(chapters, request.text.name, headlines))
    return found


def _headline(figures: dict[str, Any]) -> str:
    """What a model's plan comes to, in one sentence."""
    change = plus_minus(figures["ppl_change_percent"], figures["ppl_change_se"], sign="+")
    return (
        f"{figures['model']}: {figures['sparsity']:.0%} inactive at {change} % PPL, by rule "
        f"{figures['rule']}{figures['plan'] and ' of ' + figures['plan']}."
    )


def _measured(name: str, kind: tuple[str, str], request: Request, folder: Path) -> dict[str, Any]:
    console.print(f"loading {name}", highlight=False)
    own_folder = folder / re.sub(r"[^\w.-]+", "_", name).strip("._")
    try:
        return measure(load(name, *kind), request, own_folder)
    except KeyboardInterrupt:
        console.print(f"stopped; finished parts are in {folder}, the same command goes on")
        raise


def _named_plans(parts: dict[str, Any], paths: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """The parts that are plans, by the names of their files where there are several, or ""."""
    if len(paths) < 2:
        return [("", parts["plan"])]
    names = [Path(path).name for path in paths]
    names = names if len(set(names)) == len(names) else list(paths)
    return [(name, parts[f"plan-{i + 1}" if i else "plan"]) for i, name in enumerate(names)]


def _sections(
    parts: dict[str, Any],
    plans: list[tuple[str, dict[str, Any]]],
    results: Results,
    commands: "_Commands",
) -> list[Section]:
    card, profile, table = parts["card"], parts["profile"], parts["tradeoff"]
    shown = [(name or f"the plan, {plan['rule']}", plan) for name, plan in plans]
    timed = timed_points(card["fingerprint"], table, shown, results)
    several = [plans_side_by_side(plans, table, timed, commands.report())] if plans[1:] else []
    return [
        tradeoff_section(table, timed, commands.tradeoff()),
        *several,
        *(plan_section(name, plan, commands.plan(i)) for i, (name, plan) in enumerate(plans)),
        card_section(card, table[0], commands.evaluate()),
        distribution_section(profile, commands.profile()),
        natural_section(profile, commands.profile()),
        sample_section(parts["sample"], card["layers"], commands.report()),
        comparison_section(parts["comparison"], commands.report()),
        neurons_section(parts["neurons"], commands.neurons(parts["neurons"])),
    ]


def _main_figures(parts: dict[str, Any], name: str, plan: dict[str, Any]) -> dict[str, Any]:
    card, dense = parts["card"], parts["tradeoff"][0]
    return {
        "model": card["model"],
        "fingerprint": card["fingerprint"],
        "dtype": card["dtype"],
        "ppl": dense["ppl"],
        "ppl_se": dense["ppl_se"],
        "natural_sparsity": parts["profile"]["natural_sparsity"],
        "plan": name,
        "rule": plan["rule"],
        "sparsity": plan["sparsity"],
        "ppl_change_percent": plan["ppl_change_percent"],
        "ppl_change_se": plan["ppl_change_se"],
    }


class _Commands:
    """The commands that make a model's figures again."""

    def __init__(self, model: str, models: Sequence[str], options: dict[str, Any]) -> None:
        self._model, self._models, self._options = model, models, options

    def _command(self, *words: Any, options: Sequence[str] = ()) -> str:
        parts = ["fallow", *map(str, words)]
        for name in options:
            value = self._options[name]
            if name in ("--results", "--plan"):
                parts += [str(word) for path in value for word in (name, path)]
            elif value is not None and (name, value) != ("--dtype", "auto"):
                values = value if isinstance(value, tuple) else (value,)
                parts += [name, *map(str, values)]
        return shlex.join(parts)

    _TEXT = ("--text", "--context", "--windows", "--dtype")

    def profile(self) -> str:
        return self._command("profile", self._model, options=self._TEXT)

    def evaluate(self, *plan: Any) -> str:
        return self._command("evaluate", self._model, *plan, options=self._TEXT)

    def tradeoff(self) -> str:
        own = ("--rules", "--sparsities", "--calibration-text")
        return self._command("tradeoff", self._model, options=(*own, *self._TEXT))

    def plan(self, i: int) -> str:
        given = self._options["--plan"]
        if given:
            return self.evaluate("--plan", given[i])
        text = self._options["--calibration-text"]
        words = ["--rule", EXAMPLE_RULE, "--max-ppl-increase", f"{EXAMPLE_PPL_INCREASE:g}"]
        words += ["-o", "example.plan", *([] if text is None else ["--text", text])]
        make = self._command("calibrate", self._model, *words, options=("--context", "--dtype"))
        return f"{make} && {self.evaluate('--plan', 'example.plan')}"

    def neurons(self, found: list[dict[str, Any]]) -> str:
        first = found[0]
        words = ["--layer", first["layer"], "--neuron", first["neuron"]]
        command = self._command("neurons", self._model, *words, options=self._TEXT)
        return f"{command}  # and so for the others"

    def report(self) -> str:
        return self._command("report", *self._models, options=list(self._options))


# The page ----------------------------------------------------------------------------------------


def render(chapters: Sequence[Chapter], text: str, headlines: Sequence[str]) -> str:
    """The whole HTML file; what comes from texts, models and files is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # `tojson` also escapes what could end a script: <, >, & and quotes.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "file_name": _file_name,
        "visible": visible,
        "shares": shares,
        "snippet_shares": _snippet_shares,
        "lowest": lambda values: f"{_ends(values)[0]:.1%}",
        "highest": lambda values: f"{_ends(values)[1]:.1%}",
    }
    scripts = [get_plotlyjs().replace("\r\n", "\n"), _read("page.js")]
    return environment.get_template("page.html.jinja").render(
        chapters=chapters,
        headlines=headlines,
        text=text,
        version=fallow.__version__,
        policy=_policy(scripts),
        style=Markup(_read("page.css")),
        plotly=Markup(scripts[0]),
        script=Markup(scripts[1]),
    )


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: these scripts and no other, and no network."""
    digests = [b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    )


def _file_name(title: str, chapter: str) -> str:
    words = re.findall(r"\w+", f"{Path(chapter).name} {title}".lower())
    return f"{'-'.join(words)}.json"


def visible(token: str, line_end: str = "⏎\n") -> str:
    """A token as it is shown: what has no width gets a sign."""
    return token.replace("\n", line_end) or "▯"


def shares(values: Sequence[float]) -> list[float]:
    """Places on the scale of colours, 0 to 1; a few extremes do not make the rest alike."""
    low, high = _ends(values)
    return np.clip((np.array(values) - low) / max(high - low, 1e-12), 0, 1).round(2).tolist()


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [5, 95])
    return float(low), float(high)


def _snippet_shares(snippet: dict[str, Any], neuron: dict[str, Any]) -> list[float]:
    """The same of a snippet's tokens: out_norm over the neuron's largest."""
    largest = max(max(s["out_norm"]) for s in neuron["snippets"]) or 1.0
    return [round(value / largest, 2) for value in snippet["out_norm"]]
