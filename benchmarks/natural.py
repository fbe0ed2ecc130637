"""Naturally sparse models: what their zeros gain in decode, with a predictor before the gate.

Of the model that fallow trained, `relu`: how well few bits of a gate predict its signs (and those
of SmolLM2's above a threshold), and what the predictor costs. In the shapes of published models, of
random weights: decode beside the dense engine, llama.cpp and ik_llama.cpp, on files of the same
shape and types. Peers need llama-cpp-python==0.3.36 and ik-llama-cpp-python==0.1.5. A stopped run
continues where it was:

    python benchmarks/natural.py relu
    python benchmarks/natural.py 2.4b nemotron-4b prosparse-7b    # up to 13 GB of disk
    python benchmarks/natural.py --report      # writes docs/results/natural.md
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import seven_billion
from engine import TEST, THREADS, machine
from seven_billion import SPREAD, RowPool
from tradeoff import ROOT, keeper, machine_line

RESULTS = ROOT / "benchmarks" / "results" / "natural"
RELU = ROOT / "tests" / "data" / "relu"  # benchmarks/laws.py keep
RECALLS = (0.98, 0.99, 0.995, 0.999)
PRICED_WINDOWS, PRICED_CONTEXT = 16, 128
FIT_WINDOWS, HELD_OUT_WINDOWS, CONTEXT = 24, 8, 256
SMOLLM2_ZEROS, SMOLLM2_LAYERS = 0.9, (5, 15, 25)
PROMPT, NEW, ROUNDS = 32, 32, 3
UNEVEN = 1.0  # standard deviation of the logarithm of neurons' frequencies
RECALL, SAMPLES = 0.99, 256
PEERS = ("llama.cpp", "ik_llama.cpp", "ik_llama.cpp-rtr")
EXACT_ROWS = seven_billion.EXACT_ROWS  # of the head, with a shortlist
LAYER_TYPE, HEAD_TYPE, GATE_BITS = "Q4_K", "Q6_K", 4.5


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, and the share of its neurons that are zero."""

    hidden: int
    layers: int
    d_ff: int
    heads: int
    kv_heads: int
    vocabulary: int
    zeros: float
    activation: str = "relu"
    gated: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def attention(self) -> dict[str, int]:
        """Rows of each projection."""
        kv = self.kv_heads * self.head_dim
        return {"q": self.hidden, "k": kv, "v": kv, "o": self.hidden}


SHAPES = {
    "2.4b": Shape(2304, 40, 5760, 36, 36, 122753, 0.935),
    "nemotron-4b": Shape(3072, 32, 9216, 24, 8, 256000, 0.85, "relu2", gated=False),
    "prosparse-7b": Shape(4096, 32, 11008, 32, 32, 32000, 0.89),
}


# The trained model.


def run_relu() -> None:
    import fallow

    folder = RESULTS / "relu" / machine()
    keep = keeper(folder)
    keep("prediction", lambda: list(prediction(fallow.load(str(RELU)))))
    keep(
        "prediction of smollm2",
        lambda: list(prediction(fallow.load("smollm2"), SMOLLM2_LAYERS, SMOLLM2_ZEROS)),
    )
    for recall in RECALLS:
        keep(f"price {recall}", lambda recall=recall: price(folder, recall))


def prediction(
    model: Any, layers: tuple[int, ...] = (), zeros: float | None = None
) -> Iterator[dict[str, Any]]:
    """Per layer and way of rounding: neurons predicted, and what of the energy they have.

    Margins are fitted on some windows and measured on others. With `zeros` a neuron is active
    above the layer's quantile of its gate.
    """
    import torch

    from fallow.packing.coarse_gate import _least_margin

    layers = layers or tuple(range(len(model.layers)))
    fit, held_out = ffn_values(model, layers)
    for layer in layers:
        module = model.layers[layer]
        weight, norm = module.gate_proj.weight.detach().float(), module.down_norm
        (x, up), (x_out, up_out) = fit[layer], held_out[layer]
        gate, gate_out = x @ weight.T, x_out @ weight.T
        cut = 0.0 if zeros is None else float(np.quantile(gate.numpy(), zeros))
        energy, energy_out = (
            ((g - cut).clamp_min(0) * u * norm).square()
            for g, u in ((gate, up), (gate_out, up_out))
        )
        for name, rows in rounded(weight, x).items():
            bias = (weight - rows) @ x.mean(dim=0) - cut
            spread = (gate - cut - x @ rows.T - bias).std(dim=0).clamp_min(1e-12)
            above, above_out = ((v @ rows.T + bias) / spread for v in (x, x_out))
            for recall in (0.99, 0.999):
                some = energy > 0
                predicted = above_out > -_least_margin([(above[some], energy[some])], recall)
                active = energy_out > 0
                yield {
                    "layer": layer,
                    "rounding": name,
                    "recall": recall,
                    "active": float(active.float().mean()),
                    "predicted": float(predicted.float().mean()),
                    "active_predicted": float(predicted[active].float().mean()),
                    "energy": float(energy_out[predicted].sum() / energy_out.sum()),
                    "correlation": float(
                        torch.corrcoef(torch.stack([above_out * spread, gate_out]).flatten(1))[0, 1]
                    ),
                }


def ffn_values(model: Any, layers: tuple[int, ...]) -> list[dict[int, tuple[Any, Any]]]:
    """Inputs x (T, d_model) and `up` (T, d_ff) of calibration and of evaluation text, by layer."""
    import torch

    from fallow.checkpoints.text import load_text
    from fallow.models.taps import attach

    found = []
    for part, count in (("calibration", FIT_WINDOWS), ("evaluation", HELD_OUT_WINDOWS)):
        kept: dict[str, dict[int, list[Any]]]
        kept = {tap: {i: [] for i in layers} for tap in ("up_proj", "up")}
        with attach(model.layers, {tap: partial(_keep, kept[tap]) for tap in kept}):
            for window in model.windows(load_text(None, part), CONTEXT, at_most=count):
                model.hidden(window[None])
        found.append({i: tuple(torch.cat(kept[tap][i]) for tap in kept) for i in layers})
    return found


def _keep(kept: dict[int, list[Any]], layer: int, value: Any) -> None:
    if layer in kept:
        kept[layer].append(value.float().clone())


def rounded(weight: Any, x: Any) -> dict[str, Any]:
    """A gate (d_ff, d_model) in one bit and in two, (d_ff, d_model) each."""
    import torch

    from fallow.packing.coarse_head import DAMPING, coarse_rows, decode_rows
    from fallow.packing.gptq import MomentFactor, compensated

    moment = x.T @ x / len(x)
    factor = MomentFactor.from_moment(moment.double(), DAMPING)
    scale = weight.abs().mean(dim=1)
    blocks = weight.reshape(len(weight), -1, 32)
    white = torch.eye(weight.shape[1])
    return {
        "1 bit, a scale per row": torch.sign(weight) * scale[:, None],
        "1 bit, a scale per 32": (
            torch.sign(blocks) * blocks.abs().mean(dim=2, keepdim=True)
        ).reshape(weight.shape),
        "1 bit, a scale per row, compensated": compensated(
            weight.T.contiguous(), factor, lambda _, row: torch.where(row < 0, -scale, scale)
        ).T,
        "2 bits, a scale per row": decode_rows(coarse_rows(weight, white)),
        "2 bits, a scale per row, compensated": decode_rows(coarse_rows(weight, moment)),
    }


def price(folder: Path, recall: float) -> dict[str, Any]:
    """What a predictor costs and reads, token by token."""
    import fallow
    from fallow import Engine
    from fallow.measure.quality import evaluate_engine

    path = folder / "predictor.gguf"
    fallow.pack(RELU, path, predictor=recall)
    engine = Engine(path, threads=THREADS, context=PRICED_CONTEXT)
    found = evaluate_engine(
        engine, None, TEST, context=PRICED_CONTEXT, windows=PRICED_WINDOWS, decode=True
    ).to_json()
    keys = ("ppl", "ppl_se", "ppl_change_percent", "ppl_change_se", "kl_to_dense", "tokens")
    path.unlink()
    return {key: found[key] for key in keys} | {
        "predicted": float(engine.predicted_neurons().mean()),  # of the last window
        "active": 1 - found["achieved_sparsity"],
    }


# Shapes of random weights.


def run_shape(name: str) -> None:
    shape, folder = SHAPES[name], RESULTS / name / machine()
    keep = keeper(folder)
    files = Files(folder)
    if not files.complete.exists():
        files.make(shape)
    ids = np.random.default_rng(0).integers(1000, 30000, PROMPT + NEW)
    for i in range(ROUNDS):
        for peer in PEERS:
            keep(f"{peer}, {i}", lambda peer=peer: peer_run(peer, files.source, ids))
        for variant in variants(shape):
            keep(f"{variant}, {i}", lambda v=variant: own_run(files, v, ids))


class Files:
    """The source, and the packed model without and with coarse copies of gates and head."""

    def __init__(self, folder: Path) -> None:
        self.source, self.plain = folder / "source.gguf", folder / "plain.gguf"
        self.coarse, self.complete = folder / "coarse.gguf", folder / "complete.gguf"

    def make(self, shape: Shape) -> None:
        import fallow
        from fallow.checkpoints.catalog import ALIASES, resolve
        from fallow.checkpoints.weights import read_gguf

        small = self.source.with_name("small.gguf")
        fallow.pack("smollm2", small)
        pool = RowPool()
        write_source(self.source, shape, read_gguf(resolve(ALIASES["smollm2"])), pool)
        for path in (self.plain, self.coarse) if shape.gated else (self.plain,):
            write_packed(path, shape, read_gguf(small), pool, path == self.coarse)
        small.unlink()
        self.complete.touch()


def variants(shape: Shape) -> tuple[str, ...]:
    return (
        ("dense", "zeros", "predictor", "predictor and shortlist")
        if shape.gated
        else (
            "dense",
            "zeros",
        )
    )


def own_run(files: Files, variant: str, ids: np.ndarray) -> dict[str, float]:
    from fallow import Engine
    from fallow.measure.speed import run_once

    path = files.coarse if variant.startswith("predictor") else files.plain
    plan = None if variant.endswith("shortlist") else False
    engine = Engine(
        path, plan=plan, threads=THREADS, context=len(ids), skip_zeros=variant != "dense"
    )
    return run_once(engine, ids, PROMPT)


def peer_run(peer: str, source: Path, ids: np.ndarray) -> dict[str, Any]:
    from fallow.common.errors import FallowError
    from fallow.measure.speed import Baseline

    try:
        baseline = Baseline(peer, source, THREADS, ids, PROMPT)
    except FallowError as error:
        return {"missing": str(error).replace(str(source), source.name)}
    try:
        return baseline.run()
    finally:
        baseline.close()


def frequencies(shape: Shape, count: int) -> np.ndarray:
    """How often each neuron is active: log-normal, as uneven as trained models' neurons are."""
    raw = np.exp(UNEVEN * np.random.default_rng(2).standard_normal(count))
    low, high = 0.0, 1.0
    for _ in range(50):
        scale = (low + high) / 2
        low, high = (
            (scale, high)
            if np.minimum(raw * scale, 0.95).mean() < 1 - shape.zeros
            else (low, scale)
        )
    return np.minimum(raw * low, 0.95)


def gate_biases(shape: Shape) -> np.ndarray:
    """Biases (d_ff,) by which neurons of Gaussian weights have their frequencies.

    A normed input has the norm sqrt(d_model), so a product with it is N(0, SPREAD^2 d_model).
    """
    inverse = statistics.NormalDist().inv_cdf
    spread = SPREAD * shape.hidden**0.5
    return np.array([spread * inverse(f) for f in frequencies(shape, shape.d_ff)], dtype=np.float32)


def write_source(path: Path, shape: Shape, small: Any, pool: RowPool) -> None:
    """A GGUF for peers: as llama or, without a gate, as nemotron.

    llama.cpp knows no ReLU in llama: it computes SiLU in its place, at the same speed.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama" if shape.gated else "nemotron")
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.d_ff)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(seven_billion.ROPE_BASE)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    seven_billion.add_tokenizer(writer, small, shape.vocabulary)

    def add(name: str, kind: str, rows: int, width: int) -> None:
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", pool.matrix(kind, rows, width), raw_dtype=raw)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, dtype=np.float32))
        if not shape.gated:
            writer.add_tensor(f"{name}.bias", np.zeros(shape.hidden, dtype=np.float32))

    add("token_embd", LAYER_TYPE, shape.vocabulary, shape.hidden)
    add("output", HEAD_TYPE, shape.vocabulary, shape.hidden)
    add_norm("output_norm")
    down = LAYER_TYPE if shape.d_ff % 256 == 0 else "Q4_0"  # of as many bits
    for i in range(shape.layers):
        add_norm(f"blk.{i}.attn_norm")
        add_norm(f"blk.{i}.ffn_norm")
        for name, rows in shape.attention.items():
            add(f"blk.{i}.attn_{'output' if name == 'o' else name}", LAYER_TYPE, rows, shape.hidden)
        for name in ("gate", "up") if shape.gated else ("up",):
            add(f"blk.{i}.ffn_{name}", LAYER_TYPE, shape.d_ff, shape.hidden)
        add(f"blk.{i}.ffn_down", down, shape.hidden, shape.d_ff)
    seven_billion._finish(writer)


def write_packed(path: Path, shape: Shape, small: Any, pool: RowPool, coarse: bool) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "fallow")
    writer.add_custom_alignment(4096)
    seven_billion.add_header(writer, small, metadata(shape, small))
    ones = np.ones(shape.hidden, dtype=np.float32)

    def add(name: str, kind: str, data: np.ndarray) -> None:
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", ones)
        if not shape.gated:
            writer.add_tensor(f"{name}.bias", np.zeros_like(ones))

    add_norm("norm")
    angles = seven_billion.ROPE_BASE ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    writer.add_tensor("rope.0.inv_freq", angles.astype(np.float32))
    writer.add_tensor("rope.0.scale", np.ones(1, dtype=np.float32))
    embedding = pool.matrix(LAYER_TYPE, shape.vocabulary, shape.hidden)
    add("embed_tokens.weight", LAYER_TYPE, embedding)
    chosen = pool.choose(shape.vocabulary)
    head = pool.rows(HEAD_TYPE, shape.hidden)
    add("lm_head.weight", HEAD_TYPE, head.data[chosen])
    gates = CoarseRows(pool.rows(LAYER_TYPE, shape.hidden)) if coarse else None
    if coarse:
        plan = shortlist_plan(shape).to_bytes()
        writer.add_tensor("plan", np.frombuffer(plan, dtype=np.int8))
        add("lm_head_coarse.codes", "I8", CoarseRows(head).rows[chosen])
    biases = gate_biases(shape)
    margin = gates.margin(shape, biases) if gates else 0.0
    for i in range(shape.layers):
        here = f"layers.{i}"
        add_norm(f"{here}.attn_norm")
        add_norm(f"{here}.ffn_norm")
        writer.add_tensor(f"{here}.down_norm", np.ones(shape.d_ff, dtype=np.float32))
        for name, rows in shape.attention.items():
            matrix = pool.matrix(LAYER_TYPE, rows, shape.hidden)
            add(f"{here}.{name}_proj.weight", LAYER_TYPE, matrix)
        first = pool.choose(shape.d_ff)  # rows of gate_proj or, without a gate, of up_proj
        names = (
            ("gate_proj", "up_proj", "down_proj_t") if shape.gated else ("up_proj", "down_proj_t")
        )
        for name in names:
            rows = first if name == names[0] else pool.choose(shape.d_ff)
            matrix = pool.rows(LAYER_TYPE, shape.hidden).data[rows]
            add(f"{here}.{name}.weight", LAYER_TYPE, matrix)
        writer.add_tensor(f"{here}.{names[0]}.bias", biases)
        if gates:
            add(f"{here}.gate_coarse.codes", "I8", gates.rows[first])
            bias = (biases + margin * gates.spread[first]).astype(np.float32)
            writer.add_tensor(f"{here}.gate_coarse.bias", bias)
    seven_billion._finish(writer)


class CoarseRows:
    """A pool's rows in two bits; inputs of random weights are white, and have the mean 0."""

    def __init__(self, matrix: Any) -> None:
        import torch

        from fallow.packing.coarse_head import coarse_rows, decode_rows
        from fallow.packing.quantize import dequantize

        weight = torch.from_numpy(dequantize(matrix))
        self.rows = coarse_rows(weight, torch.eye(weight.shape[1]))
        self.weight, self.values = weight, decode_rows(self.rows)
        self.spread = (self.weight - self.values).norm(dim=1).numpy()

    def margin(self, shape: Shape, biases: np.ndarray) -> float:
        """Of a predictor with RECALL of the energy, on Gaussian inputs."""
        import torch

        from fallow.packing.coarse_gate import _least_margin

        random = np.random.default_rng(3)
        rows = random.integers(0, len(self.rows), len(biases))
        x = torch.from_numpy(random.standard_normal((SAMPLES, shape.hidden), dtype=np.float32))
        bias = torch.from_numpy(biases)
        energy = (x @ self.weight[rows].T + bias).clamp_min(0).square()
        above = (x @ self.values[rows].T + bias) / torch.from_numpy(self.spread[rows])
        return _least_margin([(above[energy > 0], energy[energy > 0])], RECALL)


def metadata(shape: Shape, small: Any) -> dict[str, Any]:
    """The packed header, less the tokenizer; what does not depend on the shape as in `small`."""
    return seven_billion._metadata(small) | {
        "model": "natural",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.d_ff,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "rotary_dim": shape.head_dim,
        "attention_scale": shape.head_dim**-0.5,
        "sliding_window": [0] * shape.layers,
        "rope": [0] * shape.layers,
        "activation": shape.activation,
        "gated": shape.gated,
        "layer_norm": not shape.gated,
    }


def shortlist_plan(shape: Shape) -> Any:
    """No cuts; a margin by which so many rows of the head become exact as of trained models."""
    from fallow.plan import Plan

    random = np.random.default_rng(1)
    spread = SPREAD * shape.hidden**0.5
    logits = np.sort(spread * random.standard_normal((100, shape.vocabulary)), axis=1)
    margin = logits[:, -1] - logits[:, -int(EXACT_ROWS * shape.vocabulary)]
    return Plan(
        model="natural",
        fingerprint=seven_billion.FINGERPRINT,
        rule="none",
        knob=0.0,
        knob_name="",
        cuts=(),
        head_margin=float(margin.mean()),
    )


# The report.

INTRODUCTION = """# Naturally sparse models

A ReLU makes most neurons exactly zero, and the engine reads neither `up_proj` nor `down_proj` of
those. With a gate, that alone leaves the whole gate to be read; `fallow pack --predictor` adds a
copy of it in two bits that says whose rows are worth it ([how](../packed.md)).
`benchmarks/natural.py` measures it; everything is in `benchmarks/results/natural`, a folder per
processor.
"""

HOW_SHAPES = f"""## Shapes of published models

Random weights, {LAYER_TYPE} with a head in {HEAD_TYPE}: for speed alone. Zeros are real ones of a
ReLU: neurons have biases by which their frequencies are log-normal around the published share. The
predictor's margin keeps {RECALL:.0%} of the energy. Its inputs are white, so that rounding makes up
for nothing: it predicts more in vain than a trained model's. {PROMPT} tokens, then {NEW} one by
one, {THREADS} threads, medians of {ROUNDS} rounds in each of which everything runs in turn. *limit*
is the gain if time went by bytes alone; where a median lies above it, its range holds it. Peers run
all neurons; llama.cpp has no ReLU in llama, and computes SiLU there. The shortlist takes exact
logits for {EXACT_ROWS:.1%} of the head's rows.
"""


def report() -> str:
    parts = [INTRODUCTION]
    parts += [_relu(path) for path in sorted(RESULTS.glob("relu/*/result.json"))]
    tables = [
        _shape(name, path)
        for name in SHAPES
        for path in sorted(RESULTS.glob(f"{name}/*/result.json"))
    ]
    return "\n".join([*parts, HOW_SHAPES, *(tables or ["No results yet.\n"])])


def _relu(path: Path) -> str:
    r = json.loads(path.read_text())
    where = machine_line(json.loads((path.parent / "machine.json").read_text()))
    lines = [
        f"## How well few bits predict, {path.parent.name}\n",
        f"{where}. Margins fitted on {FIT_WINDOWS} windows of {CONTEXT} tokens of the calibration "
        f"text, figures from {HELD_OUT_WINDOWS} windows of the evaluation text, means over layers. "
        f"SmolLM2 has no zeros; there a neuron counts as active where its gate is among the "
        f"layer's largest {1 - SMOLLM2_ZEROS:.0%} (layers {', '.join(map(str, SMOLLM2_LAYERS))}). "
        "*energy* is that of the active neurons, (inter · ‖down_proj[:, i]‖)², which predicted "
        "ones have; *bytes / gate* is what is read of the coarse and the exact gate over a whole "
        f"gate of {GATE_BITS} bits. One bit would read less of it where 1 % of the energy may go, "
        "and as much where 0.1 % may; two have the kernels of the coarse head.\n",
    ]
    for key, name in (
        ("prediction", "the trained ReLU model"),
        ("prediction of smollm2", "SmolLM2"),
    ):
        if key in r:
            lines += _prediction(name, r[key])
    lines += [
        "\n## What the predictor costs the trained model\n",
        f"Token by token, {PRICED_WINDOWS} windows of {PRICED_CONTEXT} tokens of WikiText-2, "
        "against the dense engine. The model was trained on novels: where PPL falls here, that is "
        "no gain to count on.\n",
        "| energy kept | gate rows read | neurons active | PPL change % | KL nats/token |",
        "|---|---|---|---|---|",
    ]
    for recall in RECALLS:
        if p := r.get(f"price {recall}"):
            lines.append(
                f"| {recall:.1%} | {p['predicted']:.1%} | {p['active']:.1%} | "
                f"{p['ppl_change_percent']:+.2f} ± {p['ppl_change_se']:.2f} | "
                f"{p['kl_to_dense']['mean']:.4f} |"
            )
    return "\n".join(lines) + "\n"


def _prediction(name: str, rows: list[dict[str, Any]]) -> list[str]:
    active = np.mean([r["active"] for r in rows])
    lines = [
        f"\n**{name}**, {active:.1%} active:\n",
        "| rounding | correlation | energy wanted | energy | predicted | of the active "
        "| bytes / gate |",
        "|---|---|---|---|---|---|---|",
    ]
    for recall in (0.99, 0.999):
        for rounding in dict.fromkeys(r["rounding"] for r in rows):
            some = [r for r in rows if r["rounding"] == rounding and r["recall"] == recall]
            mean = {k: np.mean([r[k] for r in some]) for k in some[0] if k != "rounding"}
            lines.append(
                f"| {rounding} | {mean['correlation']:.3f} | {recall:.1%} | {mean['energy']:.2%} "
                f"| {mean['predicted']:.1%} | {mean['active_predicted']:.1%} "
                f"| {_bits(rounding) / GATE_BITS + mean['predicted']:.2f} |"
            )
    return lines


def _bits(rounding: str) -> float:
    """Bits per weight, with scales in half precision of blocks."""
    return int(rounding[0]) + (0.5 if "per 32" in rounding else 0)


def _shape(name: str, path: Path) -> str:
    r, shape = json.loads(path.read_text()), SHAPES[name]
    rounds = [i for i in range(ROUNDS) if all(f"{v}, {i}" in r for v in variants(shape))]
    if not rounds:
        return ""
    where = machine_line(json.loads((path.parent / "machine.json").read_text()))
    peers = [p for p in PEERS if all("decode_tps" in r[f"{p}, {i}"] for i in rounds)]
    lines = [
        f"### {name}, {path.parent.name}\n",
        f"{where}. {shape.zeros:.1%} zeros wanted.\n",
        "| | neurons active | gate rows read | MB/token | tok/s | / dense | limit "
        f"| {' | '.join(f'/ {p}' for p in peers)} |",
        "|---" * (7 + len(peers)) + "|",
    ]
    for variant in variants(shape):
        mine = [r[f"{variant}, {i}"] for i in rounds]
        one = {k: statistics.median(m[k] for m in mine) for k in mine[0]}
        limit = r["dense, 0"]["bytes_per_token"] / one["bytes_per_token"]
        over = [_over(r, variant, other, rounds) for other in ("dense", *peers)]
        gate = f"{one['predicted']:.1%}" if one["predicted"] else "all" if shape.gated else "-"
        lines.append(
            f"| {variant} | {1 - one['sparsity']:.1%} | {gate} "
            f"| {one['bytes_per_token'] / 1e6:.0f} | {one['decode_tps']:.2f} | {over[0]} "
            f"| {limit:.2f} | {' | '.join(over[1:])} |"
        )
    for peer in PEERS:
        if missing := r[f"{peer}, {rounds[0]}"].get("missing"):
            lines.append(f"\n{peer}: {missing}")
    return "\n".join(lines) + "\n"


def _over(r: dict[str, Any], ours: str, other: str, rounds: list[int]) -> str:
    found = [r[f"{ours}, {i}"]["decode_tps"] / r[f"{other}, {i}"]["decode_tps"] for i in rounds]
    return f"**{statistics.median(found):.2f}** ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=["relu", *SHAPES, []])
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.names:
        run_relu() if name == "relu" else run_shape(name)
    if arguments.report:
        (ROOT / "docs" / "results" / "natural.md").write_text(report())


if __name__ == "__main__":
    main()
