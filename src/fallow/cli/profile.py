"""`fallow profile`: what a dense model's weights and activations are like."""

from pathlib import Path
from typing import Annotated, Any

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
    print_json,
    print_table,
    suggest,
)


@app.command()
def profile(
    model: ModelArg,
    text: TextOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for profile.json and profile.npz.")
    ] = Path("profile"),
    context: ContextOption = 1024,
    windows: Annotated[
        int | None, typer.Option(help="The first N windows; default: 8, or all of fewer.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure weights, activations and natural sparsity of the dense model, layer by layer."""
    check_output(output / "profile.json")
    loaded = load_model(model, dtype, device)
    from fallow.measure.profiling import profile as run

    result = run(loaded, text, context=context, windows=windows)
    result.save(output)
    if as_json:
        print_json(result.summary)
        return
    s = result.summary
    print_table(
        f"{s['model']} ({s['architecture']}, {s['dtype']}), {s['tokens']} tokens of {s['text']}: "
        f"natural sparsity of inter {s['natural_sparsity']:.1%}",
        [
            "layer",
            "inter = 0",
            "<= 1e-3",
            "<= 1e-2",
            "|gate_act| 50 %",
            "|inter| 50 %",
            "|inter| 99 %",
            "|up weight| 50 %",
            "|down weight| 50 %",
            "dead",
        ],
        [
            [
                str(row["layer"]),
                f"{row['zeros']['inter']:.1%}",
                f"{row['inter_at_most']['0.001']:.1%}",
                f"{row['inter_at_most']['0.01']:.1%}",
                f"{row['magnitude_quantiles']['gate_act']['0.5']:.3g}",
                f"{row['magnitude_quantiles']['inter']['0.5']:.3g}",
                f"{row['magnitude_quantiles']['inter']['0.99']:.3g}",
                *(f"{_median_weight(row, name):.3g}" for name in ("up_proj", "down_proj")),
                str(row["dead_neurons"]),
            ]
            for row in s["layers"]
        ],
    )
    print(f"written: {output}/profile.json, {output}/profile.npz")
    suggest("calibrate", model, "--rule", "tail", "--max-ppl-increase", 1, "-o", "tail.plan")


def _median_weight(row: dict[str, Any], name: str) -> float:
    quantiles = row["weight_quantiles"]
    return quantiles[name if name in quantiles else "gate_up_proj"]["0.5"]
