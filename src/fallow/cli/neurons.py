"""`fallow neurons`: what a single neuron does."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli._shared import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArg,
    app,
    load_model,
    print_json,
)
from fallow.common.errors import UsageError


@app.command()
def neurons(
    model: ModelArg,
    layer: Annotated[int, typer.Option(help="From 0.")],
    neuron: Annotated[int, typer.Option(help="From 0.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text, each a type with a rate of its own; repeatable. Default: both "
            "halves of the Python language reference."
        ),
    ] = None,
    snippets: Annotated[int, typer.Option(min=1, help="The strongest, to show.")] = 10,
    context: ContextOption = 1024,
    windows: Annotated[
        int | None,
        typer.Option(help="The first N windows of each text; default: 8, or all of fewer."),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Ask an OpenAI-compatible server for an explanation and score it; "
            "http://127.0.0.1:8080/v1 is fallow serve. Key: FALLOW_API_KEY or OPENAI_API_KEY.",
        ),
    ] = None,
    explain_model: Annotated[
        str | None, typer.Option(help="What the server calls its model.")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """What a neuron does: where it is active most, how often it fires, which tokens it raises."""
    if (explain is None) != (explain_model is None):
        raise UsageError("--explain and --explain-model, the model's name there, belong together")
    from fallow.reporting.explanation import RANDOM, STRONG, Endpoint, key_from_environment
    from fallow.reporting.explanation import explain as run_explain
    from fallow.reporting.neurons import examine

    endpoint = None
    if explain is not None and explain_model is not None:
        endpoint = Endpoint(explain, explain_model, key_from_environment())
    found = examine(
        load_model(model, dtype, device),
        [(layer, neuron)],
        list(dict.fromkeys(text)) if text else None,
        context=context,
        windows=windows,
        snippets=max(snippets, STRONG) if endpoint else snippets,
        random_snippets=RANDOM if endpoint else 0,
    )[0]
    explanation = None if endpoint is None else run_explain(found, endpoint).to_json()
    found.snippets = found.snippets[:snippets]
    result = found.to_json() | ({} if explanation is None else {"explanation": explanation})
    if as_json:
        print_json(result)
        return
    _print_neuron(result)


def _print_neuron(r: dict[str, Any]) -> None:
    print(f"{r['model']}, layer {r['layer']}, neuron {r['neuron']}")
    for rate in r["rates"]:
        print(
            f"  in a token's top half by out_norm on {rate['top_half']:.2%} of {rate['tokens']} "
            f"tokens, other than zero on {rate['natural']:.2%}: {rate['text']}"
        )
    for direction in ("raised", "lowered"):
        tokens = ", ".join(f"{t['token']!r} {t['logit']:+.3f}" for t in r[direction])
        print(f"  {direction} by one unit of inter: {tokens}")
    print("strongest snippets: out_norm, inter, and the token in its context")
    for s in r["snippets"]:
        peak = s["peak"]
        before, token, after = (
            _printable("".join(s["tokens"][part]))
            for part in (slice(0, peak), slice(peak, peak + 1), slice(peak + 1, None))
        )
        print(f"  {s['out_norm'][peak]:8.3f} {s['inter'][peak]:+9.3f}  {before}«{token}»{after}")
    if "explanation" in r:
        e = r["explanation"]
        score = f"score {e['score']:.3f}" if e["reason"] is None else f"no score: {e['reason']}"
        print(f"explanation by {e['model']}: {_printable(e['text'])}")
        print(f"  {score}, {e['scored_snippets']} of {e['held_out_snippets']} held-out snippets")


def _printable(text: str) -> str:
    """One line that no control character in it can disturb."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
