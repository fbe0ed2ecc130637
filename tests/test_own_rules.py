"""Rules and selectors that are not in the package, by names such as "my_rules:Mine".

The code of the how-to pages is run by test_documented_commands.py.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fallow
from fallow.calibration.calibrator import Calibrator
from fallow.common.errors import UsageError
from fallow.engine.engine import Engine
from fallow.packing.packer import pack
from fallow.plan import Cut
from fallow.rules import find_rule

MODULE = """
from fallow.rules import Cut, Rule, layer_quantiles
from fallow.selectors import Selector


class Loud(Rule):
    where, knob_name, known = "inter", "quantile of |inter|", "after gate and up"
    options, option_ranges = {"thrice": 0}, {"thrice": range(2)}

    @classmethod
    def learn(cls, calibration, knob):
        return Cut("inter", "threshold", layer_quantiles(calibration, "inter", knob))


class Silent(Rule):
    known = "never"


class Odd(Loud):
    made = None

    @classmethod
    def learn(cls, calibration, knob):
        return cls.made


class First(Selector):
    known = "before gate"

    @classmethod
    def learn_scores(cls, calibration):
        return {"sign": layer_quantiles(calibration, "inter", 0.5)}

    def score(self, index, layer, seen):
        return seen.out_norm


class Second(First):
    @classmethod
    def learn_scores(cls, calibration):
        return {"sign": -super().learn_scores(calibration)["sign"]}


number = 7
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of rules in it."""
    (tmp_path / "own_rules.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import fallow_no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_rules", "needs_more"):
        sys.modules.pop(name, None)


def test_a_rule_in_the_current_folder(
    calibrators: dict[str, Calibrator],
    texts: tuple[Path, Path],
    tiny: dict[str, fallow.Model],
    tmp_path: Path,
) -> None:
    plan = calibrators["llama"].plan("own_rules:Loud", sparsity=0.4)
    assert plan.rule == "own_rules:Loud"
    plan.save(tmp_path / "own.plan")
    loaded = fallow.Plan.load(tmp_path / "own.plan")
    result = fallow.evaluate(tiny["llama"], loaded, texts[1], context=32, windows=2)
    assert result.sparsity_ratio["inter"] == pytest.approx(0.4, abs=0.1)


def test_options_follow_the_class() -> None:
    assert find_rule("own_rules:Loud:thrice=1").name == "own_rules:Loud:thrice=1"
    assert find_rule("own_rules:Loud:thrice=1").options == {"thrice": 1}
    assert find_rule("own_rules:Loud:thrice=0").name == "own_rules:Loud"


def test_selectors_of_one_module_share_no_scores(calibrators: dict[str, Calibrator]) -> None:
    fitted: list[Any] = [
        calibrators["llama"].fit(f"own_rules:{name}", sparsity=0.5) for name in ("First", "Second")
    ]
    assert (fitted[0].arrays["sign"] == -fitted[1].arrays["sign"]).all()
    assert (fitted[0].arrays["sign"] > 0).all()
    with pytest.raises(UsageError, match="own_rules:First is a selector: it chooses by code"):
        calibrators["llama"].plan("own_rules:First", sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Rule", "there is no module no_such_module on the Python path or in {}"),
        ("own_rules.more:Rule", "there is no module own_rules.more on the Python path or in {}"),
        ("own_rules:Quiet", "own_rules has no class Quiet made of fallow's Rule"),
        ("own_rules:number", "own_rules has no class number made of fallow's Rule"),
        ("own_rules:layer_quantiles", "has no class layer_quantiles made of"),
        ("own_rules:Silent", "the class lacks where, knob_name"),
        ("own_rules:Loud:twice=1", "has no option 'twice=1'; it has: thrice=0..1"),
        ("own_rules:", "unknown rule 'own_rules'; known rules: act_topk, cats, "),
        (":Loud", "unknown rule ''; known rules: act_topk, cats, "),
        ("../own_rules:Loud", "unknown rule '../own_rules'; known rules: act_topk, cats, "),
    ],
)
def test_wrong_names(name: str, message: str, folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        find_rule(name)
    assert message.format(folder) in str(error.value)


def test_what_the_module_lacks_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="fallow_no_such_package"):
        find_rule("needs_more:Rule")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "learn gave NoneType, no cuts, so that no plan can hold what it chooses"),
        ({"threshold.inter": 1.0}, "learn gave dict, no cuts"),
        (Cut("up", "threshold", np.ones(3)), "the threshold of up has 3 layers, not 2"),
        (Cut("qkv_proj", "topk", 0.5), "the plan cuts qkv_proj, "),
        (Cut("inter", "topk", 0.5, np.ones((2, 5))), r"shape \(2, 5\), .* needs \(2, 37\)"),
    ],
)
def test_cuts_that_cannot_be_made(
    made: Any, message: str, calibrators: dict[str, Calibrator], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_rule("own_rules:Odd")
    monkeypatch.setattr(sys.modules["own_rules"].Odd, "made", made)
    with pytest.raises(UsageError, match=f"rule own_rules:Odd: .*{message}"):
        calibrators["llama"].plan("own_rules:Odd", sparsity=0.4)


def test_the_engine_runs_the_plan_without_the_rule(
    calibrators: dict[str, Calibrator],
    tiny: dict[str, fallow.Model],
    folders: dict[str, Path],
    folder: Path,
) -> None:
    plan = calibrators["llama"].plan("own_rules:Loud", sparsity=0.4, measure=False)
    pack(folders["llama"], folder / "m.gguf", quant="f32", plan=plan)
    (folder / "own_rules.py").unlink()
    del sys.modules["own_rules"]
    ids = np.arange(2, 30)
    engine = Engine(folder / "m.gguf")
    assert engine.plan is not None
    assert engine.plan.rule == "own_rules:Loud"
    found = engine.logits(ids)
    with tiny["llama"].sparse(plan):
        expected = tiny["llama"].logits(tiny["llama"].hidden(ids[None]))[0].numpy()
    np.testing.assert_allclose(found[0], expected[0], atol=5e-3)
    assert engine.idle_neurons() == pytest.approx([0.4, 0.4], abs=0.15)
    assert "own_rules" not in sys.modules
