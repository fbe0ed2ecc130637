"""Gemma 3n, Gemma 4 and Qwen3.5 in transformers; of these the engine runs Gemma 4 alone.

What all architectures have in common is tested beside the others, by their names.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import fallow
from conftest import UNPACKED, VOCABULARY, engine_plan, make_folder, make_tokenizer
from fallow.adaptation.adapter import AdaptSettings, adapt
from fallow.checkpoints.text import cut_windows, load_text
from fallow.engine.engine import Engine
from fallow.models.taps import attach
from fallow.plan import Cut, Plan
from test_models import kept_of_gate, message, write_gguf

IDS = np.random.default_rng(3).integers(2, VOCABULARY, (2, 21))
Texts = tuple[Path, Path]
NAMES = (*UNPACKED, "gemma4")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of these models alone, and of a Gemma 3."""
    root = tmp_path_factory.mktemp("unpacked")
    return {name: make_folder(name, root / name) for name in (*NAMES, "gemma3")}


def by_hand(plan: str, model: fallow.Model, *cuts: Cut) -> Plan:
    return Plan(plan, model.fingerprint, "by hand", 0.0, "", cuts)


def steps(mlp: Any, x: torch.Tensor, share: float = 0.0) -> Iterator[torch.Tensor]:
    """An FFN, step by step: gate_pre, gate_act, up."""
    gate = x @ mlp.gate_proj.weight.T
    if share:
        gate = kept_of_gate(gate.flatten(0, -2), share).reshape(gate.shape)
    yield gate
    is_gelu = "Gemma" in type(mlp).__name__
    yield nn.functional.gelu(gate, approximate="tanh") if is_gelu else nn.functional.silu(gate)
    yield x @ mlp.up_proj.weight.T


# Gemma 3n's own sparsity of each layer.
SHARES = {"gemma3n": (0.7, 0.7, 0.0, 0.0)}


@pytest.mark.parametrize("name", NAMES)
def test_taps_are_what_hooks_see(name: str, own: dict[str, Path]) -> None:
    model = fallow.load(own[name])
    taps = ("x", "gate_pre", "gate_act", "up", "inter", "ffn_out")
    tapped: dict[tuple[str, int], torch.Tensor] = {}
    hooked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(tap: str) -> Any:
        return lambda layer, value: tapped.__setitem__((tap, layer), value.clone())

    with ExitStack() as stack:
        for i, block in enumerate(model.module.model.layers):

            def hook(_module: Any, args: Any, output: torch.Tensor, i: int = i) -> None:
                hooked[i] = args[0].flatten(0, 1), output.flatten(0, 1)

            stack.callback(block.mlp.register_forward_hook(hook).remove)
        stack.enter_context(attach(model.layers, {tap: keep(tap) for tap in taps}))
        model.hidden(IDS)
    for i, share in enumerate(SHARES.get(name, (0.0,) * 4)):
        x, out = hooked[i]
        pre, act, up = steps(model.module.model.layers[i].mlp, x, share)
        expected = dict(zip(taps, (x, pre, act, up, act * up, out), strict=True))
        for tap, value in expected.items():
            torch.testing.assert_close(tapped[tap, i], value, rtol=1e-4, atol=1e-5)


@contextmanager
def kept_by_hand(model: fallow.Model, name: str, kept: int) -> Iterator[None]:
    """FFNs that leave out all but each token's `kept` largest gate_act."""
    with pytest.MonkeyPatch.context() as patch:
        for i, block in enumerate(model.module.model.layers):
            share = SHARES.get(name, (0.0,) * 4)[i]

            def forward(x: torch.Tensor, mlp: Any = block.mlp, share: float = share) -> Any:
                _, act, up = steps(mlp, x, share)
                left_out = act.abs().argsort(dim=-1)[..., : act.shape[-1] - kept]
                return (act.scatter(-1, left_out, 0.0) * up) @ mlp.down_proj.weight.T

            patch.setattr(block.mlp, "forward", forward)
        yield


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_zeroing_by_hand(name: str, own: dict[str, Path], texts: Texts) -> None:
    model, kept = fallow.load(own[name]), 7
    plan = by_hand("any", model, Cut("gate_act", "topk", [kept / 37] * 4))
    found = fallow.evaluate(model, plan, texts[1], context=24, windows=4)
    windows = cut_windows(load_text(texts[1], "evaluation"), model.tokenizer, 24, 4)

    def mean_loss() -> float:
        with torch.inference_mode():
            ids = torch.from_numpy(windows)
            return float(model.module(ids, labels=ids).loss)

    dense = mean_loss()
    with kept_by_hand(model, name, kept):
        masked = mean_loss()
    assert abs(masked - dense) > 0.01
    assert found.ppl == pytest.approx(math.exp(masked), rel=1e-4)
    assert found.sparsity_ratio["inter"] == pytest.approx(30 / 37, abs=1e-3)
    again = fallow.evaluate(model, None, texts[1], context=24, windows=4)
    assert again.ppl == pytest.approx(math.exp(dense), rel=1e-4)


def test_zeros_of_gemma3n_are_natural(own: dict[str, Path], texts: Texts) -> None:
    model = fallow.load(own["gemma3n"])
    found = fallow.profile(model, texts[1], context=32, windows=2).summary
    windows = cut_windows(load_text(texts[1], "evaluation"), model.tokenizer, 32, 2)
    zeros: list[float] = []
    with ExitStack() as stack:
        for layer in model.layers:
            handle = layer.act.register_forward_hook(
                lambda _module, _args, output: zeros.append(float((output == 0).double().mean()))
            )
            stack.callback(handle.remove)
        for window in windows:
            model.hidden(window[None])
    expected = np.reshape(zeros, (2, 4)).mean(axis=0)
    assert (expected[:2] > 0.6).all()
    for kind in ("gate_act", "inter"):
        shares = [row["zeros"][kind] for row in found["layers"]]
        np.testing.assert_allclose(shares, expected, atol=2e-3)
    assert found["natural_sparsity"] == pytest.approx(expected.mean(), abs=2e-3)


def test_inputs_of_attention(own: dict[str, Path], texts: Texts) -> None:
    """Of what every layer has; a layer with wider heads counts for more."""
    wanted = {"gemma3n": ["q_proj", "o_proj"], "gemma4": ["q_proj", "o_proj"], "qwen3_5": []}
    ffn = ["gate_proj", "up_proj", "down_proj"]
    for name, attention in wanted.items():
        model = fallow.load(own[name])
        assert list(model.layers[0].projections) == attention + ffn
        plan = fallow.calibrate(model, "wina", sparsity=0.4, text=texts[0], context=32, windows=2)
        assert [cut.tap for cut in plan.cuts] == attention + ffn
    model = fallow.load(own["gemma4"])
    plan = by_hand("any", model, Cut("o_proj", "topk", [0.5, 0.25, 0.5, 0.25], "column_norm"))
    found = fallow.evaluate(model, plan, texts[1], context=24, windows=2)
    # Of 24 rows as wide as 4 heads of 8 numbers, or of 12 in the layers that see all.
    assert found.achieved_sparsity == pytest.approx((0.5 * 32 + 0.75 * 48) / 80)


# Folders ---------------------------------------------------------------------------------------

VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3", {"image_size": 28, "patch_size": 14}),
    "gemma4": ("Gemma4", {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen3_5": ("Qwen3_5", {"depth": 1, "num_heads": 2, "out_hidden_size": 24}),
}


@pytest.mark.parametrize("name", VISION)
def test_text_model_of_a_folder_that_reads_pictures(
    name: str, own: dict[str, Path], tmp_path: Path
) -> None:
    kind, vision = VISION[name]
    sizes = {"hidden_size": 16, "intermediate_size": 16}
    if name != "qwen3_5":
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        text_config=json.loads((own[name] / "config.json").read_text()),
        vision_config=sizes | vision,
        **({"audio_config": None} if name == "gemma4" else {}),
    )
    torch.manual_seed(1)
    module = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    module.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = module(torch.from_numpy(IDS)).logits
    model = fallow.load(tmp_path)
    assert model.architecture.model_type == f"{name}_text"
    torch.testing.assert_close(model.logits(model.hidden(IDS)), expected, rtol=0, atol=1e-5)


def test_text_model_of_gemma3n_as_published(own: dict[str, Path], tmp_path: Path) -> None:
    """Beside an audio encoder, with keys of layers that read none: a folder written by hand."""
    folder = Path(shutil.copytree(own["gemma3n"], tmp_path / "m"))
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": text}))
    state = load_file(folder / "model.safetensors")
    unread = {
        k.replace(".1.", ".3."): v + 1
        for k, v in state.items()
        if ".layers.1.self_attn.k_" in k or ".layers.1.self_attn.v_" in k
    }
    assert len(unread) == 3
    state = {f"model.language_{k}": v for k, v in (state | unread).items()}
    state["model.audio_tower.conformer.0.weight"] = torch.ones(3)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model, expected = fallow.load(folder), fallow.load(own["gemma3n"])
    assert torch.equal(model.hidden(IDS), expected.hidden(IDS))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma4", {"use_bidirectional_attention": "vision"}),
        (
            "qwen3_5",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.25,
                    "mrope_section": [11, 11, 10],
                    "mrope_interleaved": True,
                }
            },
        ),
    ],
)
def test_what_is_of_pictures_alone(
    name: str, changes: dict[str, Any], own: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(own[name], tmp_path / "m"))
    change_config(folder, **changes)
    assert torch.equal(fallow.load(folder).hidden(IDS), fallow.load(own[name]).hidden(IDS))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ("gemma4", {"per_layer_config": {"1": {"rms_norm_eps": 1}}}, "per_layer_config is {'1'"),
        ("gemma4", {"enable_moe_block": True}, "enable_moe_block is True"),
        ("gemma3n", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping is 3.0"),
    ],
)
def test_configs_that_are_refused(
    name: str, changes: dict[str, Any], said: str, own: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(own[name], tmp_path / "m"))
    change_config(folder, **changes)
    found = message(folder)
    assert said in found
    assert "\n" not in found


def test_gemma3n_with_layers_of_two_widths(texts: Texts, tmp_path: Path) -> None:
    model = fallow.load(make_folder("gemma3n", tmp_path, intermediate_size=[37, 37, 37, 74]))
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(IDS)).logits
    torch.testing.assert_close(model.logits(model.hidden(IDS)), expected, rtol=0, atol=1e-5)
    plan = fallow.calibrate(model, "gate_topk", sparsity=0.4, text=texts[0], context=32, windows=2)
    found = fallow.evaluate(model, plan, texts[1], context=24, windows=2)
    assert found.sparsity_per_layer["inter"][3]["mean"] == pytest.approx(1 - 44 / 74, abs=1e-3)


# What the engine does not run --------------------------------------------------------------------

REFUSED = {
    "gemma3n": "AltUp",
    "qwen3_5": "gated delta nets",
}


def one_by_one(model: fallow.Model, prompt: str, plan: Path, count: int) -> str:
    """The likeliest tokens, each from the whole text before it."""
    ids = model.tokenizer.encode(prompt).tolist()
    n = len(ids)
    with model.sparse(Plan.load(plan)):
        for _ in range(count):
            logits = model.logits(model.hidden(np.array([ids]))[0, -1])
            ids.append(int(logits.argmax()))
    return model.tokenizer.decode(ids[n:])


@pytest.mark.parametrize("name", UNPACKED)
def test_every_command(
    name: str, own: dict[str, Path], texts: Texts, tmp_path: Path, run: Any
) -> None:
    """What works on transformers' models, and what is refused in one line."""
    sizes = ("--context", 24, "--windows", 2)
    given = (own[name], "--text", texts[1], *sizes)
    assert run("profile", *given, "-o", tmp_path / "profile").code == 0
    plan = tmp_path / "p.plan"
    calibration = ("--text", texts[0], *sizes, "-o", plan)
    found = run("calibrate", own[name], "--rule", "gate_topk", "--sparsity", 0.4, *calibration)
    assert found.code == 0, found.err
    assert run("evaluate", *given, "--plan", plan).code == 0
    command = ("generate", own[name], "neuron 3", "--plan", plan, "-n", 5)
    found = run(*command, "--dtype", "auto")
    assert found.code == 0, found.err
    assert found.out.strip() == one_by_one(fallow.load(own[name]), "neuron 3", plan, 5).strip()
    for command in ("pack", "optimize"):
        found = run(command, own[name], "-o", tmp_path / "m.gguf")
        assert (found.code, found.err.strip().count("\n")) == (1, 0), found.err
        assert REFUSED[name] in found.err
        assert "which the engine does not run" in found.err


@pytest.mark.parametrize("name", NAMES)
def test_adaptation(
    name: str, own: dict[str, Path], texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fallow.adaptation.texts.HELD_OUT", 4)
    settings = AdaptSettings(tokens=16384, context=32, batch=8, learning_rate=3e-4, budgets="even")
    report = adapt(own[name], tmp_path / "taught", settings, text=[texts[0]])
    assert report.best.kl < report.checks[0].kl
    taught = fallow.load(tmp_path / "taught")
    assert not torch.equal(taught.hidden(IDS), fallow.load(own[name]).hidden(IDS))
    if name not in REFUSED:
        return
    settings = replace(settings, quant="f32")
    with pytest.raises(fallow.FallowError, match=REFUSED[name]):
        adapt(own[name], tmp_path / "other", settings, text=[texts[0]])


def test_gemma4_in_the_engine(own: dict[str, Path], texts: Texts, tmp_path: Path, run: Any) -> None:
    """A plan that is made on transformers' model runs in the engine, and says the same."""
    sizes = ("--context", 24, "--windows", 2)
    plan, packed = tmp_path / "p.plan", tmp_path / "m.gguf"
    calibration = ("--text", texts[0], *sizes, "-o", plan)
    found = run("calibrate", own["gemma4"], "--rule", "wina", "--sparsity", 0.4, *calibration)
    assert found.code == 0, found.err
    found = run("pack", own["gemma4"], "--quant", "f32", "--plan", plan, "-o", packed)
    assert found.code == 0, found.err
    found = run("generate", packed, "neuron 3", "-n", 5)
    assert found.code == 0, found.err
    assert found.out.strip() == one_by_one(fallow.load(own["gemma4"]), "neuron 3", plan, 5).strip()
    optimize = ("--text", texts[0], "--max-ppl-increase", 5, "-o", tmp_path / "fast.gguf")
    found = run("optimize", own["gemma4"], "--quant", "f32", *optimize)
    assert found.code == 0, found.err
    engine = Engine(packed, plan=False)
    with pytest.raises(fallow.FallowError, match=r"cuts k_proj, which some layers of .* do not"):
        engine.use_plan(engine_plan(engine, Cut("k_proj", "topk", 0.5)))
    weights = np.ones((4, 32), dtype=np.float32)  # as wide as the first layer's heads
    with pytest.raises(
        fallow.FallowError, match=r"o_proj has the shape \(4, 32\), .* needs \(4, 48\)"
    ):
        engine.use_plan(engine_plan(engine, Cut("o_proj", "topk", 0.5, weights)))


def test_gguf_of_gemma3n(own: dict[str, Path], texts: Texts, tmp_path: Path, run: Any) -> None:
    path = write_gguf("gemma3n", fallow.load(own["gemma3n"]), tmp_path / "m.gguf")
    sizes = ("--context", 24, "--windows", 2)
    assert run("profile", path, "--text", texts[1], *sizes, "-o", tmp_path / "profile").code == 0
    for command in (("pack", path, "-o", tmp_path / "o"), ("bench", path)):
        found = run(*command)
        assert (found.code, found.err.strip().count("\n")) == (1, 0), found.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("architecture", ["qwen35"])
def test_ggufs_that_are_not_read(architecture: str, tmp_path: Path, run: Any) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.zeros((3, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = (
        f"GGUF M is of the architecture {architecture}, of which only Hugging Face folders are "
        "read; give the model as one"
    )
    assert message(tmp_path / "m.gguf") == said
    for command in ("pack", "optimize"):
        found = run(command, tmp_path / "m.gguf", "-o", tmp_path / "o")
        assert (found.code, found.err.strip().count("\n")) == (1, 0), found.err


def test_gpu_kernels_without_gemma3ns_top_k(own: dict[str, Path]) -> None:
    model = fallow.load(own["gemma3n"])
    plan = by_hand("any", model, Cut("gate_act", "topk", [0.5] * 4))
    with pytest.raises(fallow.FallowError, match="no GPU kernel has the top-k of gate_proj"):
        fallow.accelerate(model, plan)
