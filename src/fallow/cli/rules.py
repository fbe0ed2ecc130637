"""`fallow rules`: which rules and selectors there are."""

import textwrap

from fallow.cli._shared import JsonOption, app, print_json

_CUTS = {"inter": "neurons", "input": "inputs of projections", "experts": "experts"}


@app.command()
def rules(as_json: JsonOption = False) -> None:
    """List rules and selectors: what each cuts, its parameter, when it is known, and its paper."""
    from fallow.rules import RULES
    from fallow.selectors import SELECTORS, find

    found = {name: find(name) for name in (*RULES, *SELECTORS)}
    if as_json:
        keys = ("name", "where", "knob_name", "known", "paper", "options")
        print_json([{k: getattr(r, k) for k in keys} for r in found.values()])
        return
    for title, names in (("Rules", RULES), ("Selectors, which predict", SELECTORS)):
        print(f"{title}\n")
        for rule in (found[name] for name in names):
            print(":".join([rule.name, *(f"{k}={v}" for k, v in rule.options.items())]))
            for label, value in (
                ("cuts", _CUTS[rule.where]),
                ("parameter", rule.knob_name),
                ("known", rule.known),
                ("paper", rule.paper),
            ):
                indent = " " * 13
                print(
                    textwrap.fill(
                        value, 80, initial_indent=f"  {label:11}", subsequent_indent=indent
                    )
                )
            print()
