"""The command that teaches a model to be sparser."""

from pathlib import Path
from typing import Annotated

import typer

from fallow.cli._shared import (
    ContextOption,
    DeviceOption,
    JsonOption,
    ModelArg,
    SeedOption,
    app,
    check_output,
    count_of,
    numbers,
    print_json,
    sampled_beside,
    suggest,
)


@app.command()
def adapt(
    model: ModelArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Neurons to leave out, [0, 1); default 0.5.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="That the model learns to live with; default: gate_topk."),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(help="relu or drelu in place of the model's own: zeros, without a rule."),
    ] = None,
    l1: Annotated[
        float, typer.Option(help="Makes more zeros: nats for neurons as large as the model's.")
    ] = 0.0,
    tokens: Annotated[str, typer.Option(help="To train on, such as 20M.")] = "20M",
    minutes: Annotated[float | None, typer.Option(help="Of training, at most.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="To train on, may be repeated; default: the calibration text."),
    ] = None,
    shares: Annotated[str, typer.Option(help="Of each text, such as 0.7,0.3; by length.")] = "",
    sampled: Annotated[
        float | None,
        typer.Option(help="Share of tokens that the model writes itself; without --text half."),
    ] = None,
    train: Annotated[str, typer.Option(help="layers, ffn, lora or scales.")] = "layers",
    rank: Annotated[int, typer.Option(help="Of lora.")] = 16,
    quant: Annotated[
        str | None,
        typer.Option(help="Type that it will be packed in, q4_k say; default: a GGUF's own."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by a short probe.")] = None,
    anneal: Annotated[
        float, typer.Option(help="Share of the training in which the sparsity, or --l1, grows.")
    ] = 0.0,
    budgets: Annotated[
        str | None,
        typer.Option(help="Of layers: even, or measured, the default with a rule of top-k."),
    ] = None,
    context: ContextOption = 512,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 32,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Teach a model to do without its inactive neurons, by its own predictions."""
    from fallow.adaptation.adapter import AdaptSettings
    from fallow.adaptation.adapter import adapt as run

    settings = AdaptSettings(
        rule=rule or ("relu" if activation else "gate_topk"),
        sparsity=sparsity if sparsity is not None else 0.0 if activation else 0.5,
        activation=activation,
        l1=l1,
        tokens=count_of("--tokens", tokens),
        minutes=minutes,
        train=train,
        rank=rank,
        quant=quant,
        learning_rate=learning_rate,
        anneal=anneal,
        budgets=budgets,
        sampled=sampled_beside(text) if sampled is None else sampled,
        context=context,
        batch=batch,
        seed=seed,
    )
    settings.check()
    check_output(output, model)
    report = run(
        model,
        output,
        settings,
        text=text or (),
        shares=numbers("--shares", shares),
        device=device,
    )
    if as_json:
        print_json(report.to_json())
        return
    best = report.best
    print(
        f"written: {output}, after {report.tokens / 1e6:.2f} M tokens; held-out text under "
        f"{activation or settings.rule}, {best.sparsity:.0%} of neurons zero: {best.kl:.4f} nats, "
        f"PPL {best.ppl_change_percent:+.2f} % (before: "
        f"{report.checks[0].ppl_change_percent:+.2f} %)"
    )
    more = ("--predictor", 0.99) if activation else ("--plan", output / "fallow.plan")
    suggest("pack", output, "-o", "adapted.gguf", *more)
