"""`fallow models`: which models have a short name."""

from fallow.cli._shared import JsonOption, app, print_json


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
