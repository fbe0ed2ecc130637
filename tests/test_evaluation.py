"""Perplexity, KL and sparsity against independent computations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fallow
from conftest import DENSE, WITH_ZEROS
from fallow.checkpoints.text import Text, cut_windows, load_text
from fallow.common.errors import FallowError, UsageError
from fallow.models.taps import attach

Texts = tuple[Path, Path]


@pytest.fixture(scope="module")
def plans(tiny: dict[str, fallow.Model], texts: Texts) -> dict[str, fallow.Plan]:
    return {
        name: fallow.calibrate(model, "topk", sparsity=0.4, text=texts[0], context=32, windows=3)
        for name, model in tiny.items()
        if name in DENSE
    }


@pytest.mark.parametrize("name", DENSE)
def test_against_transformers(
    name: str, tiny: dict[str, fallow.Model], plans: dict[str, fallow.Plan], texts: Texts
) -> None:
    """PPL, KL and agreement from whole logits in float64."""
    model, plan = tiny[name], plans[name]
    result = fallow.evaluate(model, plan, texts[1], context=32, windows=3)
    windows = cut_windows(load_text(texts[1], "evaluation"), model.tokenizer, 32, 3)

    def log_probabilities(window: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = model.module(torch.from_numpy(window)[None]).logits[0, :-1]
        return logits.double().log_softmax(-1).numpy()

    dense = np.stack([log_probabilities(w) for w in windows])
    with model.sparse(plan):
        sparse = np.stack([log_probabilities(w) for w in windows])

    def losses(log_p: np.ndarray) -> np.ndarray:
        picked = np.take_along_axis(log_p, windows[:, 1:, None], axis=2)[..., 0]
        return -picked.mean(axis=1)

    kl = (np.exp(dense) * (dense - sparse)).sum(axis=2)
    assert result.ppl == pytest.approx(math.exp(losses(sparse).mean()), rel=1e-5)
    ratio = math.exp((losses(sparse) - losses(dense)).mean())
    assert result.ppl_change_percent == pytest.approx(100 * (ratio - 1), abs=1e-3)
    # Sums in float32: so small a divergence differs by 1e-7 from processor to processor.
    assert result.kl_to_dense["mean"] == pytest.approx(kl.mean(), rel=1e-3, abs=5e-7)
    assert result.kl_to_dense["p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-3, abs=5e-7)
    same = (dense.argmax(-1) == sparse.argmax(-1)).mean()
    assert result.top1_agreement == pytest.approx(same)
    assert (result.tokens, result.windows) == (96, 3)
    # 22 of 37 neurons are kept; OPT's ReLU leaves fewer to begin with.
    cut = result.sparsity_ratio["inter"]
    assert cut > 15 / 37 if name in WITH_ZEROS else cut == pytest.approx(15 / 37)


def test_dense_is_its_own_reference(tiny: dict[str, fallow.Model], texts: Texts) -> None:
    result = fallow.evaluate(tiny["qwen2"], None, texts[1], context=32, windows=2)
    assert result.ppl_change_percent == 0
    assert result.kl_to_dense["mean"] == 0
    assert result.top1_agreement == 1
    assert result.sparsity_ratio == {"x": 0, "gate_act": 0, "up": 0, "inter": 0}


def test_sparsity_is_what_was_cut(tiny: dict[str, fallow.Model], texts: Texts) -> None:
    """Zeros of inter are the union of those of gate_act and up."""
    model = tiny["llama"]
    plan = fallow.calibrate(model, "percentile", knob=0.5, text=texts[0], context=32, windows=3)
    result = fallow.evaluate(model, plan, texts[1], context=32, windows=2)
    windows = cut_windows(load_text(texts[1], "evaluation"), model.tokenizer, 32, 2)
    zeros: list[float] = []
    with (
        model.sparse(plan),
        attach(model.layers, {"inter": lambda _, v: zeros.append(float((v == 0).double().mean()))}),
    ):
        for window in windows:
            model.hidden(window[None])
    ratio = result.sparsity_ratio
    assert ratio["inter"] == pytest.approx(np.mean(zeros), abs=1e-6)
    assert ratio["gate_act"] is not None
    assert ratio["up"] is not None
    assert ratio["inter"] > max(ratio["gate_act"], ratio["up"]) + 0.1
    layers = result.sparsity_per_layer["inter"]
    assert [set(layer) for layer in layers] == [{"mean", "p5", "p95"}] * 2
    assert all(layer["p5"] <= layer["mean"] <= layer["p95"] for layer in layers)


def test_non_gated_model_has_no_up(tiny: dict[str, fallow.Model], texts: Texts) -> None:
    result = fallow.evaluate(tiny["opt"], None, texts[1], context=32, windows=1)
    assert result.sparsity_ratio["up"] is None
    assert result.ppl_se is None
    inter = result.sparsity_ratio["inter"]
    assert inter is not None
    assert inter > 0.2  # ReLU


def test_leakage_is_refused(
    tiny: dict[str, fallow.Model], plans: dict[str, fallow.Plan], texts: Texts
) -> None:
    with pytest.raises(UsageError, match="is the text the plan was calibrated on"):
        fallow.evaluate(tiny["llama"], plans["llama"], texts[0], context=32)
    result = fallow.evaluate(
        tiny["llama"], plans["llama"], texts[0], context=32, windows=1, allow_leakage=True
    )
    assert result.text_sha256 == plans["llama"].calibration_sha256
    copy = Text("copy", "\n" + texts[0].read_text())
    with pytest.raises(UsageError, match="copy has 100% in common with the text the plan was"):
        fallow.evaluate(tiny["llama"], plans["llama"], copy, context=32)


def test_plan_of_another_model(
    tiny: dict[str, fallow.Model], plans: dict[str, fallow.Plan], texts: Texts
) -> None:
    with pytest.raises(FallowError, match="this plan is for"):
        fallow.evaluate(tiny["qwen3"], plans["llama"], texts[1], context=32)


# Real weights ----------------------------------------------------------------------------------


def test_smollm2_dense_perplexity(smollm2: fallow.Model, wikitext: Texts) -> None:
    """23.24 on the first four windows was found independently, by another program."""
    result = fallow.evaluate(smollm2, None, wikitext[1], windows=4)
    assert result.ppl == pytest.approx(23.24, abs=0.01)


def test_smollm2_topk(smollm2: fallow.Model, wikitext: Texts) -> None:
    """By another program: per-token top-k at 50 % costs +3.40 % PPL on four windows."""
    plan = fallow.calibrate(
        smollm2, "topk", sparsity=0.5, text=wikitext[0], windows=1, validation_windows=1
    )
    result = fallow.evaluate(smollm2, plan, wikitext[1], windows=4)
    assert result.ppl_change_percent == pytest.approx(3.4, abs=0.5)
    assert result.sparsity_ratio["inter"] == pytest.approx(0.5, abs=1e-3)
