"""Measured parts as sections of figures: Plotly's own JSON, which the page's script draws."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from fallow.calibration.tradeoff import target_label
from fallow.common.tables import plus_minus

DEPTH = ["#2563b0", "#f5b36b"]  # from the first layer to the last: in grey, too
COLORS = ["#2f7fd6", "#e8772e", "#2e9e6b", "#b05ccc", "#c9a227", "#d64550", "#5f7a8a"]
GREY = "#888888"  # of lines, on light and dark
ONE_PERCENT = 1.0
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
        "Magnitudes of activations on the text, and of weights, in one line per layer, from blue "
        "(the first) to orange (the last)."
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
        go.Scatter(x=index, y=_percent(values), name=name, mode="lines+markers")
        for name, values in shares.items()
    ]
    dead = go.Bar(x=index, y=[row["dead_neurons"] for row in layers], name="dead neurons")
    by_layer = {
        "zeros and small values": [_plot(traces, "layer", "share of values, %")],
        "dead neurons": [_plot([dead], "layer", "neurons active on < 0.1 % of tokens")],
    }
    firing = {
        label: [
            _plot(
                [
                    go.Scatter(
                        x=_percent(row[key]["rank"]),
                        y=_percent(row[key]["value"]),
                        name=f"layer {row['layer']}",
                        mode="lines",
                    )
                    for row in profile["firing"]
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


def tradeoff_section(table: list[dict[str, Any]], command: str) -> Section:
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
            title = "KL, nats per token" if key == "kl_to_dense" else "PPL change, %"
            title = "PPL / dense PPL" if ratio else title
            plot = _plot(traces, f"{_WHERE[where]}, %", title, yaxis=axis, showlegend=True)
            plot["layout"]["xaxis"] |= {"rangemode": "tozero"}
            if key == "ppl_change_percent":
                plot["layout"]["shapes"] = [_line_at(1.01 if ratio else ONE_PERCENT)]
            variants[prefix + label] = [plot]
            best[prefix + label] = [_told_row(row) for row in front(own)]
    note = (
        f"Against the dense model on {table[0]['windows']} windows, with paired standard errors. "
        "The dotted line is +1 %. The slider goes through the rows that no other beats in both."
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
    text = (
        f"{row['rule']} at {target_label(row)}: {row['achieved_sparsity']:.1%} inactive, PPL "
        f"{change} %, KL {row['kl_to_dense']:.3g} nats"
    )
    if "ffn_bytes" in row:
        text += f", {row['ffn_bytes']:.2f} of the FFN's bytes"
    x = round(100 * row["achieved_sparsity"], 3)
    return {"text": text, "x": x, "change": row["ppl_change_percent"]}


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
                "PPL change, %": plus_minus(
                    figures["ppl_change_percent"], figures["ppl_change_se"], sign="+"
                ),
            }
        )
    plot = _plot(traces, "inactive, %", "PPL change, %", showlegend=True)
    plot["layout"]["yaxis"] |= _up_to_ten([row for _, table in found for row in table[1:]])
    plot["layout"]["xaxis"] |= {"rangemode": "tozero"}
    plot["layout"]["shapes"] = [_line_at(ONE_PERCENT)]
    note = "Of every model the rows of its trade-off that no other beats. The dotted line is +1 %."
    block = Block("Models", note, command, variants={"": [plot]}, data=rows, kind="table")
    return Section("Side by side", "", [block])


def plan_section(plan: dict[str, Any], command: str) -> Section:
    variants = {
        tap: [_layer_bars(layers)]
        for tap, layers in sorted(plan["per_layer"].items(), key=lambda item: item[0] != "inter")
        if tap == "inter" or any(layer["mean"] >= LEAST_ZEROS for layer in layers)
    }
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
    return Section("A plan", note, [block])


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
    figure = go.Figure(list(traces))
    figure.update_layout(
        height=height,
        margin=_MARGIN,
        colorway=COLORS,
        showlegend=several and traces[0].name is not None,
        legend={"orientation": "h", "y": -0.22},
        xaxis={"title": {"text": x_title}},
        yaxis={"title": {"text": y_title}},
    )
    figure.update_layout(**layout)
    plot = figure.to_plotly_json()
    del plot["layout"]["template"]
    return plot


def _by_depth(rows: Sequence[Any], x: list[float], name: str) -> list[Any]:
    """A line per layer, coloured by its depth."""
    count = len(rows)
    colors = sample_colorscale(DEPTH, [i / max(count - 1, 1) for i in range(count)])
    return [
        go.Scatter(
            x=x,
            y=_percent(row),
            mode="lines",
            line={"color": color, "width": 1.2},
            name=f"layer {i}",
            hovertemplate=f"layer {i}: %{{y}} % {name} %{{x}}<extra></extra>",
        )
        for i, (row, color) in enumerate(zip(rows, colors, strict=True))
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
        line={"dash": _DASHES[index % len(_DASHES)]},
        marker={"symbol": _MARKERS[index % len(_MARKERS)], "size": 8},
        name=rows[0]["rule"],
    )


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
