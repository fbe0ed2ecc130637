"""Commands that talk to people and programs."""

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli._shared import (
    CacheOption,
    DtypeOption,
    JsonOption,
    MemoryOption,
    PackedArg,
    PackedPlanOption,
    ThreadsOption,
    app,
    load_plan,
    plus_minus,
    print_json,
    print_table,
)

SERVER_RESERVE = 32_000_000  # bytes of a memory budget for requests and responses


@app.command()
def chat(
    file: PackedArg,
    plan: PackedPlanOption = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="The likeliest tokens of this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="That many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    stats: Annotated[bool, typer.Option("--stats", help="Show sparsity and speed.")] = False,
    threads: ThreadsOption = None,
    context: CacheOption = None,
    memory: MemoryOption = None,
) -> None:
    """Talk to a packed model; /help tells the commands."""
    from fallow.engine.engine import Engine
    from fallow.engine.sampling import Sampler
    from fallow.serving.chat import Conversation
    from fallow.serving.chat import chat as run

    engine = Engine(file, load_plan(plan), threads, context=context, memory=memory)
    sampler = Sampler(temperature, top_p, top_k, seed=seed)
    run(Conversation(engine, sampler, max_new_tokens, system), stats)


@app.command()
def serve(
    file: PackedArg,
    plan: PackedPlanOption = None,
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
    cors: Annotated[
        list[str] | None,
        typer.Option(help="An origin whose web pages may ask, http://localhost:3000; '*': all."),
    ] = None,
    turn: Annotated[
        float, typer.Option(min=1, help="Seconds of an answer, if others wait.")
    ] = 300.0,
    threads: ThreadsOption = None,
    context: CacheOption = None,
    memory: MemoryOption = None,
) -> None:
    """Serve a packed model to clients of OpenAI's API."""
    # Before the engine, which takes what is left of a memory budget.
    from fallow.engine.engine import Engine
    from fallow.engine.memory import parse_size
    from fallow.serving.server import serve as run

    largest = parse_size(max_body, "--max-body")
    engine = Engine(
        file, load_plan(plan), threads, context=context, memory=memory, reserve=SERVER_RESERVE
    )
    run(engine, name or file.stem, host, port, queue, api_key, largest, grace, cors or (), turn)


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
