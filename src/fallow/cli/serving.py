"""Commands that other programs talk to."""

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli._shared import (
    CacheOption,
    DtypeOption,
    JsonOption,
    MemoryOption,
    PackedPlanOption,
    QuantOption,
    RunArg,
    ThreadsOption,
    app,
    load_plan,
    open_engine,
    plus_minus,
    print_json,
    print_table,
)

SERVER_RESERVE = 32_000_000  # bytes of a memory budget for requests and responses


@app.command()
def serve(
    model: RunArg,
    plan: PackedPlanOption = None,
    host: Annotated[str, typer.Option(help="0.0.0.0: other machines may ask too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8080,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; default: its name."),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 16,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="FALLOW_API_KEY", help="What clients must send; better by variable."),
    ] = None,
    max_body: Annotated[str, typer.Option(help="Largest request.")] = "1MB",
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish, at the end.")] = 30.0,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose web pages may ask, http://localhost:3000; '*': all."),
    ] = None,
    turn: Annotated[
        float, typer.Option(min=1, help="Seconds of an answer, if others wait.")
    ] = 300.0,
    quant: QuantOption = None,
    slots: Annotated[
        int | None,
        typer.Option(
            *("--slots", "--parallel", "-np"),
            help="Answers at once, each of --context tokens; default: 4, fewer in little memory.",
        ),
    ] = None,
    threads: ThreadsOption = None,
    context: CacheOption = None,
    memory: MemoryOption = None,
) -> None:
    """Serve a model to clients of OpenAI's API."""
    # Before the engine, which takes what is left of a memory budget.
    from fallow.engine.memory import parse_size
    from fallow.packing.cache import short_name
    from fallow.serving.server import serve as run

    largest = parse_size(max_body, "--max-body")
    loaded_plan = load_plan(plan)
    engine = open_engine(
        model, quant, loaded_plan, threads, context=context, memory=memory,
        reserve=SERVER_RESERVE, slots=slots,
    )  # fmt: skip
    run(
        engine,
        name or short_name(model),
        host,
        port,
        queue,
        api_key,
        largest,
        grace,
        cors or (),
        turn,
    )


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
    loaded_plan = load_plan(plan)
    from fallow.measure.harness import compare, open_model

    opened = open_model(model, threads=threads, context=context, dtype=dtype)
    rows = compare(opened, loaded_plan, tasks.split(","), limit, fewshot, include_path)
    if as_json:
        print_json(rows)
        return
    cells = [
        [
            row["task"],
            row["metric"],
            plus_minus(row["dense"], row["dense_se"], 4),
            "-" if row["sparse"] is None else plus_minus(row["sparse"], row["sparse_se"], 4),
            "-" if row["change"] is None else plus_minus(row["change"], row["change_se"], 4),
        ]
        for row in rows
    ]
    print_table(f"{model}, lm-eval", ["task", "metric", "dense", "sparse", "change"], cells)
