"""The engine against transformers, on every architecture and rule, and on the real SmolLM2."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fallow
from conftest import VOCABULARY, engine_plan, make_folder, make_sentencepiece
from fallow import _core
from fallow.calibration.calibrator import Calibrator
from fallow.checkpoints.text import Half, load_text
from fallow.checkpoints.weights import read_gguf
from fallow.common.errors import FallowError, UsageError
from fallow.engine.answer import AnswerText, Piece
from fallow.engine.drafting import PASS_COST, Lookup
from fallow.engine.engine import Engine
from fallow.engine.packed import is_packed
from fallow.engine.sampling import Sampler, TokenChoice, choice_of
from fallow.measure.evaluation import dense_logits
from fallow.measure.quality import compare_logits, evaluate_engine
from fallow.models import ARCHITECTURES
from fallow.packing import packer, selfcheck
from fallow.packing.packer import pack
from fallow.packing.source import Source
from fallow.plan import Plan
from fallow.rules import RULES
from test_models import GGUF_NAMES, write_gguf

IDS = np.random.default_rng(1).integers(2, VOCABULARY, 100)
# The cache is f16, so keys and values are rounded to 2^-11; of logits up to 8 that leaves this.
ERROR = 0.03


@pytest.fixture(scope="session")
def packed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny model as a packed file of F32 weights."""
    root = tmp_path_factory.mktemp("packed")
    for name, folder in folders.items():
        pack(folder, root / f"{name}.gguf", quant="f32")
    return {name: root / f"{name}.gguf" for name in folders}


def reference(model: fallow.Model, plan: Plan | None = None) -> np.ndarray:
    with model.sparse(plan):
        return model.logits(model.hidden(IDS[None])[0]).numpy()


def one_by_one(engine: Engine) -> np.ndarray:
    engine.reset()
    return np.concatenate([engine.forward(IDS[i : i + 1]) for i in range(len(IDS))])


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(
    name: str, kernels: str, tiny: dict[str, fallow.Model], packed: dict[str, Path]
) -> None:
    expected = reference(tiny[name])
    engine = Engine(packed[name], threads=2, kernels=kernels)
    assert engine.kernels == kernels
    assert np.abs(engine.logits(IDS) - expected).max() < ERROR
    assert np.abs(one_by_one(engine) - expected).max() < ERROR
    engine.reset()  # blocks that start in the middle of the sliding window
    parts = [engine.forward(part, every=True) for part in np.split(IDS, [30, 31, 77])]
    assert np.abs(np.concatenate(parts) - expected).max() < ERROR


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_few_tokens_are_as_one_by_one(name: str, kernels: str, packed: dict[str, Path]) -> None:
    """Bit by bit: a batch verifies what one token after another would have said."""
    engine = Engine(packed[name], threads=2, kernels=kernels)
    check_a_few(engine)
    engine.use_plan(cutting_plan(engine))
    check_a_few(engine)


@pytest.mark.parametrize("kernels", _core.KERNELS)
@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"])
def test_a_few_quantised_tokens(kind: str, kernels: str, tmp_path: Path) -> None:
    width = 256 if kind.endswith("k") else 96
    folder = make_folder("llama", tmp_path / "m", hidden_size=width, num_attention_heads=4)
    pack(folder, tmp_path / "m.gguf", quant=kind)
    check_a_few(Engine(tmp_path / "m.gguf", threads=2, kernels=kernels))


def check_a_few(engine: Engine) -> None:
    expected = one_by_one(engine)
    assert _core.FEW == 8
    for sizes in ([8, 2, 3, 4, 5, 6, 7, 1], [9, 8, 8]):
        ends = np.cumsum(sizes)
        engine.reset()
        for part, end in zip(np.split(IDS[: ends[-1]], ends[:-1]), ends, strict=True):
            found = engine.forward(part, every=True)
            if len(part) <= _core.FEW:
                np.testing.assert_array_equal(found, expected[end - len(part) : end])
            else:  # of the same tokens one by one, so that the cache is the same
                engine.reset()
                for token in IDS[:end]:
                    engine.forward([token])


def cutting_plan(engine: Engine) -> Plan:
    weights = np.ones((engine._core.n_layers, engine._core.intermediate_size), dtype=np.float32)
    arrays = {
        "threshold.gate_act": np.full(engine._core.n_layers, 0.1),
        "weight.gate_act": weights,
    }
    return engine_plan(engine, "cats", arrays)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_few_tokens_under_a_plan(name: str, packed: dict[str, Path]) -> None:
    engine = Engine(packed[name], threads=2)
    n_layers = engine._core.n_layers
    plans = [
        cutting_plan(engine),
        engine_plan(engine, "topk", {"kept": np.array([0.4])}),
        engine_plan(engine, "two_stage", {"threshold.inter": np.full(n_layers, 0.05)}),
    ]
    by_input = dataclasses.replace(engine_plan(engine, "teal", {}), where="input")
    inputs = [tap for tap in _core.TAPS if tap.endswith("_proj")]
    if not engine.file.get("fallow.gated"):
        inputs.remove("gate_proj")
    thresholds = {f"threshold.{tap}": np.full(n_layers, 0.3) for tap in inputs}
    plans.append(dataclasses.replace(by_input, arrays=thresholds))
    dense = one_by_one(engine)
    for plan in plans:
        engine.use_plan(plan)
        check_a_few(engine)
        assert np.abs(one_by_one(engine) - dense).max() > 1e-4


def test_dense_leaves_the_plan_aside(packed: dict[str, Path]) -> None:
    engine = Engine(packed["llama"])
    expected = one_by_one(engine)
    engine.use_plan(cutting_plan(engine))
    engine.reset()
    engine.forward(IDS[:3], dense=True)
    found = engine.forward(IDS[3:9], every=True, dense=True)
    np.testing.assert_array_equal(found, expected[3:9])
    engine.reset(keep=8)
    assert np.abs(engine.forward(IDS[8:9]) - expected[8]).max() > 1e-4
    engine.reset(keep=8)
    np.testing.assert_array_equal(engine.forward(IDS[8:9], dense=True)[0], expected[8])


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_packing_a_gguf(name: str, tiny: dict[str, fallow.Model], tmp_path: Path) -> None:
    source = write_gguf(name, tiny[name], tmp_path / "m.gguf")
    check = pack(source, tmp_path / "packed.gguf")
    assert check.passed
    logits = Engine(tmp_path / "packed.gguf").logits(IDS)
    assert np.abs(logits - reference(tiny[name])).max() < 2 * ERROR  # down_proj is F16
    kept = read_gguf(tmp_path / "packed.gguf").tensors
    assert {kept[f"layers.0.{p}.weight"].type for p in ("q_proj", "up_proj")} == {"F32"}


def test_the_type_of_down_proj_is_chosen_on_another_text_than_reported(
    tiny: dict[str, fallow.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = tiny["llama"], tmp_path / "packed.gguf"
    source = write_gguf("llama", model, tmp_path / "m.gguf")
    halves: tuple[Half, ...] = ("calibration", "evaluation")
    read: list[tuple[bytes, str]] = []  # windows, and the type of down_proj_t they were read for

    def compare(window: np.ndarray, *rest: Any) -> Any:
        read.append((window.tobytes(), kinds[-1]))
        return compare_logits(window, *rest)

    def write(*arguments: Any) -> None:
        kinds.append(arguments[3])
        write_packed(*arguments)

    write_packed = packer.write_packed
    kinds: list[str] = []
    monkeypatch.setattr(selfcheck, "compare_logits", compare)
    monkeypatch.setattr(packer, "write_packed", write)
    monkeypatch.setattr(Source, "down_types", lambda *_: ("BF16", "F16", "F32"))
    monkeypatch.setattr(selfcheck, "LARGEST_KL", 4e-6)  # BF16 has 8e-6, F16 1e-6
    check = pack(source, output)
    assert kinds == ["BF16", "F16"]
    windows = {
        half: {w.tobytes() for w in model.windows(load_text(None, half), 128)} for half in halves
    }
    chosen = [window for window, _ in read[: -selfcheck.CHECK_WINDOWS]]
    reported = [window for window, _ in read[-selfcheck.CHECK_WINDOWS :]]
    assert set(chosen) <= windows["calibration"]
    assert set(reported) <= windows["evaluation"]
    assert read[-1][1] == "F16"
    # The figures are those of the file, on the first windows of the evaluation text.
    engine = Engine(output)
    found = evaluate_engine(
        engine, None, context=128, windows=selfcheck.CHECK_WINDOWS,
        against=partial(dense_logits, model),
    )  # fmt: skip
    assert check.kl == pytest.approx(found.kl_to_dense["mean"], rel=1e-6)
    assert check.ppl_change_percent == pytest.approx(found.ppl_change_percent, rel=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_run_is_deterministic(threads: int, packed: dict[str, Path]) -> None:
    runs = [one_by_one(Engine(packed["llama"], threads=threads)) for _ in range(2)]
    np.testing.assert_array_equal(runs[0], runs[1])


def make_plan(calibrator: Calibrator, rule: str, sparsity: float) -> Plan:
    if rule == "relu":
        return calibrator.plan(rule, knob=0.0)
    return calibrator.plan(rule, sparsity=sparsity)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plans_are_those_of_the_reference(
    name: str,
    rule: str,
    tiny: dict[str, fallow.Model],
    packed: dict[str, Path],
    calibrators: dict[str, Calibrator],
) -> None:
    plan = make_plan(calibrators[name], rule, 0.5)
    expected = reference(tiny[name], plan)
    engine = Engine(packed[name], plan, threads=2)
    for found in (engine.logits(IDS), one_by_one(engine)):
        # Where a score lies at its threshold, rounding decides, and all later tokens see it: the
        # first ones are compared.
        error = np.abs(found - expected).max(axis=1)[:16]
        assert np.quantile(error, 0.25) < ERROR


@pytest.mark.parametrize("rule", [r for r in RULES if r != "relu"])
def test_the_same_neurons_are_chosen(
    rule: str,
    tiny: dict[str, fallow.Model],
    packed: dict[str, Path],
    calibrators: dict[str, Calibrator],
) -> None:
    plan = make_plan(calibrators["llama"], rule, 0.5)
    engine = Engine(packed["llama"], plan, threads=2)
    one_by_one(engine)
    decoded = engine.idle_neurons()
    engine.reset_stats()
    engine.logits(IDS)
    np.testing.assert_allclose(engine.idle_neurons(), decoded, atol=2e-3)
    idle: list[list[float]] = [[], []]
    tap: Any = lambda layer, value: idle[layer].append(float((value == 0).float().mean()))  # noqa: E731
    from fallow.models.taps import attach

    model = tiny["llama"]
    with model.sparse(plan), attach(model.layers, {"inter": tap}):
        model.hidden(IDS[None])
    np.testing.assert_allclose(decoded, np.mean(idle, axis=1), atol=5e-3)
    assert (decoded > 0.2).all() == (plan.where == "inter" or rule in ("teal", "wina"))


@pytest.mark.parametrize("rule", [r for r in RULES if r != "relu"])
def test_sparsity_0_is_dense(
    rule: str, packed: dict[str, Path], calibrators: dict[str, Calibrator]
) -> None:
    engine = Engine(packed["qwen2"], threads=2)
    dense = one_by_one(engine), engine.logits(IDS)
    plan = make_plan(calibrators["qwen2"], rule, 0.0)
    for other in (plan, dataclasses.replace(plan, arrays={})):  # an empty plan, too
        engine.use_plan(other)
        np.testing.assert_array_equal(one_by_one(engine), dense[0])
        np.testing.assert_array_equal(engine.logits(IDS), dense[1])


def test_skipped_neurons_are_not_read(
    packed: dict[str, Path], calibrators: dict[str, Calibrator]
) -> None:
    read = {}
    for sparsity in (0.0, 0.5, 0.9):
        plan = make_plan(calibrators["llama"], "gate_topk", sparsity)
        engine = Engine(packed["llama"], plan)
        engine.forward(IDS[:1])
        read[sparsity] = engine.core_stats()["bytes_read"]
    width, d_ff, layers = 24, 37, 2
    for sparsity, kept in ((0.5, 18), (0.9, 4)):  # round(0.5 * 37), round(0.1 * 37)
        saved = layers * 2 * (d_ff - kept) * width * 4  # rows of up_proj and down_proj_t, F32
        assert read[0.0] - read[sparsity] == saved


def test_score(packed: dict[str, Path], tiny: dict[str, fallow.Model]) -> None:
    log_p = torch.from_numpy(reference(tiny["llama"])).log_softmax(-1)
    expected = log_p[:-1].gather(1, torch.from_numpy(IDS[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(Engine(packed["llama"]).score(IDS), expected, atol=ERROR)


def test_generation(packed: dict[str, Path], tiny: dict[str, fallow.Model]) -> None:
    engine = Engine(packed["gemma3"], threads=2)
    pieces = list(engine.generate("neuron 3 rests", max_tokens=24))
    assert "".join(pieces) == tiny["gemma3"].generate("neuron 3 rests", max_new_tokens=24)
    stats = engine.stats
    assert stats.new_tokens <= 24
    assert stats.prompt_tokens == len(engine.tokenizer.prompt("neuron 3 rests"))
    assert len(stats.sparsity_per_layer) == 2
    assert len(stats.logits_hash) == 16
    assert min(stats.decode_tps, stats.prefill_tps, stats.bytes_per_token, stats.peak_rss_mb) > 0


def test_sampling_follows_its_seed(packed: dict[str, Path]) -> None:
    engine = Engine(packed["llama"])
    options = {"max_tokens": 20, "temperature": 1.5, "top_p": 0.9, "top_k": 50}
    texts = ["".join(engine.generate("neuron", seed=seed, **options)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_lossless_text_is_the_dense_models(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lookup, "_cost", lambda _self, guesses: 1 + 0.05 * guesses)
    engine = Engine(packed["qwen3"])
    prompt = "the gate"
    accepted = 0
    for options in ({}, {"temperature": 0.3, "seed": 1}, {"temperature": 1.0, "top_p": 0.9}):
        engine.use_plan(None)
        expected = "".join(engine.generate(prompt, max_tokens=60, **options))
        plain = engine.stats
        engine.use_plan(cutting_plan(engine))
        assert "".join(engine.generate(prompt, max_tokens=60, **options)) != expected
        found = "".join(engine.generate(prompt, max_tokens=60, lossless=True, **options))
        assert found == expected
        assert engine.stats.new_tokens == plain.new_tokens
        assert engine.stats.accepted <= engine.stats.drafted
        accepted += engine.stats.accepted
        # Stopped anywhere it is the same text.
        for end in (1, 2, 7):
            pieces = engine.generate(prompt, max_tokens=end, lossless=True, **options)
            assert expected.startswith("".join(pieces))
    assert accepted > 10
    # Up to the last token that the context holds.
    size = len(engine.tokenizer.prompt(prompt, False))
    small = Engine(packed["qwen3"], context=size + 30)
    texts = [
        "".join(small.generate(prompt, max_tokens=30, lossless=lossless))
        for lossless in (False, True)
    ]
    assert texts[0] == texts[1]


def test_lookup_proposes_what_followed() -> None:
    lookup = Lookup([5, 6, 7, 8, 9, 1, 2])
    assert lookup.propose(7) == []  # a suffix that has not occurred
    for token in (5, 6, 7):
        lookup.add(token)
    assert lookup.propose(1) == [8]
    assert lookup.propose(7) == [8]  # a second one would cost more than it is likely to give
    assert lookup.propose(0) == []
    for _ in range(20):
        wrong = len(lookup.propose(7))
        lookup.learn(wrong, 0, PASS_COST[wrong])
    assert lookup.propose(7) == []  # such guesses have not held
    for _ in range(20):
        lookup.learn(5, 5, PASS_COST[5])
    assert lookup.propose(7) == [8, 9, 1]
    assert lookup.propose(2) == [8, 9]
    for _ in range(9):  # on a machine where a pass of six is no longer than one of one
        lookup.learn(0, 0, PASS_COST[5])
    assert lookup.propose(7) == [8, 9, 1, 2, 5]


def test_stop_ends_before_its_text(packed: dict[str, Path]) -> None:
    engine = Engine(packed["llama"])
    whole = "".join(engine.generate("neuron", max_tokens=30))
    stop = whole[10:13]
    pieces = list(engine.generate("neuron", max_tokens=30, stop=[stop]))
    assert "".join(pieces) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "top_k": 2}, {0, 1}),
        ({"temperature": 1.0, "top_p": 0.6}, {0, 1}),  # 0.5 and 0.3
        ({"temperature": 1.0, "min_p": 0.3}, {0, 1}),  # 0.3 / 0.5, but 0.15 / 0.5 is just 0.3
        ({"temperature": 0.0}, {0}),
    ],
)
def test_sampler(options: dict[str, Any], kept: set[int]) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.145, 0.055])).astype(np.float32)
    sampler = Sampler(**options)
    assert {sampler.pick(logits) for _ in range(300)} == kept


def test_a_prompt_in_steps_is_the_same_to_the_bit(
    packed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(packed["gemma3"])
    whole = "".join(engine.generate(IDS[:90], 8))
    expected = engine.logits_hash()
    monkeypatch.setattr("fallow.engine.answer.PREFILL_STEP", 32)
    pieces = list(engine.answer(IDS[:90], 8, Sampler()))
    assert pieces[:2] == [Piece(), Piece()]  # where it could have been stopped
    assert "".join(p.text for p in pieces) == whole
    assert engine.logits_hash() == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_cache_holds_is_not_read_again(name: str, packed: dict[str, Path]) -> None:
    engine = Engine(packed[name])
    fresh = Engine(packed[name])

    def logits_after(ids: np.ndarray) -> tuple[int, float]:
        list(engine.answer(ids, 1, Sampler(), reuse=True))
        list(fresh.answer(ids, 1, Sampler()))
        assert engine.last_logits is not None
        return engine.stats.cached_tokens, float(
            np.abs(engine.last_logits - fresh.last_logits).max()
        )

    assert logits_after(IDS[:50]) == (0, 0.0)
    for ids, held in (
        (IDS[:70], 50),  # goes on
        (IDS[:70], 69),  # the same again: the last token is read
        (np.r_[IDS[:30], IDS[40:60]], 30),  # turns off
        (IDS[60:90], 0),
    ):
        cached, error = logits_after(ids)
        assert cached == held
        assert error < ERROR
    engine.reset(keep=10)
    assert logits_after(np.r_[IDS[60:70], IDS[:5]])[0] == 10
    engine.logits(IDS[:20])
    assert logits_after(IDS[:30])[0] == 20


def test_log_probabilities_are_of_the_model(packed: dict[str, Path]) -> None:
    engine = Engine(packed["llama"])
    sampler = Sampler(temperature=1.5, top_k=5, seed=1)
    pieces = list(engine.answer(IDS[:20], 12, sampler, top_logprobs=3))
    tokens = [t for p in pieces for t in p.tokens]
    assert engine.stats.new_tokens == 12
    scores = engine.score(np.r_[IDS[:20], [t.id for t in tokens]])[-len(tokens) :]
    assert [t.logprob for t in tokens] == pytest.approx(scores, abs=ERROR)
    for token in tokens:
        values = [value for _, value in token.top]
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0] + 1e-9


class _Said:
    """Stands for a tokenizer whose tokens are these texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[i] for i in ids)


def test_text_is_held_back_while_it_may_change() -> None:
    tokenizer: Any = _Said("one ", "\ufffd", "st", "op", " two")
    text = AnswerText(tokenizer, ("stop",))
    said = [text.add(TokenChoice(i), last=False) for i in (0, 2)]
    assert [p.text for p in said] == ["one ", ""]
    assert text.add(TokenChoice(4), last=False).text == "st two"  # no stop text after all
    assert text.add(TokenChoice(1), last=False) == Piece()
    assert text.rest() == Piece("\ufffd", (TokenChoice(1),))
    text = AnswerText(tokenizer, ("stop",))
    pieces = [text.add(TokenChoice(i), last=False) for i in (0, 2, 3)]
    assert text.stopped
    assert [p.text for p in pieces] == ["one ", "", ""]
    assert [t.id for p in pieces for t in p.tokens] == [0]
    text = AnswerText(tokenizer, ("stop",))
    pieces = [text.add(TokenChoice(0), False), text.add(TokenChoice(2), False), text.rest()]
    assert "".join(p.text for p in pieces) == "one st"  # the answer ended there


def test_an_answer_can_be_stopped(packed: dict[str, Path]) -> None:
    engine = Engine(packed["llama"])
    pieces = engine.answer(IDS[:20], 50, Sampler())
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert engine.stats.finish == ""
    assert engine.stats.new_tokens < 50
    assert engine.stats.peak_rss_mb > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([0, np.nan], "logits are NaN"),
        ([-np.inf, np.nan], "logits are NaN"),
        ([0, np.inf], "logits are infinite"),
        ([np.inf, np.inf], "logits are infinite"),
        ([-np.inf, -np.inf], "logits are infinite"),
    ],
)
def test_logits_that_are_no_numbers(logits: list[float], message: str, temperature: float) -> None:
    with pytest.raises(FallowError, match=message):
        Sampler(temperature).pick(np.array(logits, dtype=np.float32))


def test_a_logit_of_minus_infinity_is_never_picked() -> None:
    logits = np.array([-np.inf, 0, 0.1, -np.inf], dtype=np.float32)
    for options in ({}, {"top_k": 4}, {"top_p": 0.999}, {"min_p": 0.1}):
        sampler = Sampler(temperature=100.0, **options)  # type: ignore[arg-type]
        assert {sampler.pick(logits) for _ in range(50)} == {1, 2}
    choice = choice_of(2, logits, top=4)
    # numpy's own logaddexp for the sum.
    expected = np.array([0.1, 0.0]) - np.logaddexp(np.float32(0.1), 0)
    assert [i for i, _ in choice.top] == [2, 1, 0, 3]
    assert [p for _, p in choice.top] == pytest.approx([*expected, -np.inf, -np.inf], abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-30, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    random = np.random.default_rng(0)
    sampler = Sampler(temperature=temperature)
    for _ in range(20):
        logits = random.normal(size=100, scale=1e3).astype(np.float32)
        logits[7] = -np.inf
        assert sampler.pick(logits) == int(np.argmax(logits))


def test_the_reference_samples_as_the_engine_does(
    tiny: dict[str, fallow.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny["llama"]
    greedy = model.generate(IDS[:5], max_new_tokens=5)
    for temperature in (1e-29, 1e-300, 5e-324):
        assert model.generate(IDS[:5], max_new_tokens=5, temperature=temperature) == greedy
    head = model.module.lm_head.forward
    for bad, message in ((np.nan, "logits are NaN"), (np.inf, "logits are infinite")):
        monkeypatch.setattr(model.module.lm_head, "forward", lambda x, b=bad: head(x) + b)
        for temperature in (0.0, 1.0):
            with pytest.raises(FallowError, match=message):
                model.generate(IDS[:5], max_new_tokens=5, temperature=temperature)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_scores_are_never_nan(packed: dict[str, Path], bad: float) -> None:
    engine = Engine(packed["llama"])
    logits = engine.logits(IDS[:4])
    logits[0, 5] = bad
    engine.logits = lambda _: logits  # type: ignore[method-assign]
    with pytest.raises(FallowError, match="logits are"):
        engine.score(IDS[:4])
    with pytest.raises(FallowError, match="logits are"):
        choice_of(3, logits[0], top=1)


# Text --------------------------------------------------------------------------------------------


def test_an_answer_keeps_its_first_space(parrot: tuple[Path, Path]) -> None:
    """What transformers decodes of prompt and answer, less what it decodes of the prompt."""
    engine = Engine(parrot[1])
    assert list(engine.generate("neuron", 20)) == [" rests", "🙂", " re"]
    assert engine.stats.finish == "stop"
    assert "".join(engine.generate("neuron", 20, stop=["s🙂"])) == " rest"
    model = fallow.load(parrot[0])
    assert model.generate("neuron", max_new_tokens=20) == " rests🙂 re"
    reference = make_sentencepiece()
    prompt = engine.tokenizer.prompt("neuron").tolist()
    said = [t.id for piece in engine.answer(prompt, 20, Sampler()) for t in piece.tokens]
    whole = reference.decode(prompt + said, skip_special_tokens=True)
    assert whole[len(reference.decode(prompt)) :] == " rests🙂 re"


def test_control_tokens_in_a_prompt(parrot: tuple[Path, Path], run: Any) -> None:
    engine, model = Engine(parrot[1]), fallow.load(parrot[0])
    for answer in (
        "".join(engine.generate("neuron<s>", 20)),
        model.generate("neuron<s>", max_new_tokens=20),
    ):
        assert answer == "."
    as_text = "".join(engine.generate("neuron<s>", 20, parse_special=False))
    assert as_text != "."
    for option, said in (((), "."), (("--no-parse-special",), as_text)):
        done = run("generate", parrot[1], "neuron<s>", "--max-new-tokens", 20, "--json", *option)
        assert done.json["text"] == said
        length = len(engine.tokenizer.encode("neuron<s>", parse_special=not option))
        assert done.json["stats"]["prompt_tokens"] == length
    slow = run("generate", parrot[0], "neuron<s>", "--max-new-tokens", 20, "--no-parse-special")
    assert slow.out.rstrip("\n") == as_text


def test_evaluation_on_the_engine(
    packed: dict[str, Path],
    tiny: dict[str, fallow.Model],
    calibrators: dict[str, Calibrator],
    texts: tuple[Path, Path],
) -> None:
    plan = make_plan(calibrators["qwen3"], "topk", 0.5)
    engine = Engine(packed["qwen3"], context=64)
    found = evaluate_engine(engine, plan, texts[1], context=64, windows=3)
    expected = fallow.evaluate(tiny["qwen3"], plan, texts[1], context=64, windows=3)
    assert found.ppl == pytest.approx(expected.ppl, rel=0.01)
    assert found.ppl_change_percent == pytest.approx(expected.ppl_change_percent, abs=1)
    assert found.achieved_sparsity == pytest.approx(expected.achieved_sparsity, abs=0.01)
    # The engine counts windows: their spread is less than that over tokens, and is not called so.
    windows = [evaluate_engine(engine, plan, texts[1], context=64, windows=n + 1) for n in range(2)]
    first = [layer["mean"] for layer in windows[0].sparsity_per_layer["inter"]]
    both = [layer["mean"] for layer in windows[1].sparsity_per_layer["inter"]]
    for layer, one, mean in zip(windows[1].sparsity_per_layer["inter"], first, both, strict=True):
        low, high = np.percentile([one, 2 * mean - one], [5, 95])
        assert (layer["p5"], layer["p95"]) == pytest.approx((low, high))
    assert (found.spread_over, expected.spread_over) == ("windows", "tokens")
    decoded = evaluate_engine(engine, plan, texts[1], context=64, windows=3, decode=True)
    assert decoded.ppl == pytest.approx(found.ppl, rel=0.01)
    against = evaluate_engine(
        engine, None, texts[1], context=64, windows=3, against=partial(dense_logits, tiny["qwen3"])
    )
    assert against.kl_to_dense["mean"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(UsageError, match="is the text the plan was calibrated on"):
        evaluate_engine(engine, plan, texts[0], context=64)


def test_a_packed_plan_is_used(
    folders: dict[str, Path], calibrators: dict[str, Calibrator], tmp_path: Path
) -> None:
    plan = make_plan(calibrators["llama"], "cats", 0.5)
    pack(folders["llama"], tmp_path / "m.gguf", quant="f32", plan=plan)
    with_plan, without = Engine(tmp_path / "m.gguf"), Engine(tmp_path / "m.gguf", plan=False)
    assert with_plan.plan is not None
    assert with_plan.plan.rule == "cats"
    assert without.plan is None
    assert (with_plan.logits(IDS) != without.logits(IDS)).any()


def test_tokenizer_survives(packed: dict[str, Path], tiny: dict[str, fallow.Model]) -> None:
    text = "neuron 7 rests; the 3rd gate — «works»"
    ids = tiny["llama"].tokenizer.encode(text)
    found = Engine(packed["llama"]).tokenizer
    np.testing.assert_array_equal(found.encode(text), ids)
    assert found.decode(ids) == text
    assert found.eos_ids == tiny["llama"].tokenizer.eos_ids


def fails(kind: type[Exception], call: Any) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_use(
    packed: dict[str, Path], tiny: dict[str, fallow.Model], calibrators: dict[str, Calibrator]
) -> None:
    path = packed["llama"]
    engine = Engine(path, context=16)
    assert "threads 0 is outside" in fails(UsageError, lambda: Engine(path, threads=0))
    assert "--context 999 is outside 1 to 128" in fails(
        UsageError, lambda: Engine(path, context=999)
    )
    assert "do not run here; known: " in fails(UsageError, lambda: Engine(path, kernels="mmx"))
    assert "exceed the context of 16" in fails(FallowError, lambda: engine.logits(IDS))
    assert "exceed the context of 16" in fails(FallowError, lambda: engine.generate("neuron " * 20))
    assert "token id 300 is outside the vocabulary of 300" in fails(
        FallowError, lambda: engine.forward([300])
    )
    assert "token id -1" in fails(FallowError, lambda: engine.forward([-1]))
    assert "no tokens to read" in fails(FallowError, lambda: engine.forward([]))
    assert "top_p 0 is outside" in fails(UsageError, lambda: engine.generate("neuron", top_p=0))
    other = make_plan(calibrators["qwen2"], "topk", 0.5)
    assert "not for llama" in fails(FallowError, lambda: Engine(path, other))
    plan = make_plan(calibrators["llama"], "cats", 0.5)
    short = dataclasses.replace(plan, arrays={"threshold.gate_act": np.zeros(1, np.float32)})
    assert "has the shape (1,)" in fails(FallowError, lambda: Engine(path, short))
    assert "unknown type 'q9'" in fails(
        UsageError, lambda: pack(tiny["llama"], "x.gguf", quant="q9")
    )
    assert "not whole blocks of 32" in fails(
        FallowError, lambda: pack(tiny["llama"], "x.gguf", quant="q8_0")
    )
    assert not Path("x.gguf").exists()


def test_files_that_are_not_packed(
    packed: dict[str, Path], tiny: dict[str, fallow.Model], tmp_path: Path
) -> None:
    plain = write_gguf("llama", tiny["llama"], tmp_path / "plain.gguf")
    assert is_packed(packed["llama"])
    assert not is_packed(plain)
    assert not is_packed("smollm2")
    assert "not a packed model; make one with" in fails(FallowError, lambda: Engine(plain))
    assert "cannot read GGUF" in fails(FallowError, lambda: Engine(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("neurons at rest, and more of them")
    assert "not a GGUF file" in fails(FallowError, lambda: Engine(tmp_path / "text.gguf"))


def test_truncated_at_any_byte(packed: dict[str, Path], tmp_path: Path) -> None:
    content = packed["phi"].read_bytes()
    rng = np.random.default_rng(0)
    used = len(content) - 4096  # the last tensor is padded to whole pages
    cuts = {0, 1, 4, 23, used, *rng.integers(0, used, 60).tolist()}
    for cut in sorted(cuts):
        path = tmp_path / f"{cut}.gguf"
        path.write_bytes(content[:cut])
        assert str(path) in fails(FallowError, lambda path=path: Engine(path))


def test_smollm2_is_its_reference(
    smollm2: fallow.Model, wikitext: tuple[Path, Path], tmp_path: Path
) -> None:
    """2,000 tokens of WikiText: KL <= 0.002 nats and top-1 agreement >= 98 %."""
    check = pack("smollm2", tmp_path / "m.gguf")
    assert check.passed
    engine = Engine(tmp_path / "m.gguf", context=500)
    found = evaluate_engine(
        engine, None, wikitext[1], context=500, windows=4, against=partial(dense_logits, smollm2)
    )
    assert found.kl_to_dense["mean"] <= 0.002
    assert found.top1_agreement >= 0.98
    assert abs(found.ppl_change_percent) < 0.2
