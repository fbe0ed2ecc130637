"""Commands of fallow law."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli._shared import (
    ContextOption,
    JsonOption,
    SeedOption,
    WorkersOption,
    app,
    check_output,
    numbers,
    print_json,
    print_table,
    suggest,
)
from fallow.common.errors import UsageError

law_app = typer.Typer(help="How sparse a model becomes with training.", no_args_is_help=True)
app.add_typer(law_app, name="law")


@law_app.command("fit")
def law_fit(
    curves: Annotated[list[Path], typer.Argument(help="Files of points; see docs/laws.md.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for law.json and law.png.")
    ] = Path("law"),
    form: Annotated[
        str, typer.Option(help="relu, silu, piecewise or a rival; auto: by the direction.")
    ] = "auto",
    drop_first: Annotated[int, typer.Option(help="Points of the warm-up to leave out.")] = 0,
    unit: Annotated[
        float | None, typer.Option(help="Tokens that 1 in token_passed stands for.")
    ] = None,
    at: Annotated[str, typer.Option(help="Predict A at so many tokens, such as 1e11,1e12.")] = "",
    tokens_for: Annotated[str, typer.Option(help="Tokens until A is that, such as 0.08.")] = "",
    draws: Annotated[int, typer.Option(min=20, help="Of the bootstrap.")] = 400,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit laws to curves of the activation ratio: parameters, intervals, rivals, predictions."""
    from fallow.common.files import write_json
    from fallow.laws.curves import load_curve
    from fallow.laws.figures import draw
    from fallow.laws.fitting import fit_jointly, fit_law

    check_output(output / "law.json", *curves)
    reached = numbers("--at", at)
    if any(x <= 0 for x in reached):
        raise UsageError(f"--at {at} is not all positive; give tokens such as 1e11,1e12")
    loaded = [load_curve(path, unit) for path in dict.fromkeys(curves)]
    fits = [
        fit_law(
            curve,
            form,
            drop_first=drop_first,
            at=[x / curve.unit for x in reached],
            tokens_for=numbers("--tokens-for", tokens_for),
            draws=draws,
            seed=seed,
        )
        for curve in loaded
    ]
    result: dict[str, Any] = {"fits": [f.to_json() for f in fits]}
    if len(fits) > 1 and len({f.form for f in fits}) == 1:
        result["joint"] = vars(fit_jointly(loaded, form, drop_first=drop_first))
    write_json(output / "law.json", result)
    draw(loaded, fits, output / "law.png")
    if as_json:
        print_json(result)
        return
    for law in result["fits"]:
        _print_law(law)
    if "joint" in result:
        joint = result["joint"]
        low, high = joint["interval"]
        print(
            f"one limit A0 for all: {joint['limit']:.4f} ({low:.4f} to {high:.4f}); that they have "
            f"the same has p = {joint['p_value']:.2g}"
        )
    print(f"written: {output}/law.json and law.png")
    suggest("law", "advise", "--params", "1e9", "--tokens", "2e11")


@law_app.command("train")
def law_train(
    text: Annotated[Path, typer.Option(help="What to train on; .xz too. Its end is held out.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the model.")],
    activation: Annotated[str, typer.Option(help="relu or silu.")] = "relu",
    hidden_size: Annotated[int, typer.Option(help="d_model, a multiple of 64.")] = 192,
    layers: Annotated[int, typer.Option(help="How many.")] = 5,
    intermediate_size: Annotated[int, typer.Option(help="d_ff, neurons per layer.")] = 480,
    tokens: Annotated[float, typer.Option(help="To see; such as 4e7.")] = 4e7,
    vocabulary: Annotated[int, typer.Option(help="Of a tokenizer trained on the text.")] = 2048,
    context: ContextOption = 256,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 3e-3,
    checkpoints: Annotated[int, typer.Option(help="Points of the curve, log-spaced.")] = 12,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a small LLaMA-like model and measure how sparse it becomes; goes on if stopped."""
    from fallow.laws.training import Settings, train

    if not math.isfinite(tokens):
        raise UsageError(f"--tokens {tokens} is no number of tokens; give one such as 4e7")
    report = train(
        output,
        text,
        Settings(
            activation=activation,
            hidden_size=hidden_size,
            layers=layers,
            intermediate_size=intermediate_size,
            vocabulary=vocabulary,
            tokens=round(tokens),
            context=context,
            batch=batch,
            learning_rate=learning_rate,
            checkpoints=checkpoints,
            seed=seed,
        ),
        device,
    )
    if as_json:
        print_json(report.to_json())
        return
    print(
        f"written: {output}: {report.non_embedding_parameters / 1e6:.2f} M parameters besides "
        f"embeddings, {report.epochs:.2f} epochs, activation ratio {report.activation_ratio:.4f} ± "
        f"{report.activation_ratio_se:.4f} at CETT {report.cett:.4f} (CETT-PPL-1 %), "
        f"validation loss {report.validation_loss:.3f}; the curve: {report.curve}"
    )
    suggest("law", "fit", report.curve, "-o", "law")


@law_app.command("sweep")
def law_sweep(
    config: Annotated[Path, typer.Argument(help="A TOML file of runs; see docs/laws.md.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of all models.")],
    workers: WorkersOption = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a grid of small models, and put their activation ratios in one table."""
    from fallow.laws.sweeping import sweep

    table = sweep(config, output, workers=workers, device=device)
    if as_json:
        print_json({"output": str(output), "rows": table})
        return
    rows = [
        [
            row["run"],
            f"{row['non_embedding_parameters'] / 1e6:.2f}",
            f"{row['width_depth']:.0f}",
            f"{row['tokens'] / 1e6:.1f}",
            f"{row['validation_loss']:.3f}",
            f"{row['last_ratio']:.4f}",
            f"{row['activation_ratio']:.4f}",
            "-" if row["limit"] is None else f"{row['limit']:.4f}",
        ]
        for row in table
    ]
    columns = ["run", "M parameters", "width / depth", "M tokens", "loss", "A before decay"]
    print_table("trained", [*columns, "A", "limit"], rows)
    print(f"written: {output}/sweep.json")


@law_app.command("advise")
def law_advise(
    params: Annotated[float, typer.Option(help="Parameters besides embeddings, such as 1e9.")],
    tokens: Annotated[float, typer.Option(help="To train on, such as 2e11.")],
    activation: Annotated[str, typer.Option(help="relu or silu.")] = "relu",
    curve: Annotated[
        list[Path] | None, typer.Option(help="Also rest on this curve of law train; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What activation ratio to expect of a model, and how much faster its FFN could be."""
    from fallow.laws.advice import advise, own_basis

    found = advise(params, tokens, activation, [own_basis(path) for path in curve or ()])
    if as_json:
        print_json(found.to_json())
        return
    for warning in found.warnings:
        print(f"warning: {warning}")
    low, high = found.interval
    print(f"activation ratio at +1 % PPL: {found.ratio:.3f} ({low:.3f} to {high:.3f})")
    for what, value, (low, high) in (
        ("active neurons known at no cost", found.known_ceiling, found.known_interval),
        ("gate_proj computed to know them", found.gate_ceiling, found.gate_interval),
    ):
        print(f"FFN at most {value:.1f} times faster ({low:.1f} to {high:.1f}), {what}")
    low, high = found.best_loss_width_depth
    print(
        f"best training loss at d_model / layers of {low:.0f} to {high:.0f} (0.1B ReLU models); "
        "the smallest of these is the sparsest"
    )
    print(f"rests on: {', '.join(found.rests_on)}")


def _print_law(law: dict[str, Any]) -> None:
    rows = []
    for name, value in law["params"].items():
        numbers = (value, *law["intervals"][name], *law["bootstrap"][name])
        rows.append([name, *(f"{number:.4g}" for number in numbers)])
    print_table(
        f"{law['curve']}: {law['formula']}, {law['n_points']} points, mean error "
        f"{100 * law['mae']:.3f} points",
        ["parameter", "value", "95 %: profile", "to", "bootstrap", "to"],
        rows,
    )
    if law["warning"]:
        print(f"warning: {law['warning']}")
    rivals = [
        [
            r["form"],
            r["formula"],
            f"{100 * r['mae']:.3f}",
            "-" if r["aicc"] is None else f"{r['aicc']:.1f}",
            "-" if r["extrapolation_mae"] is None else f"{100 * r['extrapolation_mae']:.3f}",
            "better by both" if r["form"] in law["better"] else "",
        ]
        for r in law["rivals"]
    ]
    print_table(
        "it and its rivals; errors in points, the last of a fit to the first 60 % of the rest",
        ["form", "formula", "error", "AICc", "of the rest", "than the law"],
        rivals,
    )
    for p in law["at"]:
        low, high = p["interval"]
        print(f"at {p['x']:.4g} × {law['unit']}: A = {p['ratio']:.4f} ({low:.4f} to {high:.4f})")
    for p in law["tokens_for"]:
        ends = " to ".join("no end" if end is None else f"{end:.4g}" for end in p["interval"])
        reached = "never" if p["x"] is None else f"at {p['x']:.4g} ({ends}) × {law['unit']}"
        print(f"A = {p['ratio']:g}: {reached}")
