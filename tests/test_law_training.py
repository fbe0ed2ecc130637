"""Training of small models, sweeps of it, and advice: exact resuming, and clear refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from fallow.checkpoints.text import Text, load_text
from fallow.common.errors import FallowError, UsageError
from fallow.laws import sweeping, training
from fallow.laws.advice import advise, own_basis
from fallow.laws.curves import load_curve
from fallow.laws.sweeping import read_config, sweep
from fallow.laws.training import Settings, _Run, train

SMALL = Settings(
    hidden_size=64, layers=2, intermediate_size=48, vocabulary=300, tokens=6000, context=32,
    batch=8, checkpoints=3, learning_rate=1e-2,
)  # fmt: skip


WORDS = ["the", "ship", "sailed", "at", "dawn", "and", "no", "one", "saw", "it", "return"]


@pytest.fixture(scope="module")
def novel() -> Text:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, 12)) for _ in range(1500)]
    return Text("novel", "\n".join(lines))


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_on(2, monkeypatch)


def measure_on(windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIT_WINDOWS", "SEARCH_WINDOWS", "JUDGE_WINDOWS"):
        monkeypatch.setattr(training, name, windows)


def test_trained_model_and_its_curve(novel: Text, tmp_path: Path) -> None:
    report = train(tmp_path / "m", novel, SMALL)
    assert report.non_embedding_parameters == 2 * (4 * 64 * 64 + 3 * 64 * 48) + 5 * 64
    assert report.parameters == report.non_embedding_parameters + 300 * 64
    assert report.tokens == 24 * 8 * 32
    curve = json.loads((tmp_path / "m" / "curve.json").read_text())
    assert curve["token_passed"] == [s * 256 for s in SMALL.checkpoint_steps()]
    assert curve["token_passed"][-1] == SMALL.stable_steps * 256
    lists = [values for values in curve.values() if isinstance(values, list)]
    assert {len(values) for values in lists} == {len(curve["token_passed"])}
    assert (curve["activation"], curve["parameters"]) == ("relu", report.non_embedding_parameters)
    read = load_curve(tmp_path / "m" / "curve.json", unit=1)
    assert read.x[-1] * 1e9 == pytest.approx(curve["token_passed"][-1])
    assert report.validation_loss < curve["validation_loss"][0]  # it learnt something
    assert 0.3 < curve["zero_ratio"][0] < 0.7
    model = fallow.load(str(tmp_path / "m"))
    assert len(model.layers) == 2
    for checkpoint in (tmp_path / "m" / "checkpoints").iterdir():
        plan = fallow.Plan.load(checkpoint / "cett.plan")
        assert plan.rule == "cett"
        plan.check_model(fallow.load(str(checkpoint)).fingerprint, str(checkpoint))
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert train(tmp_path / "m", novel, SMALL) == report  # there is nothing left to do
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def rise_and_ratio(
    folder: Path, windows: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By transformers alone: each window's rise of the loss, and its share of active neurons."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shares: list[float] = []

    def cut(threshold: float, projection: Any) -> Any:
        norms = projection.weight.detach().norm(dim=0)

        def hook(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            active = inputs[0].abs() * norms > threshold
            shares.append(float(active.float().mean()))
            return (inputs[0] * active,)

        return projection.register_forward_pre_hook(hook)

    def losses() -> np.ndarray:
        with torch.no_grad():
            ids = [torch.from_numpy(window.astype(np.int64))[None] for window in windows]
            return np.array([float(module(input_ids=i, labels=i).loss) for i in ids])

    dense = losses()
    for layer, threshold in zip(module.model.layers, thresholds, strict=True):
        cut(float(threshold), layer.mlp.down_proj)
    sparse = losses()
    return sparse - dense, np.array(shares).reshape(len(windows), -1).mean(axis=1)


def test_one_cett_is_searched_on_the_last_five_checkpoints_and_judged_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_on(6, monkeypatch)
    # A word mostly follows from the one before: what the FFN has to know.
    rng = np.random.default_rng(0)
    told = [0]
    for follows, other in zip(rng.random(18_000) < 0.8, rng.integers(11, size=18_000), strict=True):
        told.append((7 * told[-1] + 3) % 11 if follows else int(other))
    lines = [" ".join(WORDS[i] for i in told[at : at + 12]) for at in range(0, 18_000, 12)]
    chain = Text("chain", "\n".join(lines))
    settings = replace(SMALL, checkpoints=6, tokens=20_000)
    report = train(tmp_path / "m", chain, settings)
    curve = json.loads((tmp_path / "m" / "curve.json").read_text())
    folders = [tmp_path / "m" / "checkpoints" / str(n) for n in curve["token_passed"]]
    assert len(folders) == 6
    held_out = training.prepare(tmp_path / "m", chain, settings).held_out
    windows = fallow.load(str(folders[0])).windows(held_out, settings.context, 18)
    search, judge = windows[6:12], windows[12:]

    def thresholds(folder: Path, cett: float) -> np.ndarray:
        plan = fallow.calibrate(
            fallow.load(str(folder)), "cett", knob=cett, text=held_out,
            context=settings.context, windows=6, validation_windows=6, measure=False,
        )  # fmt: skip
        (found,) = plan.cuts
        return found.value

    def mean_rise(cett: float, of: list[Path]) -> float:
        rises = [rise_and_ratio(f, search, thresholds(f, cett))[0].mean() for f in of]
        return 100 * (float(np.exp(rises).mean()) - 1)

    cett = curve["cett"]
    assert mean_rise(cett, folders[-5:]) < 1
    assert mean_rise(cett + 1 / 1024, folders[-5:]) >= 1  # where the search's last step ended
    assert len(set(curve["own_cett"])) > 1  # it matters on which checkpoints
    for i, folder in enumerate(folders):
        plan = fallow.Plan.load(folder / "cett.plan")
        assert plan.knob == cett
        np.testing.assert_array_equal(plan.cuts[0].value, thresholds(folder, cett))
        for name, value in (("", cett), ("own_cett_", curve["own_cett"][i])):
            rise, ratio = rise_and_ratio(folder, judge, thresholds(folder, value))
            found = {
                key.removeprefix(name): values[i]
                for key, values in curve.items()
                if key.startswith(name) and isinstance(values, list)
            }
            assert found["activation_ratio"] == pytest.approx(ratio.mean(), abs=1e-4)
            assert found["activation_ratio_se"] == pytest.approx(
                ratio.std(ddof=1) / np.sqrt(6), rel=0.02
            )
            change = 100 * np.exp(rise.mean())
            assert found["ppl_change_percent"] == pytest.approx(change - 100, abs=2e-3)
            assert found["ppl_change_se"] == pytest.approx(
                change * rise.std(ddof=1) / np.sqrt(6), rel=0.02
            )
    assert report.cett == cett
    assert fallow.Plan.load(tmp_path / "m" / "cett.plan").knob == cett


def test_resumed_run_is_the_same(
    novel: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[str, list[float]] = {}
    save = _Run.save

    def note(run: _Run) -> None:
        losses[run.folder.name] = list(run.losses)
        save(run)

    monkeypatch.setattr(_Run, "save", note)
    whole = train(tmp_path / "whole", novel, SMALL)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    take_step, limit = _Run._take_step, 0

    def stop(run: _Run) -> None:
        if run.step == limit:
            raise KeyboardInterrupt
        take_step(run)

    for limit in (1, 7, 19):  # noqa: B007
        with monkeypatch.context() as patch:
            patch.setattr(_Run, "_take_step", stop)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "parts", novel, SMALL)
        assert not (tmp_path / "parts" / "model.safetensors").exists()
    for name, calls in (("joint_cett", 0), ("judge", 2), ("judge", 3)):
        real, left = getattr(training, name), [calls]

        def cut(*given: Any, real: Any = real, left: list[int] = left) -> Any:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(training, name, cut)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "parts", novel, SMALL)
    parts = train(tmp_path / "parts", novel, SMALL)
    assert losses["parts"] == losses["whole"]
    assert parts.sha256 == whole.sha256
    curves = [(tmp_path / n / "curve.json").read_text() for n in ("whole", "parts")]
    assert curves[0] == curves[1]


def test_seed_and_activation_change_the_model(novel: Text, tmp_path: Path) -> None:
    few = replace(SMALL, tokens=600, checkpoints=1)
    first = train(tmp_path / "a", novel, few)
    assert train(tmp_path / "b", novel, few).sha256 == first.sha256
    assert train(tmp_path / "c", novel, replace(few, seed=1)).sha256 != first.sha256
    smooth = train(tmp_path / "d", novel, replace(few, activation="silu"))
    assert smooth.sha256 != first.sha256
    assert json.loads((tmp_path / "d" / "final.json").read_text())["zero_ratio"] < 0.01


def test_every_epoch_sees_every_window_once(novel: Text, tmp_path: Path) -> None:
    corpus = training.prepare(tmp_path, novel, SMALL)
    one = replace(SMALL, batch=corpus.windows)
    first, second = (corpus.batch(one, step) for step in (0, 1))
    assert first.shape == (corpus.windows, 33)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.unique(first, axis=0), np.unique(second, axis=0))
    np.testing.assert_array_equal(first[0, 1:], first[0, 1:])
    starts = sorted(tuple(row[:-1]) for row in first)
    whole = corpus.ids[: corpus.windows * 32].reshape(-1, 32)
    assert starts == sorted(tuple(row) for row in whole)
    assert novel.content.endswith(corpus.held_out.content)


def test_learning_rate() -> None:
    settings = replace(SMALL, tokens=256 * 1000)
    rates = [settings.rate(step) for step in range(settings.steps)]
    assert settings.steps == 1000
    assert rates[0] == pytest.approx(1e-2 / 20)
    assert rates[20:900] == [1e-2] * 880
    assert (np.diff(rates[900:]) < 0).all()
    assert rates[-1] == pytest.approx(1e-3, rel=0.1)


def test_loss_that_is_not_finite(
    novel: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    take_step = _Run._take_step

    def spoil(run: _Run) -> None:
        if run.step == 3:
            with torch.no_grad():
                run.module.model.norm.weight.fill_(float("nan"))
        take_step(run)

    monkeypatch.setattr(_Run, "_take_step", spoil)
    with pytest.raises(FallowError, match=r"the loss is nan after 768 tokens; .*last good state"):
        train(tmp_path / "m", novel, SMALL)
    state = torch.load(tmp_path / "m" / "state.pt", weights_only=True)
    assert state["step"] == 3
    assert all(v.isfinite().all() for v in state["module"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "unknown activation 'gelu'; known: relu, silu"),
        ({"hidden_size": 100}, "--hidden-size 100 is no multiple of heads of 64"),
        ({"layers": 0}, "--layers 0 is too small"),
        ({"tokens": -1}, "--tokens -1 is too small"),
        ({"vocabulary": 100}, "--vocabulary 100 is outside 260 to 65536"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str, novel: Text, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "m", novel, replace(SMALL, **changes))
    assert not (tmp_path / "m").exists()


def test_bad_requests(novel: Text, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        train(tmp_path / "m", novel, SMALL, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="torch finds no GPU here"):
            train(tmp_path / "m", novel, SMALL, "cuda")
    with pytest.raises(FallowError, match=r"has 11 characters; .* are held out"):
        train(tmp_path / "m", Text("t", "a short one"), SMALL)
    train(tmp_path / "n", novel, replace(SMALL, tokens=300, checkpoints=1))
    with pytest.raises(FallowError, match="another activation, tokens, checkpoints; choose"):
        train(tmp_path / "n", novel, replace(SMALL, activation="silu"))
    settings = tmp_path / "n" / "training.json"
    older = {k: v for k, v in json.loads(settings.read_text()).items() if k != "metric"}
    settings.write_text(json.dumps(older))
    with pytest.raises(FallowError, match="another metric; choose another"):
        train(tmp_path / "n", novel, replace(SMALL, tokens=300, checkpoints=1))
    settings.write_text(json.dumps(older | {"metric": training.METRIC}))
    (tmp_path / "n" / "model.safetensors").unlink()
    (tmp_path / "n" / "state.pt").write_bytes(b"cut")
    with pytest.raises(FallowError, match=r"state\.pt is damaged"):
        train(tmp_path / "n", novel, replace(SMALL, tokens=300, checkpoints=1))


def test_compressed_text(tmp_path: Path) -> None:
    import lzma

    (tmp_path / "t.xz").write_bytes(lzma.compress(b"the ship"))
    assert load_text(tmp_path / "t.xz", "calibration").content == "the ship"
    (tmp_path / "t.xz").write_bytes(lzma.compress(b"the ship")[:20])
    with pytest.raises(FallowError, match="no whole xz file"):
        load_text(tmp_path / "t.xz", "calibration")


# Sweeps ------------------------------------------------------------------------------------------


CONFIG = """
[base]
text = "novel.txt"
hidden_size = 64
layers = 2
intermediate_size = 48
vocabulary = 300
tokens = 6e2
context = 32
batch = 8
checkpoints = 1
"""


def test_sweep(novel: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "novel.txt").write_text(novel.content)
    (tmp_path / "c.toml").write_text(f'{CONFIG}\n[grid]\nactivation = ["relu", "silu"]\nseed = [0]')
    ran = []

    def noted(folder: Path, *rest: Any) -> Any:
        ran.append(folder.name)
        return train(folder, *rest)

    monkeypatch.setattr(sweeping, "train", noted)
    table = sweep(tmp_path / "c.toml", tmp_path / "o")
    assert [row["run"] for row in table] == ["activation=relu-seed=0", "activation=silu-seed=0"]
    assert ran == [row["run"] for row in table]
    assert json.loads((tmp_path / "o" / "sweep.json").read_text()) == table
    for row in table:
        alone = json.loads((tmp_path / "o" / row["run"] / "curve.json").read_text())
        assert row["last_ratio"] == alone["activation_ratio"][-1]
        assert row["width_depth"] == 32
        assert row["limit"] is None  # one point has none
    assert sweep(tmp_path / "c.toml", tmp_path / "o") == table


def test_runs_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        CONFIG
        + """
[[run]]
hidden_size = 128
layers = 1
[[run]]
text = "other/code.txt"
seed = 3
"""
    )
    first, second = read_config(path)
    assert (first.settings.hidden_size, first.settings.layers) == (128, 1)
    assert (first.settings.tokens, first.text) == (600, tmp_path / "novel.txt")
    assert (second.name, second.text) == ("text=code-seed=3", tmp_path / "other" / "code.txt")
    path.write_text(CONFIG)
    assert [run.name for run in read_config(path)] == ["base"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[base", "is no TOML file"),
        ("[base]\nlayers = 1", "base.text must name a file"),
        ('[base]\ntext = "a"\nlayer = 1', "unknown setting 'layer'; known: activation"),
        ('[base]\ntext = "a"\nlayers = 1.5', "layers is 1.5, not of type int"),
        ('[base]\ntext = "a"\nlayers = true', "layers is True, not of type int"),
        ('[base]\ntext = "a"\nactivation = 1', "activation is 1, not of type str"),
        ('[base]\ntext = "a"\n[grid]\nseed = 1', "grid.seed must be a list"),
        ('[base]\ntext = "a"\n[grid]\nseed = [1, 1]', "two runs are 'seed=1'"),
        ('[base]\ntext = "a"\n[runs]\nseed = 1', "unknown table 'runs'"),
        ('[base]\ntext = "a"\nlayers = 0', "--layers 0 is too small"),
    ],
)
def test_bad_configs(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises((UsageError, FallowError), match=message):
        sweep(tmp_path / "c.toml", tmp_path / "o")
    with pytest.raises(FallowError, match="cannot read"):
        read_config(tmp_path / "none.toml")


# Advice ------------------------------------------------------------------------------------------


def test_advice_at_a_published_model() -> None:
    """The 0.8B ReLU model after as many tokens as it saw: its own law, 7.6 %."""
    found = advise(7.6e8, 2.724e11, "relu")
    assert found.ratio == pytest.approx(0.0753, abs=0.0005)
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert found.known_ceiling == pytest.approx(1 / found.ratio)
    assert found.gate_ceiling == pytest.approx(3 / (1 + 2 * found.ratio))
    assert found.known_interval[0] <= found.known_ceiling <= found.known_interval[1]
    assert not found.warnings
    assert len(found.rests_on) == 6


def test_advice_follows_the_laws() -> None:
    fresh, trained = (advise(1e9, tokens, "silu").ratio for tokens in (1e10, 2e11))
    assert fresh < trained < 0.41  # SiLU rises
    assert advise(1e9, 1e10, "relu").ratio > advise(1e9, 2e11, "relu").ratio
    assert len(advise(1e8, 1e15, "relu").warnings) == 2
    for arguments in ((0, 1e9, "relu"), (1e9, float("inf"), "relu"), (1e9, 1e9, "gelu")):
        with pytest.raises(UsageError):
            advise(*arguments)


def test_own_curve_joins(tmp_path: Path) -> None:
    path = tmp_path / "run" / "curve.json"
    path.parent.mkdir()
    tokens = np.geomspace(1e7, 1e9, 12)
    content: dict[str, Any] = {
        "token_passed": tokens.tolist(),
        "activation_ratio": (0.3 - 0.01 * (tokens / 1e9) ** -0.4).tolist(),
    }
    path.write_text(json.dumps(content))
    with pytest.raises(FallowError, match="does not say of what model it is"):
        own_basis(path)
    content |= {"activation": "silu", "parameters": 2e6}
    path.write_text(json.dumps(content | {"cett": [0.1] * 12}))
    with pytest.raises(FallowError, match="has a CETT per checkpoint, as older versions measured"):
        own_basis(path)
    path.write_text(json.dumps(content))
    found = advise(2e6, 1e9, "silu", [own_basis(path)])
    assert found.ratio == pytest.approx(0.29, abs=1e-3)
    assert "own run/curve" in found.rests_on
