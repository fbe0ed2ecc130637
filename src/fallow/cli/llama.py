"""Commands for llama.cpp with skipped neurons."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fallow.cli._shared import (
    JsonOption,
    TextOption,
    ThreadsOption,
    app,
    check_output,
    load_plan,
    print_json,
    print_table,
    suggest,
)
from fallow.common.errors import FallowError, UsageError

llama_app = typer.Typer(
    help="llama.cpp with the FFNs computed here, and neurons skipped.", no_args_is_help=True
)
app.add_typer(llama_app, name="llama")

GgufArg = Annotated[Path, typer.Argument(help="The GGUF that llama.cpp runs.")]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="What fallow pack or optimize made of it, or a file of fallow llama pack; "
        "default: FALLOW_PLAN's, or dense.",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="What FFNs may take, 800MB say; the others' weights are read from a packed --plan. "
        "Default: FALLOW_MEMORY's, or all that they need."
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--llama-cpp", help="A folder of llama.cpp, built; default: the installed llama-cpp-python."
    ),
]
_FREE = {"allow_extra_args": True, "ignore_unknown_options": True}


@llama_app.command("build")
def build(
    llama_cpp: FolderOption = None,
    headers: Annotated[
        Path | None,
        typer.Option(help="Source of the installed llama-cpp-python; default: it is fetched."),
    ] = None,
) -> None:
    """Build the plugin for the llama.cpp that is there: once, and again after it was upgraded."""
    from fallow.llama_cpp import plugin

    if llama_cpp is not None and headers is not None:
        raise UsageError("--headers is for the installed llama-cpp-python, not for --llama-cpp")
    print(f"written: {plugin.build(plugin.target_of(llama_cpp), headers)}")
    suggest("llama", "bench", "model.gguf")


@llama_app.command("pack")
def pack(
    model: GgufArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    packed: Annotated[
        Path | None,
        typer.Option(help="What fallow pack or optimize made of the same GGUF: its plan is taken."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan, in place of that of --packed.")] = None,
    down: Annotated[
        str | None,
        typer.Option(help="Without --packed: type of down_proj; default q6_k, or q8_0."),
    ] = None,
) -> None:
    """Write what llama.cpp needs beside its own file to skip neurons of it."""
    check_output(output, model, packed, plan)
    from fallow.packing.ffn_file import pack_ffns

    pack_ffns(model, output, packed=packed, plan=load_plan(plan), down=down)
    print(f"written: {output}, {output.stat().st_size / 1e6:.0f} MB")
    suggest("llama", "bench", model, "--plan", output)


@llama_app.command("run", context_settings=_FREE)
def run(
    context: typer.Context,
    plan: FileOption = None,
    memory: MemoryOption = None,
    llama_cpp: FolderOption = None,
) -> None:
    """Run a program of llama.cpp with the plugin: fallow llama run -- llama-server -m …"""
    from fallow.engine.memory import parse_size
    from fallow.llama_cpp import plugin

    if not context.args:
        raise UsageError("give the command after --, such as: -- llama-server -m model.gguf")
    if plan is not None and not plan.is_file():
        raise FallowError(f"--plan {plan}: no such file; make it with: fallow llama pack")
    path = plugin.built(plugin.target_of(llama_cpp))
    env = os.environ | {"GGML_BACKEND_PATH": str(path)}
    if plan is not None:
        env["FALLOW_PLAN"] = str(plan)
    if memory is not None:
        env["FALLOW_MEMORY"] = str(parse_size(memory))
    try:
        os.execvpe(context.args[0], context.args, env)
    except OSError as error:
        raise FallowError(f"cannot run {context.args[0]}: {error.strerror}") from error


@llama_app.command("serve", context_settings=_FREE)
def serve(context: typer.Context, plan: FileOption = None, memory: MemoryOption = None) -> None:
    """Run llama-cpp-python's server with the plugin: fallow llama serve -- --model model.gguf"""
    import fallow.llama_cpp
    from fallow.engine.memory import parse_size

    fallow.llama_cpp.load(plan, None if memory is None else parse_size(memory))
    try:
        from llama_cpp.server.__main__ import main
    except ImportError as error:
        raise FallowError(
            f"llama-cpp-python's server needs {error.name}; install it with: "
            "pip install 'llama-cpp-python[server]'"
        ) from error
    sys.argv = ["llama_cpp.server", *context.args]
    main()


@llama_app.command("verify")
def verify(
    model: GgufArg,
    plan: FileOption = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text.")] = 256,
    threads: ThreadsOption = None,
    text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare what llama.cpp puts out with the plugin and without."""
    from fallow.engine.engine import thread_count
    from fallow.measure.llama_cpp import verify as measure

    found = measure(model, plan, text=text, tokens=tokens, threads=thread_count(threads))
    if as_json:
        print_json(found)
        return
    rows = [
        [f"{name}, {way}", f"{v['kl']:.5f}", f"{v['top1']:.1%}", f"{v['ppl_change_percent']:+.2f}"]
        for name, ways in found.items()
        for way, v in ways.items()
    ]
    columns = ["against llama.cpp alone", "KL, nats/token", "same top token", "PPL, %"]
    print_table(f"{model}, {tokens} tokens", columns, rows)


@llama_app.command("bench")
def bench(
    model: GgufArg,
    plan: FileOption = None,
    threads: ThreadsOption = None,
    prompt_tokens: Annotated[int, typer.Option("-p", help="Tokens of prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option("-n", help="Tokens of decode.")] = 128,
    runs: Annotated[int, typer.Option(help="Runs; medians are reported.")] = 5,
    text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time llama.cpp with the plugin and without, in turn."""
    from statistics import median

    from fallow.engine.engine import thread_count
    from fallow.measure.llama_cpp import bench as measure

    found = measure(
        model, plan, threads=thread_count(threads), prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, runs=runs, text=text,
    )  # fmt: skip
    if as_json:
        print_json(found)
        return
    rows = []
    for name, all_runs in found["runs"].items():
        row = [name]
        for key in ("prefill", "decode"):
            row.append(f"{median(r[f'{key}_tps'] for r in all_runs):.1f}")
            ratio = found["ratios"].get(name, {}).get(key)
            row.append("" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio))
        rows.append(row)
    columns = ["llama.cpp", "prefill, tok/s", "/ stock", "decode, tok/s", "/ stock"]
    print_table(f"{model}, {runs} runs in turn", columns, rows)
