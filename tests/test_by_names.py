"""Architectures without a file in fallow.models, which are found by their modules' names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.stablelm.modeling_stablelm import StableLmMLP

import fallow
from conftest import CONFIGS, SAMPLE, make_folder
from fallow.common.errors import FallowError
from fallow.models import check_logits

IDS = np.arange(2, 14)[None]
# With a LayerNorm; a factor of logits, and attention beside the FFN; norms of queries.
NAMES = ("stablelm", "cohere", "exaone4")
_CLASSES = {"stablelm": "StableLmConfig", "cohere": "CohereConfig", "exaone4": "Exaone4Config"}
_MORE = {"cohere": {"logit_scale": 0.25}, "exaone4": {"sliding_window": 16}}


def make(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Path:
    settings = CONFIGS["llama"][1] | _MORE.get(name, {})
    monkeypatch.setitem(CONFIGS, name, (_CLASSES[name], settings))
    return make_folder(name, folder, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_is_made_and_does_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fallow.load(make(name, tmp_path / name, monkeypatch))
    with torch.inference_mode():
        dense = model.module(torch.tensor(IDS)).logits
    torch.testing.assert_close(model.logits(model.hidden(IDS)), dense)
    plan = fallow.calibrate(model, "topk", sparsity=0.5, text=SAMPLE, context=32, windows=2)
    sparse = model.logits
    with model.sparse(plan):
        found = model.hidden(IDS)
    kept = round(0.5 * 37)

    def keep_largest(module: torch.nn.Linear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        score = args[0].abs() * module.weight.norm(dim=0)
        least = score.topk(kept, dim=-1).values[..., -1:]
        return (args[0] * (score >= least),)

    for block in model.module.model.layers:
        block.mlp.down_proj.register_forward_pre_hook(keep_largest)
    with torch.inference_mode():
        expected = model.module(torch.tensor(IDS)).logits
    torch.testing.assert_close(sparse(found), expected)
    assert not torch.allclose(expected, dense)


def test_the_engine_does_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make("stablelm", tmp_path / "m", monkeypatch)
    with pytest.raises(FallowError, match="has the architecture stablelm, which has no file in"):
        fallow.pack(folder, tmp_path / "packed.gguf")
    assert not (tmp_path / "packed.gguf").exists()


def test_an_ffn_that_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("stablelm", tmp_path / "m", monkeypatch)
    usual = StableLmMLP.forward
    monkeypatch.setattr(StableLmMLP, "forward", lambda self, x: usual(self, x).tanh())
    with pytest.raises(FallowError, match="its FFN is not down_proj"):
        fallow.load(folder)


def test_logits_that_are_not_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fallow.load(make("stablelm", tmp_path / "m", monkeypatch))
    model.module.lm_head.register_forward_hook(lambda _m, _a, logits: logits.tanh())
    with pytest.raises(FallowError, match="makes its logits in another way"):
        check_logits(model)
