"""`fallow report`: one page of all that can be seen of models."""

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli._shared import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    TextOption,
    app,
    check_output,
    numbers,
    plus_minus,
    print_json,
    split_names,
)


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
        list[Path] | None,
        typer.Option(
            help="A plan to show, or several side by side; repeatable; default: tail at +1 % PPL."
        ),
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
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """One HTML file of all that can be seen of models: for a phone too, offline; resumable."""
    names = split_names(rules)
    targets = numbers("--sparsities", sparsities)
    check_output(output, *models, text, calibration_text, sample, *(plan or ()), *(results or ()))
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
        plans=plan or (),
        sample=sample,
        compare=compare,
        results=results or (),
        work=work,
        dtype=dtype,
        device=device,
    )
    size = output.stat().st_size
    if as_json:
        print_json({"output": str(output), "bytes": size, "models": found})
        return
    for row in found:
        print(
            f"{row['model']}: PPL {plus_minus(row['ppl'], row['ppl_se'], 2)}; rule {row['rule']}"
            f"{row['plan'] and ' of ' + row['plan']} at sparsity {row['sparsity']:.1%} "
            f"{plus_minus(row['ppl_change_percent'], row['ppl_change_se'], 2)} %"
        )
    print(f"written: {output}, {size / 1e6:.1f} MB")
