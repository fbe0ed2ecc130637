"""Decoding on a GPU: `fallow.accelerate` against the fastest dense model, on random weights.

Shapes are those of published models, at full depth; every row is one token (or 8 sequences' next
ones) at a short context with a static cache, captured in a CUDA graph. Plans are made of the
random model's own activations, so that the stated share is inactive, and the share that was read is
counted in the run.

    python benchmarks/gpu.py --check      # every kernel against float32, half a minute
    python benchmarks/gpu.py              # writes benchmarks/results/gpu/CARD.json
    python benchmarks/gpu.py --report     # writes docs/results/gpu.md
"""

import argparse
import gc
import inspect
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
import triton

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
CONTEXT, POSITION = 128, 64  # of the cache, and of the token that is decoded
SAMPLE = 64  # tokens whose activations thresholds are taken from
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
HALF = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A model's widths, and the rows that are measured on it."""

    title: str
    config: dict[str, Any]
    rows: tuple[str, ...]


def _shape(title: str, rows: tuple[str, ...], **config: Any) -> Shape:
    common = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
    return Shape(title, common | config, rows)


SHAPES = {
    "8b": _shape(
        "Llama 3 8B",
        ("nothing", "gate_topk 50", "two_stage", "teal 40", "teal 50", "gate_topk 50 x8"),
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, hidden_act="silu",
    ),
    "relu7b": _shape(
        "ProSparse Llama 2 7B", ("nothing", "relu 89"),
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, hidden_act="relu",
    ),
    "2.4b": _shape(
        "2.4B of arXiv:2411.02335", ("nothing", "relu 93.5"),
        vocab_size=122753, hidden_size=2304, intermediate_size=5760, num_hidden_layers=40,
        num_attention_heads=36, num_key_value_heads=36, hidden_act="relu",
        tie_word_embeddings=True,
    ),
    "mistral7b": _shape(
        "Mistral 7B", ("gate_topk 50", "teal 50"),
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, hidden_act="silu",
    ),
}  # fmt: skip
TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass
class Run:
    """Where it runs, and how long it may take."""

    device: torch.device
    dtype: torch.dtype
    tiny: bool
    seconds: float  # per row
    compile_limit: float
    compile_sparse: bool
    copy_gb_s: float = 0.0
    pieces: dict[str, Any] = field(default_factory=dict)  # compiled once


# ---------------------------------------------------------------------------- the card's ceilings


def ceilings(run: Run) -> dict[str, float]:
    """GB/s of a copy, counting bytes read and written, and TFLOP/s of a bf16 product."""
    if run.tiny:
        return {"copy_gb_s": 1.0, "matmul_tflop_s": 1.0}
    copy = _copy_ms(run.device)
    n = 8192
    a, b = (torch.randn(n, n, dtype=HALF, device=run.device) for _ in range(2))
    product = _median_ms(lambda: a @ b, 20)
    _free()
    return {"copy_gb_s": 2 * (4 << 30) / copy / 1e6, "matmul_tflop_s": 2 * n**3 / product / 1e9}


def _copy_ms(device: torch.device) -> float:
    source = torch.empty(4 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return _median_ms(lambda: target.copy_(source), 20)


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------ models and plans


def build(shape: Shape, run: Run) -> Any:
    """A random model, made on the device."""
    config = shape.config | (TINY if run.tiny else {})
    torch.manual_seed(0)
    with torch.device(run.device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**config), dtype=run.dtype, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def layers_of(model: Any) -> list[Any]:
    from fallow.models import by_model_type

    return by_model_type("llama", "").find_layers(model)


def magnitudes(model: Any, taps: tuple[str, ...], run: Run) -> dict[str, list[torch.Tensor]]:
    """|value| (T, width) of some taps in every layer, on random tokens."""
    from fallow.models.taps import attach

    found: dict[str, list[torch.Tensor]] = {tap: [] for tap in taps}

    def keep(tap: str, _: int, value: torch.Tensor) -> None:
        found[tap].append(value.abs().float())

    ids = torch.randint(0, model.config.vocab_size, (1, SAMPLE), device=run.device)
    with torch.inference_mode(), attach(layers_of(model), {t: partial(keep, t) for t in taps}):
        model.model(ids)
    return found


def cuts_of(row: str, model: Any, run: Run) -> list[Any]:
    """The cuts of a row; of thresholds those that leave out the row's share of the sample."""
    from fallow.plan import Cut

    kind, _, percent = row.removesuffix(" x8").partition(" ")
    share = float(percent or 0) / 100
    width, n_layers = model.config.intermediate_size, model.config.num_hidden_layers
    draw = np.random.default_rng(0)
    weight = np.exp(draw.normal(0, 0.5, (n_layers, width))).astype(np.float32)
    if kind == "nothing":
        return []
    if kind == "gate_topk":
        return [Cut("gate_act", "topk", np.full(n_layers, 1 - share), weight)]
    if kind == "teal":
        found = magnitudes(model, PROJECTIONS, run)
        return [Cut(tap, "threshold", _quantiles(found[tap], share)) for tap in PROJECTIONS]
    if kind == "two_stage":  # 40 % by the gate, 30 % of the others by their inter
        found = magnitudes(model, ("gate_act", "inter"), run)
        score = _weighted(found["gate_act"], weight)
        first = _quantiles(score, 0.4)
        norms = torch.stack([layer.down_norm for layer in layers_of(model)]).cpu().numpy()
        late = [
            inter[gate > float(limit)]
            for inter, gate, limit in zip(
                _weighted(found["inter"], norms), score, first, strict=True
            )
        ]
        second = _quantiles(late, 0.3)
        return [Cut("gate_act", "threshold", first, weight),
                Cut("inter", "threshold", second, "column_norm")]  # fmt: skip
    # Zeros of a ReLU, and further neurons, so that the share is the published one; neurons differ
    # in how often they are active, by a factor of each.
    score = _weighted(magnitudes(model, ("gate_act",), run)["gate_act"], weight)
    return [Cut("gate_act", "threshold", _quantiles(score, share), weight)]


def _weighted(values: list[torch.Tensor], weight: np.ndarray) -> list[torch.Tensor]:
    factors = torch.from_numpy(np.ascontiguousarray(weight)).to(values[0].device)
    return [value * factor for value, factor in zip(values, factors, strict=True)]


def _quantiles(values: list[torch.Tensor], share: float) -> np.ndarray:
    found = []
    for value in values:
        flat = value.flatten()
        found.append(float(flat.kthvalue(max(1, round(share * len(flat)))).values))
    return np.array(found, dtype=np.float32)


# ------------------------------------------------------------------------------ one decoding step


def decoder(model: Any, batch: int, run: Run) -> Callable[[], torch.Tensor]:
    """One step at POSITION: the cache is static, and written there again each time."""
    from transformers.cache_utils import StaticLayer

    position = torch.tensor([POSITION], device=run.device)

    class AtPosition(StaticLayer):
        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                try:
                    self.lazy_initialization(key_states, value_states)
                except TypeError:
                    self.lazy_initialization(key_states)
                self.keys.normal_()
                self.values.normal_()
            self.keys.index_copy_(2, position, key_states)
            self.values.index_copy_(2, position, value_states)
            return self.keys, self.values

        def get_seq_length(self, *_: Any) -> int:
            return POSITION

    cache = transformers.StaticCache(config=model.config, max_cache_len=CONTEXT)
    cache.layers = [AtPosition(max_cache_len=CONTEXT) for _ in cache.layers]
    for layer in cache.layers:
        layer.position = position
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=run.device)
    positions = position[None].expand(batch, 1).contiguous()
    mask = (torch.arange(CONTEXT, device=run.device) <= POSITION).expand(batch, 1, 1, CONTEXT)
    mask = mask.contiguous()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def step() -> torch.Tensor:
        return model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
            **{name: cache},
        ).logits  # fmt: skip

    with torch.inference_mode():
        step()  # the cache is made outside of whatever captures
    return step


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], object]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def fused(run: Run) -> Iterator[None]:
    """What lies between projections is compiled, dense and sparse: as torch.compile would fuse it.

    Pieces are the same for all layers, so that this takes seconds, where compiling a whole model
    takes most of a minute.
    """
    from transformers.models.llama import modeling_llama as llama

    if not run.pieces:
        pieces = {"norm": _norm, "add_norm": _add_norm, "attend": _attend, "product": _product}
        run.pieces |= {name: torch.compile(f, dynamic=False) for name, f in pieces.items()}
    pieces = run.pieces

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return pieces["norm"](x, self.weight, self.variance_epsilon)

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        relu = self.config.hidden_act == "relu"
        return self.down_proj(pieces["product"](self.gate_proj(x), self.up_proj(x), relu))

    def layer(
        self: Any, hidden_states: torch.Tensor, attention_mask: Any = None,
        position_embeddings: Any = None, **others: Any,
    ) -> torch.Tensor:  # fmt: skip
        attention, second = self.self_attn, self.post_attention_layernorm
        x = self.input_layernorm(hidden_states)
        qkv = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        cache = others.get("cache", others.get("past_key_values")).layers[attention.layer_idx]
        out = pieces["attend"](
            *qkv, *position_embeddings, attention_mask, cache.keys, cache.values, cache.position
        )
        out = attention.o_proj(out)
        added, x = pieces["add_norm"](hidden_states, out, second.weight, second.variance_epsilon)
        return added + self.mlp(x)

    changed = [(llama.LlamaRMSNorm, norm), (llama.LlamaMLP, mlp), (llama.LlamaDecoderLayer, layer)]
    kept = [kind.forward for kind, _ in changed]
    for kind, forward in changed:
        kind.forward = forward
    try:
        yield
    finally:
        for (kind, _), forward in zip(changed, kept, strict=True):
            kind.forward = forward


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    mask: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What a decoder layer does between its projections of one token and o_proj."""
    from transformers.models.llama import modeling_llama as llama

    shape = (*q.shape[:2], -1, keys.shape[-1])
    q, k, v = (part.view(shape).transpose(1, 2) for part in (q, k, v))
    q, k = llama.apply_rotary_pos_emb(q, k, cos, sin)
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    # Sums that are compiled together, in place of this and its copies, took 25 µs more a layer.
    groups = q.shape[1] // keys.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, llama.repeat_kv(keys, groups), llama.repeat_kv(values, groups), attn_mask=mask
    )
    return out.transpose(1, 2).reshape(*q.shape[:1], 1, -1)


def _add_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    added = x + y
    return added, _norm(added, weight, eps)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _product(gate: torch.Tensor, up: torch.Tensor, relu: bool) -> torch.Tensor:
    act = torch.nn.functional.relu if relu else torch.nn.functional.silu
    return act(gate) * up


class TooLong(Exception):
    """Compilation took longer than it may."""


def compiled(step: Callable[[], torch.Tensor], limit: float) -> Callable[[], object]:
    """The step by torch.compile, which captures graphs itself."""

    def stop(*_: object) -> None:
        raise TooLong

    torch._dynamo.reset()
    made = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with torch.inference_mode():
            for _ in range(4):
                made()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    def call() -> None:
        with torch.inference_mode():
            made()

    return call


# ----------------------------------------------------------------------------------- measurements


class Energy:
    """Joules of the card since it was made, by NVML; None where it does not say."""

    def __init__(self) -> None:
        self.handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self.start = pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        except Exception:  # no NVML, or a card without the counter
            self.handle = None

    def joules(self) -> float | None:
        if self.handle is None:
            return None
        import pynvml

        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self.start) / 1000


def timed(call: Callable[[], object], run: Run) -> dict[str, Any]:
    """Milliseconds of single calls, and joules of each, over at least `seconds`."""
    if run.tiny:
        start = time.monotonic()
        call()
        ms = 1000 * (time.monotonic() - start)
        return {"ms": ms, "ms_min": ms, "ms_max": ms, "calls": 1, "joules": None}
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    energy, times, begin = Energy(), list[float](), time.monotonic()
    while time.monotonic() - begin < run.seconds:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(33)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in pairwise(events)]
    joules = energy.joules()
    return {
        "ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times),
        "calls": len(times), "joules": None if joules is None else joules / len(times),
    }  # fmt: skip


class Bytes:
    """What one step reads, counted in the operators."""

    def __init__(self) -> None:
        self.read, self.neurons, self.of, self.inputs, self.of_inputs = 0, 0, 0, 0, 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        from fallow.gpu import ops

        kept = ops.gemv, ops.gather_rows, ops.gather_sum

        def gemv(x: Any, w: Any, *others: Any) -> Any:
            self.read += w.numel() * w.element_size()
            return kept[0](x, w, *others)

        def gather_rows(x: Any, w: Any, bias: Any, gates: Any, weight: Any, threshold: Any,
                        *late: Any) -> Any:  # fmt: skip
            score = gates.abs().float() * (1 if weight is None else weight)
            rows = int((score.view(torch.int32) > threshold[:, None]).any(0).sum())
            self.read += rows * w.shape[1] * w.element_size()
            self.neurons += rows
            self.of += len(w)
            return kept[1](x, w, bias, gates, weight, threshold, *late)

        def gather_sum(values: Any, up: Any, act: str, weight: Any, threshold: Any, w: Any,
                       bias: Any, ends: Any) -> Any:  # fmt: skip
            size = w.element_size()
            if threshold is None:
                self.read += int((values != 0).any(0).sum()) * w.shape[1] * size
            else:
                from fallow.gpu.modules import ACTIVATIONS

                value = values if up is None else ACTIVATIONS[act](values) * up
                begin = 0
                for i, end in enumerate(ends):
                    score = value.abs().float() * (1 if weight is None else weight[i])
                    bits = score.view(torch.int32) > threshold[i][:, None]
                    rows = int(bits.any(0).sum())
                    self.read += rows * (end - begin) * size
                    self.inputs += rows * (end - begin)
                    self.of_inputs += len(w) * (end - begin)
                    begin = end
            return kept[2](values, up, act, weight, threshold, w, bias, ends)

        ops.gemv, ops.gather_rows, ops.gather_sum = gemv, gather_rows, gather_sum
        try:
            yield
        finally:
            ops.gemv, ops.gather_rows, ops.gather_sum = kept


def dense_bytes(model: Any, batch: int = 1) -> int:
    """Of weights that a step reads whole by no operator of ours: Linear ones, and the head's."""
    from fallow.gpu.modules import DenseInputs

    kinds = (torch.nn.Linear,) if batch == 1 else (torch.nn.Linear, DenseInputs)
    found = {m.weight.data_ptr(): m.weight for m in model.modules() if isinstance(m, kinds)}
    return sum(w.numel() * w.element_size() for w in found.values())


def modes(step: Callable[[], torch.Tensor], run: Run, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The step in several ways; of one that fails, why."""
    found: dict[str, Any] = {}
    for kind in kinds:
        begin = time.monotonic()
        try:
            if kind == "eager" or run.tiny:
                with torch.inference_mode():
                    found[kind] = timed(step, run)
            elif kind == "graph":
                found[kind] = timed(captured(step), run)
            elif kind == "fused":
                with fused(run):
                    found[kind] = timed(captured(step), run)
            else:
                found[kind] = timed(compiled(step, run.compile_limit), run)
        except TooLong:
            found[kind] = {"failed": f"no code after {run.compile_limit:.0f} s"}
        except Exception as error:  # a line of the table
            found[kind] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        found[kind]["seconds"] = time.monotonic() - begin
        ms = found[kind].get("ms")
        print(f"    {kind}: {found[kind].get('failed') or f'{ms:.3f} ms'}", flush=True)
    return found


def batch_of(row: str) -> int:
    return 8 if row.endswith(" x8") else 1


def fastest(found: dict[str, Any]) -> float:
    return min(mode["ms"] for mode in found.values() if "ms" in mode)


def measure(shape: Shape, run: Run) -> dict[str, Any]:
    """Every row of a shape, each on a model that is made anew."""
    result: dict[str, Any] = {"title": shape.title, "rows": {}}
    sparse_kinds = ("graph", "fused", *(("compile",) if run.compile_sparse else ()))
    for batch in (1, 8):
        if batch == 8 and not any(row.endswith(" x8") for row in shape.rows):
            continue
        name = "dense" + (" x8" if batch == 8 else "")
        print(f"  {name}", flush=True)
        model = build(shape, run)
        kinds = ("eager", "graph", "fused", *(("compile",) if run.compile_limit else ()))
        if batch == 8:  # of which compilation alone takes a minute
            kinds = ("graph", "fused")
        found = modes(decoder(model, batch, run), run, kinds)
        read = dense_bytes(model)
        result["rows"][name] = {"modes": found, "bytes": read, "ms": fastest(found)}
        del model
        _free()
    for row in shape.rows:
        print(f"  {row}", flush=True)
        result["rows"][row] = sparse_row(row, shape, run, sparse_kinds)
        _free()
    for name, row in result["rows"].items():
        dense = result["rows"]["dense x8" if batch_of(name) == 8 else "dense"]
        row["over_dense"] = dense["ms"] / row["ms"]
        if "nothing" in result["rows"] and batch_of(name) == 1:
            row["over_own_dense"] = result["rows"]["nothing"]["ms"] / row["ms"]
        row["limit_ms"] = row["bytes"] / run.copy_gb_s / 1e6
        row["of_limit"] = row["limit_ms"] / row["ms"]
    return result


def sparse_row(row: str, shape: Shape, run: Run, kinds: tuple[str, ...]) -> dict[str, Any]:
    from fallow.gpu import ops
    from fallow.gpu.accelerate import replace

    model = build(shape, run)
    cuts = cuts_of(row, model, run)
    replace(model, layers_of(model), cuts, shape.title)
    _free()
    batch = batch_of(row)
    step = decoder(model, batch, run)
    if not run.tiny:
        with torch.inference_mode(), ops.tuning():
            step()
    counted = Bytes()
    with torch.inference_mode(), counted.counting():
        step()
    found = modes(step, run, kinds)
    return {
        "modes": found,
        "bytes": counted.read + dense_bytes(model, batch),
        "ms": fastest(found),
        "active_neurons": counted.neurons / counted.of if counted.of else None,
        "active_inputs": counted.inputs / counted.of_inputs if counted.of_inputs else None,
    }


# ------------------------------------------------------------------------------ the kernels alone


def kernels_alone(run: Run) -> list[dict[str, Any]]:
    """Each operator's share of the copy's bandwidth, over more weights than caches hold."""
    from fallow.gpu import ops

    d, width = (32, 80) if run.tiny else (4096, 14336)
    copies = 1 if run.tiny else 8
    new = partial(torch.randn, device=run.device, dtype=run.dtype)
    x, gate, weights = new(1, d), new(1, width), [new(width, d) for _ in range(copies)]
    size, found = x.element_size(), []

    def case(name: str, active: float, call: Callable[[torch.Tensor], object], rows: int) -> None:
        if not run.tiny:
            with ops.tuning():
                call(weights[0])
        again = lambda: [call(w) for w in weights]  # noqa: E731
        if run.tiny:
            again()
            us = 1.0
        else:
            us = 1000 * timed(captured(again), SimpleNamespace(tiny=False, seconds=0.2))["ms"]
            us /= copies
        gb_s = rows * d * size / us / 1e3
        found.append({"name": name, "active": active, "us": us, "of_copy": gb_s / run.copy_gb_s})
        print(f"  {name} {active:.0%}: {us:.1f} us, {gb_s / run.copy_gb_s:.0%}", flush=True)

    case("dense product", 1.0, lambda w: torch.nn.functional.linear(x, w), width)
    case("gemv", 1.0, lambda w: ops.gemv(x, w, None, "silu"), width)
    case("gemv, counted", 1.0, lambda w: ops.gemv(x, w, None, "silu", True), width)
    ops.thresholds(gate, None, 1, True)  # and zeroes what was counted
    for active in (0.5, 0.11):
        k = round(active * width)
        case("thresholds", active, lambda w, k=k: ops.thresholds(gate, None, k), 0)
        limit = ops.thresholds(gate, None, k)
        sparse = torch.where(gate.abs().float().view(torch.int32) > limit, gate, 0)
        case("gather_rows", active, lambda w, t=limit: ops.gather_rows(
            x, w, None, gate, None, t[0], None, None), k)  # fmt: skip
        case("gather_sum", active, lambda w, v=sparse: ops.gather_sum(
            v, None, "none", None, None, w, None, [d]), k)  # fmt: skip
    limit = ops.thresholds(gate, None, width // 2)
    case("gather_sum by threshold", 0.5, lambda w: ops.gather_sum(
        gate, None, "none", None, limit, w, None, [d]), width // 2)  # fmt: skip
    case("gemv and thresholds", 0.5, lambda w: ops.thresholds(
        ops.gemv(x, w, None, "silu", True), None, width // 2, True), width)  # fmt: skip
    return found


# -------------------------------------------------------------------------------------- correctness


def check(run: Run) -> bool:
    """Every kernel against float32 on the device, at odd and real sizes. Prints what fails."""
    right = True

    def same(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        nonlocal right
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        bad = not error < {torch.float32: 1e-5}.get(found.dtype, 1e-2)
        right = right and not bad
        if bad or run.tiny:
            print(f"  {'WRONG' if bad else 'right'} {name}: {error:.2e}", flush=True)

    odd, small, large = (24, 37), (2304, 5760), (4096, 14336)
    cases = [(torch.float32, odd, (1, 3, 8))]
    if not run.tiny:
        cases += [(torch.float16, odd, (1, 8)), (torch.float32, small, (1, 8)),
                  (HALF, odd, (1, 3, 8)), (HALF, small, (1, 8)), (HALF, large, (1, 8))]  # fmt: skip
    for dtype, (d, width), batches in cases:
        for batch in batches:
            for share in (0.0, 0.11, 0.5, 1.0):
                _check_once(f"{dtype} {d} {width} batch {batch} {share:.0%}", same, d, width,
                            batch, share, dtype, run.device)  # fmt: skip
        print(f"{dtype} {d} x {width}", flush=True)
    return right


def _check_once(
    name: str, same: Callable[..., None], d: int, width: int, batch: int, share: float,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    from fallow.gpu import ops

    new = partial(torch.randn, device=device)
    x, gate, up, down = (
        new(*shape).to(dtype) for shape in ((batch, d), (width, d), (width, d), (width, d))
    )
    weight, k = torch.rand(width, device=device), round(share * width)
    gate_act = ops.gemv(x, gate, None, "silu", True, weight)
    same(f"gemv {name}", gate_act, torch.nn.functional.silu(x.float() @ gate.float().T))
    score = gate_act.abs().float() * weight
    ranked = torch.cat([score.sort(1, descending=True).values, -torch.ones(batch, 1).to(score)], 1)
    active = score > ranked[:, k : k + 1]
    limit = ops.thresholds(gate_act, weight[None], k, True)
    one = torch.ones(1)
    for found in (limit, ops.thresholds(gate_act, weight[None], k)):
        right = torch.equal(score.view(torch.int32) > found[0][:, None], active)
        same(f"thresholds {name}", one if right else 2 * one, one)
    inter = ops.gather_rows(x, up, None, gate_act, weight, limit[0], None, None)
    args = (inter, None, "none", None, None, down, None, [d])
    out = ops.gather_sum(*args)
    if k == 0:
        same(f"nothing {name}", one if not inter.any() and not out.any() else 2 * one, one)
        return
    product = (x.float() @ up.float().T).to(dtype)
    same(f"gather_rows {name}", inter, gate_act.float() * product.float() * active)
    same(f"gather_sum {name}", out, inter.float() @ down.float())
    for _ in range(5):
        again = ops.gather_sum(*args)
        same(f"again {name}", one if torch.equal(out, again) else 2 * one, one)
    chosen = torch.where(active, gate_act, 0)
    value = torch.nn.functional.silu(chosen.float()).to(dtype) * gate_act
    ends = [d // 2, d // 2 + 3, d]
    limits = [0.1, 0.0, 0.3]
    bits = torch.tensor(limits, device=device).view(torch.int32)[:, None].contiguous()
    weights = torch.rand(3, width, device=device)
    parts, begin = [], 0
    for i, end in enumerate(ends):
        kept = value.float() * (value.abs().float() * weights[i] > limits[i])
        parts.append(kept @ down.float()[:, begin:end])
        begin = end
    found = ops.gather_sum(chosen, gate_act, "silu", weights, bits, down, None, ends)
    same(f"inputs {name}", found, torch.cat(parts, 1))


# ------------------------------------------------------------------------------------------- report


def record(run: Run, commit: str) -> dict[str, Any]:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    where = {
        "commit": commit or found or "unknown", "torch": torch.__version__,
        "triton": triton.__version__, "transformers": transformers.__version__,
        "card": "none", "driver": "none",
    }  # fmt: skip
    if not run.tiny:
        where["card"] = torch.cuda.get_device_name(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        where["driver"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return where


def report(folder: Path) -> str:
    lines = [
        "# Decoding on a GPU",
        "",
        "`benchmarks/gpu.py`: models of published shapes at full depth with random bfloat16",
        f"weights, one token at position {POSITION} of a static cache. Plans leave out the stated",
        "share of the random model's own activations, and what was active is counted in the run;",
        "quality is what other pages are about. Dense is the fastest of eager, a CUDA graph, one",
        "with all that lies between projections compiled (fused), and torch.compile",
        '(mode="reduce-overhead"); the others are measured as a graph, plain and fused. "nothing":',
        "our dense products in the places of torch's, and nothing left out, which is the engine's",
        "part of the gain; what leaving neurons out gains is the column over nothing, below 1",
        "where it loses. The limit is bytes over the bandwidth of a large copy on the same card.",
        "x8: eight sequences at once, whose active neurons are read if any of them needs them.",
        "What was measured is the commit that is named; kernels may have changed since.",
    ]
    for path in sorted(folder.glob("*.json")):
        lines += _card(json.loads(path.read_text()))
    return "\n".join(lines) + "\n"


def _card(found: dict[str, Any]) -> list[str]:
    where, top = found["where"], found["ceilings"]
    lines = [
        "",
        f"## {where['card']}",
        "",
        f"Commit {where['commit']}, driver {where['driver']}, torch {where['torch']}, triton "
        f"{where['triton']}, transformers {where['transformers']}. A copy of 4 GiB moves "
        f"{top['copy_gb_s']:.0f} GB/s, read and written; a product of 8192 x 8192 bf16 matrices "
        f"runs at {top['matmul_tflop_s']:.0f} TFLOP/s.",
        "",
        "| model | row | ms per token, median (least to most) | way | over dense | over nothing "
        "| GB per token | of the limit | active | joules per token |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in found["shapes"].values():
        for name, row in shape["rows"].items():
            lines.append(_row(shape["title"], name, row))
    lines += [
        "",
        "Kernels alone, d_model 4096, d_ff 14336, one token; of the copy's bandwidth:",
        "",
        "| operator | active | µs | of the bandwidth |",
        "|---|---|---|---|",
    ]
    for each in found["kernels"]:
        lines.append(
            f"| {each['name']} | {each['active']:.0%} | {each['us']:.1f} | "
            f"{each['of_copy']:.0%} |" if each["of_copy"] else
            f"| {each['name']} | {each['active']:.0%} | {each['us']:.1f} | |"
        )  # fmt: skip
    return lines


def _row(title: str, name: str, row: dict[str, Any]) -> str:
    way, mode = min(
        ((kind, m) for kind, m in row["modes"].items() if "ms" in m), key=lambda x: x[1]["ms"]
    )
    batch = batch_of(name)
    active = row.get("active_neurons") or row.get("active_inputs")
    own = f"{row['over_own_dense']:.2f}" if "over_own_dense" in row else ""
    joules = "" if mode["joules"] is None else f"{mode['joules'] / batch:.2f}"
    return (
        f"| {title} | {name} | {mode['ms'] / batch:.3f} ({mode['ms_min'] / batch:.3f} to "
        f"{mode['ms_max'] / batch:.3f}) | {way} | {row['over_dense']:.2f} | "
        f"{own} | "
        f"{row['bytes'] / batch / 1e9:.2f} | {row['of_limit']:.0%} | "
        f"{'' if active is None else f'{active:.1%}'} | {joules} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", help=", ".join(SHAPES))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each row and way")
    parser.add_argument("--compile-limit", type=float, default=90, help="seconds; 0: not compiled")
    parser.add_argument("--compile-sparse", action="store_true")
    parser.add_argument("--rows", nargs="*", help="only rows that begin so")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.report:
        (ROOT / "docs" / "results" / "gpu.md").write_text(report(arguments.out))
        return
    tiny = arguments.tiny
    run = Run(
        torch.device("cpu" if tiny else "cuda"), torch.float32 if tiny else HALF, tiny,
        arguments.seconds, arguments.compile_limit, arguments.compile_sparse,
    )  # fmt: skip
    if arguments.check:
        right = check(run)
        print("all right" if right else "WRONG, see above")
        sys.exit(not right)
    found: dict[str, Any] = {"where": record(run, arguments.commit), "ceilings": ceilings(run)}
    run.copy_gb_s = found["ceilings"]["copy_gb_s"]
    print(json.dumps(found), flush=True)
    found |= {"kernels": kernels_alone(run), "shapes": {}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{found['where']['card'].replace(' ', '-').lower()}.json"
    for name in arguments.shapes or SHAPES:
        print(name, flush=True)
        shape = SHAPES[name]
        if arguments.rows:
            chosen = tuple(r for r in shape.rows if r.startswith(tuple(arguments.rows)))
            shape = Shape(shape.title, shape.config, chosen)
        begin = time.monotonic()
        found["shapes"][name] = measure(shape, run)
        found["shapes"][name]["seconds"] = time.monotonic() - begin
        path.write_text(json.dumps(found, indent=1) + "\n")  # each shape at once: time is lent
        for row, one in found["shapes"][name]["rows"].items():
            print(f"  {row}: {one['ms']:.3f} ms, {one['over_dense']:.2f}x, "
                  f"{one['of_limit']:.0%} of the limit", flush=True)  # fmt: skip
    print(json.dumps({"file": str(path)}))


if __name__ == "__main__":
    main()
