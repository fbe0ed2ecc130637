"""The command line. Every command is a function here; the work is done elsewhere."""

import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.errors import FallowError, UsageError
from fallow.files import check_writable

# Of which extra a package is that a command may lack.
EXTRAS = {
    "lab": ("torch", "transformers", "accelerate", "scipy", "matplotlib", "huggingface_hub"),
    "ray": ("ray",),
    "report": ("plotly",),
    "harness": ("lm_eval",),
    "server": ("fastapi", "uvicorn", "prometheus_client"),
}
SERVER_RESERVE = 32_000_000  # bytes of a memory budget for requests and responses

INTERRUPTED = 130  # what Typer makes of Ctrl-C: 128 + SIGINT, as in shells

app = typer.Typer(
    help="Activation sparsity for language models: measure, calibrate, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(
    help="Look at plans, and make them from published thresholds.", no_args_is_help=True
)
app.add_typer(plan_app, name="plan")
select_app = typer.Typer(
    help="Compare and train selectors, which predict the neurons that matter.", no_args_is_help=True
)
app.add_typer(select_app, name="select")

patterns_app = typer.Typer(
    help="Collect and cluster patterns: which neurons are active.", no_args_is_help=True
)
app.add_typer(patterns_app, name="patterns")

law_app = typer.Typer(help="How sparse a model becomes with training.", no_args_is_help=True)
app.add_typer(law_app, name="law")

ModelArg = Annotated[
    str,
    typer.Argument(
        help="An alias (see: fallow models), a Hugging Face folder, a .gguf file, "
        "or a hub id such as org/name."
    ),
]
PackedArg = Annotated[Path, typer.Argument(help="A file that fallow pack wrote.")]
LayersOption = Annotated[str | None, typer.Option(help="Such as 0,13,27; default: all.")]
TestStoreOption = Annotated[
    Path | None, typer.Option(help="A store to score on; default: the last windows.")
]
HeldOutOption = Annotated[float, typer.Option(help="Share of the windows to score on.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Default: all processors.")]
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
    int, typer.Option(min=1, help="Processes of Ray (pip install 'fallow[ray]'); 1: this one.")
]
RuleSparsityOption = Annotated[float | None, typer.Option(help="Of the rule; default: 0.5.")]
PlanForRuleOption = Annotated[Path | None, typer.Option(help="A plan, in place of a rule.")]
RuleTextOption = Annotated[
    Path | None, typer.Option(help="What the rule is fitted on, as --text of calibrate.")
]
ContextOption = Annotated[int, typer.Option(help="Tokens per window.")]
DtypeOption = Annotated[
    str,
    typer.Option(help="float32, bfloat16, float16; auto: float32 up to 1e9 weights."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="End stdout with one JSON document.")]
LeakageOption = Annotated[
    bool,
    typer.Option("--allow-leakage", help="Evaluate on the calibration text all the same."),
]


def main() -> None:
    """Entry point: one line for an error, exit code 2 for usage and 1 for the rest."""
    _prepare_streams()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except FallowError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((name for name, has in EXTRAS.items() if package in has), None)
        if extra is None:
            raise
        _fail(f"this command needs {error.name}; install it with: pip install 'fallow[{extra}]'", 1)
    except BrokenPipeError:
        _discard_output()
        sys.exit(1)
    except OSError as error:  # the disk that stdout goes to is full, say
        _discard_output()
        where = "cannot write the output" if error.filename is None else error.filename
        _fail(f"{where}: {error.strerror or error}", 1)
    except Exception as error:
        # Typer's own usage errors, whose class is private to it.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if not message():  # no arguments at all: the help was printed
            sys.exit(2)
        _fail(f"{message().rstrip('.')}; see: fallow --help", 2)
    else:
        if code == INTERRUPTED:
            _fail("interrupted", INTERRUPTED)
        sys.exit(code or 0)


def _prepare_streams() -> None:
    """Gives closed streams a place, and lets stdout print any text whatever the locale.

    Without a place of its own the next file that is opened would take a stream's number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """What is left to print cannot be: not even when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _load(model: str, dtype: str) -> Any:
    from fallow.model import load
    from fallow.progress import console

    console.print(f"loading {model}", highlight=False)
    return load(model, dtype)


def _load_plan(path: Path | None) -> Any:
    from fallow.plan import Plan

    return None if path is None else Plan.load(path)


def _print_json(value: Any) -> None:
    print(json.dumps(value, allow_nan=False), flush=True)


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    print(title)
    # A pipe has no width: give it enough for every column.
    (Console() if sys.stdout.isatty() else Console(width=160)).print(table)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the aliases, where their files are, and how to install them."""
    from fallow.catalog import ALIASES, find_pieces, locate

    found = []
    for alias in ALIASES.values():
        path = locate(alias)
        found.append(
            {
                "alias": alias.name,
                "description": alias.description,
                "path": None if path is None else str(path),
                "installed": find_pieces(alias) is not None,
                "install": alias.install_command,
                "sha256": alias.sha256,
            }
        )
    if as_json:
        _print_json(found)
        return
    for entry in found:
        print(f"{entry['alias']}: {entry['description']}")
        print(f"  {entry['path'] or 'not installed'}")
        print(f"  {entry['install']}")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Whose disk is timed.")] = Path("."),
    as_json: JsonOption = False,
) -> None:
    """Look at processor, memory, disk and packages, and warn of what makes fallow slower."""
    from fallow.doctor import examine

    found = examine(folder)
    if as_json:
        _print_json(found)
    else:
        _print_examination(found)


def _print_examination(r: dict[str, Any]) -> None:
    cpu, count, ram, speed = r["processor"], r["cores"], r["memory"], r["bandwidth_gbps"]
    quota = "" if count["cgroup"] is None else f", {count['cgroup']:g} by its cgroup"
    limit = "" if ram["cgroup"] is None else f", its cgroup allows {ram['cgroup'] / 1e9:.1f} GB"
    disk = r["disk"]["error"] or f"{r['disk']['gbps']:.2f} GB/s"
    models = ", ".join(name for name, is_here in r["models"].items() if is_here)
    lacks = cpu["better_kernels_lack"]
    better = [f"not {name}, for want of {', '.join(lacks[name])}" for name in lacks]
    lines = {
        "fallow": f"{r['fallow']}, Python {r['python']}, {r['system']}",
        "processor": f"{cpu['name']}, {cpu['architecture']}",
        "kernels": "; ".join([cpu["kernels"], *better]),
        "cores": f"{count['machine']}, {count['affinity']} for this process{quota}",
        "memory": f"{ram['total'] / 1e9:.1f} GB, {ram['available'] / 1e9:.1f} available{limit}",
        "reads memory": f"{speed['one_thread']:.1f} GB/s with one thread, "
        f"{speed['all_threads']:.1f} with {speed['threads']}",
        "reads disk": f"{disk}, {r['disk']['folder']}",
        "numpy": f"{r['numpy']['version']}, {r['numpy']['blas'] or 'no BLAS'}",
        "torch": "none" if r["torch"] is None else f"{r['torch']} threads",
        "models": models or "none; see: fallow models",
    }
    for name, value in lines.items():
        print(f"{name:13} {value}")
    for extra, packages in r["extras"].items():
        said = ", ".join(f"{name} {version or '(missing)'}" for name, version in packages.items())
        print(f"[{extra}]".ljust(13), said)
    for warning in r["warnings"]:
        print(f"warning: {warning}")


@app.command()
def rules(as_json: JsonOption = False) -> None:
    """List rules and selectors: what each cuts, when it is known, its knob, options and paper."""
    from fallow.rules import RULES, find_rule
    from fallow.selectors import SELECTORS

    found = {name: find_rule(name) for name in (*RULES, *SELECTORS)}
    if as_json:
        keys = ("name", "where", "knob_name", "known", "paper", "options")
        _print_json([{k: getattr(r, k) for k in keys} for r in found.values()])
        return
    columns = ["rule", "where", "knob", "known", "paper"]
    for title, names in (("Rules", RULES), ("Selectors, which predict", SELECTORS)):
        _print_table(
            title,
            columns,
            [
                [
                    ":".join([r.name, _options(r.options)]) if r.options else r.name,
                    *(r.where, r.knob_name, r.known, r.paper),
                ]
                for r in (found[name] for name in names)
            ],
        )


def _options(options: dict[str, int]) -> str:
    return ":".join(f"{name}={value}" for name, value in options.items())


@app.command()
def profile(
    model: ModelArg,
    text: TextOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for profile.json and profile.npz.")
    ] = Path("profile"),
    context: ContextOption = 1024,
    windows: Annotated[int, typer.Option(help="How many windows of the text.")] = 8,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure weights, activations and natural sparsity of the dense model, layer by layer."""
    check_writable(output / "profile.json")
    loaded = _load(model, dtype)
    from fallow.profiling import profile as run

    result = run(loaded, text, context=context, windows=windows)
    result.save(output)
    if as_json:
        _print_json(result.summary)
        return
    s = result.summary
    _print_table(
        f"{s['model']} ({s['architecture']}, {s['dtype']}), {s['tokens']} tokens of {s['text']}: "
        f"natural sparsity of inter {s['natural_sparsity']:.2%}",
        [
            "layer",
            "inter = 0",
            "<= 1e-3",
            "<= 1e-2",
            "|gate_act| 50 %",
            "|inter| 50 %",
            "|inter| 99 %",
            "|up weight| 50 %",
            "|down weight| 50 %",
            "dead",
        ],
        [
            [
                str(row["layer"]),
                f"{row['zeros']['inter']:.2%}",
                f"{row['inter_at_most']['0.001']:.2%}",
                f"{row['inter_at_most']['0.01']:.2%}",
                f"{row['magnitude_quantiles']['gate_act']['0.5']:.4f}",
                f"{row['magnitude_quantiles']['inter']['0.5']:.4f}",
                f"{row['magnitude_quantiles']['inter']['0.99']:.4f}",
                *(f"{_median_weight(row, name):.4f}" for name in ("up_proj", "down_proj")),
                str(row["dead_neurons"]),
            ]
            for row in s["layers"]
        ],
    )
    print(f"written: {output}/profile.json, {output}/profile.npz")


def _median_weight(row: dict[str, Any], name: str) -> float:
    quantiles = row["weight_quantiles"]
    return quantiles[name if name in quantiles else "gate_up_proj"]["0.5"]


@app.command()
def report(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="As for fallow profile.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path(
        "report.html"
    ),
    text: TextOption = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="Text that thresholds are fitted on; not --text.")
    ] = None,
    context: ContextOption = 1024,
    windows: Annotated[int, typer.Option(help="How many windows of each text.")] = 8,
    rules: Annotated[str, typer.Option(help="Of the trade-off, comma-separated.")] = (
        "topk,cats,tail"
    ),
    sparsities: Annotated[str, typer.Option(help="Their targets, comma-separated.")] = (
        "0.3,0.5,0.7"
    ),
    plan: Annotated[
        Path | None, typer.Option(help="A plan to show; default: tail at +1 % PPL.")
    ] = None,
    sample: Annotated[Path | None, typer.Option(help="Text to show token by token.")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="TEXT TEXT", help="Two texts whose active neurons are compared."),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="What bench --json or optimize --json printed; repeatable."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of finished parts; default: OUTPUT.work.")
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """One HTML file of all that can be seen of models: for a phone too, offline; resumable."""
    names = [name.strip() for name in rules.split(",") if name.strip()]
    targets = _numbers("--sparsities", sparsities)
    from fallow.reporting.page import report as run

    found = run(
        models,
        output,
        text=text,
        calibration_text=calibration_text,
        context=context,
        windows=windows,
        rules=names,
        sparsities=targets,
        plan=plan,
        sample=sample,
        compare=compare,
        results=results or (),
        work=work,
        dtype=dtype,
    )
    size = output.stat().st_size
    if as_json:
        _print_json({"output": str(output), "bytes": size, "models": found})
        return
    for row in found:
        print(
            f"{row['model']}: PPL {_plus_minus(row['ppl'], row['ppl_se'], 2)}; rule {row['rule']} "
            f"at sparsity {row['sparsity']:.1%} "
            f"{_plus_minus(row['ppl_change_percent'], row['ppl_change_se'], 2)} %"
        )
    print(f"written: {output}, {size / 1e6:.1f} MB")


@app.command()
def neurons(
    model: ModelArg,
    layer: Annotated[int, typer.Option(help="From 0.")],
    neuron: Annotated[int, typer.Option(help="From 0.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text, each a type with a rate of its own; repeatable. Default: both "
            "halves of the Python language reference."
        ),
    ] = None,
    snippets: Annotated[int, typer.Option(min=1, help="The strongest, to show.")] = 10,
    context: ContextOption = 1024,
    windows: Annotated[int, typer.Option(help="How many windows of each text.")] = 8,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask an OpenAI-compatible server for an explanation and score it; "
            "http://127.0.0.1:8080/v1 is fallow serve. Key: FALLOW_API_KEY or OPENAI_API_KEY.",
        ),
    ] = None,
    explain_model: Annotated[
        str | None, typer.Option(help="What the server calls its model.")
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """What a neuron does: where it is active most, how often it fires, which tokens it raises."""
    if (explain is None) != (explain_model is None):
        raise UsageError("--explain and --explain-model, the model's name there, belong together")
    from fallow.explanation import RANDOM, STRONG, Endpoint, key_from_environment
    from fallow.explanation import explain as run_explain
    from fallow.neurons import examine

    endpoint = None
    if explain is not None and explain_model is not None:
        endpoint = Endpoint(explain, explain_model, key_from_environment())
    found = examine(
        _load(model, dtype),
        [(layer, neuron)],
        text or None,
        context=context,
        windows=windows,
        snippets=max(snippets, STRONG) if endpoint else snippets,
        random_snippets=RANDOM if endpoint else 0,
    )[0]
    explanation = None if endpoint is None else run_explain(found, endpoint).to_json()
    found.snippets = found.snippets[:snippets]
    result = found.to_json() | ({} if explanation is None else {"explanation": explanation})
    if as_json:
        _print_json(result)
        return
    _print_neuron(result)


def _print_neuron(r: dict[str, Any]) -> None:
    print(f"{r['model']}, layer {r['layer']}, neuron {r['neuron']}")
    for rate in r["rates"]:
        print(
            f"  in a token's louder half on {rate['top_half']:.2%} of {rate['tokens']} tokens, "
            f"other than zero on {rate['natural']:.2%}: {rate['text']}"
        )
    for direction in ("raised", "lowered"):
        tokens = ", ".join(f"{t['token']!r} {t['logit']:+.3f}" for t in r[direction])
        print(f"  {direction} by one unit of inter: {tokens}")
    print("strongest snippets: out_norm, inter, and the token in its context")
    for s in r["snippets"]:
        peak = s["peak"]
        before, token, after = (
            _printable("".join(s["tokens"][part]))
            for part in (slice(0, peak), slice(peak, peak + 1), slice(peak + 1, None))
        )
        print(f"  {s['out_norm'][peak]:8.3f} {s['inter'][peak]:+9.3f}  {before}«{token}»{after}")
    if "explanation" in r:
        e = r["explanation"]
        score = f"score {e['score']:.3f}" if e["reason"] is None else f"no score: {e['reason']}"
        print(f"explanation by {e['model']}: {_printable(e['text'])}")
        print(f"  {score}, {e['scored_snippets']} of {e['held_out_snippets']} held-out snippets")


def _printable(text: str) -> str:
    """One line that no control character in it can disturb."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


@app.command()
def calibrate(
    model: ModelArg,
    rule: Annotated[str, typer.Option(help="See: fallow rules.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    sparsity: Annotated[float | None, typer.Option(help="Target, [0, 1).")] = None,
    knob: Annotated[float | None, typer.Option(help="The rule's own number.")] = None,
    max_ppl_increase: Annotated[
        float | None, typer.Option(help="Largest PPL increase, percent, on held-out text.")
    ] = None,
    text: TextOption = None,
    context: ContextOption = 1024,
    windows: Annotated[int, typer.Option(help="Windows that thresholds are fitted on.")] = 8,
    validation_windows: Annotated[int, typer.Option(help="Held-out windows after those.")] = 4,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fit a rule to a sparsity, a knob or a largest loss, and write the plan."""
    from fallow.calibration import calibrate as run
    from fallow.calibration import check_request

    check_request(rule, sparsity, knob, max_ppl_increase)
    check_writable(output)
    loaded = _load(model, dtype)
    plan = run(
        loaded,
        rule,
        sparsity=sparsity,
        knob=knob,
        max_ppl_increase=max_ppl_increase,
        text=text,
        context=context,
        windows=windows,
        validation_windows=validation_windows,
    )
    _write_plan(plan, output, as_json)


@app.command()
def pack(
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The packed model to write.")],
    plan: Annotated[
        Path | None, typer.Option(help="A plan to store in the file and use by default.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            help="Type of all matrices of a Hugging Face folder: q8_0, q4_0, q4_k, bf16 …"
        ),
    ] = None,
    down: Annotated[
        str | None, typer.Option(help="Type of down_proj; default: the smallest that passes.")
    ] = None,
    shortlist: Annotated[
        bool,
        typer.Option("--shortlist", help="Add a coarse head, which plans of fallow optimize use."),
    ] = False,
    planes: Annotated[
        bool,
        typer.Option("--planes", help="Cut FFN rows in two, for plans that read some coarse."),
    ] = False,
    text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in the engine's form, checked against its source before it gets its name."""
    check_writable(output)
    loaded_plan = _load_plan(plan)
    from fallow.packing import pack as run

    check = run(
        model, output, plan=loaded_plan, quant=quant, down=down, shortlist=shortlist,
        planes=planes, text=text,
    )  # fmt: skip
    size = output.stat().st_size / 1e6
    if as_json:
        _print_json({"path": str(output), "mb": size, "self_check": vars(check)})
        return
    print(f"self-check against {model}: {check}")
    print(f"written: {output}, {size:.0f} MB")


@app.command()
def export(
    model: ModelArg,
    plan: Annotated[Path, typer.Option(help="A plan for it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a Hugging Face folder with the plan in it, for transformers: fallow.load_sparse."""
    loaded_plan = _load_plan(plan)
    from fallow.model import find_model
    from fallow.sparsified import export as run

    run(_load(model, dtype), loaded_plan, output, find_model(model))
    if as_json:
        _print_json({"path": str(output), "rule": loaded_plan.rule})
        return
    print(f"written: {output}; in Python: fallow.load_sparse({str(output)!r})")


@app.command()
def optimize(
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The packed model to write.")],
    max_ppl_increase: Annotated[
        float, typer.Option(help="Largest PPL increase against the source, percent.")
    ] = 1.0,
    text: TextOption = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="Text that the plan is made on; not --text.")
    ] = None,
    context: ContextOption = 1024,
    windows: Annotated[int, typer.Option(help="Windows that thresholds are fitted on.")] = 4,
    validation_windows: Annotated[int, typer.Option(help="Held-out windows after those.")] = 24,
    check_windows: Annotated[int, typer.Option(help="Windows of --text.")] = 8,
    threads: ThreadsOption = None,
    prefer: Annotated[
        str, typer.Option(help="speed: only what is faster here; bytes: read as few as possible.")
    ] = "speed",
    planes: Annotated[
        bool,
        typer.Option(
            "--planes", help="With --prefer bytes: read some rows coarse; fewer bytes, slower."
        ),
    ] = False,
    quant: Annotated[str | None, typer.Option(help="As for fallow pack.")] = None,
    down: Annotated[str | None, typer.Option(help="As for fallow pack.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Pack a model with the plan that skips most at a stated loss; calibrate, search and check."""
    check_writable(output)
    from fallow.optimization import optimize as run

    result = run(
        model,
        output,
        max_ppl_increase=max_ppl_increase,
        calibration_text=calibration_text,
        text=text,
        context=context,
        windows=windows,
        validation_windows=validation_windows,
        check_windows=check_windows,
        threads=threads,
        prefer=prefer,
        planes=planes,
        quant=quant,
        down=down,
    )
    if as_json:
        _print_json(result.to_json())
        return
    change = _plus_minus(result.ppl_change_percent, result.ppl_change_se, 2)
    print(f"{result.selector}: {result.sparsity_ratio:.0%} of neurons idle")
    print(f"  PPL {change} % against {model} on {result.text}, KL {result.kl_to_dense:.4f} nats")
    print(
        f"  decode {result.decode_tps:.1f} tok/s, {result.decode_ratio_dense:.2f} times dense, "
        f"{result.threads} threads"
    )
    print(f"  {result.bytes_per_token / 1e6:.0f} MB/token, {result.bytes_ratio:.0%} of dense")
    print(f"written: {output}, after {result.seconds:.0f} s")


@app.command()
def bench(
    file: PackedArg,
    plan: Annotated[Path | None, typer.Option(help="A plan; default: the packed one.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Also time another engine: llama.cpp or openvino.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="The GGUF that the other engine reads.")
    ] = None,
    threads: ThreadsOption = None,
    prompt_tokens: Annotated[int, typer.Option("-p", help="Tokens of prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option("-n", help="Tokens of decode.")] = 128,
    runs: Annotated[int, typer.Option(help="Runs; medians are reported.")] = 5,
    memory: Annotated[
        str | None,
        typer.Option(help="What the process may take, 800MB say; or several, comma-separated."),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Of several budgets: also draw tok/s, as .png or .svg.")
    ] = None,
    text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time prefill and decode, alternating with another engine if asked to."""
    if memory and "," in memory:
        if against or source:
            raise UsageError("--against goes with one --memory, not with several")
        given = {"--plan": plan, "--threads": threads, "--text": text, "--runs": runs}
        given |= {"-p": prompt_tokens, "-n": new_tokens}
        _bench_budgets(file, memory.split(","), given, figure, as_json)
        return
    if figure:
        raise UsageError("--figure draws several budgets; give --memory 1GB,800MB say")
    loaded_plan = _load_plan(plan)
    from fallow.bench import bench as run

    result = run(
        file,
        loaded_plan,
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        against=against,
        source=source,
        memory=memory,
        text=text,
    )
    if as_json:
        _print_json(result)
        return
    _print_bench(result)


def _bench_budgets(
    file: Path, budgets: list[str], given: dict[str, Any], figure: Path | None, as_json: bool
) -> None:
    from fallow.bench import bench_budgets, draw_budgets
    from fallow.memory import parse_size

    budgets = [budget.strip() for budget in budgets if budget.strip()]
    for budget in budgets:
        parse_size(budget)
    arguments = [str(part) for kv in given.items() if kv[1] is not None for part in kv]
    rows = bench_budgets(file, budgets, arguments)
    if all("error" in r for r in rows):
        raise FallowError(f"no budget works; the last one: {rows[-1]['error']}")
    if figure:
        draw_budgets(rows, figure)
    if as_json:
        _print_json({"budgets": rows})
        return
    table = []
    for r in rows:
        cells = [f"{r['memory_mb']:.0f}"]
        if "error" in r:
            cells += ["-"] * 5
        else:
            cells += [f"{r['decode_tps']:.2f}", f"{r['stall_ms_per_token']:.1f}"]
            cells += [f"{r['disk_bytes_per_token'] / 1e6:.0f}", f"{r['hit_rate']:.0%}"]
            cells += [f"{r['peak_rss_mb']:.0f}"]
        table.append(cells)
    columns = ["MB", "tok/s", "ms/token waiting", "MB/token from disk", "in memory", "peak MB"]
    _print_table("Memory budgets", columns, table)
    for r in rows:
        if "error" in r:
            print(f"{r['memory_mb']:.0f} MB: {r['error']}")


def _print_bench(r: dict[str, Any]) -> None:
    print(f"{r['threads']} threads, {r['kernels']} kernels, medians of {r['runs']} runs")
    print(f"  prefill  {r['prefill_tps']:.1f} tok/s (first token after {r['ttft_ms']:.0f} ms)")
    share = f", {r['mbu']:.0%} of what {r['threads']} threads read" if "mbu" in r else ""
    print(
        f"  decode   {r['decode_tps']:.2f} tok/s, {r['bytes_per_token'] / 1e6:.0f} MB/token, "
        f"{r['gbps']:.1f} GB/s{share}"
    )
    if "memory_mb" in r:
        print(
            f"  memory   {r['memory_mb']:.0f} MB: {r['disk_bytes_per_token'] / 1e6:.0f} MB/token "
            f"from the disk, {r['hit_rate']:.0%} of the bytes in memory, "
            f"{r['stall_ms_per_token']:.1f} ms/token waiting"
        )
    print(f"  neurons idle {r['sparsity']:.1%}, outside products {r['overhead']:.1%} of decode")
    print(f"  peak RSS {r['peak_rss_mb']:.0f} MB, file {r['file_mb']:.0f} MB")
    if "baseline" in r:
        for phase in ("prefill", "decode"):
            low, high = r[f"{phase}_ratio_range"]
            print(
                f"  {phase} / {r['baseline']}: {r[f'{phase}_ratio']:.2f} "
                f"({low:.2f} to {high:.2f}), which did {r[f'baseline_{phase}_tps']:.1f} tok/s"
            )


@app.command()
def evaluate(
    model: ModelArg,
    plan: Annotated[Path | None, typer.Option(help="A plan; without one: the dense model.")] = None,
    text: TextOption = None,
    context: ContextOption = 1024,
    windows: Annotated[int | None, typer.Option(help="The first N windows; default: all.")] = None,
    task: Annotated[
        list[Path] | None, typer.Option(help="Also score a task file (JSON lines); repeatable.")
    ] = None,
    task_items: Annotated[
        int | None, typer.Option(min=1, help="The first N items of each task.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="For a packed model: what changes are relative to; default: itself."),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="For a packed model: read token by token.")
    ] = False,
    threads: ThreadsOption = None,
    memory: MemoryOption = None,
    allow_leakage: LeakageOption = False,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity, KL to dense and achieved sparsity of a plan, on text it has not seen."""
    loaded_plan = _load_plan(plan)
    from fallow.tasks import evaluate_task, load_task

    for path in task or []:
        load_task(path, task_items)  # a wrong file is reported before hours of work
    subject: Any
    if _is_packed(model):
        subject, result = _evaluate_packed(
            model, loaded_plan, text, context, windows, against, decode, threads, memory,
            allow_leakage, dtype,
        )  # fmt: skip
        loaded_plan = subject.plan
    else:
        if against is not None or decode or memory is not None:
            raise UsageError(
                "--against, --decode and --memory are for packed models; make one with fallow pack"
            )
        subject = _load(model, dtype)
        from fallow.evaluation import evaluate as run

        result = run(
            subject, loaded_plan, text, context=context, windows=windows,
            allow_leakage=allow_leakage,
        )  # fmt: skip
    found = result.to_json()
    found["tasks"] = [evaluate_task(subject, loaded_plan, p, task_items) for p in task or []]
    if as_json:
        _print_json(found)
    else:
        _print_evaluation(found)


def _is_packed(model: str) -> bool:
    from fallow.engine import is_packed

    return is_packed(model)


def _evaluate_packed(
    model: str,
    plan: Any,
    text: Path | None,
    context: int,
    windows: int | None,
    against: str | None,
    decode: bool,
    threads: int | None,
    memory: str | None,
    allow_leakage: bool,
    dtype: str,
) -> tuple[Any, Any]:
    """The engine, with its plan in use, and what it came to."""
    from fallow.engine import Engine, packed_windows
    from fallow.progress import console
    from fallow.quality import BUDGET_RESERVE, evaluate_engine
    from fallow.text import load_text

    if memory is not None and against is not None:
        raise UsageError("--memory is for one model; leave out --against or --memory")
    source = load_text(text, "evaluation")
    cut: Any = windows
    reserve = 0
    if memory is not None:
        cut, reserve = packed_windows(model, source, context, windows), BUDGET_RESERVE
    engine = Engine(model, plan, threads, context=context, memory=memory, reserve=reserve)
    if memory is not None:
        console.print(engine.describe_memory(), highlight=False)
    other: Any = None
    if against is not None:
        if _is_packed(against):
            other = Engine(against, threads=threads, context=context)
        else:
            reference = _load(against, dtype)
            from fallow.evaluation import dense_logits

            other = partial(dense_logits, reference)
    result = evaluate_engine(
        engine,
        engine.plan,
        source,
        context=context,
        windows=cut,
        against=other,
        decode=decode,
        allow_leakage=allow_leakage,
    )
    return engine, result


def _plus_minus(value: float, error: float | None, digits: int) -> str:
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{value:.{digits}f}{spread}"


def _print_evaluation(r: dict[str, Any]) -> None:
    what = f"rule {r['rule']}, knob {r['knob']:.4g}" if r["rule"] else "dense"
    kl = r["kl_to_dense"]
    print(f"{r['model']} ({r['dtype']}), {what}")
    print(f"{r['tokens']} tokens of {r['text']}, {r['windows']} windows of {r['context']}")
    print(f"  PPL             {_plus_minus(r['ppl'], r['ppl_se'], 3)}")
    if r["rule"]:
        change = _plus_minus(r["ppl_change_percent"], r["ppl_change_se"], 2)
        print(f"  against dense   {change} % (paired)")
        print(
            f"  KL to dense     {_plus_minus(kl['mean'], kl['se'], 4)} nats/token, "
            f"p99 {kl['p99']:.3f}"
        )
        print(f"  top-1 agreement {r['top1_agreement']:.2%}")
        print(f"  sparsity achieved {r['achieved_sparsity']:.2%}")
    rows = []
    for tap, layers in r["sparsity_per_layer"].items():
        mean = [layer["mean"] for layer in layers]
        rows.append(
            [
                tap,
                f"{r['sparsity_ratio'][tap]:.2%}",
                f"{min(mean):.2%}",
                f"{max(mean):.2%}",
                f"{min(layer['p5'] for layer in layers):.2%}",
                f"{max(layer['p95'] for layer in layers):.2%}",
            ]
        )
    _print_table(
        "Sparsity",
        ["tensor", "mean", "lowest layer", "highest layer", "lowest p5 over tokens", "highest p95"],
        rows,
    )
    for t in r["tasks"]:
        accuracy = _plus_minus(100 * t["accuracy"], 100 * (t["accuracy_se"] or 0), 1)
        change = _plus_minus(100 * t["change"], 100 * (t["change_se"] or 0), 1)
        print(f"{t['task']}: {accuracy} % of {t['items']}, change against dense {change} points")


@app.command()
def tradeoff(
    model: ModelArg,
    rules: Annotated[
        str, typer.Option(help="Comma-separated; see: fallow rules.")
    ] = "percentile,cats,topk,tail,cett,teal,wina",
    sparsities: Annotated[
        str, typer.Option(help="Comma-separated targets, [0, 1).")
    ] = "0.3,0.4,0.5,0.6,0.7",
    max_ppl_increases: Annotated[
        str, typer.Option(help="Comma-separated: also each rule's point of this PPL increase, %.")
    ] = "",
    text: TextOption = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="Text that thresholds are fitted on; not --text.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of tables, figures and finished work.")
    ] = Path("tradeoff"),
    context: ContextOption = 1024,
    windows: Annotated[int | None, typer.Option(help="The first N windows; default: all.")] = None,
    calibration_windows: Annotated[int, typer.Option(help="Windows thresholds use.")] = 8,
    validation_windows: Annotated[int, typer.Option(help="Held-out windows of a search.")] = 4,
    allow_leakage: LeakageOption = False,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """One table and one figure of PPL and KL against sparsity; stops and continues."""
    names = list(dict.fromkeys(name.strip() for name in rules.split(",") if name.strip()))
    targets = _numbers("--sparsities", sparsities)
    increases = _numbers("--max-ppl-increases", max_ppl_increases)
    from fallow.sweep import make_rows
    from fallow.sweep import tradeoff as run

    rows = make_rows(names, targets, increases)
    loaded = _load(model, dtype)
    table = run(
        loaded,
        rows,
        output,
        calibration_text=calibration_text,
        text=text,
        context=context,
        windows=windows,
        calibration_windows=calibration_windows,
        validation_windows=validation_windows,
        allow_leakage=allow_leakage,
    )
    _report_tradeoff(table, output, as_json)


@select_app.command("compare")
def select_compare(
    model: ModelArg,
    selectors: Annotated[
        str,
        typer.Option(help="Comma-separated; see: fallow rules. Oracle, random, static are added."),
    ] = "gate,gate_bucket,lowbit,lowbit:gate=3:up=3",
    sparsities: Annotated[str, typer.Option(help="Comma-separated targets, [0, 1).")] = "0.5",
    text: TextOption = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="Text that selectors are fitted on; not --text.")
    ] = None,
    trained: Annotated[
        list[Path] | None,
        typer.Option(help="Also a plan that fallow select train wrote; repeatable."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of tables, figures and finished work.")
    ] = Path("selectors"),
    context: ContextOption = 1024,
    windows: Annotated[int | None, typer.Option(help="The first N windows; default: all.")] = None,
    calibration_windows: Annotated[int, typer.Option(help="Windows selectors are fitted on.")] = 8,
    allow_leakage: LeakageOption = False,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Selectors at equal budget: recall, bytes, operations, PPL and KL, the model in the loop."""
    from fallow.rules import find_rule
    from fallow.selectors._base import Selector
    from fallow.sweep import make_rows
    from fallow.sweep import tradeoff as run

    plans = [_load_plan(path) for path in trained or []]
    asked = (name.strip() for name in selectors.split(",") if name.strip())
    names = list(dict.fromkeys(("oracle", "random", "static", *asked, *(p.rule for p in plans))))
    for name in names:
        if not issubclass(find_rule(name), Selector):
            raise UsageError(f"{name} is a rule, not a selector; compare it with fallow tradeoff")
    rows = make_rows(names, _numbers("--sparsities", sparsities))
    loaded = _load(model, dtype)
    table = run(
        loaded,
        rows,
        output,
        calibration_text=calibration_text,
        text=text,
        context=context,
        windows=windows,
        calibration_windows=calibration_windows,
        validation_windows=1,
        allow_leakage=allow_leakage,
        trained=plans,
    )
    _report_tradeoff(table, output, as_json)


@select_app.command("train")
def select_train(
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    rank: Annotated[int, typer.Option(help="Width of each layer's bottleneck.")] = 64,
    gate: Annotated[
        bool, typer.Option("--gate", help="Know the exact gate: predict up_proj alone.")
    ] = False,
    tokens: Annotated[
        int, typer.Option(help="Tokens to learn from; a shorter text is read again.")
    ] = 300_000,
    sparsity: Annotated[float, typer.Option(help="Share of neurons that rest, [0, 1).")] = 0.5,
    text: TextOption = None,
    context: ContextOption = 1024,
    validation_windows: Annotated[int, typer.Option(help="Held-out windows that judge.")] = 4,
    checks: Annotated[int, typer.Option(help="How often they do in the course of training.")] = 10,
    patience: Annotated[int, typer.Option(help="Checks without a better PPL that end it.")] = 3,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train the selector learned; a plan for evaluate, and for compare. Stops and continues."""
    from fallow.training import check_request
    from fallow.training import train as run

    check_request(rank, gate, tokens, sparsity, checks, patience)
    check_writable(output)
    loaded = _load(model, dtype)
    plan = run(
        loaded,
        output,
        rank=rank,
        gate=gate,
        tokens=tokens,
        sparsity=sparsity,
        text=text,
        context=context,
        validation_windows=validation_windows,
        checks=checks,
        patience=patience,
    )
    _report_plan(plan, output, as_json)


@patterns_app.command("collect")
def patterns_collect(
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The store, a folder.")],
    rule: Annotated[str | None, typer.Option(help="See: fallow rules. Default: topk.")] = None,
    sparsity: RuleSparsityOption = None,
    plan: PlanForRuleOption = None,
    text: TextOption = None,
    calibration_text: RuleTextOption = None,
    taps: Annotated[
        str, typer.Option(help="Of inter, gate_pre, gate_act, up, ffn_out; comma-separated.")
    ] = "inter",
    context: ContextOption = 1024,
    windows: Annotated[int | None, typer.Option(help="The first N windows; default: all.")] = None,
    magnitudes: Annotated[
        bool, typer.Option("--magnitudes", help="Also keep how loud neurons are: 16 bits each.")
    ] = False,
    workers: WorkersOption = 1,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Keep which neurons a rule leaves active for every token of a text; goes on if stopped."""
    loaded, used = _with_plan(
        model, dtype, plan, rule or "topk", sparsity, calibration_text, context
    )
    from fallow.patterns.collect import collect

    store = collect(
        loaded,
        used,
        output,
        text,
        taps=tuple(tap.strip() for tap in taps.split(",")),
        context=context,
        windows=windows,
        magnitudes=magnitudes,
        workers=workers,
    )
    header = store.header
    if as_json:
        _print_json({"path": str(output), "rows": store.n_rows} | vars(header))
        return
    print(f"written: {output}: {store.n_rows} tokens, {header.n_layers} layers, {taps}")


def _with_plan(
    model: str,
    dtype: str,
    plan: Path | None,
    rule: str,
    sparsity: float | None,
    calibration_text: Path | None,
    context: int,
) -> tuple[Any, Any]:
    """The model, and the plan, or one of the rule at a sparsity, 0.5 without one."""
    loaded_plan = _load_plan(plan)
    from fallow.calibration import calibrate as fit
    from fallow.calibration import check_request

    if loaded_plan is not None and sparsity is not None:
        raise UsageError("give --plan, or --rule and --sparsity")
    sparsity = 0.5 if sparsity is None else sparsity
    check_request(rule, sparsity, None, None)
    loaded = _load(model, dtype)
    if loaded_plan is None:
        loaded_plan = fit(
            loaded, rule, sparsity=sparsity, text=calibration_text, context=context, measure=False
        )
    return loaded, loaded_plan


@patterns_app.command("similarity")
def patterns_similarity(
    model: ModelArg,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for similarity.json and its figure.")
    ] = Path("similarity"),
    rule: Annotated[
        str | None, typer.Option(help="See: fallow rules. Default: topk; percentile as published.")
    ] = None,
    sparsity: RuleSparsityOption = None,
    plan: PlanForRuleOption = None,
    text: TextOption = None,
    calibration_text: RuleTextOption = None,
    published: Annotated[
        Path | None, typer.Option(help="A folder of the published texts: their test, not ours.")
    ] = None,
    kind: Annotated[str, typer.Option(help="Of edits: substitute, insert or delete.")] = (
        "substitute"
    ),
    tap: Annotated[str | None, typer.Option(help="Default: inter; gate_pre as published.")] = None,
    documents: Annotated[int, typer.Option(help="Windows of the text.")] = 12,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the edits.")] = 0,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Edit texts, and measure how far active sets of the other tokens change."""
    check_writable(output / "similarity.json")
    rule = rule or ("percentile" if published else "topk")
    loaded, used = _with_plan(model, dtype, plan, rule, sparsity, calibration_text, context)
    from fallow.files import write_json
    from fallow.patterns.similarity import draw, draw_variants, edit_test, published_test

    if published:
        variants = published_test(loaded, used, published, tap=tap or "gate_pre")
        draw_variants(variants, output / "similarity.png")
        result: dict[str, Any] = {"variants": [v.to_json() for v in variants]}
    else:
        report = edit_test(
            loaded,
            used,
            text,
            tap=tap or "inter",
            documents=documents,
            context=context,
            kind=kind,
            seed=seed,
        )
        result = report.to_json()
        draw(report, output / "similarity.png")
    write_json(output / "similarity.json", result)
    if as_json:
        _print_json(result)
    elif published:
        _print_variants(result["variants"])
    else:
        _print_similarity(result)


def _print_similarity(r: dict[str, Any]) -> None:
    names = ("agreement", "jaccard", "kappa_unrelated", "kappa_frequency")
    rows = [
        [f"{row['edited']:.0%}", row["stratum"], *(f"{_mean(row[n]):.4f}" for n in names)]
        for row in r["rows"]
    ]
    unrelated, frequency = _mean(r["unrelated_agreement"]), _mean(r["frequency_agreement"])
    _print_table(
        f"{r['documents']} documents, {r['kind']}, mean of layers; unrelated tokens agree "
        f"{unrelated:.4f}, by frequency {frequency:.4f}",
        ["edited", "tokens", *(n.replace("_", " over ") for n in names)],
        rows,
    )


def _print_variants(variants: list[dict[str, Any]]) -> None:
    rows = []
    for v in variants:
        cells = [v["sample"], v["variant"], f"{v['prefix_tokens'] / v['tokens']:.0%}"]
        for name in ("prefix", "row_by_row", "behind", "aligned", "shifted"):
            cells.append("-" if v[name] is None else f"{_mean(v[name]):.4f}")
        rows.append([*cells, f"{v['best_shift']:+d}"])
    columns = ["sample", "variant", "shared prefix", "in it", "row by row", "behind it", "aligned"]
    _print_table("agreement, mean of layers", [*columns, "shifted", "by rows"], rows)


@patterns_app.command("cluster")
def patterns_cluster(
    store: Annotated[Path, typer.Argument(help="A folder of fallow patterns collect.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of codebooks.")],
    clusters: Annotated[int, typer.Option(help="Centroids per layer.")] = 256,
    budget: Annotated[float, typer.Option(help="Share of the neurons in a centroid.")] = 0.5,
    algorithm: Annotated[
        str, typer.Option(help="lloyd, or as published: published, and its baseline, binary.")
    ] = "lloyd",
    tap: Annotated[str, typer.Option(help="Of the store's.")] = "inter",
    layers: LayersOption = None,
    test: TestStoreOption = None,
    held_out: HeldOutOption = 0.25,
    restarts: Annotated[int, typer.Option(min=1, help="The best of so many fits.")] = 1,
    energy: Annotated[
        bool, typer.Option("--energy", help="Loud neurons count for more; needs magnitudes.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(help="A first run in mini-batches of so many rows.")
    ] = None,
    workers: WorkersOption = 1,
    seed: Annotated[int, typer.Option(help="Of the first centroids.")] = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make codebooks of patterns at an equal budget, and score them on held-out windows."""
    from fallow.patterns.codebooks import cluster_store
    from fallow.patterns.store import PatternStore

    report = cluster_store(
        PatternStore(store),
        output,
        clusters,
        budget,
        algorithm=algorithm,
        tap=tap,
        layers=_layers(layers),
        test=None if test is None else PatternStore(test),
        held_out=held_out,
        seed=seed,
        restarts=restarts,
        energy=energy,
        batch=batch,
        workers=workers,
        n_threads=threads or os.cpu_count() or 1,
    )
    if as_json:
        _print_json(report.to_json())
        return
    names = list(report.layers[0].scores)
    rows = [
        [str(r.layer), *(f"{r.scores[n]['recall']:.4f}" for n in names), str(r.passes)]
        for r in report.layers
    ]
    rows.append(["mean", *(f"{report.mean(n):.4f}" for n in names), ""])
    _print_table(
        f"recall of {report.test_rows} held-out tokens, {clusters} clusters, budget {budget:g}",
        ["layer", *names, "passes"],
        rows,
    )
    print(f"written: {output} ({report.codebook_bytes / 1e6:.1f} MB of centroids)")


@patterns_app.command("predict")
def patterns_predict(
    store: Annotated[Path, typer.Argument(help="A folder of fallow patterns collect.")],
    codebooks: Annotated[Path, typer.Argument(help="A file of fallow patterns cluster.")],
    features: Annotated[
        str, typer.Option(help="Of token, previous (its cluster), below (the layer's active set).")
    ] = "token,previous,below",
    layers: LayersOption = None,
    test: TestStoreOption = None,
    held_out: HeldOutOption = 0.25,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the hidden layer.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Runs over the training windows.")] = 6,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict clusters from what is known before a layer runs; scored on held-out windows."""
    from fallow.patterns.prediction import predict_clusters
    from fallow.patterns.store import PatternStore

    report = predict_clusters(
        PatternStore(store),
        codebooks,
        features=[name.strip() for name in features.split(",") if name.strip()],
        test=None if test is None else PatternStore(test),
        held_out=held_out,
        layers=_layers(layers),
        hidden=hidden,
        epochs=epochs,
        seed=seed,
        n_threads=threads or os.cpu_count() or 1,
    )
    if as_json:
        _print_json(report.to_json())
        return
    names = ("predicted", "cluster", "static")
    rows = [
        [str(r.layer), f"{a:.3f}", *(f"{r.scores[n]['recall']:.4f}" for n in names)]
        for r, a in zip(report.layers, report.accuracy, strict=True)
    ]
    mean = sum(report.accuracy) / len(rows)
    rows.append(["mean", f"{mean:.3f}", *(f"{report.mean(n):.4f}" for n in names)])
    _print_table(
        f"recall of {report.test_rows} held-out tokens, {report.n_clusters} clusters, from "
        f"{', '.join(report.features)}",
        ["layer", "right", *names],
        rows,
    )


@law_app.command("fit")
def law_fit(
    curves: Annotated[list[Path], typer.Argument(help="Files of points; see docs/laws.md.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for law.json and law.png.")
    ] = Path("law"),
    form: Annotated[
        str, typer.Option(help="relu, silu, piecewise or a rival; auto: by the direction.")
    ] = "auto",
    drop_first: Annotated[int, typer.Option(help="Points of the warm-up to leave out.")] = 0,
    unit: Annotated[
        float | None, typer.Option(help="Tokens that 1 in token_passed stands for.")
    ] = None,
    at: Annotated[str, typer.Option(help="Predict A at so many tokens, such as 1e11,1e12.")] = "",
    tokens_for: Annotated[str, typer.Option(help="Tokens until A is that, such as 0.08.")] = "",
    draws: Annotated[int, typer.Option(min=20, help="Of the bootstrap.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit laws to curves of the activation ratio: parameters, intervals, rivals, predictions."""
    from fallow.files import write_json
    from fallow.laws.curves import load_curve
    from fallow.laws.figures import draw
    from fallow.laws.fitting import fit_jointly, fit_law

    check_writable(output / "law.json")
    loaded = [load_curve(path, unit) for path in curves]
    fits = [
        fit_law(
            curve,
            form,
            drop_first=drop_first,
            at=[x / curve.unit for x in _numbers("--at", at)],
            tokens_for=_numbers("--tokens-for", tokens_for),
            draws=draws,
            seed=seed,
        )
        for curve in loaded
    ]
    result: dict[str, Any] = {"fits": [f.to_json() for f in fits]}
    if len(fits) > 1 and len({f.form for f in fits}) == 1:
        result["joint"] = vars(fit_jointly(loaded, form, drop_first=drop_first))
    write_json(output / "law.json", result)
    draw(loaded, fits, output / "law.png")
    if as_json:
        _print_json(result)
        return
    for law in result["fits"]:
        _print_law(law)
    if "joint" in result:
        joint = result["joint"]
        low, high = joint["interval"]
        print(
            f"one limit A0 for all: {joint['limit']:.4f} ({low:.4f} to {high:.4f}); that they have "
            f"the same has p = {joint['p_value']:.2g}"
        )
    print(f"written: {output}/law.json and law.png")


@law_app.command("train")
def law_train(
    text: Annotated[Path, typer.Option(help="What to train on; .xz too. Its end is held out.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the model.")],
    activation: Annotated[str, typer.Option(help="relu or silu.")] = "relu",
    hidden_size: Annotated[int, typer.Option(help="d_model, a multiple of 64.")] = 192,
    layers: Annotated[int, typer.Option(help="How many.")] = 5,
    intermediate_size: Annotated[int, typer.Option(help="d_ff, neurons per layer.")] = 480,
    tokens: Annotated[float, typer.Option(help="To see; such as 4e7.")] = 4e7,
    vocabulary: Annotated[int, typer.Option(help="Of a tokenizer trained on the text.")] = 2048,
    context: ContextOption = 256,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 3e-3,
    checkpoints: Annotated[int, typer.Option(help="Points of the curve, log-spaced.")] = 12,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a small LLaMA-like model and measure how sparse it becomes; goes on if stopped."""
    from fallow.laws.training import Settings, train

    report = train(
        output,
        text,
        Settings(
            activation=activation,
            hidden_size=hidden_size,
            layers=layers,
            intermediate_size=intermediate_size,
            vocabulary=vocabulary,
            tokens=round(tokens),
            context=context,
            batch=batch,
            learning_rate=learning_rate,
            checkpoints=checkpoints,
            seed=seed,
        ),
        device,
    )
    if as_json:
        _print_json(report.to_json())
        return
    print(
        f"written: {output}: {report.non_embedding_parameters / 1e6:.2f} M parameters besides "
        f"embeddings, {report.epochs:.2f} epochs, activation ratio {report.activation_ratio:.4f}, "
        f"validation loss {report.validation_loss:.3f}; the curve: {report.curve}"
    )


@law_app.command("sweep")
def law_sweep(
    config: Annotated[Path, typer.Argument(help="A TOML file of runs; see docs/laws.md.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of all models.")],
    workers: WorkersOption = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a grid of small models, and put their activation ratios in one table."""
    from fallow.laws.sweeping import sweep

    table = sweep(config, output, workers=workers, device=device)
    if as_json:
        _print_json({"output": str(output), "rows": table})
        return
    rows = [
        [
            row["run"],
            f"{row['non_embedding_parameters'] / 1e6:.2f}",
            f"{row['width_depth']:.0f}",
            f"{row['tokens'] / 1e6:.1f}",
            f"{row['validation_loss']:.3f}",
            f"{row['last_ratio']:.4f}",
            f"{row['activation_ratio']:.4f}",
            "-" if row["limit"] is None else f"{row['limit']:.4f}",
        ]
        for row in table
    ]
    columns = ["run", "M parameters", "width / depth", "M tokens", "loss", "A before decay"]
    _print_table("trained", [*columns, "A", "limit"], rows)
    print(f"written: {output}/sweep.json")


@law_app.command("advise")
def law_advise(
    params: Annotated[float, typer.Option(help="Parameters besides embeddings, such as 1e9.")],
    tokens: Annotated[float, typer.Option(help="To train on, such as 2e11.")],
    activation: Annotated[str, typer.Option(help="relu or silu.")] = "relu",
    curve: Annotated[
        list[Path] | None, typer.Option(help="Also rest on this curve of law train; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What activation ratio to expect of a model, and how much faster its FFN could be."""
    from fallow.laws.advice import advise, own_basis

    found = advise(params, tokens, activation, [own_basis(path) for path in curve or ()])
    if as_json:
        _print_json(found.to_json())
        return
    for warning in found.warnings:
        print(f"warning: {warning}")
    low, high = found.interval
    print(f"activation ratio at +1 % PPL: {found.ratio:.3f} ({low:.3f} to {high:.3f})")
    for what, value, (low, high) in (
        ("active neurons known at no cost", found.known_ceiling, found.known_interval),
        ("gate_proj computed to know them", found.gate_ceiling, found.gate_interval),
    ):
        print(f"FFN at most {value:.1f} times faster ({low:.1f} to {high:.1f}), {what}")
    print(f"rests on: {', '.join(found.rests_on)}")


def _print_law(law: dict[str, Any]) -> None:
    rows = []
    for name, value in law["params"].items():
        numbers = (value, *law["intervals"][name], *law["bootstrap"][name])
        rows.append([name, *(f"{number:.4g}" for number in numbers)])
    _print_table(
        f"{law['curve']}: {law['formula']}, {law['n_points']} points, mean error "
        f"{100 * law['mae']:.3f} points",
        ["parameter", "value", "95 %: profile", "to", "bootstrap", "to"],
        rows,
    )
    if law["warning"]:
        print(f"warning: {law['warning']}")
    rivals = [
        [
            r["form"],
            r["formula"],
            f"{100 * r['mae']:.3f}",
            "-" if r["aicc"] is None else f"{r['aicc']:.1f}",
            "-" if r["extrapolation_mae"] is None else f"{100 * r['extrapolation_mae']:.3f}",
        ]
        for r in law["rivals"]
    ]
    _print_table(
        "it and its rivals; errors in points, the last of a fit to the first 60 % of the rest",
        ["form", "formula", "error", "AICc", "of the rest"],
        rivals,
    )
    for p in law["at"]:
        low, high = p["interval"]
        print(f"at {p['x']:.4g} × {law['unit']}: A = {p['ratio']:.4f} ({low:.4f} to {high:.4f})")
    for p in law["tokens_for"]:
        ends = " to ".join("no end" if end is None else f"{end:.4g}" for end in p["interval"])
        reached = "never" if p["x"] is None else f"at {p['x']:.4g} ({ends}) × {law['unit']}"
        print(f"A = {p['ratio']:g}: {reached}")


def _layers(text: str | None) -> list[int] | None:
    return None if text is None else [int(n) for n in _numbers("--layers", text)]


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a list of numbers such as 0.3,0.5") from error


def _report_tradeoff(table: list[dict[str, Any]], output: Path, as_json: bool) -> None:
    if as_json:
        _print_json({"output": str(output), "rows": table})
        return
    from fallow.sweep import target_label

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
                _plus_minus(r["ppl_change_percent"], r["ppl_change_se"], 2),
                _plus_minus(r["kl_to_dense"], r["kl_se"], 4),
                f"{r['top1_agreement']:.1%}",
                *(show(r[key]) if key in r else "" for key, (_, show) in selection.items()),
            ]
        )
    _print_table(
        f"Dense PPL {_plus_minus(dense['ppl'], dense['ppl_se'], 2)}, {dense['windows']} windows",
        [
            "rule",
            "target",
            "knob",
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


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(help="A packed model, or any other: then nothing is skipped.")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue, or to answer with --chat.")],
    plan: Annotated[Path | None, typer.Option(help="A plan; without one: the dense model.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    top_p: Annotated[
        float, typer.Option(help="Packed models: the likeliest tokens of this probability.")
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Packed models: that many likeliest tokens; 0: all.")
    ] = 0,
    min_p: Annotated[
        float, typer.Option(help="Packed models: tokens this likely, relative to the likeliest.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Packed models: end before this text; repeatable.")
    ] = None,
    lossless: Annotated[
        bool,
        typer.Option(
            "--lossless", help="Packed models: the dense model's own text, guesses read ahead."
        ),
    ] = False,
    threads: ThreadsOption = None,
    context: Annotated[
        int | None, typer.Option(help="Packed models: tokens of cache; default: at most 4096.")
    ] = None,
    memory: MemoryOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, with the plan's neurons skipped (packed model) or set to zero."""
    loaded_plan = _load_plan(plan)
    if _is_packed(model):
        from fallow.engine import Engine
        from fallow.progress import console

        engine = Engine(model, loaded_plan, threads, context=context, memory=memory)
        if memory is not None:
            console.print(engine.describe_memory(), highlight=False)
        pieces = engine.generate(
            prompt, max_new_tokens, temperature, top_p, top_k, min_p, seed, stop or (), chat,
            lossless,
        )  # fmt: skip
        _print_stream(engine, prompt, pieces, as_json)
        return
    given = (top_p, top_k, min_p, stop, lossless, context, memory)
    if given != (1.0, 0, 0.0, None, False, None, None):
        raise UsageError("this option needs a packed model; make one with fallow pack")
    loaded = _load(model, dtype)
    answer = loaded.generate(
        prompt,
        loaded_plan,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )
    if as_json:
        _print_json({"prompt": prompt, "text": answer})
    else:
        print(answer)


def _print_stream(engine: Any, prompt: str, pieces: Any, as_json: bool) -> None:
    from fallow.progress import console

    text = ""
    for piece in pieces:
        text += piece
        if not as_json:
            print(piece, end="", flush=True)
    stats = engine.stats
    if as_json:
        _print_json({"prompt": prompt, "text": text, "stats": stats.to_json()})
        return
    print()
    console.print(
        f"{stats.new_tokens} tokens, {stats.decode_tps:.1f} tok/s, "
        f"{stats.bytes_per_token / 1e6:.0f} MB/token, first after {stats.ttft_ms:.0f} ms, "
        f"{stats.sparsity:.0%} of neurons idle"
        + (f", {stats.accepted} of {stats.drafted} guesses held" if stats.drafted else ""),
        highlight=False,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@app.command()
def harness(
    model: Annotated[str, typer.Argument(help="A packed model, or any other.")],
    tasks: Annotated[str, typer.Option(help="Names that lm-eval knows: arc_easy,lambada_openai.")],
    plan: Annotated[
        Path | None, typer.Option(help="What dense is compared with; default: the packed plan.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of a task.")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder of your own tasks.")] = None,
    threads: ThreadsOption = None,
    context: Annotated[int | None, typer.Option(help="Packed models: tokens of cache.")] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run tasks of lm-evaluation-harness, dense and with a plan, in one table."""
    loaded_plan = _load_plan(plan)
    from fallow.harness import compare, open_model

    opened = open_model(model, threads=threads, context=context, dtype=dtype)
    rows = compare(opened, loaded_plan, tasks.split(","), limit, fewshot, include_path)
    if as_json:
        _print_json(rows)
        return
    cells = [
        [
            row["task"],
            row["metric"],
            _plus_minus(row["dense"], row["dense_se"], 4),
            "-" if row["sparse"] is None else _plus_minus(row["sparse"], row["sparse_se"], 4),
            "-" if row["change"] is None else _plus_minus(row["change"], row["change_se"], 4),
        ]
        for row in rows
    ]
    _print_table(f"{model}, lm-eval", ["task", "metric", "dense", "sparse", "change"], cells)


@app.command()
def chat(
    file: PackedArg,
    plan: Annotated[Path | None, typer.Option(help="A plan; default: the packed one.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="The likeliest tokens of this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="That many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Show sparsity and speed.")] = False,
    threads: ThreadsOption = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of cache; default: at most 4096.")
    ] = None,
    memory: MemoryOption = None,
) -> None:
    """Talk to a packed model; /help tells the commands."""
    from fallow.chat import Conversation
    from fallow.chat import chat as run
    from fallow.engine import Engine, Sampler

    engine = Engine(file, _load_plan(plan), threads, context=context, memory=memory)
    sampler = Sampler(temperature, top_p, top_k, seed=seed)
    run(Conversation(engine, sampler, max_new_tokens, system), stats)


@app.command()
def serve(
    file: PackedArg,
    plan: Annotated[Path | None, typer.Option(help="A plan; default: the packed one.")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0: other machines may ask too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8080,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: the file's name.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 16,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="FALLOW_API_KEY", help="What clients must send; better by variable."),
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "1MB",
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish, at the end.")] = 30.0,
    threads: ThreadsOption = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of cache; default: at most 4096.")
    ] = None,
    memory: MemoryOption = None,
) -> None:
    """Serve a packed model to clients of OpenAI's API."""
    # Before the engine, which takes what is left of a memory budget.
    from fallow.engine import Engine
    from fallow.memory import parse_size
    from fallow.serving.server import serve as run

    largest = parse_size(max_body, "--max-body")
    engine = Engine(
        file, _load_plan(plan), threads, context=context, memory=memory, reserve=SERVER_RESERVE
    )
    run(engine, name or file.stem, host, port, queue, api_key, largest, grace)


@plan_app.command("show")
def plan_show(
    file: Annotated[Path, typer.Argument(help="A plan file.")], as_json: JsonOption = False
) -> None:
    """Print what a plan is for, how it was made, and its arrays."""
    plan = _load_plan(file)
    if as_json:
        arrays = {name: array.tolist() for name, array in plan.arrays.items()}
        _print_json({**plan.metadata, "arrays": arrays})
        return
    _print_plan(plan, str(file))


@plan_app.command("import")
def plan_import(
    file: Annotated[Path, typer.Argument(help="Published thresholds, such as mistral-7b_50.json.")],
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    knob: Annotated[
        float | None, typer.Option(help="Percentile / 100; default: from the file's name.")
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make a percentile plan from a published threshold file."""
    check_writable(output)
    loaded = _load(model, dtype)
    from fallow.published import import_thresholds

    plan = import_thresholds(file, loaded, knob)
    _write_plan(plan, output, as_json)


def _write_plan(plan: Any, output: Path, as_json: bool) -> None:
    plan.save(output)
    _report_plan(plan, output, as_json)


def _report_plan(plan: Any, output: Path, as_json: bool) -> None:
    if as_json:
        _print_json({**plan.metadata, "path": str(output)})
        return
    _print_plan(plan, str(output))


def _print_plan(plan: Any, path: str) -> None:
    print(f"plan {path}")
    for name, value in plan.metadata.items():
        if value is not None and value != "":
            print(
                f"  {name:22} {value:.6g}" if isinstance(value, float) else f"  {name:22} {value}"
            )
    for name, array in sorted(plan.arrays.items()):
        print(f"  {name:22} {array.shape} from {array.min():.4g} to {array.max():.4g}")


if __name__ == "__main__":
    main()
