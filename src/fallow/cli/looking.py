"""Commands that look: at models, the machine, rules, and single neurons."""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli._shared import (
    ContextOption,
    DtypeOption,
    JsonOption,
    ModelArg,
    TextOption,
    app,
    check_output,
    load_model,
    numbers,
    plus_minus,
    print_json,
    print_table,
    split_names,
)
from fallow.common.errors import UsageError


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the aliases, where their files are, and how to install them."""
    from fallow.checkpoints.catalog import ALIASES, find_pieces, locate

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
        print_json(found)
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
    from fallow.cli.doctor import examine

    found = examine(folder)
    if as_json:
        print_json(found)
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
    """List rules and selectors: what each cuts, its parameter, when it is known, and its paper."""
    from fallow.rules import RULES, find_rule
    from fallow.selectors import SELECTORS

    found = {name: find_rule(name) for name in (*RULES, *SELECTORS)}
    if as_json:
        keys = ("name", "where", "knob_name", "known", "paper", "options")
        print_json([{k: getattr(r, k) for k in keys} for r in found.values()])
        return
    for title, names in (("Rules", RULES), ("Selectors, which predict", SELECTORS)):
        print(f"{title}\n")
        for rule in (found[name] for name in names):
            print(":".join([rule.name, *(f"{k}={v}" for k, v in rule.options.items())]))
            for label, value in (
                ("cuts", "neurons" if rule.where == "inter" else "inputs of projections"),
                ("parameter", rule.knob_name),
                ("known", rule.known),
                ("paper", rule.paper),
            ):
                indent = " " * 13
                print(
                    textwrap.fill(
                        value, 80, initial_indent=f"  {label:11}", subsequent_indent=indent
                    )
                )
            print()


@app.command()
def profile(
    model: ModelArg,
    text: TextOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for profile.json and profile.npz.")
    ] = Path("profile"),
    context: ContextOption = 1024,
    windows: Annotated[
        int | None, typer.Option(help="The first N windows; default: 8, or all of fewer.")
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure weights, activations and natural sparsity of the dense model, layer by layer."""
    check_output(output / "profile.json")
    loaded = load_model(model, dtype)
    from fallow.measure.profiling import profile as run

    result = run(loaded, text, context=context, windows=windows)
    result.save(output)
    if as_json:
        print_json(result.summary)
        return
    s = result.summary
    print_table(
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
        Path | None,
        typer.Option(help="Text whose first 12 windows rules are fitted on; not --text."),
    ] = None,
    context: ContextOption = 1024,
    windows: Annotated[
        int | None,
        typer.Option(
            help="The first N windows of --text, and for neurons of --calibration-text; "
            "default: 8, or all of fewer."
        ),
    ] = None,
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
    names = split_names(rules)
    targets = numbers("--sparsities", sparsities)
    check_output(output, *models, text, calibration_text, plan, sample, *(results or ()))
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
        print_json({"output": str(output), "bytes": size, "models": found})
        return
    for row in found:
        print(
            f"{row['model']}: PPL {plus_minus(row['ppl'], row['ppl_se'], 2)}; rule {row['rule']} "
            f"at sparsity {row['sparsity']:.1%} "
            f"{plus_minus(row['ppl_change_percent'], row['ppl_change_se'], 2)} %"
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
    windows: Annotated[
        int | None,
        typer.Option(help="The first N windows of each text; default: 8, or all of fewer."),
    ] = None,
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
    from fallow.reporting.explanation import RANDOM, STRONG, Endpoint, key_from_environment
    from fallow.reporting.explanation import explain as run_explain
    from fallow.reporting.neurons import examine

    endpoint = None
    if explain is not None and explain_model is not None:
        endpoint = Endpoint(explain, explain_model, key_from_environment())
    found = examine(
        load_model(model, dtype),
        [(layer, neuron)],
        list(dict.fromkeys(text)) if text else None,
        context=context,
        windows=windows,
        snippets=max(snippets, STRONG) if endpoint else snippets,
        random_snippets=RANDOM if endpoint else 0,
    )[0]
    explanation = None if endpoint is None else run_explain(found, endpoint).to_json()
    found.snippets = found.snippets[:snippets]
    result = found.to_json() | ({} if explanation is None else {"explanation": explanation})
    if as_json:
        print_json(result)
        return
    _print_neuron(result)


def _print_neuron(r: dict[str, Any]) -> None:
    print(f"{r['model']}, layer {r['layer']}, neuron {r['neuron']}")
    for rate in r["rates"]:
        print(
            f"  in a token's top half by out_norm on {rate['top_half']:.2%} of {rate['tokens']} "
            f"tokens, other than zero on {rate['natural']:.2%}: {rate['text']}"
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
