"""The README's first picture and table: decode beside the fastest peer, dense and skipping neurons.

Measures nothing: it takes one processor's runs of benchmarks/engine.py, so that picture, table and
docs/results/engine.md say the same:

    python benchmarks/first_screen.py         # writes docs/speed.svg and the README's table
"""

import statistics
from html import escape
from typing import Any

import engine
from tradeoff import ROOT, machine_line, processors, update_readme

PROCESSOR = "amd-epyc-family-25-model-17-stepping-1"
MODELS = {
    "smollm2": "SmolLM2-135M",
    "gemma3": "Gemma-3-270M",
    "qwen2.5-1.5b": "Qwen2.5-Coder-1.5B",
}
# What leaves out neurons, the best that there is first; named as the table has it.
SPARSE = {"plan": "`fallow optimize`", "topk": "`topk` at 50 %"}
PICTURE = ROOT / "docs" / "speed.svg"

# Of three greys that differ, where there is no colour, and written on in ink that is legible there.
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1d1c1a }
.name { font-weight: 600 } .small { font-size: 13px; fill: #57534b }
.back { fill: #fbfaf7 } .spread { stroke: #1d1c1a; stroke-width: 1.5 }
.halo { stroke: #fbfaf7; stroke-width: 4 }
.peer { fill: #d8d4ca } .dense { fill: #e2a06e } .sparse { fill: #963a0c } .on { fill: #fff }
@media (prefers-color-scheme: dark) {
text { fill: #eceae6 } .small { fill: #b3afa7 }
.back { fill: #1a1c1f } .spread { stroke: #eceae6 } .halo { stroke: #1a1c1f }
.peer { fill: #4a4d53 } .dense { fill: #a86335 } .sparse { fill: #f5b074 } .on { fill: #1d1208 }
}
"""
WIDTH, LEFT, LENGTH, BAR, ROW, GAP = 680, 150, 400, 24, 31, 22  # px


def runs() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Model, what was measured and where, as MODELS has them; what was not measured is left out."""
    found = {
        name: (name, result, machine)
        for name, where, result, machine in engine.results()
        if where == PROCESSOR
    }
    return [found[name] for name in MODELS if name in found]


def sparse(result: dict[str, Any]) -> str | None:
    """Which of SPARSE was timed and has a PPL; None: none was."""
    known = result.get("quality", {})
    return next((name for name in SPARSE if name in result["runs"] and name in known), None)


def bars(result: dict[str, Any]) -> list[tuple[str, str, list[float], str]]:
    """Kind, label, tok/s of every turn and what is written on the bar; no turns: not measured."""
    speeds = {name: [r["decode_tps"] for r in found] for name, found in result["runs"].items()}
    peer, skipping = engine.fastest_peer(result["runs"]), sparse(result)
    cost = ""
    if skipping:
        decode = result["quality"][skipping]["decode"]
        cost = f"PPL {decode['ppl_change_percent']:+.1f} ± {decode['ppl_change_se'] or 0:.1f} %"
    return [
        ("peer", peer or "other engine", speeds.get(peer or "", []), ""),
        ("dense", "fallow dense", speeds["dense"], ""),
        ("sparse", "fallow sparse", speeds.get(skipping or "", []), cost),
    ]


def picture() -> str:
    """An SVG of it, which has its own ground, so that it is legible on any page."""
    found, parts, y = runs(), [], 18
    for name, result, _ in found:
        parts.append(f'<text class="name" x="16" y="{y + 14}">{MODELS[name]}</text>')
        y += ROW - 6
        rows = bars(result)
        longest = max(max(turns) for _, _, turns, _ in rows if turns)
        for kind, label, turns, cost in rows:
            parts += _bar(kind, label, turns, cost, y, LENGTH / longest)
            y += ROW
        y += GAP
    for line in _notes([machine for *_, machine in found]):
        parts.append(f'<text class="small" x="16" y="{y + 6}">{escape(line)}</text>')
        y += 20
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 4}" role="img" '
        f'aria-label="{escape(alternative())}">\n<style>{STYLE}</style>\n'
        f'<rect class="back" width="{WIDTH}" height="{y + 4}" rx="12"/>\n{body}\n</svg>\n'
    )


def _bar(
    kind: str, label: str, turns: list[float], cost: str, y: int, per_token: float
) -> list[str]:
    middle, base = y + BAR / 2, y + BAR / 2 + 5
    lines = [f'<text x="16" y="{base}">{label}</text>']
    if not turns:
        return [*lines, f'<text class="small" x="{LEFT}" y="{base}">not measured here</text>']
    median, low, high = (f(turns) for f in (statistics.median, min, max))
    ends = [f"{LEFT + per_token * value:.1f}" for value in (low, high)]
    spread = f"M{ends[0]} {middle}H{ends[1]}"
    spread += "".join(f"M{end} {y + 7}V{y + BAR - 7}" for end in ends)
    lines.append(
        f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{per_token * median:.1f}" '
        f'height="{BAR}" rx="3"/>'
    )
    if cost:
        lines.append(f'<text class="on" x="{LEFT + 10}" y="{base}">{cost}</text>')
    lines += [f'<path class="{kind}" d="{spread}"/>' for kind in ("halo", "spread")]
    lines.append(f'<text x="{LEFT + LENGTH + 14}" y="{base}">{median:.1f} tok/s</text>')
    return lines


def _notes(machines: list[dict[str, Any]]) -> list[str]:
    where = f"{', '.join(processors(*machines))}, {machines[0]['threads']} threads, 4-bit weights."
    return [
        f"{where} PPL: against dense, token by token.",
        "Bars: medians of five turns; lines: slowest to fastest. Each model has its own scale.",
    ]


def alternative() -> str:
    """The picture in words, for those who do not see it."""
    told = []
    for name, result, _ in runs():
        rows = [
            f"{label} {statistics.median(turns):.1f}{f' ({cost})' if cost else ''}"
            for _, label, turns, cost in bars(result)
            if turns
        ]
        told.append(f"{MODELS[name]}: {', '.join(rows)}")
    return f"Decode, tok/s. {'; '.join(told)}."


def summary() -> str:
    """The picture and, of the same runs, the table under it."""
    found = runs()
    lines = [
        f"![{alternative()}](docs/speed.svg)\n",
        "| decode | engine gain, over llama.cpp | over the fastest other engine "
        "| sparsity gain, over dense | by | PPL change %: in blocks; token by token |",
        "|---|---|---|---|---|---|",
    ]
    for name, result, _ in found:
        timed, skipping = result["runs"], sparse(result)
        others = ("llama.cpp", engine.fastest_peer(timed))
        cells = [engine.ratio(timed, "dense", o) if o in timed else "not run" for o in others]
        if skipping:
            quality = result["quality"][skipping]
            costs = f"{engine.change(quality['blocks'])}; {engine.change(quality['decode'])}"
            by = SPARSE[skipping]
            if skipping == "plan" and "shortlist" in timed:
                alone = statistics.median(engine.ratios(timed, "shortlist", "dense"))
                by += f", {alone:.2f} by its shortlist alone"
            cells += [engine.ratio(timed, skipping, "dense"), by, costs]
        else:
            cells += ["not run", "", ""]
        lines.append(f"| {MODELS[name]} | {' | '.join(cells)} |")
    return (
        "\n".join(lines)
        + f"\n\n{machine_line(*(machine for *_, machine in found))}. Ratios are medians of five "
        "turns, lowest and highest in brackets; PPL is against dense ([all figures]"
        "(docs/results/engine.md))."
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
    update_readme("speed", summary())
