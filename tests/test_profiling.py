"""The profile against numpy on stored activations."""

import json
from pathlib import Path

import numpy as np
import pytest

import fallow
from conftest import DENSE, WITH_ZEROS
from fallow.checkpoints.text import cut_windows, load_text
from fallow.models.taps import attach

Texts = tuple[Path, Path]


@pytest.mark.parametrize("name", DENSE)
def test_against_numpy(name: str, tiny: dict[str, fallow.Model], texts: Texts) -> None:
    model = tiny[name]
    result = fallow.profile(model, texts[1], context=32, windows=3)
    stored: list[list[np.ndarray]] = [[] for _ in model.layers]
    with attach(model.layers, {"inter": lambda layer, v: stored[layer].append(v.numpy().copy())}):
        for window in cut_windows(load_text(texts[1], "evaluation"), model.tokenizer, 32, 3):
            model.hidden(window[None])
    for i, layer in enumerate(model.layers):
        inter = np.concatenate(stored[i])
        row = result.summary["layers"][i]
        assert row["zeros"]["inter"] == pytest.approx((inter == 0).mean())
        for text, share in row["inter_at_most"].items():
            assert share == pytest.approx((np.abs(inter) <= np.float32(text)).mean())
        out_norm = np.abs(inter) * layer.down_norm.numpy()
        assert row["out_norm_below_1e-7"] == pytest.approx((out_norm < 1e-7).mean())
        fired = (out_norm >= 1e-7).mean(axis=0)
        np.testing.assert_allclose(result.arrays["firing_frequency"][i], fired, atol=1e-6)
        assert row["dead_neurons"] == (fired < 1e-3).sum()
        for text, value in row["magnitude_quantiles"]["inter"].items():
            exact = np.percentile(np.abs(inter), 100 * float(text))
            assert value == pytest.approx(exact, rel=2e-3, abs=1e-12)
        weight = layer.down_proj.weight.numpy()
        median = row["weight_quantiles"]["down_proj"]["0.5"]
        assert median == pytest.approx(np.median(np.abs(weight)), rel=2e-3)
        counts = result.arrays["magnitude.inter"][i]
        assert counts.sum() == inter.size
        assert result.arrays["magnitude_cdf.inter"][i][-1] == 1
    natural = np.mean([(np.concatenate(s) == 0).mean() for s in stored])
    assert result.summary["natural_sparsity"] == pytest.approx(natural)
    assert (natural > 0.2) == (name in WITH_ZEROS)  # only ReLU is sparse by nature
    assert result.summary["dtype"] == "float32"


def test_shared_inputs_are_counted_once(tiny: dict[str, fallow.Model], texts: Texts) -> None:
    result = fallow.profile(tiny["llama"], texts[1], context=32, windows=4)
    assert result.arrays["magnitude.x"][0].sum() == 4 * 32 * 24
    assert result.arrays["magnitude.q_proj"][0].sum() == 4 * 32 * 24
    assert result.arrays["magnitude.o_proj"][1].sum() == 4 * 32 * 24
    assert len(result.arrays["edges"]) == result.arrays["magnitude.x"].shape[1] + 1


def test_files(tiny: dict[str, fallow.Model], texts: Texts, tmp_path: Path) -> None:
    result = fallow.profile(tiny["phi3"], texts[1], context=32, windows=1)
    result.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "profile.json").read_text()) == result.summary
    with np.load(tmp_path / "out" / "profile.npz") as arrays:
        assert set(arrays) == set(result.arrays)
        np.testing.assert_array_equal(arrays["weight.qkv_proj"], result.arrays["weight.qkv_proj"])
