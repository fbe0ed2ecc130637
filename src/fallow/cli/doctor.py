"""`fallow doctor`: what this machine is, and what makes fallow slower on it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fallow.cli._shared import JsonOption, app, print_json


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Whose disk is timed.")] = Path("."),
    as_json: JsonOption = False,
) -> None:
    """Look at processor, memory, disk and packages, and warn of what makes fallow slower."""
    from fallow.measure.machine import examine

    found = examine(folder)
    if as_json:
        print_json(found)
    else:
        _print_examination(found)


def _print_examination(r: dict[str, Any]) -> None:
    cpu, count, ram, speed = r["processor"], r["cores"], r["memory"], r["bandwidth_gbps"]
    quota = "" if count["cgroup"] is None else f", {count['cgroup']:g} by its cgroup"
    limit = "" if ram["cgroup"] is None else f", its cgroup allows {ram['cgroup'] / 1e9:.1f} GB"
    disk = r["disk"]["error"] or f"{r['disk']['gbps']:.2f} GB/s"
    models = ", ".join(name for name, is_here in r["models"].items() if is_here)
    lacks = cpu["better_kernels_lack"]
    better = [f"not {name}, for want of {', '.join(lacks[name])}" for name in lacks]
    lines = {
        "fallow": f"{r['fallow']}, Python {r['python']}, {r['system']}",
        "processor": f"{cpu['name']}, {cpu['architecture']}",
        "kernels": "; ".join([cpu["kernels"], *better]),
        "cores": f"{count['machine']}, {count['affinity']} for this process{quota}",
        "memory": f"{ram['total'] / 1e9:.1f} GB, {ram['available'] / 1e9:.1f} available{limit}",
        "reads memory": f"{speed['one_thread']:.1f} GB/s with one thread, "
        f"{speed['all_threads']:.1f} with {speed['threads']}",
        "reads disk": f"{disk}, {r['disk']['folder']}",
        "numpy": f"{r['numpy']['version']}, {r['numpy']['blas'] or 'no BLAS'}",
        "torch": "none" if r["torch"] is None else f"{r['torch']} threads",
        "models": models or "none; see: fallow models",
    }
    for name, value in lines.items():
        print(f"{name:13} {value}")
    for extra, packages in r["extras"].items():
        said = ", ".join(f"{name} {version or '(missing)'}" for name, version in packages.items())
        print(f"[{extra}]".ljust(13), said)
    for warning in r["warnings"]:
        print(f"warning: {warning}")
