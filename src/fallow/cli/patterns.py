"""Commands of fallow patterns."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli._shared import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArg,
    SeedOption,
    TextOption,
    ThreadsOption,
    WorkersOption,
    app,
    check_output,
    load_model,
    load_plan,
    numbers,
    print_json,
    print_table,
    refuse_given,
    split_names,
    suggest,
)
from fallow.common.errors import UsageError

patterns_app = typer.Typer(
    help="Collect and cluster patterns: which neurons are active.", no_args_is_help=True
)
app.add_typer(patterns_app, name="patterns")

LayersOption = Annotated[str | None, typer.Option(help="Such as 0,13,27; default: all.")]
TestStoreOption = Annotated[
    Path | None, typer.Option(help="A store to score on; default: the last windows.")
]
HeldOutOption = Annotated[float, typer.Option(help="Share of the windows to score on.")]
RuleSparsityOption = Annotated[float | None, typer.Option(help="Of the rule; default: 0.5.")]
PlanForRuleOption = Annotated[Path | None, typer.Option(help="A plan, in place of a rule.")]
RuleTextOption = Annotated[
    Path | None, typer.Option(help="What the rule is fitted on, as --text of calibrate.")
]


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
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Keep which neurons a rule leaves active for every token of a text; goes on if stopped."""
    loaded, used = _with_plan(
        model, (dtype, device), plan, rule, sparsity, calibration_text, context, default="topk"
    )
    from fallow.patterns.collect import collect

    store = collect(
        loaded,
        used,
        output,
        text,
        taps=tuple(split_names(taps)),
        context=context,
        windows=windows,
        magnitudes=magnitudes,
        workers=workers,
    )
    header = store.header
    if as_json:
        print_json({"path": str(output), "rows": store.n_rows} | vars(header))
        return
    print(f"written: {output}: {store.n_rows} tokens, {header.n_layers} layers, {taps}")
    suggest("patterns", "cluster", output, "-o", "codebooks.safetensors")


def _with_plan(
    model: str,
    kind: tuple[str, str],
    plan: Path | None,
    rule: str | None,
    sparsity: float | None,
    calibration_text: Path | None,
    context: int,
    default: str,
) -> tuple[Any, Any]:
    """The model, of a dtype on a device, and the plan, or one of the rule at a sparsity (0.5)."""
    loaded_plan = load_plan(plan)
    from fallow.calibration.calibrator import calibrate as fit
    from fallow.calibration.calibrator import check_request

    if loaded_plan is not None:
        given = {"--rule": rule is not None, "--sparsity": sparsity is not None}
        given["--calibration-text"] = calibration_text is not None
        refuse_given(given, "makes a plan, and --plan gives one; leave out either")
    rule, sparsity = rule or default, 0.5 if sparsity is None else sparsity
    check_request(rule, sparsity, None, None)
    loaded = load_model(model, *kind)
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
    kind: Annotated[
        str | None,
        typer.Option(help="Of edits: substitute, insert or delete. Default: substitute."),
    ] = None,
    tap: Annotated[str | None, typer.Option(help="Default: inter; gate_pre as published.")] = None,
    documents: Annotated[
        int | None, typer.Option(help="The first N windows; default: 12, or all of fewer.")
    ] = None,
    context: ContextOption = 512,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Edit texts, and measure how far active sets of the other tokens change."""
    check_output(output / "similarity.json")
    if published:
        given = {"--text": text is not None, "--kind": kind is not None}
        given["--documents"] = documents is not None
        refuse_given(given, "is of our test, not of the --published one")
    default = "percentile" if published else "topk"
    loaded, used = _with_plan(
        model, (dtype, device), plan, rule, sparsity, calibration_text, context, default
    )
    from fallow.common.files import write_json
    from fallow.patterns.similarity import draw, draw_variants, edit_test, published_test

    if published:
        variants = published_test(loaded, used, published, tap=tap or "gate_pre")
        draw_variants(variants, output / "similarity.png")
        result: dict[str, Any] = {"variants": [v.to_json() for v in variants]}
    else:
        report = edit_test(
            loaded, used, text, tap=tap or "inter", documents=documents, context=context,
            kind=kind or "substitute", seed=seed,
        )  # fmt: skip
        result = report.to_json()
        draw(report, output / "similarity.png")
    write_json(output / "similarity.json", result)
    if as_json:
        print_json(result)
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
    print_table(
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
    print_table("agreement, mean of layers", [*columns, "shifted", "by rows"], rows)


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
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make codebooks of patterns at an equal budget, and score them on held-out windows."""
    check_output(output)
    from fallow.engine.engine import thread_count

    wanted, n_threads = _layers(layers), thread_count(threads)
    from fallow.patterns.codebooks import cluster_store
    from fallow.patterns.store import PatternStore

    report = cluster_store(
        PatternStore(store),
        output,
        clusters,
        budget,
        algorithm=algorithm,
        tap=tap,
        layers=wanted,
        test=None if test is None else PatternStore(test),
        held_out=held_out,
        seed=seed,
        restarts=restarts,
        energy=energy,
        batch=batch,
        workers=workers,
        n_threads=n_threads,
    )
    if as_json:
        print_json(report.to_json())
    else:
        _print_codebooks(report)
        suggest("patterns", "predict", store, report.path)


def _print_codebooks(report: Any) -> None:
    names = list(report.layers[0].scores)
    rows = [
        [str(r.layer), *(f"{r.scores[n]['recall']:.4f}" for n in names), str(r.passes)]
        for r in report.layers
    ]
    rows.append(["mean", *(f"{report.mean(n):.4f}" for n in names), ""])
    print_table(
        f"recall of {report.test_rows} held-out tokens, {report.n_clusters} clusters, "
        f"budget {report.budget:g}",
        ["layer", *names, "passes"],
        rows,
    )
    print(f"written: {report.path} ({report.codebook_bytes / 1e6:.1f} MB of centroids)")


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
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict clusters from what is known before a layer runs; scored on held-out windows."""
    from fallow.engine.engine import thread_count

    wanted, n_threads = _layers(layers), thread_count(threads)
    from fallow.patterns.prediction import predict_clusters
    from fallow.patterns.store import PatternStore

    report = predict_clusters(
        PatternStore(store),
        codebooks,
        features=list(dict.fromkeys(split_names(features))),
        test=None if test is None else PatternStore(test),
        held_out=held_out,
        layers=wanted,
        hidden=hidden,
        epochs=epochs,
        seed=seed,
        n_threads=n_threads,
    )
    if as_json:
        print_json(report.to_json())
        return
    names = ("predicted", "cluster", "static")
    rows = [
        [str(r.layer), f"{a:.3f}", *(f"{r.scores[n]['recall']:.4f}" for n in names)]
        for r, a in zip(report.layers, report.accuracy, strict=True)
    ]
    mean = sum(report.accuracy) / len(rows)
    rows.append(["mean", f"{mean:.3f}", *(f"{report.mean(n):.4f}" for n in names)])
    print_table(
        f"recall of {report.test_rows} held-out tokens, {report.n_clusters} clusters, from "
        f"{', '.join(report.features)}",
        ["layer", "right", *names],
        rows,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _layers(text: str | None) -> list[int] | None:
    """Whole numbers, each once. Raises UsageError for anything else, and for none."""
    if text is None:
        return None
    found = numbers("--layers", text)
    if not found or any(n != round(n) for n in found):
        raise UsageError(f"--layers {text!r} is not a list of layers such as 0,13,27")
    return list(dict.fromkeys(map(int, found)))
