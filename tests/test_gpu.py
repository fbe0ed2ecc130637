"""Sparse decoding on CUDA: kernels in Triton's interpreter, on the CPU, and models with them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is for x86-64 alone")

import fallow
import interpreted  # noqa: F401
from conftest import OWN_CONFIGS, VOCABULARY, WITH_RELU
from fallow.calibration.calibrator import Calibrator
from fallow.common.errors import FallowError, UsageError
from fallow.gpu import ops
from fallow.gpu.modules import ACTIVATIONS, threshold_bits
from fallow.plan import Cut, Plan
from test_sparsified import plain

D, WIDTH = 24, 37
BATCHES = (1, 3, 8)
# The interpreter takes products of several bfloat16 tokens for those of their bits as integers.
KINDS = [(b, k) for b in BATCHES for k in ("float32", "float16", "bfloat16")]
KINDS = [(b, k) for b, k in KINDS if b == 1 or (b, k) in ((3, "float16"), (b, "float32"))]
ERROR = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}  # rounding of terms, and of the sum


def draw(*shape: int, kind: str = "float32") -> torch.Tensor:
    return torch.randn(*shape).to(getattr(torch, kind))


def close(found: torch.Tensor, expected: torch.Tensor, kind: str) -> None:
    assert found.dtype == getattr(torch, kind)
    error = (found.double() - expected.double()).norm() / (expected.double().norm() + 1e-9)
    assert error <= ERROR[kind]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("batch", "kind"), KINDS)
@pytest.mark.parametrize("act", [*ACTIVATIONS, "none"])
def test_gemv(batch: int, kind: str, act: str) -> None:
    x, w, bias = draw(batch, D, kind=kind), draw(WIDTH, D, kind=kind), draw(WIDTH, kind=kind)
    for added in (None, bias):
        pre = x.double() @ w.double().T + (0 if added is None else added.double())
        expected = pre if act == "none" else ACTIVATIONS[act](pre)
        close(ops.gemv(x, w, added, act), expected, kind)


def active_of(values: torch.Tensor, weight: torch.Tensor | None, k: int) -> torch.Tensor:
    """(B, width) bool: by the smallest threshold that leaves at most k."""
    score = values.abs().float() * (1 if weight is None else weight)
    if k == values.shape[1]:
        return torch.ones_like(score, dtype=torch.bool)
    return score > score.sort(1, descending=True).values[:, k : k + 1]


@pytest.mark.parametrize("batch", [1, 3])  # each token of 8 has a program of its own, as of 3
@pytest.mark.parametrize("k", [0, 1, 18, WIDTH - 1, WIDTH])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_thresholds(batch: int, k: int, ties: bool, counted: bool) -> None:
    x, w, weight = draw(batch, D), draw(WIDTH, D), torch.rand(WIDTH)
    if ties:  # many equal, many zero
        x, w, weight = (x / 4).round(), (w / 4).round(), weight.round()
    for factor in (None, weight):
        values = ops.gemv(x, w, None, "none", counted, factor)
        found = ops.thresholds(values, None if factor is None else factor[None], k, counted)
        score = values.abs() * (1 if factor is None else factor)
        above = score.view(torch.int32) > found[0][:, None]
        assert torch.equal(above, active_of(values, factor, k))


def test_nan_is_active() -> None:
    x, w, up = draw(2, D), draw(WIDTH, D), draw(WIDTH, D)
    w[7] = float("nan")
    values = ops.gemv(x, w, None, "none", True)
    for bits in (
        ops.thresholds(values, None, 0, True)[0],
        ops.thresholds(values, None, 1)[0],
        threshold_bits([99.0], values.device),
    ):
        inter = ops.gather_rows(x, up, None, values, None, bits, None, None)
        assert inter[:, 7].isnan().all()
        assert inter.isnan().sum() == 2
        assert (inter == 0).sum() == 2 * (WIDTH - 1)
    values = draw(2, WIDTH)
    values[1, 7] = float("nan")
    bits = threshold_bits([9.0], values.device)[:, None]
    out = ops.gather_sum(values, None, "none", None, bits, up, None, [D])
    assert not out[0].isnan().any()
    assert out[1].isnan().all()


@pytest.mark.parametrize(("batch", "kind"), KINDS)
@pytest.mark.parametrize("limit", [-1.0, 0.3, 99.0])
@pytest.mark.parametrize("late", [False, True])
def test_gathers(batch: int, kind: str, limit: float, late: bool) -> None:
    """Of thresholds that leave all, some and no neurons, each token's another, or one for all."""
    x, up, down = (draw(n, D, kind=kind) for n in (batch, WIDTH, WIDTH))
    gate, bias, norm = draw(batch, WIDTH, kind=kind), draw(WIDTH, kind=kind), torch.rand(WIDTH)
    limits = [limit + i / 8 * (limit > 0) for i in range(1 if late else batch)]
    late_bits = threshold_bits([0.5], x.device) if late else None
    inter = ops.gather_rows(
        x, up, bias, gate, norm, threshold_bits(limits, x.device), norm if late else None, late_bits
    )
    active = gate.abs().float() * norm > torch.tensor(limits)[:, None]
    product = (x.double() @ up.double().T + bias.double()).to(gate.dtype)
    expected = gate * product * active
    if late:
        expected = expected * (expected.abs().float() * norm > 0.5)
    close(inter, expected, kind)
    assert not inter[~active].any()
    for added in (None, draw(D, kind=kind)):
        summed = inter.double() @ down.double()
        if added is not None:
            summed += added.double()
        out = ops.gather_sum(inter, None, "none", None, None, down, added, [D])
        close(out, summed, kind)
        again = ops.gather_sum(inter, None, "none", None, None, down, added, [D])
        assert torch.equal(out, again)


TILES = [(name, tile) for name, (tiles, _) in ops.TILES.items() for tile in tiles]


@pytest.mark.parametrize(("name", "tile"), TILES)
def test_tiles(name: str, tile: ops.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `tuning` may choose, of one token; lists that are full before a program has its rows."""
    monkeypatch.setattr(ops, "TILES", {name: ((tile,), ())})
    monkeypatch.setattr(ops, "LONGEST_LIST", 64)
    x, w, gate = draw(1, D), draw(200, D), draw(1, 200)
    if name == "gemv":
        close(ops.gemv(x, w, None, "none"), x.double() @ w.double().T, "float32")
    elif name == "gather_rows":
        bits = threshold_bits([0.7], x.device)
        expected = gate * (x.double() @ w.double().T) * (gate.abs() > 0.7)
        close(ops.gather_rows(x, w, None, gate, None, bits, None, None), expected, "float32")
    else:
        expected = (gate * (gate.abs() > 0.7)).double() @ w.double()
        bits = threshold_bits([0.7], x.device)[:, None]
        close(ops.gather_sum(gate, None, "none", None, bits, w, None, [D]), expected, "float32")


@pytest.mark.parametrize(("batch", "kind"), KINDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_inputs(batch: int, kind: str, gated: bool, weighted: bool) -> None:
    """Three segments with a threshold each, of a width that blocks do not divide."""
    x, up = draw(batch, 2 * D, kind=kind).chunk(2, 1)
    w, limits, ends = draw(D, 310, kind=kind), [0.4, -1.0, 0.9], [10, 280, 310]
    weight = torch.rand(3, D) + 0.5 if weighted else None
    bits = threshold_bits(limits, x.device)[:, None]
    value = torch.nn.functional.silu(x.float()).to(x.dtype) * up if gated else x
    expected, begin = [], 0
    for i, (limit, end) in enumerate(zip(limits, ends, strict=True)):
        score = value.abs().float() * (1 if weight is None else weight[i])
        expected.append((value * (score > limit)).double() @ w[:, begin:end].double())
        begin = end
    found = ops.gather_sum(x, up if gated else None, "silu", weight, bits, w, None, ends)
    close(found, torch.cat(expected, 1), kind)


IDS = torch.from_numpy(np.random.default_rng(1).integers(2, VOCABULARY, (8, 5)))


def both(folder: Path, plan: Plan, batches: tuple[int, ...]) -> list[torch.Tensor]:
    """Logits of some tokens and of a step's, sparsified and accelerated, for each batch."""
    found = []
    for apply in (fallow.sparsify, fallow.accelerate):
        module = apply(plain(folder, dtype=torch.float32), plan)
        for batch in batches:
            with torch.inference_mode():
                logits = [module(ids).logits for ids in (IDS[:batch], IDS[:batch, 1:2])]
            found.append(torch.cat(logits, 1))
    return found


def compare(folder: Path, plan: Plan, batches: tuple[int, ...] = (1, 3)) -> None:
    found, n = both(folder, plan, batches), len(batches)
    for expected, accelerated in zip(found[:n], found[n:], strict=True):
        assert torch.allclose(accelerated, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("llama", "gate_topk"), ("llama", "two_stage"), ("llama", "topk"), ("llama", "teal"),
        ("llama", "wina"), ("phi3", "gate_topk"), ("phi3", "teal"), ("gemma3", "cats"),
        ("qwen2", "teal"), ("granite", "two_stage"), ("phi", "topk"), ("opt", "relu"),
        ("nemotron", "wina"), ("gpt_neox", "teal"), ("llama", "scap"), ("phi3", "wina_uniform"),
    ],
)  # fmt: skip
def test_models_are_as_sparsified(
    name: str, rule: str, folders: dict[str, Path], calibrators: dict[str, Calibrator]
) -> None:
    sparsity = 0.0 if rule == "relu" else 0.5
    batches = BATCHES if rule == "gate_topk" else (1, 3)
    compare(folders[name], calibrators[name].plan(rule, sparsity=sparsity, measure=False), batches)


@pytest.mark.parametrize("name", [n for n in WITH_RELU if n not in ("bitnet", *OWN_CONFIGS)])
def test_exact_zeros_change_nothing(name: str, folders: dict[str, Path]) -> None:
    dense = plain(folders[name], dtype=torch.float32)
    with torch.inference_mode():
        expected = dense(IDS[:1]).logits
        found = fallow.accelerate(dense)(IDS[:1]).logits
    assert torch.allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("bamboo", "ReLU of up_proj"),
        ("bitnet", "norm before down_proj"),
        ("sparsellama", "FATReLU"),
    ],
)
def test_ffns_that_no_kernel_has(name: str, missing: str, folders: dict[str, Path]) -> None:
    with pytest.raises(FallowError, match=f"no GPU kernel has the {missing} of .*{name}"):
        fallow.accelerate(fallow.load(folders[name]))


def test_a_layer_without_a_cut_stays_dense(
    folders: dict[str, Path], calibrators: dict[str, Calibrator]
) -> None:
    plan = calibrators["llama"].plan("teal", sparsity=0.5, measure=False)
    cuts = []
    for cut in plan.cuts:
        value = cut.value.copy()
        value[0] = -1
        if cut.tap in ("k_proj", "up_proj", "down_proj"):
            value[1] = -1
        cuts.append(Cut(cut.tap, cut.kind, value))
    compare(folders["llama"], Plan(**(vars(plan) | {"cuts": tuple(cuts)})))


def test_generate(folders: dict[str, Path], calibrators: dict[str, Calibrator]) -> None:
    plan = calibrators["llama"].plan("gate_topk", sparsity=0.5, measure=False)
    texts = []
    for apply in (fallow.sparsify, fallow.accelerate):
        module = apply(plain(folders["llama"], dtype=torch.float32), plan)
        texts.append(module.generate(IDS[:2], max_new_tokens=4, do_sample=False).tolist())
    assert texts[0] == texts[1]


def test_errors(folders: dict[str, Path], calibrators: dict[str, Calibrator]) -> None:
    plan = calibrators["llama"].plan("gate_topk", sparsity=0.5, measure=False)
    with pytest.raises(UsageError, match="Linear is no transformers model"):
        fallow.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(FallowError, match="not for"):
        fallow.accelerate(plain(folders["qwen2"]), plan)
    with pytest.raises(UsageError, match="has no ReLU"):
        fallow.accelerate(plain(folders["llama"]))
    with pytest.raises(FallowError, match="by tail"):
        fallow.accelerate(plain(folders["llama"]), calibrators["llama"].plan("tail", sparsity=0.5))
    with pytest.raises(UsageError, match="float64"):
        fallow.accelerate(plain(folders["llama"], dtype=torch.float64))
    for cuts, words in (
        ([Cut("ffn_out", "threshold", 0.1)], "cuts of ffn_out"),
        ([Cut("up", "threshold", 0.1)], "cuts of up"),
        ([Cut("q_proj", "threshold", 0.1), Cut("inter", "topk", 0.5)], "cuts of inter beside"),
        ([Cut("gate_act", "topk", 0.5), Cut("inter", "topk", 0.5)], "gate_act and of inter"),
    ):
        layers = [cut.of_layers(2) for cut in cuts]
        other = Plan(**(vars(plan) | {"cuts": tuple(layers)}))
        with pytest.raises(FallowError, match=words):
            fallow.accelerate(plain(folders["llama"]), other)


def test_a_model_elsewhere_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match=r'is on cpu; move it: model.to\("cuda"\)'):
        fallow.accelerate(plain(folders["opt"]))


BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def test_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its whole path, at tiny sizes in the interpreter."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    benchmark = importlib.import_module(BENCHMARK.stem)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--check"])
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert not stop.value.code, capsys.readouterr().out
    options = ("--tiny", "--rows", "gate", "teal 50", "relu", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "8b", "2.4b", *options])
    benchmark.main()
    file = json.loads(capsys.readouterr().out.splitlines()[-1])["file"]
    rows = json.loads(Path(file).read_text())["shapes"]["8b"]["rows"]
    assert rows["gate_topk 50"]["active_neurons"] == 0.5
    assert 0.3 < rows["teal 50"]["active_inputs"] < 0.7
    assert rows["teal 50"]["bytes"] < rows["gate_topk 50"]["bytes"] < rows["dense"]["bytes"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_device() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--check"],
        env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
