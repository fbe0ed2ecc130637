"""Commands that make plans and look at them."""

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli._shared import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArg,
    TextOption,
    app,
    check_output,
    load_model,
    load_plan,
    print_json,
    print_plan,
    report_plan,
)

plan_app = typer.Typer(
    help="Look at plans, and make them from published thresholds.", no_args_is_help=True
)
app.add_typer(plan_app, name="plan")


@app.command()
def calibrate(
    model: ModelArg,
    rule: Annotated[str, typer.Option(help="See: fallow rules.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    sparsity: Annotated[float | None, typer.Option(help="Target, [0, 1).")] = None,
    knob: Annotated[float | None, typer.Option(help="The rule's own parameter.")] = None,
    max_ppl_increase: Annotated[
        float | None, typer.Option(help="Largest PPL increase, percent, on held-out text.")
    ] = None,
    text: TextOption = None,
    context: ContextOption = 1024,
    windows: Annotated[int, typer.Option(help="Windows that thresholds are fitted on.")] = 8,
    validation_windows: Annotated[int, typer.Option(help="Held-out windows after those.")] = 4,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fit a rule to a sparsity, a parameter or a largest loss, and write the plan."""
    from fallow.calibration.calibrator import calibrate as run
    from fallow.calibration.calibrator import check_request

    check_request(rule, sparsity, knob, max_ppl_increase)
    check_output(output, model, text)
    loaded = load_model(model, dtype, device)
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
    plan.save(output)
    report_plan(plan, model, output, as_json)


@plan_app.command("show")
def plan_show(
    file: Annotated[Path, typer.Argument(help="A plan file.")], as_json: JsonOption = False
) -> None:
    """Print what a plan is for, how it was made, and its arrays."""
    plan = load_plan(file)
    if as_json:
        arrays = {name: array.tolist() for name, array in plan.arrays.items()}
        print_json({**plan.metadata, "arrays": arrays})
        return
    print_plan(plan, str(file))


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
    check_output(output, model, file)
    loaded = load_model(model, dtype)
    from fallow.calibration.imported import import_thresholds

    plan = import_thresholds(file, loaded, knob)
    plan.save(output)
    report_plan(plan, model, output, as_json)


@app.command()
def export(
    model: ModelArg,
    plan: Annotated[Path, typer.Option(help="A plan for it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write a Hugging Face folder with the plan in it, for transformers: fallow.load_sparse."""
    loaded_plan = load_plan(plan)
    from fallow.checkpoints.catalog import find_model
    from fallow.reference.sparsified import export as run

    run(load_model(model, dtype), loaded_plan, output, find_model(model))
    if as_json:
        print_json({"path": str(output), "rule": loaded_plan.rule})
        return
    print(f"written: {output}; in Python: fallow.load_sparse({str(output)!r})")
