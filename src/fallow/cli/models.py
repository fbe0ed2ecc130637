"""`fallow models`: which models have a short name. `fallow cache`: which were packed once."""

from typing import Annotated

import typer

from fallow.cli._shared import JsonOption, app, print_json

cache_app = typer.Typer(help="Packed copies of models that were run by name.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the aliases, where their files are, and how to install them."""
    from fallow.checkpoints.catalog import ALIASES, find_pieces, locate

    found = []
    for alias in ALIASES.values():
        path = locate(alias)
        found.append(
            {
                "alias": alias.name,
                "description": alias.description,
                "path": None if path is None else str(path),
                "installed": find_pieces(alias) is not None,
                "install": alias.install_command,
                "sha256": alias.sha256,
            }
        )
    if as_json:
        print_json(found)
        return
    for entry in found:
        print(f"{entry['alias']}: {entry['description']}")
        print(f"  {entry['path'] or 'not installed'}")
        print(f"  {entry['install']}")


@cache_app.command("list")
def cache_list(as_json: JsonOption = False) -> None:
    """List the copies by their last use: name, size, when."""
    from datetime import datetime

    from fallow.packing.cache import entries

    found = entries()
    if as_json:
        print_json([entry._asdict() | {"path": str(entry.path)} for entry in found])
        return
    for entry in found:
        used = f"{datetime.fromtimestamp(entry.last_used):%Y-%m-%d %H:%M}"
        print(f"{entry.name:44} {entry.size / 1e6:8.0f} MB  {used}")


@cache_app.command("clear")
def cache_clear(
    name: Annotated[
        str | None, typer.Argument(help="Of a copy, or of a model: all of it; default: everything.")
    ] = None,
) -> None:
    """Delete copies; they are made anew when they are needed."""
    from fallow.packing.cache import clear

    found = clear(name)
    print(f"deleted: {len(found)} files, {sum(entry.size for entry in found) / 1e6:.0f} MB")
