"""What MkDocs does besides Markdown: pages made from the code, and figures from benchmarks/."""

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

ROOT = Path(__file__).parent.parent
# Pages of results show figures of benchmarks/results, which is beside docs/ and not in it.
FIGURES = re.compile(r"\.\./\.\./(benchmarks/results/[^)\s]+\.(?:svg|png))")


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "commands.md", content=commands_page()))
    wanted = {
        figure
        for page in files.documentation_pages()
        if page.src_uri.startswith("results/")
        for figure in FIGURES.findall(page.content_string)
    }
    for figure in sorted(wanted):
        files.append(File.generated(config, figure, abs_src_path=str(ROOT / figure)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return FIGURES.sub(r"../\1", markdown)


def commands_page() -> str:
    """The reference of all commands, Markdown, as Typer writes it."""
    from fallow.cli import app

    group = typer.main.get_command(app)
    _tell_all(group)
    return get_docs_for_click(obj=group, ctx=typer.Context(group), name="fallow", title="Commands")


def _tell_all(command: Any) -> None:
    """Lists of commands then have the whole first sentence, not its first 45 characters."""
    for inner in getattr(command, "commands", {}).values():
        inner.short_help = inner.help
        _tell_all(inner)
