"""What commands share: the app, options, and how results are printed."""

import math
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.common.errors import UsageError
from fallow.common.files import check_writable, to_json
from fallow.common.tables import plus_minus

app = typer.Typer(
    help="Activation sparsity for language models: measure, calibrate, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArg = Annotated[
    str,
    typer.Argument(
        help="An alias (see: fallow models), a Hugging Face folder, a .gguf file, "
        "or a hub id such as org/name."
    ),
]
_RUN_HELP = "A packed model, or any other: it is packed once, see fallow cache list."
RunArg = Annotated[str, typer.Argument(help=_RUN_HELP)]
QuantOption = Annotated[
    str | None,
    typer.Option(help="A Hugging Face folder that is not packed: type of its matrices, q4_k say."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", "-t", help="Default: all that it may use.")
]
SkipOption = Annotated[
    bool,
    typer.Option(
        "--skip/--no-skip", help="Models with ReLU: do not read neurons that are exactly zero."
    ),
]
KernelsOption = Annotated[
    str | None,
    typer.Option(help="Packed models: an instruction set, avx2 say; default: the fastest here."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Packed models: what the process may take, 800MB say; the rest is read from the disk."
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", help="UTF-8 text; default: half of the Python language reference."),
]
WorkersOption = Annotated[
    int,
    # rich would take an unescaped bracket for markup.
    typer.Option(min=1, help=r"Processes of Ray (pip install 'fallow\[ray]'); 1: this one."),
]
ContextOption = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is random.")]
DtypeOption = Annotated[
    str,
    typer.Option(help="float32, bfloat16, float16; auto: float32 up to 1e9 weights."),
]
DeviceOption = Annotated[
    str, typer.Option(help="What the model runs on: cpu, cuda; auto: a GPU if there is one.")
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="End stdout with one JSON document; null: no finite number."),
]
PackedPlanOption = Annotated[Path | None, typer.Option(help="A plan; default: the packed one.")]
CacheOption = Annotated[
    int | None, typer.Option("--context", "-c", help="Tokens of cache; default: at most 4096.")
]
# Of commands that answer a prompt; the short ones are llama.cpp's.
OptionalRunArg = Annotated[str | None, typer.Argument(help=_RUN_HELP)]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="In place of the first argument.")
]
PromptArg = Annotated[str | None, typer.Argument(help="The same as --prompt.")]
PromptOption = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="Text; -: standard input, which is also the default."),
]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="The prompt's file, less one newline."),
]
SystemOption = Annotated[str | None, typer.Option(help="A system message.")]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", "-n", help="Longest answer, tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", "--temp", help="0: the most likely token.")
]
TopPOption = Annotated[
    float, typer.Option(help="Sample among the likeliest tokens of this probability.")
]
TopKOption = Annotated[int, typer.Option(help="Among that many likeliest tokens; 0: all.")]
MinPOption = Annotated[
    float, typer.Option(help="Among tokens this likely, relative to the likeliest.")
]
RepeatPenaltyOption = Annotated[
    float, typer.Option(help="Tokens of prompt and answer are less likely by this factor; 1: no.")
]
PresencePenaltyOption = Annotated[
    float, typer.Option(help="Taken off the logit of a token that the answer has.")
]
FrequencyPenaltyOption = Annotated[
    float, typer.Option(help="Taken off, for every time that the answer has it.")
]
LogitBiasOption = Annotated[
    list[str] | None,
    typer.Option("--logit-bias", "-l", help="Added to a token id's logit: 15043+1.5; repeatable."),
]
LeakageOption = Annotated[
    bool,
    typer.Option("--allow-leakage", help="Evaluate on the calibration text all the same."),
]


def refuse_given(options: dict[str, bool], reason: str) -> None:
    """Raises UsageError, by name, for an option that was given and would have no effect."""
    given = [name for name, is_given in options.items() if is_given]
    if given:
        raise UsageError(f"{', '.join(given)} {reason}")


def load_model(model: str, dtype: str, device: str = "cpu") -> Any:
    from fallow.common.progress import console
    from fallow.reference.model import load

    console.print(f"loading {model}", highlight=False)
    return load(model, dtype, device)


def open_engine(
    model: str, quant: str | None, plan: Any, threads: int | None, **options: Any
) -> Any:
    """An engine for a packed model, or for the packed copy of any other; `options` are its own."""
    from fallow.engine.engine import Engine

    path = packed_file(model, quant, threads, options.get("memory"))
    return Engine(path, plan, threads, **options)


def packed_file(model: str, quant: str | None, threads: int | None, memory: str | None) -> Path:
    """A packed model, or the copy of any other; what else the engine is given is looked at first.

    Raises:
        UsageError: threads or memory are out of range.
    """
    from fallow.engine.engine import thread_count
    from fallow.engine.memory import parse_size
    from fallow.packing.cache import packed_copy

    thread_count(threads)
    if memory is not None:
        parse_size(memory)
    return packed_copy(model, quant)


def load_plan(path: Path | None) -> Any:
    from fallow.plan import Plan

    return None if path is None else Plan.load(path)


def print_json(value: Any) -> None:
    print(to_json(value), flush=True)


def suggest(*words: object) -> None:
    """Says on stderr which command is the next one to give."""
    from fallow.common.progress import console

    line = f"next: fallow {shlex.join(map(str, words))}"
    console.print(line, soft_wrap=True, highlight=False)


def check_output(output: Path, *inputs: str | Path | None) -> None:
    """Refuses an output that cannot be written, or that is one of the files to be read.

    Called before anything is loaded.

    Raises:
        UsageError: it is an input, or "-", since no result goes to standard output.
        FallowError: it cannot be written.
    """
    if str(output) == "-":
        raise UsageError("--output - would be a file of that name; give another")
    for path in inputs:
        with suppress(OSError):  # one of both is not there, or is no name of a file
            if path is not None and os.path.samefile(output, path):
                raise UsageError(f"--output {output} is also to be read; choose another name")
    check_writable(output)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    print(title)
    # A pipe has no width: give it enough for every column.
    width = None if sys.stdout.isatty() else 160
    Console(width=width, markup=False, emoji=False).print(table)


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(option: str, text: str) -> list[float]:
    """Finite numbers, comma-separated. Raises UsageError for anything else."""
    try:
        found = [float(part) for part in split_names(text)]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UsageError(f"{option} {text!r} is not a list of numbers such as 0.3,0.5")
    return found


def sampled_beside(text: object) -> float:
    """Share of an adaptation's tokens that the model writes, if it is not said: half, or none of it
    where the user gave text.
    """
    return 0.0 if text else 0.5


def count_of(option: str, text: str) -> int:
    """A whole number such as 300000, 300k or 20M. Raises UsageError for anything else."""
    factors = {"k": 10**3, "m": 10**6, "g": 10**9}
    factor = factors.get(text[-1:].lower(), 1)
    try:
        found = float(text[:-1] if factor > 1 else text) * factor
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found >= 1):
        raise UsageError(f"{option} {text!r} is no number of tokens such as 300000 or 20M")
    return round(found)


def report_tradeoff(table: list[dict[str, Any]], output: Path, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), "rows": table})
        return
    from fallow.calibration.tradeoff import target_label

    dense = table[0]
    # What only selectors, and rules that keep k neurons per token, have.
    percent, millions = "{:.1%}".format, lambda v: f"{v / 1e6:.2f}"
    labels: dict[str, tuple[str, Any]] = {
        "recall": ("recall", percent),
        "energy_recall": ("energy", percent),
        "ffn_bytes": ("FFN bytes", percent),
        "choosing_bytes": ("MB to choose", millions),
        "choosing_multiplications": ("M mult. to choose", millions),
    }
    selection = {key: v for key, v in labels.items() if any(key in r for r in table)}
    rows = []
    for r in table[1:]:
        rows.append(
            [
                r["rule"],
                target_label(r),
                f"{r['knob']:.4g}",
                f"{r['achieved_sparsity']:.1%}",
                f"{r['sparsity_inter']:.1%}",
                f"{r['ppl']:.2f}",
                plus_minus(r["ppl_change_percent"], r["ppl_change_se"], 2),
                plus_minus(r["kl_to_dense"], r["kl_se"], 4),
                f"{r['top1_agreement']:.1%}",
                *(show(r[key]) if key in r else "" for key, (_, show) in selection.items()),
            ]
        )
    print_table(
        f"Dense PPL {plus_minus(dense['ppl'], dense['ppl_se'], 2)}, {dense['windows']} windows",
        [
            "rule",
            "target",
            "parameter",
            "achieved",
            "S(inter)",
            "PPL",
            "PPL change %",
            "KL nats/token",
            "top-1",
            *(label for label, _ in selection.values()),
        ],
        rows,
    )
    figures = ("tradeoff", "pareto") if "ffn_bytes" in selection else ("tradeoff",)
    names = ", ".join(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))
    print(f"written: {output}/table.csv, table.json, {names}")


def report_plan(plan: Any, model: str, output: Path, as_json: bool) -> None:
    if as_json:
        print_json({**plan.metadata, "path": str(output)})
        return
    print_plan(plan, str(output))
    suggest("evaluate", model, "--plan", output)


def print_plan(plan: Any, path: str) -> None:
    print_metadata(f"plan {path}", plan.metadata)
    for cut in plan.cuts:
        weight = cut.weight if cut.weight is None or isinstance(cut.weight, str) else "an array"
        values = f"from {cut.value.min():.4g} to {cut.value.max():.4g}"
        print(f"  {f'cut of {cut.tap}':22} {cut.kind} {values}, weight {weight or 1}")


def print_metadata(title: str, metadata: dict[str, Any]) -> None:
    print(title)
    for name, value in metadata.items():
        if name != "cuts" and value is not None and value != "":
            print(
                f"  {name:22} {value:.4g}" if isinstance(value, float) else f"  {name:22} {value}"
            )
