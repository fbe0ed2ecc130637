"""Commands that write packed models and time them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli._shared import (
    ContextOption,
    DeviceOption,
    JsonOption,
    KernelsOption,
    ModelArg,
    PackedPlanOption,
    QuantOption,
    RunArg,
    SkipOption,
    TextOption,
    ThreadsOption,
    app,
    check_output,
    count_of,
    load_plan,
    packed_file,
    plus_minus,
    print_json,
    print_table,
    sampled_beside,
    split_names,
    suggest,
)
from fallow.common.errors import FallowError, UsageError
from fallow.common.files import check_writable


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
            help="Type of all matrices of a Hugging Face folder: q8_0, q4_k, bf16 …; "
            "of llama.cpp's mixes, q4_k_m say, the main type."
        ),
    ] = None,
    down: Annotated[
        str | None, typer.Option(help="Type of down_proj; default: the smallest that passes.")
    ] = None,
    shortlist: Annotated[
        bool,
        typer.Option("--shortlist", help="Add a coarse head, which plans of fallow optimize use."),
    ] = False,
    predictor: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Predict which neurons of a ReLU model are active, with this share of their "
            "energy (0.99 say): the gate's other rows are not read.",
        ),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="A LoRA adapter to merge: a PEFT folder, or a GGUF.")
    ] = None,
    text: TextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in the engine's form, checked against its source before it gets its name."""
    check_output(output, model, plan, text)
    loaded_plan = load_plan(plan)
    from fallow.packing.packer import pack as run

    check = run(
        model, output, plan=loaded_plan, quant=quant, down=down, shortlist=shortlist,
        predictor=predictor, lora=lora, text=text,
    )  # fmt: skip
    size = output.stat().st_size / 1e6
    if as_json:
        print_json({"path": str(output), "mb": size, "self_check": vars(check)})
        return
    print(f"self-check against {model}: {check}")
    print(f"written: {output}, {size:.0f} MB")
    suggest("run", output)


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
    validation_windows: Annotated[int, typer.Option(help="Held-out windows after those.")] = 10,
    check_windows: Annotated[int, typer.Option(help="Windows of --text.")] = 8,
    threads: ThreadsOption = None,
    prefer: Annotated[
        str, typer.Option(help="speed: only what is faster here; bytes: read as few as possible.")
    ] = "speed",
    quant: Annotated[str | None, typer.Option(help="As for fallow pack.")] = None,
    down: Annotated[str | None, typer.Option(help="As for fallow pack.")] = None,
    adapt: Annotated[
        str | None,
        typer.Option(help="First teach it, on 10M tokens say, to do without half of its neurons."),
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Pack a model with the plan that skips most at a stated loss; calibrate, search and check."""
    check_output(output, model, text, calibration_text)
    from fallow.adaptation.adapter import AdaptSettings
    from fallow.optimization.optimizer import optimize as run

    settings = None
    if adapt is not None:
        settings = AdaptSettings(
            tokens=count_of("--adapt", adapt),
            sampled=sampled_beside(calibration_text),
            quant=quant,
        )

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
        quant=quant,
        down=down,
        adapt=settings,
        device=device,
    )
    if as_json:
        print_json(result.to_json())
        return
    change = plus_minus(result.ppl_change_percent, result.ppl_change_se, 2)
    print(f"{result.selector}: {result.sparsity_ratio:.0%} of neurons inactive")
    print(f"  PPL {change} % against {model} on {result.text}, KL {result.kl_to_dense:.4f} nats")
    decoded = plus_minus(result.decode_ppl_change_percent, result.decode_ppl_change_se, 2)
    print(f"  read token by token, as it is timed: PPL {decoded} % ({result.decode_tokens} tokens)")
    print(
        f"  decode {result.decode_tps:.1f} tok/s, {result.decode_ratio_dense:.2f} times dense: "
        f"{result.shortlist_gain:.2f} by the shortlist, {result.neuron_gain:.2f} by inactive "
        f"neurons; {result.threads} threads"
    )
    print(f"  {result.bytes_per_token / 1e6:.0f} MB/token, {result.bytes_ratio:.0%} of dense")
    print(f"written: {output}, after {result.seconds:.0f} s")
    suggest("run", output)


@app.command()
def bench(
    model: RunArg,
    plan: PackedPlanOption = None,
    against: Annotated[
        str | None, typer.Option(help="Also time another engine: llama.cpp or openvino.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(help="The GGUF the other engine reads; default: the model."),
    ] = None,
    threads: ThreadsOption = None,
    skip: SkipOption = True,
    kernels: KernelsOption = None,
    prompt_tokens: Annotated[int, typer.Option("-p", help="Tokens of prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option("-n", help="Tokens of decode.")] = 128,
    runs: Annotated[int, typer.Option(help="Runs; medians are reported.")] = 5,
    quant: QuantOption = None,
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
    budgets = split_names(memory or "")
    if len(budgets) > 1:
        if against or source:
            raise UsageError("--against goes with one --memory, not with several")
        given = {
            "--plan": plan,
            "--threads": threads,
            "--text": text,
            "--runs": runs,
            "--kernels": kernels,
            "--no-skip": not skip,
            "-p": prompt_tokens,
            "-n": new_tokens,
        }
        _bench_budgets(model, quant, budgets, given, figure, as_json)
        return
    if figure:
        raise UsageError("--figure draws several budgets; give --memory 1GB,800MB say")
    loaded_plan = load_plan(plan)
    file = packed_file(model, quant, threads, memory)
    from fallow.checkpoints.catalog import find_model
    from fallow.measure.speed import bench as run

    if against is not None and source is None:
        found = find_model(model)
        source = found if found.suffix == ".gguf" and found != file else None
    result = run(
        file,
        loaded_plan,
        threads=threads,
        skip_zeros=skip,
        kernels=kernels or "",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=runs,
        against=against,
        source=source,
        memory=memory,
        text=text,
    )
    if as_json:
        print_json(result)
        return
    _print_bench(result)


def _bench_budgets(
    model: str,
    quant: str | None,
    budgets: list[str],
    given: dict[str, Any],
    figure: Path | None,
    as_json: bool,
) -> None:
    from fallow.engine.memory import parse_size
    from fallow.measure.speed import bench_budgets, draw_budgets

    for budget in budgets:
        parse_size(budget)
    if figure:
        if figure.suffix not in (".png", ".svg"):
            raise UsageError(f"--figure {figure} ends in neither .png nor .svg")
        check_writable(figure)
    file = packed_file(model, quant, given["--threads"], None)
    arguments = []
    for name, value in given.items():
        if value is not None and value is not False:
            arguments += [name] if value is True else [name, str(value)]
    rows = bench_budgets(file, budgets, arguments)
    if all("error" in r for r in rows):
        raise FallowError(f"no budget works; the last one: {rows[-1]['error']}")
    if figure:
        draw_budgets(rows, figure)
    if as_json:
        print_json({"budgets": rows})
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
    print_table("Memory budgets", columns, table)
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
    print(f"  neurons inactive {r['sparsity']:.1%}, outside products {r['overhead']:.1%} of decode")
    print(f"  peak RSS {r['peak_rss_mb']:.0f} MB, file {r['file_mb']:.0f} MB")
    joules = r.get("joules_per_token")
    told = f"{joules:.3g} J/token of the whole processor" if joules else r["no_energy"]
    print(f"  energy   {told}")
    if "baseline" in r:
        for phase in ("prefill", "decode"):
            low, high = r[f"{phase}_ratio_range"]
            print(
                f"  {phase} / {r['baseline']}: {r[f'{phase}_ratio']:.2f} "
                f"({low:.2f} to {high:.2f}), which did {r[f'baseline_{phase}_tps']:.1f} tok/s"
            )
