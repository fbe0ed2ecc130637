"""Answers of the engine: sampling, what is guessed ahead, stops, text and log probabilities."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fallow
from conftest import PACKED, make_sentencepiece
from engines import ERROR, IDS
from fallow.common.errors import FallowError, UsageError
from fallow.engine.answer import AnswerText, Piece
from fallow.engine.drafting import PASS_COST, Lookup
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler, TokenChoice, choice_of


def test_sampling_follows_its_seed(packed: dict[str, Path]) -> None:
    engine = Engine(packed["llama"])
    options = {"max_tokens": 20, "temperature": 1.5, "top_p": 0.9, "top_k": 50}
    texts = ["".join(engine.generate("neuron", seed=seed, **options)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


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


@pytest.mark.parametrize("name", PACKED)
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


class _Bytes:
    """Stands for a tokenizer of bytes, which counts those that it decodes."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")  # the rest: control


@pytest.mark.parametrize(
    "token_ids",
    [
        list("so é 🙂 ".encode()) * 300,
        [0x80] * 3000,  # no text
        [0xF0] * 3000,
        [*b"a", *[0xF0, 0x9F] * 1500],
        [*b"a", *[300] * 3000, *b"b"],  # control tokens
        list(b"stostosto") * 300,
        list(b"x" * 3000),
    ],
)
def test_answers_take_time_in_proportion_to_their_length(token_ids: list[int]) -> None:
    tokenizer: Any = _Bytes()
    text = AnswerText(tokenizer, ("stop", "never" * 20))
    pieces = []
    for i in token_ids:
        pieces.append(text.add(TokenChoice(i), last=False))
        assert len(text._text()) < 200  # which stop texts are sought in
    pieces.append(text.rest())
    assert tokenizer.decoded < 200 * len(token_ids)
    assert [t.id for p in pieces for t in p.tokens] == token_ids
    said = "".join(p.text for p in pieces)
    whole = bytes(i for i in token_ids if i < 256).decode("utf-8", "replace")
    assert said.rstrip("\ufffd") == whole.rstrip("\ufffd")


def test_a_stop_text_in_pieces_of_characters() -> None:
    tokenizer: Any = _Bytes()
    for stop in ("🙂!", "é🙂", "\ufffd"):
        text, said, tokens = AnswerText(tokenizer, (stop,)), "", 0
        for i in "a é🙂! b".encode() + b"\x80z":
            piece = text.add(TokenChoice(i), last=False)
            said, tokens = said + piece.text, tokens + len(piece.tokens)
            if text.stopped:
                break
        whole = "a é🙂! b\ufffdz"
        assert text.stopped
        assert said == whole[: whole.index(stop)]
        assert tokens == len(said.encode())


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


def test_repeat_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    random, text = np.random.default_rng(0), [3, 7, 7]
    for penalty in (1.3, 0.8):
        expected = RepetitionPenaltyLogitsProcessor(penalty)
        sampler = Sampler(repeat_penalty=penalty)
        sampler.begin(text, 20)
        ids = list(text)
        for _ in range(60):
            logits = random.normal(size=20).astype(np.float32)
            scores = expected(torch.tensor([ids]), torch.tensor(logits[None]))
            ids.append(sampler.pick(logits))
            assert ids[-1] == int(scores.argmax())
        assert len(set(ids)) > 5


def test_penalties_and_biases_are_those_of_openai() -> None:
    """https://platform.openai.com/docs/guides/text-generation: how often a token was sampled."""
    options: Any = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": {2: 1.5}}
    random, sampler = np.random.default_rng(1), Sampler(**options)
    for prompt in ([1, 1, 2], []):  # a prompt does not count, nor does the answer before
        sampler.begin(prompt, 12)
        counts = np.zeros(12)
        for _ in range(60):
            logits = random.normal(size=12).astype(np.float32)
            expected = logits - counts * 0.4 - (counts > 0) * 0.7
            expected[2] += 1.5
            token = sampler.pick(logits)
            assert token == int(expected.argmax())
            counts[token] += 1
        assert (counts > 0).all()
    with pytest.raises(UsageError, match="logit_bias: token id 2 is outside the vocabulary of 2"):
        sampler.begin([], 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repeat_penalty": 0}, r"repeat_penalty 0 is outside \[0.1, 10\]"),
        ({"presence_penalty": 2.5}, r"presence_penalty 2.5 is outside \[-2, 2\]"),
        ({"frequency_penalty": float("nan")}, r"frequency_penalty nan is outside"),
        ({"logit_bias": {3: 101}}, r"logit_bias 101 of token 3 is outside \[-100, 100\]"),
    ],
)
def test_penalties_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Sampler(**options)


def test_penalties_of_an_answer(talking: Path) -> None:
    """As transformers has them, of prompt and answer; and the same where tokens are guessed."""
    import torch
    from transformers import AutoModelForCausalLM

    engine = Engine(talking, threads=1)
    ids = engine.tokenizer.prompt("neuron 3 neuron 3 neuron")
    model = AutoModelForCausalLM.from_pretrained(talking.parent / "model", dtype=torch.float32)
    made = model.generate(
        torch.tensor(ids[None]), max_new_tokens=24, do_sample=False, repetition_penalty=1.5,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    expected = made[0, len(ids) :].tolist()
    plain = [t.id for p in engine.answer(ids, 24, Sampler()) for t in p.tokens]
    assert plain != expected
    for lossless in (False, True):
        sampler = Sampler(repeat_penalty=1.5)
        for _ in range(2):  # the second answer begins anew
            pieces = list(engine.answer(ids, 24, sampler, lossless=lossless))
            assert [t.id for p in pieces for t in p.tokens] == expected
    text = "".join(engine.generate(ids, 24, repeat_penalty=1.5))
    assert text == "".join(p.text for p in pieces)


@pytest.mark.parametrize("temperature", [1e-30, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    random = np.random.default_rng(0)
    sampler = Sampler(temperature=temperature)
    for _ in range(20):
        logits = random.normal(size=100, scale=1e3).astype(np.float32)
        logits[7] = -np.inf
        assert sampler.pick(logits) == int(np.argmax(logits))


def test_the_reference_samples_as_the_engine_does(
    talking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, engine = fallow.load(talking.parent / "model"), Engine(talking)
    greedy = list(model.generate(IDS[:5], 5))
    for temperature in (1e-29, 1e-300, 5e-324):
        assert list(model.generate(IDS[:5], 5, temperature)) == greedy
    taken = [inspect.signature(one.generate).parameters for one in (model, engine)]
    assert set(taken[0]) - {"plan"} == set(taken[1]) - {"lossless"}
    assert all(
        taken[1][name].default == taken[0][name].default for name in taken[0] if name != "plan"
    )
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01}
    changed = {"repeat_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7}
    form = {"json_schema": {"type": "array", "items": {"enum": [1, 22]}, "maxItems": 3}}
    for others in (changed, {"logit_bias": {3: 2.0, 5: -100}}, form):
        told = list(engine.generate("hi", 20, seed=1, **options, **others))
        assert told != list(engine.generate("hi", 20, seed=1, **options))
        assert list(model.generate("hi", 20, seed=1, **options, **others)) == told
    for one in (model, engine):
        with pytest.raises(UsageError, match=r"^repeat_penalty 0 is outside \[0\.1, 10\]$"):
            one.generate("hi", repeat_penalty=0)
    for seed in range(4):
        told = list(engine.generate(IDS[:5], 20, seed=seed, **options))
        assert list(model.generate(IDS[:5], 20, seed=seed, **options)) == told
        stop = ["".join(told)[5:7]]
        cut = "".join(model.generate(IDS[:5], 20, seed=seed, stop=stop, **options))
        assert cut == "".join(told).partition(stop[0])[0]
    logits = model.logits
    for bad, message in ((np.nan, "logits are NaN"), (np.inf, "logits are infinite")):
        monkeypatch.setattr(model, "logits", lambda hidden, b=bad: logits(hidden) + b)
        for temperature in (0.0, 1.0):
            with pytest.raises(FallowError, match=message):
                list(model.generate(IDS[:5], 5, temperature))


def test_between_pieces_the_reference_is_as_it_was(
    tiny: dict[str, fallow.Model], texts: tuple[Path, Path]
) -> None:
    model = tiny["llama"]
    plan = fallow.calibrate(model, "topk", sparsity=0.9, text=texts[0], context=32, windows=4)
    dense = model.hidden(IDS[None, :5])
    pieces = model.generate(IDS[:5], 5, plan=plan)
    next(pieces)
    assert bool((model.hidden(IDS[None, :5]) == dense).all())


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
    assert list(model.generate("neuron", 20)) == [" rests", "🙂", " re"]
    reference = make_sentencepiece()
    prompt = engine.tokenizer.prompt("neuron").tolist()
    said = [t.id for piece in engine.answer(prompt, 20, Sampler()) for t in piece.tokens]
    whole = reference.decode(prompt + said, skip_special_tokens=True)
    assert whole[len(reference.decode(prompt)) :] == " rests🙂 re"


def test_control_tokens_in_a_prompt(parrot: tuple[Path, Path], run: Any) -> None:
    engine, model = Engine(parrot[1]), fallow.load(parrot[0])
    for answer in (
        "".join(engine.generate("neuron<s>", 20)),
        "".join(model.generate("neuron<s>", 20)),
    ):
        assert answer == "."
    as_text = "".join(engine.generate("neuron<s>", 20, parse_special=False))
    assert as_text != "."
    for option, said in (((), "."), (("--no-parse-special",), as_text)):
        done = run("generate", parrot[1], "neuron<s>", "--max-new-tokens", 20, "--json", *option)
        assert done.json["text"] == said
        length = len(engine.tokenizer.encode("neuron<s>", parse_special=not option))
        assert done.json["stats"]["prompt_tokens"] == length
    command = ("generate", parrot[0], "neuron<s>", "-n", 20, "--dtype", "auto")
    slow = run(*command, "--no-parse-special")
    assert slow.out.rstrip("\n") == as_text
