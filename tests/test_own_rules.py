"""Rules and selectors that are not in the package, by names such as "my_rules:Mine".

The code of the how-to pages is run by test_documented_commands.py.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fallow
from fallow.calibration.calibrator import Calibrator
from fallow.common.errors import FallowError, UsageError
from fallow.rules import find_rule

MODULE = """
from fallow.rules import Rule, layer_quantiles
from fallow.selectors import Selector


class Loud(Rule):
    where, knob_name, known = "inter", "quantile of |inter|", "after gate and up"
    options, option_ranges = {"thrice": 0}, {"thrice": range(2)}

    @classmethod
    def cuts(cls, layer):
        return ("inter",)

    @classmethod
    def learn(cls, calibration, knob):
        return {"threshold.inter": layer_quantiles(calibration, "inter", knob)}


class Silent(Rule):
    known = "never"


class First(Selector):
    known = "before gate"

    @classmethod
    def learn_scores(cls, calibration):
        return {"sign": layer_quantiles(calibration, "inter", 0.5)}

    @classmethod
    def score_shapes(cls, layers):
        return {"sign": (len(layers),)}

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
    plans = [
        calibrators["llama"].plan(f"own_rules:{name}", sparsity=0.5, measure=False)
        for name in ("First", "Second")
    ]
    assert (plans[0].arrays["sign"] == -plans[1].arrays["sign"]).all()
    assert (plans[0].arrays["sign"] > 0).all()


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
        ("own_rules:", "unknown rule 'own_rules'; known rules: cats, "),
        (":Loud", "unknown rule ''; known rules: cats, "),
        ("../own_rules:Loud", "unknown rule '../own_rules'; known rules: cats, "),
    ],
)
def test_wrong_names(name: str, message: str, folder: Path) -> None:
    with pytest.raises(UsageError) as error:
        find_rule(name)
    assert message.format(folder) in str(error.value)


def test_what_the_module_lacks_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="fallow_no_such_package"):
        find_rule("needs_more:Rule")


def test_a_plan_whose_module_is_not_here(
    calibrators: dict[str, Calibrator], tiny: dict[str, fallow.Model], folder: Path
) -> None:
    plan = calibrators["llama"].plan("own_rules:Loud", sparsity=0.4, measure=False)
    (folder / "own_rules.py").unlink()
    del sys.modules["own_rules"]
    with pytest.raises(FallowError) as error:
        tiny["llama"].rule(plan)
    assert str(error.value) == (
        "cannot run this plan: rule 'own_rules:Loud': there is no module own_rules on the Python "
        f"path or in {folder}"
    )
