"""Commands that tell what plans cost."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli._shared import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LeakageOption,
    MemoryOption,
    ModelArg,
    TextOption,
    ThreadsOption,
    app,
    check_output,
    load_model,
    load_plan,
    numbers,
    plus_minus,
    print_json,
    print_table,
    refuse_given,
    report_tradeoff,
    split_names,
    suggest,
)
from fallow.common.errors import UsageError


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
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Perplexity, KL to dense and achieved sparsity of a plan, on text it has not seen."""
    loaded_plan = load_plan(plan)
    from fallow.engine.packed import is_packed
    from fallow.measure.tasks import evaluate_task, load_task

    tasks = list(dict.fromkeys(task or ()))
    refuse_given({"--task-items": task_items is not None and not tasks}, "goes with --task")
    for path in tasks:
        load_task(path, task_items)  # a wrong file is reported before hours of work
    subject: Any
    if is_packed(model):
        subject, result = _evaluate_packed(
            model, loaded_plan, text, context, windows, against, decode, threads, memory,
            allow_leakage, dtype, device,
        )  # fmt: skip
        loaded_plan = subject.plan
    else:
        if against is not None or decode or threads is not None or memory is not None:
            raise UsageError(
                "--against, --decode, --threads and --memory are for packed models; make one with "
                "fallow pack"
            )
        subject = load_model(model, dtype, device)
        from fallow.measure.evaluation import evaluate as run

        result = run(
            subject, loaded_plan, text, context=context, windows=windows,
            allow_leakage=allow_leakage,
        )  # fmt: skip
    found = result.to_json()
    found["tasks"] = [evaluate_task(subject, loaded_plan, p, task_items) for p in tasks]
    if as_json:
        print_json(found)
    else:
        _print_evaluation(found)


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
    device: str,
) -> tuple[Any, Any]:
    """The engine, with its plan in use, and what it came to."""
    from fallow.checkpoints.text import load_text
    from fallow.common.progress import console
    from fallow.engine.engine import Engine
    from fallow.engine.packed import is_packed, packed_windows
    from fallow.measure.quality import BUDGET_RESERVE, evaluate_engine

    if memory is not None and against is not None:
        raise UsageError("--memory is for one model; leave out --against or --memory")
    is_torch = against is not None and not is_packed(against)
    given = {"--dtype": dtype != "auto", "--device": device != "auto"}
    refuse_given({} if is_torch else given, "is for models that are not packed")
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
        if not is_torch:
            other = Engine(against, threads=threads, context=context)
        else:
            reference = load_model(against, dtype, device)
            from fallow.measure.evaluation import dense_logits

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


def _print_evaluation(r: dict[str, Any]) -> None:
    what = f"rule {r['rule']}, parameter {r['knob']:.4g}" if r["rule"] else "dense"
    kl = r["kl_to_dense"]
    print(f"{r['model']} ({r['dtype']}), {what}")
    print(f"{r['tokens']} tokens of {r['text']}, {r['windows']} windows of {r['context']}")
    print(f"  PPL             {plus_minus(r['ppl'], r['ppl_se'], 2)}")
    if r["rule"]:
        change = plus_minus(r["ppl_change_percent"], r["ppl_change_se"], 2)
        print(f"  against dense   {change} % (paired)")
        print(
            f"  KL to dense     {plus_minus(kl['mean'], kl['se'], 4)} nats/token, "
            f"p99 {kl['p99']:.3f}"
        )
        print(f"  top-1 agreement {r['top1_agreement']:.1%}")
        print(f"  sparsity achieved {r['achieved_sparsity']:.1%}")
    rows = []
    for tap, layers in r["sparsity_per_layer"].items():
        mean = [layer["mean"] for layer in layers]
        rows.append(
            [
                tap,
                f"{r['sparsity_ratio'][tap]:.1%}",
                f"{min(mean):.1%}",
                f"{max(mean):.1%}",
                f"{min(layer['p5'] for layer in layers):.1%}",
                f"{max(layer['p95'] for layer in layers):.1%}",
            ]
        )
    lowest = f"lowest p5 over {r['spread_over']}"
    print_table(
        "Sparsity",
        ["tensor", "mean", "lowest layer", "highest layer", lowest, "highest p95"],
        rows,
    )
    for t in r["tasks"]:
        accuracy = plus_minus(100 * t["accuracy"], 100 * (t["accuracy_se"] or 0), 1)
        change = plus_minus(100 * t["change"], 100 * (t["change_se"] or 0), 1)
        print(f"{t['task']}: {accuracy} % of {t['items']}, change against dense {change} points")


@app.command()
def tradeoff(
    model: ModelArg,
    rules: Annotated[
        str, typer.Option(help="Comma-separated; see: fallow rules.")
    ] = "percentile,cats,topk,topp,tail,cett,teal_uniform,wina_uniform",
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
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """One table and one figure of PPL and KL against sparsity; stops and continues."""
    names = list(dict.fromkeys(split_names(rules)))
    targets = numbers("--sparsities", sparsities)
    increases = numbers("--max-ppl-increases", max_ppl_increases)
    from fallow.calibration.tradeoff import make_rows
    from fallow.calibration.tradeoff import tradeoff as run

    rows = make_rows(names, targets, increases)
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
        validation_windows=validation_windows,
        allow_leakage=allow_leakage,
    )
    report_tradeoff(table, output, as_json)
    if not as_json:
        suggest("optimize", model, "-o", "fast.gguf")
