"""Plans applied to plain transformers models, and their folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fallow
from conftest import DENSE, OWN_CONFIGS, VOCABULARY, make_folder
from fallow.calibration.calibrator import Calibrator
from fallow.common.errors import FallowError, UsageError
from fallow.plan import Plan
from fallow.reference.model import Model
from test_models import write_gguf

IDS = torch.from_numpy(np.random.default_rng(1).integers(2, VOCABULARY, (1, 40)))


def plan_of(calibrator: Calibrator, rule: str = "topk") -> Plan:
    return calibrator.plan(rule, sparsity=0.5)


def logits(module: Any) -> torch.Tensor:
    with torch.inference_mode():
        return module(IDS).logits


def plain(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("name", [n for n in DENSE if n not in OWN_CONFIGS])
@pytest.mark.parametrize("rule", ["topk", "cats"])
def test_a_plain_model_is_as_the_loaded_one(
    name: str,
    rule: str,
    folders: dict[str, Path],
    tiny: dict[str, Model],
    calibrators: dict[str, Calibrator],
    tmp_path: Path,
) -> None:
    plan = plan_of(calibrators[name], rule)
    model = tiny[name]
    with model.sparse(plan):
        expected = model.logits(model.hidden(IDS.numpy()))
    module = plain(folders[name])
    dense = logits(module)
    assert fallow.sparsify(module, plan) is module
    assert torch.allclose(logits(module), expected, atol=1e-4)
    fallow.save_sparse(module, tmp_path / "out")
    assert torch.equal(logits(fallow.load_sparse(tmp_path / "out")), logits(module))
    assert torch.equal(logits(plain(tmp_path / "out")), dense)  # others see the dense model
    assert torch.equal(logits(fallow.densify(module)), dense)
    assert fallow.densify(module) is module


def test_an_exported_folder_is_a_model_of_its_own(
    folders: dict[str, Path], tiny: dict[str, Model], calibrators: dict[str, Calibrator],
    tmp_path: Path,
) -> None:  # fmt: skip
    from fallow.reference.sparsified import export

    gguf = fallow.load(str(write_gguf("llama", tiny["llama"], tmp_path / "m.gguf")))
    plan = plan_of(calibrators["llama"])
    for source, path in ((tiny["llama"], folders["llama"]), (gguf, tmp_path / "m.gguf")):
        mine = Plan(**(vars(plan) | {"fingerprint": source.fingerprint}))
        out = tmp_path / f"out-{path.suffix[1:]}"
        export(source, mine, out, path)
        again = fallow.load(str(out))
        assert again.tokenizer.eos_ids == source.tokenizer.eos_ids
        ids = again.tokenizer.prompt("neuron 7 rests")
        np.testing.assert_array_equal(ids, source.tokenizer.prompt("neuron 7 rests"))
        with again.sparse(Plan.load(out / "fallow.plan")), source.sparse(mine):
            found, expected = (m.logits(m.hidden(IDS.numpy())) for m in (again, source))
        assert torch.allclose(found, expected, atol=1e-5)
        text = transformers.AutoTokenizer.from_pretrained(out)
        assert text("neuron 7 rests")["input_ids"] == ids.tolist()
        assert getattr(source.module, "_fallow_sparse", None) is None


def test_another_type_is_the_same_model(
    folders: dict[str, Path], calibrators: dict[str, Calibrator]
) -> None:
    module = plain(folders["qwen2"], dtype=torch.float32).to(torch.float64).to(torch.float32)
    fallow.sparsify(module, plan_of(calibrators["qwen2"]))


def test_errors(
    folders: dict[str, Path],
    tiny: dict[str, Model],
    calibrators: dict[str, Calibrator],
    tmp_path: Path,
) -> None:
    plan = plan_of(calibrators["llama"])
    module = plain(folders["llama"])
    with pytest.raises(FallowError, match="is not sparse"):
        fallow.save_sparse(module, tmp_path / "x")
    with pytest.raises(FallowError, match="not for"):
        fallow.sparsify(plain(folders["qwen2"]), plan)
    with pytest.raises(UsageError, match="Linear is no transformers model"):
        fallow.sparsify(torch.nn.Linear(2, 2), plan)
    with pytest.raises(UsageError, match="int is no transformers model"):
        fallow.sparsify(3, plan)
    fallow.sparsify(module, plan)
    with pytest.raises(FallowError, match="sparse already"):
        fallow.sparsify(module, plan)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(FallowError, match="there already"):
        fallow.save_sparse(module, tmp_path / "there")
    with pytest.raises(FallowError, match="no such file"):
        fallow.load_sparse(folders["llama"])
    other = make_folder("llama", tmp_path / "other", intermediate_size=40)
    plan.save(other / "fallow.plan")
    with pytest.raises(FallowError, match="not for"):
        fallow.load_sparse(other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "there"]
