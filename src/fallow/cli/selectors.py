"""Commands of fallow select."""

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli._shared import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LeakageOption,
    ModelArg,
    TextOption,
    app,
    check_output,
    load_model,
    numbers,
    print_json,
    print_metadata,
    report_tradeoff,
    split_names,
    suggest,
)
from fallow.common.errors import UsageError

select_app = typer.Typer(
    help="Compare and train selectors, which predict the neurons that matter.", no_args_is_help=True
)
app.add_typer(select_app, name="select")


@select_app.command("compare")
def select_compare(
    model: ModelArg,
    selectors: Annotated[
        str,
        typer.Option(help="Comma-separated; see: fallow rules. Oracle, random, static are added."),
    ] = "gate,lowbit,lowbit:gate=3:up=3",
    sparsities: Annotated[str, typer.Option(help="Comma-separated targets, [0, 1).")] = "0.5",
    text: TextOption = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="Text that selectors are fitted on; not --text.")
    ] = None,
    trained: Annotated[
        list[Path] | None,
        typer.Option(help="Also what fallow select train wrote; repeatable."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of tables, figures and finished work.")
    ] = Path("selectors"),
    context: ContextOption = 1024,
    windows: Annotated[int | None, typer.Option(help="The first N windows; default: all.")] = None,
    calibration_windows: Annotated[int, typer.Option(help="Windows selectors are fitted on.")] = 8,
    allow_leakage: LeakageOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Selectors at equal budget: recall, bytes, operations, PPL and KL, the model in the loop."""
    from fallow.calibration.tradeoff import make_rows
    from fallow.calibration.tradeoff import tradeoff as run
    from fallow.research.learned import Trained
    from fallow.selectors import Selector, find

    files = [Trained.load(path) for path in trained or []]
    asked = split_names(selectors)
    given = (file.selector for file in files)
    names = list(dict.fromkeys(("oracle", "random", "static", *asked, *given)))
    for name in names:
        if not issubclass(find(name), Selector):
            raise UsageError(f"{name} is a rule, not a selector; compare it with fallow tradeoff")
    rows = make_rows(names, numbers("--sparsities", sparsities))
    check_output(output / "table.json")
    loaded = load_model(model, dtype, device)
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
        trained=files,
    )
    report_tradeoff(table, output, as_json)
    if not as_json:
        suggest("select", "train", model, "-o", "learned.selector")


@select_app.command("train")
def select_train(
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    rank: Annotated[int, typer.Option(help="Width of each layer's bottleneck.")] = 64,
    gate: Annotated[
        bool, typer.Option("--gate", help="Know the exact gate: predict up_proj alone.")
    ] = False,
    tokens: Annotated[
        int, typer.Option(help="Tokens to learn from; a shorter text is read again.")
    ] = 300_000,
    sparsity: Annotated[float, typer.Option(help="Share of inactive neurons, [0, 1).")] = 0.5,
    text: TextOption = None,
    context: ContextOption = 1024,
    validation_windows: Annotated[int, typer.Option(help="Held-out windows that judge.")] = 4,
    checks: Annotated[int, typer.Option(help="How often they do in the course of training.")] = 10,
    patience: Annotated[int, typer.Option(help="Checks without a better PPL that end it.")] = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train the selector learned, for fallow select compare --trained. Stops and continues."""
    from fallow.research.training import check_request
    from fallow.research.training import train as run

    check_request(rank, gate, tokens, sparsity, checks, patience)
    check_output(output, model, text)
    loaded = load_model(model, dtype, device)
    trained = run(
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
    if as_json:
        print_json({**trained.metadata, "path": str(output)})
        return
    print_metadata(f"trained selector {output}", trained.metadata)
    suggest("select", "compare", model, "--trained", output)
