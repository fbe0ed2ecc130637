"""Measured parts as sections of figures: Plotly's own JSON, which the page's script draws."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from fallow.calibration.tradeoff import target_label
from fallow.common.tables import plus_minus
from fallow.reporting.results import Results

DEPTH = ["#2563b0", "#f5b36b"]  # from the first layer to the last: in grey, too
COLORS = ["#2f7fd6", "#e8772e", "#2e9e6b", "#b05ccc", "#c9a227", "#d64550", "#5f7a8a"]
GREY = "#888888"  # of lines, on light and dark
ONE_PERCENT = 1.0
NOT_TIMED = "no speed was measured"
LEAST_ZEROS = 0.001  # of a tensor besides inter that is worth a figure
_MARGIN = {"l": 54, "r": 12, "t": 10, "b": 46}
_WHERE = {
    "inter": "neuron sparsity",
    "input": "input sparsity",
    "experts": "experts left out",
}


@dataclass
class Block:
    """A figure, or something the template draws by its `kind` from `data`.

    `variants` are plots by name, of which a menu labelled `choice` shows one name's; all have the
    same number of plots.
    """

    title: str
    note: str
    command: str
    kind: str = "plot"  # or card, tokens, neurons, table, choosing
    choice: str = ""
    variants: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    data: Any = None

    @property
    def content(self) -> dict[str, Any]:
        """What is embedded: drawn, and downloaded."""
        return {
            "title": self.title,
            "command": self.command,
            "variants": self.variants,
            "data": self.data,
        }


@dataclass
class Section:
    title: str
    note: str
    blocks: list[Block]


def card_section(card: dict[str, Any], dense: dict[str, Any], command: str) -> Section:
    """`dense` is the trade-off table's first row."""
    facts = {
        "model": card["model"],
        "fingerprint": card["fingerprint"],
        "architecture": f"{card['architecture']}, FFN {'' if card['gated'] else 'not '}gated",
        "layers": card["layers"],
        "hidden size": card["hidden_size"],
        "neurons per layer": card["intermediate_size"],
        "attention heads": card["attention_heads"],
        "vocabulary": card["vocabulary"],
        "longest context": f"{card['longest_context']} tokens",
        "computed in": card["dtype"],
        "weights": f"{card['weights'] / 1e6:.1f} million",
        "FFN share of weights": f"{card['ffn_weights'] / card['weights']:.1%}",
        "stored": f"{card['file_bytes'] / 1e6:.1f} MB",
        "FFN share of stored bytes": f"{card['ffn_bytes'] / card['file_bytes']:.1%}",
        "dense perplexity": plus_minus(dense["ppl"], dense["ppl_se"]),
    }
    block = Block("Model", "", command, kind="card", data={k: str(v) for k, v in facts.items()})
    return Section("Model card", "Perplexity with its standard error over windows.", [block])


def distribution_section(profile: dict[str, Any], command: str) -> Section:
    note = (
        "Magnitudes of activations on the text, and of weights, in one line per layer, from thin "
        "and blue (the first) to thick and orange (the last)."
    )
    histograms, cdfs, quantiles = {}, {}, {}
    for name, tensor in profile["tensors"].items():
        histograms[name] = [_histogram(tensor)]
        cdfs[name] = [_cdf(tensor)]
        quantiles[name] = [_quantiles(tensor)]
    return Section(
        "Distributions",
        note,
        [
            Block(
                "Histogram",
                "Share of a layer's values in each doubling of the magnitude. Zeros are left out.",
                command,
                choice="tensor",
                variants=histograms,
            ),
            Block(
                "Cumulative distribution",
                "Share of a layer's values that are no larger, zeros included.",
                command,
                choice="tensor",
                variants=cdfs,
            ),
            Block(
                "Quantiles by layer",
                "Magnitude at each quantile, on a scale of powers of ten.",
                command,
                choice="tensor",
                variants=quantiles,
            ),
        ],
    )


def natural_section(profile: dict[str, Any], command: str) -> Section:
    layers = profile["layers"]
    index = [row["layer"] for row in layers]
    shares = {
        "inter = 0": [row["zeros"]["inter"] for row in layers],
        "gate_act = 0": [row["zeros"]["gate_act"] for row in layers],
        **{
            f"|inter| ≤ {epsilon}": [row["inter_at_most"][epsilon] for row in layers]
            for epsilon in layers[0]["inter_at_most"]
        },
    }
    traces = [
        go.Scatter(x=index, y=_percent(values), name=name, mode="lines+markers", **_in_grey(i))
        for i, (name, values) in enumerate(shares.items())
    ]
    dead = go.Bar(x=index, y=[row["dead_neurons"] for row in layers], name="dead neurons")
    by_layer = {
        "zeros and small values": [_plot(traces, "layer", "share of values, %")],
        "dead neurons": [_plot([dead], "layer", "neurons active on < 0.1 % of tokens")],
    }
    for (plot,) in by_layer.values():
        plot["layout"]["yaxis"] |= {"rangemode": "nonnegative"}
    firing = {
        label: [
            _plot(
                [
                    go.Scatter(
                        x=_percent(row[key]["rank"]),
                        y=_percent(row[key]["value"]),
                        name=f"layer {row['layer']}",
                        mode="lines",
                        line=_in_grey(i)["line"],
                    )
                    for i, row in enumerate(profile["firing"])
                ],
                "neurons by rank, %",
                "share of tokens, %",
            )
        ]
        for label, key in (("in a token's top half", "top_half"), ("other than zero", "natural"))
    }
    note = (
        f"The dense model, nothing cut: {profile['natural_sparsity']:.2%} of inter is exactly zero "
        f"on {profile['tokens']} tokens."
    )
    return Section(
        "Natural sparsity",
        note,
        [
            Block("Zeros by layer", "", command, choice="show", variants=by_layer),
            Block(
                "Firing frequency",
                "How often neurons fire, the most frequent first. A token's top half are the "
                "neurons whose out_norm is above its median; other than zero is out_norm ≥ 1e-7.",
                command,
                choice="fires if",
                variants=firing,
            ),
        ],
    )


def tradeoff_section(
    table: list[dict[str, Any]], timed: list[dict[str, Any]], command: str
) -> Section:
    """`timed`: of `timed_points`."""
    rows, variants, best = table[1:], {}, {}
    kinds = [w for w in _WHERE if any(r["where"] == w for r in rows)]
    for where in kinds:
        own = [row for row in rows if row["where"] == where]
        prefix = f"{_WHERE[where]}: " if len(kinds) > 1 else ""
        for label, key, error, axis in (
            ("PPL change up to +10 %", "ppl_change_percent", "ppl_change_se", _up_to_ten(own)),
            ("PPL over dense, all of it", "ppl_change_percent", "ppl_change_se", {"type": "log"}),
            ("KL to dense", "kl_to_dense", "kl_se", {"type": "log"}),
        ):
            ratio = axis.get("type") == "log" and key == "ppl_change_percent"
            traces = [
                _tradeoff_line([row for row in own if row["rule"] == rule], key, error, i, ratio)
                for i, rule in enumerate(dict.fromkeys(row["rule"] for row in own))
            ]
            points = [row for row in timed if row["where"] == where]
            if points and key == "ppl_change_percent":
                traces.append(_timed_marks(points, ratio))
            title = "KL, nats per token" if key == "kl_to_dense" else "PPL change, %"
            title = "PPL / dense PPL" if ratio else title
            plot = _plot(traces, f"{_WHERE[where]}, %", title, yaxis=axis, showlegend=True)
            plot["layout"]["xaxis"] |= {"rangemode": "tozero"}
            if key == "ppl_change_percent":
                plot["layout"]["shapes"] = [_line_at(1.01 if ratio else ONE_PERCENT)]
            variants[prefix + label] = [plot]
            told = [row | {"speed": None} for row in front(own) if not _is_in(row, points)]
            ordered = sorted([*told, *points], key=lambda row: row["achieved_sparsity"])
            best[prefix + label] = [_told_row(row) for row in ordered]
    note = (
        f"Against the dense model on {table[0]['windows']} windows, with paired standard errors. "
        "The dotted line is +1 %. The slider goes through the rows that no other beats in both"
    )
    note += (
        ", and through what was timed in the engine, the stars."
        if timed
        else f"; {NOT_TIMED} for any of them. --results takes what fallow bench and optimize find."
    )
    block = Block("Sparsity against quality", note, command, "choosing", "show", variants, best)
    return Section("Trade-off", "What it costs to leave neurons inactive.", [block])


def front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in both sparsity and PPL, densest first."""
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda r: (-r["achieved_sparsity"], r["ppl_change_percent"])):
        if not found or row["ppl_change_percent"] < found[-1]["ppl_change_percent"]:
            found.append(row)
    return found[::-1]


def _told_row(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row of the trade-off: its place in a figure, and what the slider says of it."""
    change = plus_minus(row["ppl_change_percent"], row["ppl_change_se"], sign="+")
    text = f"{_row_name(row)}: {row['achieved_sparsity']:.1%} inactive, PPL {change} %"
    if "kl_to_dense" in row:
        text += f", KL {row['kl_to_dense']:.3g} nats"
    if "of" in row:
        text += f" on {row['of']}"
    if "ffn_bytes" in row:
        text += f", {row['ffn_bytes']:.2f} of the FFN's bytes"
    text += f"; {row['speed'] or NOT_TIMED}"
    x = round(100 * row["achieved_sparsity"], 3)
    return {"text": text, "x": x, "change": row["ppl_change_percent"]}


def timed_points(
    fingerprint: str,
    table: list[dict[str, Any]],
    plans: Sequence[tuple[str, dict[str, Any]]],
    results: Results,
) -> list[dict[str, Any]]:
    """Like rows of the trade-off, those of which `results` hold a speed, each with its "speed".

    Of the table, of the plans that are shown, of what `fallow optimize` found, and of no plan.
    """
    rows = [row for row in table[1:] if row["plan_sha256"] is not None]
    rows += [_plan_row(name, plan) for name, plan in plans]
    none = {"rule": "no plan", "where": "inter", "achieved_sparsity": 0.0}
    rows += [none | {"ppl_change_percent": 0.0, "ppl_change_se": None, "plan_sha256": None}]
    for timing in results.optimized(fingerprint):
        rows.append({**(timing.found or {}), "plan_sha256": timing.plan_sha256})
    told = [row | {"speed": results.told_of(fingerprint, row["plan_sha256"])} for row in rows]
    return [row for row in told if row["speed"]]


def _plan_row(name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """A plan as a row of the trade-off."""
    kept = ("where", "ppl_change_percent", "ppl_change_se", "plan_sha256")
    return {k: plan[k] for k in kept} | {"rule": name, "achieved_sparsity": plan["sparsity"]}


def _row_name(row: dict[str, Any]) -> str:
    return f"{row['rule']} at {target_label(row)}" if "target_sparsity" in row else row["rule"]


def side_by_side(
    found: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]], command: str
) -> Section:
    """A table of models, and their fronts in one figure, of main figures and trade-off tables."""
    traces, rows = [], []
    for i, (figures, table) in enumerate(found):
        # One kind of sparsity is no measure of another.
        best = front([row for row in table[1:] if row["where"] == table[1]["where"]])
        traces.append(_tradeoff_line(best, "ppl_change_percent", "ppl_change_se", i, False))
        traces[-1].name = plain(figures["model"])
        traces[-1].customdata = [f"{row['rule']} at {target_label(row)}" for row in best]
        traces[-1].hovertemplate = "%{customdata}: %{x} %, PPL %{y} %"
        rows.append(
            {
                "model": figures["model"],
                "dense PPL": plus_minus(figures["ppl"], figures["ppl_se"]),
                "zero as it is": f"{figures['natural_sparsity']:.1%}",
                "plan": figures["rule"],
                "inactive under it": f"{figures['sparsity']:.1%}",
                "PPL change, %": _change(figures),
            }
        )
    plot = _plot(traces, "inactive, %", "PPL change, %", showlegend=True)
    plot["layout"]["yaxis"] |= _up_to_ten([row for _, table in found for row in table[1:]])
    plot["layout"]["xaxis"] |= {"rangemode": "tozero"}
    plot["layout"]["shapes"] = [_line_at(ONE_PERCENT)]
    note = "Of every model the rows of its trade-off that no other beats. The dotted line is +1 %."
    block = Block("Models", note, command, variants={"": [plot]}, data=rows, kind="table")
    return Section("Side by side", "", [block])


def plans_side_by_side(
    plans: Sequence[tuple[str, dict[str, Any]]],
    table: list[dict[str, Any]],
    timed: list[dict[str, Any]],
    command: str,
) -> Section:
    """A table of plans by their names, where they lie in the trade-off, and their layers."""
    speeds = {row["plan_sha256"]: row["speed"] for row in timed}
    rows = [
        {
            "plan": name,
            "inactive": f"{plan['sparsity']:.1%}",
            "PPL change, %": _change(plan),
            "speed": speeds.get(plan["plan_sha256"], NOT_TIMED),
            "rule": plan["rule"],
            "parameter": f"{plan['knob']:.4g}",
            "cut": _WHERE[plan["where"]],
        }
        for name, plan in plans
    ]
    places = {}
    for where in dict.fromkeys(plan["where"] for _, plan in plans):
        best = [front([row for row in table[1:] if row["where"] == where])]
        own = [[_plan_row(name, plan)] for name, plan in plans if plan["where"] == where]
        shown = [*filter(None, best), *own]
        traces = [
            _tradeoff_line(each, "ppl_change_percent", "ppl_change_se", i, False)
            for i, each in enumerate(shown)
        ]
        for trace, each in zip(traces, shown, strict=True):
            trace.name = "best of the trade-off" if each is best[0] else plain(each[0]["rule"])
            trace.marker.size = 7 if each is best[0] else 13
        plot = _plot(traces, f"{_WHERE[where]}, %", "PPL change, %", showlegend=True)
        plot["layout"]["yaxis"] |= _up_to_ten([row for each in shown for row in each])
        plot["layout"]["xaxis"] |= {"rangemode": "tozero"}
        plot["layout"]["shapes"] = [_line_at(ONE_PERCENT)]
        places[_WHERE[where]] = [plot]
    layers = {}
    for tap in _shown_taps([plan for _, plan in plans]):
        traces = [
            go.Scatter(
                x=list(range(len(plan["per_layer"][tap]))),
                y=_percent(layer["mean"] for layer in plan["per_layer"][tap]),
                name=plain(name),
                mode="lines+markers",
                **_in_grey(i),
            )
            for i, (name, plan) in enumerate(plans)
            if tap in plan["per_layer"]
        ]
        layers[tap] = [_plot(traces, "layer", "zero, %", showlegend=True)]
        layers[tap][0]["layout"]["yaxis"] |= {"rangemode": "tozero"}
    note = "The line is what no other row of the trade-off beats, and the dotted one +1 %."
    return Section(
        "Plans side by side",
        "",
        [
            Block("Plans", note, command, "table", "show", places, rows),
            Block(
                "Layer by layer",
                "Share of values that are zero under each plan, mean of tokens.",
                command,
                choice="tensor",
                variants=layers,
            ),
        ],
    )


def _change(figures: dict[str, Any]) -> str:
    return plus_minus(figures["ppl_change_percent"], figures["ppl_change_se"], sign="+")


def _shown_taps(plans: Sequence[dict[str, Any]]) -> list[str]:
    """Tensors that have zeros under one of the plans; `inter`, which comes first, in any case."""
    zeros = {"inter": 1.0}
    for tap, layers in ((t, found) for plan in plans for t, found in plan["per_layer"].items()):
        zeros[tap] = max(zeros.get(tap, 0.0), *(layer["mean"] for layer in layers))
    shown = [tap for tap, most in zeros.items() if most >= LEAST_ZEROS]
    return [tap for tap in shown if any(tap in plan["per_layer"] for plan in plans)]


def plan_section(name: str, plan: dict[str, Any], command: str) -> Section:
    """`name`: of one of several plans; "": it is the only one."""
    variants = {tap: [_layer_bars(plan["per_layer"][tap])] for tap in _shown_taps([plan])}
    change = plus_minus(plan["ppl_change_percent"], plan["ppl_change_se"])
    origin = (
        "The plan that was given"
        if plan["given"]
        else f"An example, calibrated for +{plan['target_ppl_increase']:g} % PPL at most"
    )
    note = (
        f"{origin}: rule {plan['rule']}, parameter {plan['knob']:.4g}. Mean sparsity "
        f"{plan['sparsity']:.1%}, PPL {change} % against dense."
    )
    block = Block(
        "Sparsity by layer",
        "Share of values that are zero; lines reach from the 5th to the 95th percentile of tokens.",
        command,
        choice="tensor",
        variants=variants,
    )
    return Section(f"Plan {name}" if name else "A plan", note, [block])


def sample_section(sample: dict[str, Any], layers: int, command: str) -> Section:
    base = _plot([go.Bar(x=list(range(layers)), y=[0.0] * layers)], "layer", "active, %")
    base["layout"]["yaxis"]["range"] = [0, 100]
    cut = sample["all_tokens"] - len(sample["tokens"])
    note = (
        f"The text is {sample['text']}. Colour is a token's activation ratio under the plan: the "
        "share of neurons that stay active, mean of layers. Point at a token, or tap it, for its "
        "layers." + (f" The last {cut} tokens are left out." if cut else "")
    )
    means = [sum(ratios) / len(ratios) for ratios in sample["active"]]
    block = Block(
        "Activation ratio by token",
        "",
        command,
        kind="tokens",
        variants={"": [base]},
        data={"tokens": sample["tokens"], "active": sample["active"], "mean": means},
    )
    return Section("Tokens", note, [block])


def comparison_section(found: dict[str, Any], command: str) -> Section:
    layers = len(found["agreement"])
    maps = {
        f"layer {i}": [
            _pattern_map(found["groups"][which][i], found["tokens"][which]) for which in (0, 1)
        ]
        for i in range(layers)
    }
    before = next((i for i, same in enumerate(found["same"]) if not same), len(found["same"]))
    note = (
        f"1: {found['texts'][0]}\n2: {found['texts'][1]}\nTokens before the first difference (here "
        f"{before}) agree by construction, as attention looks back only."
    )
    return Section(
        "Two similar inputs",
        note,
        [
            Block(
                "Patterns side by side",
                f"Active share under the plan of {len(found['groups'][0][0])} runs of the "
                f"{found['neurons']} neurons, token by token.",
                command,
                choice="show",
                variants=maps,
                data={"texts": found["texts"], "tokens": found["tokens"]},
            ),
            Block(
                "Agreement by token",
                "Share of neurons that are active in both texts or inactive in both. The dotted "
                "line is what tokens at different places share.",
                command,
                choice="show",
                variants=_agreement(found),
                data={k: found[k] for k in ("tokens", "pairs", "same", "jaccard", "unrelated")},
            ),
        ],
    )


def results_section(bars: dict[str, list[dict[str, Any]]], command: str) -> Section:
    variants = {name: [_result_bars(of_metric, name)] for name, of_metric in bars.items()}
    block = Block(
        "Packed models",
        "As measured by fallow bench and fallow optimize; lines span the runs.",
        command,
        choice="show",
        variants=variants,
    )
    return Section("Speed and memory", "", [block])


def neurons_section(neurons: list[dict[str, Any]], command: str) -> Section:
    note = (
        "Neurons of the first, the middle and the last layer, chosen by how often they are in a "
        "token's top half by out_norm. The dense model."
    )
    block = Block(
        "Most frequent, middle, rarest",
        "A token's colour is out_norm over the largest shown. Raised and lowered are the tokens "
        "whose logits move most with inter, by the plain product of output and head, without the "
        "norms between; where inter is negative the two change places.",
        command,
        kind="neurons",
        data=neurons,
    )
    return Section("Neurons", note, [block])


# Plots -------------------------------------------------------------------------------------------


def _plot(
    traces: Sequence[Any], x_title: str, y_title: str, height: int = 330, **layout: Any
) -> dict[str, Any]:
    """Traces and axes as Plotly's JSON; colours of text and grid are the page's."""
    several = len(traces) > 1
    shown = {
        "height": height,
        "margin": _MARGIN,
        "colorway": COLORS,
        "showlegend": several and traces[0].name is not None,
        "legend": {"orientation": "h", "y": -0.3},
        "xaxis": {"title": {"text": x_title}},
    }
    shown |= layout | {"yaxis": {"title": {"text": y_title}} | layout.get("yaxis", {})}
    # A Figure would check the default template, too: nine tenths of its time.
    return {
        "data": [trace.to_plotly_json() for trace in traces],
        "layout": go.Layout(shown).to_plotly_json(),
    }


def _by_depth(rows: Sequence[Any], x: list[float], name: str) -> list[Any]:
    """A line per layer, whose colour and width tell its depth."""
    depths = [i / max(len(rows) - 1, 1) for i in range(len(rows))]
    colors = sample_colorscale(DEPTH, depths)
    return [
        go.Scatter(
            x=x,
            y=_percent(row),
            mode="lines",
            line={"color": color, "width": 1 + 2 * depth},
            name=f"layer {i}",
            hovertemplate=f"layer {i}: %{{y}} % {name} %{{x}}<extra></extra>",
        )
        for i, (row, depth, color) in enumerate(zip(rows, depths, colors, strict=True))
    ]


_MAGNITUDES = {"type": "log", "exponentformat": "power", "dtick": 1}


def _histogram(tensor: dict[str, Any]) -> dict[str, Any]:
    middle = [float(f"{low * 2**0.5:.4g}") for low in tensor["low"]]
    traces = _by_depth(tensor["share"], middle, "near")
    plot = _plot(traces, "magnitude", "share of values, %", showlegend=False)
    plot["layout"]["xaxis"] |= _MAGNITUDES
    return plot


def _cdf(tensor: dict[str, Any]) -> dict[str, Any]:
    edges = [*tensor["low"], 2 * tensor["low"][-1]]
    rows = []
    for below, shares in zip(tensor["below"], tensor["share"], strict=True):
        row = [below]
        for share in shares:
            row.append(row[-1] + share)
        rows.append([round(value, 5) for value in row])
    plot = _plot(_by_depth(rows, edges, "up to"), "magnitude", "no larger, %", showlegend=False)
    plot["layout"]["xaxis"] |= _MAGNITUDES
    return plot


def _quantiles(tensor: dict[str, Any]) -> dict[str, Any]:
    rows = tensor["quantiles"]
    names = [f"{100 * float(q):g} %" for q in rows[0]]
    values = [list(row.values()) for row in rows]
    heat = go.Heatmap(
        x=names,
        y=list(range(len(rows))),
        z=[[_log10(v) for v in row] for row in values],
        text=[[f"{v:.4g}" for v in row] for row in values],
        hovertemplate="layer %{y}, %{x}: %{text}<extra></extra>",
        colorscale="Viridis",
        colorbar={"thickness": 10, "tickprefix": "1e", "dtick": 1},
    )
    plot = _plot([heat], "quantile", "layer", height=_map_height(len(rows)))
    plot["layout"]["xaxis"]["type"] = "category"
    return plot


# Lines that are told apart without their colours.
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")


def _tradeoff_line(
    rows: list[dict[str, Any]], key: str, error: str, index: int, ratio: bool
) -> Any:
    """The line of a rule, the index-th; changes in percent as ratios, if asked for."""
    rows = sorted(rows, key=lambda row: row["achieved_sparsity"])
    scale, base = (0.01, 1.0) if ratio else (1.0, 0.0)
    return go.Scatter(
        x=_percent(row["achieved_sparsity"] for row in rows),
        y=[float(f"{base + scale * row[key]:.5g}") for row in rows],
        error_y={
            "type": "data",
            "array": [float(f"{scale * (row[error] or 0):.4g}") for row in rows],
        },
        mode="lines+markers",
        name=rows[0]["rule"],
        **_in_grey(index),
    )


def _in_grey(index: int) -> dict[str, Any]:
    """Dash and marker of the index-th line."""
    return {
        "line": {"dash": _DASHES[index % len(_DASHES)]},
        "marker": {"symbol": _MARKERS[index % len(_MARKERS)], "size": 8},
    }


def _timed_marks(points: list[dict[str, Any]], ratio: bool) -> Any:
    """Where speeds were measured; changes in percent as ratios, if asked for."""
    marks = _tradeoff_line(points, "ppl_change_percent", "ppl_change_se", 0, ratio)
    ordered = sorted(points, key=lambda row: row["achieved_sparsity"])
    marks.mode, marks.name, marks.cliponaxis = "markers", "timed", False
    marks.marker = {"symbol": "star", "size": 14, "color": GREY}
    marks.customdata = [plain(f"{_row_name(row)}: {row['speed']}") for row in ordered]
    marks.hovertemplate = "%{customdata}<extra></extra>"
    return marks


def _is_in(row: dict[str, Any], points: list[dict[str, Any]]) -> bool:
    """Whether a row of the trade-off is one of those that were timed."""
    return row["plan_sha256"] in [p["plan_sha256"] for p in points if p["plan_sha256"]]


def _up_to_ten(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The axis of PPL changes that one can think of bearing, in percent."""
    return {"range": [min(-1.0, *(1.1 * row["ppl_change_percent"] for row in rows)), 10]}


def _line_at(y: float) -> dict[str, Any]:
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": {"color": GREY, "dash": "dot", "width": 1.5},
    }


def _layer_bars(layers: list[dict[str, float]]) -> dict[str, Any]:
    mean, low, high = ([layer[key] for layer in layers] for key in ("mean", "p5", "p95"))
    bars = go.Bar(
        x=list(range(len(layers))),
        y=_percent(mean),
        error_y={
            "type": "data",
            "symmetric": False,
            "array": _percent(b - a for a, b in zip(mean, high, strict=True)),
            "arrayminus": _percent(b - a for a, b in zip(low, mean, strict=True)),
            "thickness": 1,
            "color": GREY,
        },
    )
    return _plot([bars], "layer", "zero, %")


def _pattern_map(groups: list[list[int]], tokens: list[str]) -> dict[str, Any]:
    heat = go.Heatmap(
        x=list(range(len(tokens))),
        z=groups,
        zmin=0,
        zmax=100,
        colorscale="Viridis",
        colorbar={"thickness": 10, "ticksuffix": " %"},
        hovertemplate="token %{x}, group %{y}: %{z} % active<extra></extra>",
    )
    plot = _plot([heat], "", "group of neurons", height=400)
    plot["layout"]["xaxis"] |= _token_axis(tokens)
    return plot


def _agreement(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Mean of layers as bars, and layer by token as a map."""
    labels = [
        found["tokens"][0][a] if same else f"{found['tokens'][0][a]} → {found['tokens'][1][b]}"
        for (a, b), same in zip(found["pairs"], found["same"], strict=True)
    ]
    rows, at = found["agreement"], list(range(len(labels)))
    bars = go.Bar(
        x=at,
        y=_percent(sum(column) / len(column) for column in zip(*rows, strict=True)),
        marker={
            "color": [COLORS[0] if same else COLORS[1] for same in found["same"]],
            "pattern": {"shape": ["" if same else "/" for same in found["same"]]},
        },
    )
    mean = _plot([bars], "", "agreement, %")
    mean["layout"]["yaxis"]["range"] = [0, 100]
    if found["unrelated"]:
        unrelated = 100 * sum(found["unrelated"]) / len(found["unrelated"])
        mean["layout"]["shapes"] = [_line_at(round(unrelated, 2))]
    heat = go.Heatmap(
        x=at,
        z=[_percent(row) for row in rows],
        zmax=100,
        colorscale="Viridis",
        colorbar={"thickness": 10, "ticksuffix": " %"},
        hovertemplate="token %{x}, layer %{y}: %{z} %<extra></extra>",
    )
    by_layer = _plot([heat], "", "layer", height=_map_height(len(rows)))
    for plot in (mean, by_layer):
        plot["layout"]["xaxis"] |= _token_axis(labels)
    return {"mean of layers": [mean], "layer by layer": [by_layer]}


def _result_bars(bars: list[dict[str, Any]], name: str) -> dict[str, Any]:
    value = [bar["value"] for bar in bars]
    spread = go.Bar(
        y=[plain(bar["label"]) for bar in bars],
        x=[float(f"{v:.4g}") for v in value],
        orientation="h",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [max(bar.get("high", v) - v, 0) for bar, v in zip(bars, value, strict=True)],
            "arrayminus": [
                max(v - bar.get("low", v), 0) for bar, v in zip(bars, value, strict=True)
            ],
            "color": GREY,
        },
    )
    plot = _plot([spread], name, "", height=90 + 36 * len(bars))
    plot["layout"]["yaxis"] |= {"autorange": "reversed", "type": "category"}
    return plot


# Small things ------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text for Plotly's labels, which take some HTML: shown as it is, on one line."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "⏎")


def _token_axis(tokens: list[str]) -> dict[str, Any]:
    """Ticks with tokens, of which several may be alike."""
    return {
        "tickvals": list(range(len(tokens))),
        "ticktext": [plain(token.strip(" ")) or "·" for token in tokens],
        "tickangle": -60,
    }


def _map_height(rows: int) -> int:
    return max(220, 90 + 11 * rows)


def _percent(values: Iterable[float]) -> list[float]:
    return [round(100 * value, 3) for value in values]


def _log10(value: float) -> float | None:
    return round(math.log10(value), 3) if value > 0 else None
