"""What MkDocs does besides Markdown: pages made from the code, and figures from benchmarks/."""

import inspect
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

import fallow

ROOT = Path(__file__).parent.parent
# Pages of results show figures of benchmarks/results, which is beside docs/ and not in it.
FIGURES = re.compile(r"\.\./\.\./(benchmarks/results/[^)\s]+\.(?:svg|png))")
REFERENCE = "<!-- reference -->"  # where docs/python.md has it
LINE = 88  # a signature that is longer has a line per parameter


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
    if page.file.src_uri == "python.md":
        return markdown.replace(REFERENCE, python_reference())
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


def python_reference() -> str:
    """Signatures and docstrings of all public names, Markdown; functions before classes."""
    public = {name: getattr(fallow, name) for name in fallow.__all__}
    parts: list[str] = []
    for is_class in (False, True):
        for name, value in public.items():
            if inspect.isclass(value) == is_class:
                parts += [f"## {name}", *_documented(f"fallow.{name}", value)]
                parts += _methods(value) if is_class else []
    return "\n\n".join(parts)


def _methods(owner: type) -> list[str]:
    """Those that are public and have a docstring."""
    parts = []
    for name, value in vars(owner).items():
        method = value.__func__ if isinstance(value, classmethod) else value
        if name[0] != "_" and inspect.isfunction(method) and method.__doc__:
            parts += [f"### {owner.__name__}.{name}", *_documented(name, method)]
    return parts


def _documented(name: str, value: Any) -> list[str]:
    signature = "" if _is_error(value) else _signature(name, value)
    code = [f"```python\n{signature}\n```"] if signature else []
    return [*code, _docstring(inspect.getdoc(value) or "")]


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _signature(name: str, value: Any) -> str:
    """On one line, or a line per parameter; types without their modules."""
    found = inspect.signature(value)
    parameters = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    rows = [str(parameter) for parameter in parameters]
    if any(p.kind is p.KEYWORD_ONLY for p in parameters):
        rows.insert([p.kind is p.KEYWORD_ONLY for p in parameters].index(True), "*")
    _, arrow, returns = str(found).rpartition(" -> ")
    end = arrow + returns if arrow else ""
    line = f"{name}({', '.join(rows)}){end}"
    if len(line) > LINE:
        line = f"{name}(\n    " + ",\n    ".join(rows) + f",\n){end}"
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", line)


def _docstring(text: str) -> str:
    """Markdown of a docstring: its sections (Args, Returns, Raises) become lists."""
    lines: list[str] = []
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises):", line):
            lines += [f"**{line[:-1]}**", ""]
        elif re.match(r"    (?=\S)[\w, ]+: ", line):
            name, _, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}")
        else:
            lines.append(line.strip())
    return "\n".join(lines)
