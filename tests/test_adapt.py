"""Adaptation: rounding as the packer's, what is trained, stopping, going on, and bad input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fallow
from fallow.adaptation import adapter, rounding, texts
from fallow.adaptation.adapter import AdaptReport, AdaptSettings, adapt
from fallow.adaptation.budgets import allocate, measured_at
from fallow.adaptation.rounding import ROUNDINGS
from fallow.adaptation.students import TRAINED, LowRank, finish, prepare, renew_rounding
from fallow.common.errors import FallowError, UsageError
from fallow.engine.engine import Engine
from fallow.models.cuts import cut_taps
from fallow.packing.quantize import QUANT_TYPES, dequantize, quantize
from fallow.plan import Cut, Plan

SMALL = AdaptSettings(tokens=16384, context=32, batch=8, learning_rate=3e-4, budgets="even")


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer windows than real texts have are held out of the tiny one."""
    monkeypatch.setattr(texts, "HELD_OUT", 4)


@pytest.fixture(scope="session")
def taught(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, AdaptReport]:
    """A tiny llama after a short adaptation, in Q8_0."""
    folder = tmp_path_factory.mktemp("adapted") / "taught"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fallow.adaptation.texts.HELD_OUT", 4)
        return folder, adapt(folders["llama"], folder, SMALL, text=[texts[0]])


# Rounding ----------------------------------------------------------------------------------------


def matrix(rows: int = 24, cols: int = 512) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, cols)) * rng.uniform(0.01, 3, (rows, 1))
    values[3, :64], values[5, :32], values[6, :32] = 0, 1.5, -2
    return values.astype(np.float32)


def test_every_type_of_the_packer_can_be_trained_for() -> None:
    assert set(ROUNDINGS) == set(QUANT_TYPES)


@pytest.mark.parametrize("kind", [k for k in QUANT_TYPES if not k.endswith("_K")])
def test_rounding_is_the_packers(kind: str) -> None:
    values = matrix()
    rounded = ROUNDINGS[kind](torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(rounded, dequantize(quantize(values, kind)))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_rounding_to_a_k_type_is_nearly_the_packers(kind: str) -> None:
    values = matrix()
    rounded = ROUNDINGS[kind](torch.from_numpy(values)).numpy()
    packed = dequantize(quantize(values, kind))
    assert np.square(rounded - values).sum() < 1.15 * np.square(packed - values).sum()
    # What it leaves is what the packer keeps.
    again = dequantize(quantize(rounded, kind))
    assert np.square(again - rounded).sum() < 1e-3 * np.square(packed - values).sum()


# What is trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "opt"])
def test_a_student_begins_as_the_model(folders: dict[str, Path], name: str, trained: str) -> None:
    model = fallow.load(folders[name])
    ids = torch.arange(2, 30)[None]
    before = model.module(input_ids=ids).logits
    parameters = prepare(model.module, model.layers, trained, 4, {})
    assert parameters
    assert all(p.requires_grad for p in parameters)
    after = model.module(input_ids=ids).logits
    torch.testing.assert_close(after, before)
    after.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    finish(model.module)
    torch.testing.assert_close(model.module(input_ids=ids).logits, before)


def test_a_low_rank_change_is_merged() -> None:
    weight = torch.randn(5, 7)
    change = LowRank(weight, 2)
    with torch.no_grad():
        change.out.normal_()
    torch.testing.assert_close(change(weight), weight + change.out @ change.into)


def test_what_is_not_trained_keeps_its_values(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, held_out: None
) -> None:
    settings = replace(SMALL, train="ffn", tokens=512)
    adapt(folders["llama"], tmp_path / "out", settings, text=[texts[0]])
    before, after = (fallow.load(f) for f in (folders["llama"], tmp_path / "out"))
    old, new = (dict(m.module.named_parameters()) for m in (before, after))
    changed = {name for name in old if not torch.equal(old[name].bfloat16(), new[name].bfloat16())}
    assert changed
    assert all(".mlp." in name for name in changed)


@pytest.mark.parametrize("trained", ["layers", "lora"])
def test_weights_are_rounded_together_as_one_by_one(
    folders: dict[str, Path], trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "AT_ONCE", 5000)  # some matrices of the model
    model = fallow.load(folders["llama"], "float32")
    parts = dict(model.module.named_modules())
    names = {f"{n}.weight": "F16" if "attn" in n else "BF16" for n in parts if n.endswith("proj")}
    prepare(model.module, model.layers, trained, 4, names)
    renew_rounding(model.module)
    for name, kind in names.items():
        part = parts[name.removesuffix(".weight")]
        before = part.parametrizations.weight.original
        torch.testing.assert_close(part.weight, ROUNDINGS[kind](before.float()), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_the_gpus_cut_is_the_cpus(
    folders: dict[str, Path], kept: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is for x86-64 alone")
    from fallow.adaptation.topk import topk_taps

    layers = fallow.load(folders["llama"]).layers
    width = layers[0].down_proj.in_features
    weight = np.random.default_rng(0).uniform(0, 2, (len(layers), width))
    for given in (weight, "column_norm", None):
        cut = Cut("inter", "topk", kept, given).of_layers(len(layers))
        values = torch.randn(5, width).to(getattr(torch, kind))
        values[0, :9] = values[0, 9]  # ties
        values[1] = 0
        found, wanted = values.clone().requires_grad_(), values.clone().requires_grad_()
        one = topk_taps([cut], layers)["inter"](1, found)
        other = cut_taps([cut], layers, "llama")["inter"](1, wanted)
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        for result in (one, other):
            result.sum().backward()
        torch.testing.assert_close(found.grad, wanted.grad * (values != 0))


# A run -------------------------------------------------------------------------------------------


def test_it_learns_to_live_with_the_rule(taught: tuple[Path, AdaptReport]) -> None:
    _, report = taught
    first, last = report.checks[0], report.checks[-1]
    assert last.kl < 0.9 * first.kl
    assert report.best.kl == min(c.kl for c in report.checks)
    assert report.tokens == last.tokens == 16384


def test_the_folder_is_an_ordinary_model_with_a_plan(
    taught: tuple[Path, AdaptReport], texts: tuple[Path, Path]
) -> None:
    folder, report = taught
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not any("parametrizations" in name for name, _ in module.named_parameters())
    model, plan = fallow.load(folder), Plan.load(folder / "fallow.plan")
    assert (plan.fingerprint, plan.rule) == (model.fingerprint, "gate_topk")
    assert report.fingerprint != model.fingerprint
    found = fallow.evaluate(model, plan, texts[1], context=32, windows=4)
    assert found.sparsity_ratio["inter"] == pytest.approx(0.5, abs=0.02)
    said = json.loads((folder / "adapted.json").read_text())
    assert said["best"]["kl"] == report.best.kl
    assert [t["sha256"] for t in said["texts"]] == [t["sha256"] for t in report.texts]


def test_the_engine_runs_it_as_the_reference(
    taught: tuple[Path, AdaptReport], tmp_path: Path
) -> None:
    folder, _ = taught
    plan = Plan.load(folder / "fallow.plan")
    fallow.pack(folder, tmp_path / "packed.gguf", quant="f32", plan=plan)
    model, engine = fallow.load(folder, "float32"), Engine(tmp_path / "packed.gguf", threads=1)
    ids = np.arange(2, 24)
    with model.sparse(plan):
        wanted = model.logits(model.hidden(ids[None]))[0].numpy()
    # Of a tie the two may keep different neurons, from where on logits differ.
    assert np.median(np.abs(engine.logits(ids) - wanted)) < 2e-3


@pytest.mark.parametrize(
    ("kl", "ends"),
    [
        ([0.270, 0.152, 0.156, 0.154, 0.1524], False),  # the rate is near its peak
        ([0.27, 0.15, 0.18, 0.19, 0.16], False),  # on its way back
        ([0.27, 0.15, 0.18, 0.19], False),
        ([0.27, 0.15, 0.18, 0.19, 0.18], True),
        ([0.27, 0.4, 0.5, 0.6], True),
        ([0.27, 0.4, 0.5], False),
        ([], False),
    ],
)
def test_only_a_run_that_gets_much_worse_ends_early(kl: list[float], ends: bool) -> None:
    checks = [adapter.Check(0, 0.0, value, 0.0, None, 0.0) for value in kl]
    assert adapter.is_worse(checks) == ends


def test_a_stopped_run_goes_on_to_the_same_model(
    folders: dict[str, Path],
    texts: tuple[Path, Path],
    tmp_path: Path,
    held_out: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(name: str) -> AdaptReport:
        settings = replace(SMALL, tokens=4096)
        return adapt(folders["llama"], tmp_path / name, settings, text=[texts[0]])

    whole = run("whole")
    step = adapter._Run.train_step

    def stop(self: Any, windows: np.ndarray) -> float:
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self, windows)

    monkeypatch.setattr(adapter._Run, "train_step", stop)
    monkeypatch.setattr(adapter, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    assert not (tmp_path / "stopped").exists()
    assert (tmp_path / "stopped.adapting" / "state.pt").exists()
    monkeypatch.setattr(adapter._Run, "train_step", step)
    again = run("stopped")
    assert [c.kl for c in again.checks] == [c.kl for c in whole.checks]
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "stopped.adapting").exists()


def test_a_rate_is_found(
    folders: dict[str, Path],
    texts: tuple[Path, Path],
    tmp_path: Path,
    held_out: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter, "RATES", (1e-9, 3e-4, 1e9))
    settings = replace(SMALL, learning_rate=None)
    assert adapt(folders["llama"], tmp_path / "a", settings, text=[texts[0]]).learning_rate == 3e-4


def test_a_gguf_is_trained_in_its_own_types(tmp_path: Path, smollm2: fallow.Model) -> None:
    types = adapter._types(smollm2, "smollm2", None)
    assert types["model.layers.3.mlp.gate_proj.weight"] == "Q4_1"
    assert types["model.layers.3.mlp.down_proj.weight"] == "Q5_0"
    assert types["model.embed_tokens.weight"] == "Q8_0"


def test_an_adapted_folder_is_packed_in_the_types_it_learned(
    taught: tuple[Path, AdaptReport], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(taught[0], tmp_path / "copy"))
    said = json.loads((folder / "adapted.json").read_text())
    names = fallow.load(folder).module.state_dict()
    said["types"] = {n: "F32" if "gate_proj" in n or "down_proj" in n else "F16" for n in names}
    (folder / "adapted.json").write_text(json.dumps(said))
    fallow.pack(folder, tmp_path / "packed.gguf")
    engine = Engine(tmp_path / "packed.gguf", threads=1)
    kinds = [engine.matrix(f"layers.0.{n}").type for n in ("gate_proj", "up_proj", "down_proj_t")]
    assert kinds == ["F32", "F16", "F32"]
    said["types"] = ["F32"]
    (folder / "adapted.json").write_text(json.dumps(said))
    with pytest.raises(FallowError, match=r"adapted.json is damaged"):
        fallow.pack(folder, tmp_path / "other.gguf")


# Budgets ---------------------------------------------------------------------------------------


def test_layers_that_matter_less_leave_out_more() -> None:
    costs = np.outer([1.0, 1.0, 9.0], [0.1, 0.4, 1.6])
    shares = allocate(costs, 0.4)
    assert shares.mean() == pytest.approx(0.4)
    assert shares[2] < shares[0] == pytest.approx(shares[1], abs=0.011)
    assert (shares >= 0.2 - 1e-9).all()
    assert (shares <= 0.7 + 1e-9).all()
    # No other of the same mean costs less.
    levels = measured_at(0.4)

    def cost(found: np.ndarray) -> float:
        logs = [np.interp(s, levels, np.log(c)) for s, c in zip(found, costs, strict=True)]
        return float(np.exp(logs).sum())

    for change in ((0.02, -0.02, 0), (-0.02, 0, 0.02), (0.02, 0, -0.02)):
        assert cost(shares + change) > cost(shares) - 1e-3


def test_budgets_are_measured(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, held_out: None
) -> None:
    settings = replace(SMALL, tokens=512, budgets="measured", anneal=0.5)
    adapt(folders["llama"], tmp_path / "out", settings, text=[texts[0]])
    kept = Plan.load(tmp_path / "out" / "fallow.plan").cuts[0].value
    assert kept.mean() == pytest.approx(0.5, abs=1e-6)
    assert kept.min() < kept.max()
    model = fallow.load(tmp_path / "out")
    found = fallow.evaluate(
        model, Plan.load(tmp_path / "out" / "fallow.plan"), texts[1], context=32, windows=4
    )
    assert found.sparsity_ratio["inter"] == pytest.approx(0.5, abs=0.03)
    with pytest.raises(UsageError, match="--budgets measured: gate_tail at 50% does not keep one"):
        adapt(
            folders["llama"], tmp_path / "b", replace(settings, rule="gate_tail"), text=[texts[0]]
        )


# Texts -------------------------------------------------------------------------------------------


def test_shares_are_kept_and_held_out_windows_never_read() -> None:
    def windows(first: int, n: int) -> np.ndarray:
        return np.arange(first, first + n)[:, None].repeat(8, axis=1)

    read = [fallow_text("a"), fallow_text("b")]
    mixture = texts.mix(read, [windows(0, 40), windows(100, 80)], (3, 1), seed=0)
    seen = mixture.batch(400)[:, 0]
    assert (seen < 100).mean() == pytest.approx(0.75)
    assert not set(seen) & set(mixture.held_out[:, 0])
    assert set(seen[:32][seen[:32] < 100]) != set(range(24))  # in an order of its own
    assert len(mixture.held_out) == texts.HELD_OUT
    assert mixture.epochs(400) == pytest.approx([300 / 32, 100 / 72])


def fallow_text(name: str) -> Any:
    from fallow.checkpoints.text import Text

    return Text(name, name)


def test_a_model_writes_its_own_text(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, held_out: None
) -> None:
    settings = replace(SMALL, sampled=0.5, tokens=512)
    report = adapt(folders["llama"], tmp_path / "out", settings, text=[texts[0]])
    assert [t["share"] for t in report.texts] == [0.5, 0.5]
    assert report.texts[1]["name"].startswith("sampled from")


def test_what_is_written_begins_as_windows_do() -> None:
    windows = np.random.default_rng(0).integers(2, 40, (80, 24))
    windows[:, 0] = 1
    mixture = texts.mix([fallow_text("a")], [windows], (), seed=0, bos=1)
    begin = texts.prefixes(mixture, 64, np.random.default_rng(0))
    assert (begin[:, 0] == 1).all()
    assert (begin[:, 1:] > 1).all()
    length = texts.PREFIX - 1
    pieces = np.lib.stride_tricks.sliding_window_view(windows[:, 1:], length, axis=1)
    assert {tuple(row) for row in begin[:, 1:]} <= {
        tuple(row) for row in pieces.reshape(-1, length)
    }


def test_what_it_writes_is_likely_to_the_model(folders: dict[str, Path]) -> None:
    """Drawn token by token from the model's own distribution, after a piece of the text."""
    model = fallow.load(folders["llama"], "float32")
    windows = np.random.default_rng(0).integers(2, 40, (80, 24))
    mixture = texts.mix([fallow_text("a")], [windows], (), seed=0)
    begin = texts.prefixes(mixture, 64, np.random.default_rng(0))
    assert begin.shape == (64, texts.PREFIX)
    pieces = np.lib.stride_tricks.sliding_window_view(windows, texts.PREFIX, axis=1)
    assert {tuple(row) for row in begin} <= {tuple(row) for row in pieces.reshape(-1, texts.PREFIX)}
    torch.manual_seed(0)
    written = texts._write(model.module, begin, 24)
    assert written.shape == (64, 24)
    np.testing.assert_array_equal(written[:, : texts.PREFIX], begin)
    logits = model.logits(model.hidden(written))[:, texts.PREFIX - 1 : -1]
    log_p = logits.log_softmax(dim=-1)
    drawn = torch.from_numpy(written[:, texts.PREFIX :])
    losses = -log_p.gather(-1, drawn[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    spread = float((losses - entropy).std()) / losses.numel() ** 0.5
    assert abs(float((losses - entropy).mean())) < 4 * spread


def test_writing_fits_itself_to_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(module: Any, begin: np.ndarray, context: int) -> np.ndarray:
        if len(begin) > 3:
            raise torch.OutOfMemoryError
        return begin

    monkeypatch.setattr(texts, "_write", write)
    begin = np.arange(20).reshape(10, 2)
    np.testing.assert_array_equal(texts._write_what_fits(None, begin, 2), begin)
    monkeypatch.setattr(texts, "_write", lambda *_: write(None, np.zeros(9), 2))
    with pytest.raises(torch.OutOfMemoryError):
        texts._write_what_fits(None, begin, 2)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "--tokens 0 is not positive"),
        ({"train": "head"}, "unknown --train 'head'; known: layers, ffn, lora, scales"),
        ({"sparsity": 1.0}, r"sparsity 1 is outside \[0, 1\)"),
        ({"rule": "oracle"}, "is a selector"),
        ({"quant": "q9"}, "unknown type 'q9'"),
        ({"anneal": 2.0}, "--anneal 2.0 is outside 0 to 1"),
        ({"budgets": "fair"}, "unknown --budgets 'fair'; known: even, measured"),
        ({"minutes": float("nan")}, "--minutes nan is not positive"),
        ({"activation": "relu"}, "--activation relu makes zeros, which need no rule"),
        (
            {"activation": "swish", "rule": "relu"},
            "unknown --activation .swish.; known: relu, drelu",
        ),
        ({"l1": -1.0}, "--l1 -1.0 is not 0 or more"),
        ({"l1": 0.1}, "--l1 makes more zeros of a ReLU"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **changes).check()


def test_bad_input(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, run: Any, held_out: None
) -> None:
    out = tmp_path / "out"
    common = ("adapt", folders["llama"], "-o", out, "--text", texts[0], "--context", 32)
    cases = [
        (("--tokens", "many"), 2, "--tokens 'many' is no number of tokens such as 300000 or 20M"),
        (("--shares", "1,2"), 2, "--shares gives 1, 2 for 1 texts"),
        (("--device", "tpu"), 2, "unknown device 'tpu'"),
        (("--quant", "q4_k"), 1, "rows of 24 weights of model.layers.0.self_attn.q_proj.weight"),
        (("--context", 120), 1, "windows of 120 tokens, of which 4 are held out"),
    ]
    for options, code, message in cases:
        found = run(*common, "--tokens", 512, "--learning-rate", 1e-3, *options)
        assert (found.code, message in found.err) == (code, True), found.err
        assert not out.exists()
        shutil.rmtree(tmp_path / "out.adapting", ignore_errors=True)
    out.mkdir()
    assert "it is there and no file" in run(*common, "--tokens", 512).err


def test_a_stopped_run_of_other_settings_is_refused(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, held_out: None
) -> None:
    work = tmp_path / "out.adapting"
    work.mkdir()
    settings = replace(SMALL, tokens=512)
    (work / "settings.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(FallowError, match="is of a stopped run with another rule"):
        adapt(folders["llama"], tmp_path / "out", settings, text=[texts[0]])


def test_nan_is_said(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, held_out: None
) -> None:
    settings = replace(SMALL, learning_rate=1e30)
    with pytest.raises(FallowError, match=r"the KL is nan after .* give a lower --learning-rate"):
        adapt(folders["llama"], tmp_path / "out", settings, text=[texts[0]])
    assert not (tmp_path / "out").exists()


def test_the_command(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path: Path, run: Any, held_out: None
) -> None:
    command = (
        "adapt", folders["llama"], "-o", tmp_path / "out", "--text", texts[0], "--tokens", "1k",
        "--context", 32, "--batch", 4, "--learning-rate", 3e-4, "--train", "lora", "--anneal", 0.5,
        "--sampled", 0, "--json",
    )  # fmt: skip
    found = run(*command)
    assert found.code == 0, found.err
    assert found.json["settings"]["train"] == "lora"
    assert 0 < found.json["tokens"] <= 1024


# Another activation ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rectified(
    folders: dict[str, Path], texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, float], tuple[Path, AdaptReport]]:
    """A tiny llama that learned each of REPLACEMENTS, and ReLU with a large l1."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fallow.adaptation.texts.HELD_OUT", 4)
        for act, l1 in (("relu", 0.0), ("drelu", 0.0), ("relu", 3.0)):
            folder = tmp_path_factory.mktemp("rectified") / act
            settings = replace(SMALL, rule="relu", sparsity=0.0, activation=act, l1=l1)
            found[act, l1] = folder, adapt(folders["llama"], folder, settings, text=[texts[0]])
    return found


@pytest.mark.parametrize(("act", "l1"), [("relu", 0.0), ("drelu", 0.0), ("relu", 3.0)])
def test_a_model_learns_another_activation(
    rectified: dict[tuple[str, float], tuple[Path, AdaptReport]],
    texts: tuple[Path, Path],
    tmp_path: Path,
    act: str,
    l1: float,
) -> None:
    folder, report = rectified[act, l1]
    assert json.loads((folder / "config.json").read_text())["hidden_act"] == act
    first, best = report.checks[0], report.best
    assert best.loss < first.loss
    model = fallow.load(folder, "float32")
    gate, up = (model.layers[0].ffn_inputs[name] for name in ("gate_proj", "up_proj"))
    x = torch.randn(5, gate.in_features)
    raw = torch.nn.functional.linear(x, up.weight)
    torch.testing.assert_close(up(x), raw.relu() if act == "drelu" else raw)
    torch.testing.assert_close(model.layers[0].act(gate(x)), gate(x).relu())
    seen = fallow.profile(model, texts[1], context=32, windows=4)
    assert seen.summary["natural_sparsity"] == pytest.approx(best.sparsity, abs=0.1)
    fallow.pack(folder, tmp_path / "packed.gguf", quant="f32")
    engine = Engine(tmp_path / "packed.gguf", threads=1)
    ids = np.arange(2, 24)
    wanted = model.logits(model.hidden(ids[None]))[0].detach().numpy()
    np.testing.assert_allclose(engine.logits(ids), wanted, rtol=0, atol=0.01 * wanted.std())


def test_drelu_and_l1_make_more_zeros(
    rectified: dict[tuple[str, float], tuple[Path, AdaptReport]],
) -> None:
    zeros = {key: report.best.sparsity for key, (_, report) in rectified.items()}
    assert zeros["relu", 0.0] < zeros["drelu", 0.0]
    assert zeros["relu", 0.0] < zeros["relu", 3.0]
    penalties = [check.l1 for check in rectified["relu", 3.0][1].checks]
    assert penalties[-1] < 0.9 * penalties[0]


def test_transformers_opens_a_model_with_relu(
    rectified: dict[tuple[str, float], tuple[Path, AdaptReport]],
) -> None:
    folder, _ = rectified["relu", 0.0]
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = torch.arange(2, 24)[None]
    model = fallow.load(folder, "float32")
    torch.testing.assert_close(module(ids).logits, model.logits(model.hidden(ids.numpy())))


@pytest.mark.parametrize(
    ("name", "act", "message"),
    [
        ("phi3", "drelu", "phi3 models have no gate_proj and up_proj"),
        ("bamboo", "relu", "the activation of bamboo models is no setting of theirs"),
    ],
)
def test_an_activation_that_a_model_cannot_have_is_refused(
    folders: dict[str, Path],
    texts: tuple[Path, Path],
    tmp_path: Path,
    held_out: None,
    name: str,
    act: str,
    message: str,
) -> None:
    settings = replace(SMALL, rule="relu", sparsity=0.0, activation=act)
    with pytest.raises(FallowError, match=message):
        adapt(folders[name], tmp_path / "out", settings, text=[texts[0]])
