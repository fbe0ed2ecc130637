"""Answers that have a form: what is said is of it, and what is asked for in vain."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from fallow import cli
from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from fallow.engine.grammar import FormError
from fallow.engine.sampling import Sampler
from served import HI

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain"]}, "maxItems": 1},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def fits(said: str) -> None:
    """PERSON, checked by hand."""
    found = json.loads(said)
    assert set(found) == {"name", "age", "likes"}
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 4
    assert type(found["age"]) is int
    assert 0 <= found["age"] <= 150
    assert len(found["likes"]) <= 1
    assert set(found["likes"]) <= {"tea", "rain"}


@pytest.mark.parametrize("lossless", [False, True])
def test_every_answer_fits_the_schema(engine: Engine, lossless: bool) -> None:
    """A random model, which by itself writes no JSON, ends where the value is complete."""
    said = set()
    for seed in range(10):
        grammar = engine.grammars.of_schema(PERSON)
        sampler = Sampler(temperature=1.5 * (seed > 0), seed=seed, grammar=grammar)
        for _ in range(2):  # a sampler begins anew with each answer
            pieces = engine.answer(engine.tokenizer.prompt("hi"), 120, sampler, lossless=lossless)
            text = "".join(p.text for p in pieces)
            assert engine.stats.finish in ("stop", "length")
            if engine.stats.finish == "stop":  # else it went on with white space
                said.add(text)
    assert len(said) > 8
    for each in said:
        fits(each)


def test_the_end_token_comes_only_where_the_value_is_complete(engine: Engine) -> None:
    grammar, (end, *_) = engine.grammars.of_schema({"const": "no"}), engine.tokenizer.eos_ids
    grammar.begin()
    zeros = np.zeros(engine.vocabulary_size, dtype=np.float32)
    for token in engine.tokenizer.encode('"no"'):
        assert np.isneginf(grammar.masked(zeros)[end])
        grammar.add(int(token))
    assert np.isfinite(grammar.masked(zeros)).nonzero()[0].tolist() == [end]


def test_a_grammar_of_either_kind(engine: Engine) -> None:
    for text in ('root ::= "n" [0-9]{2,3} ("x" | "y")', 'start: "n" /[0-9]{2,3}/ ("x" | "y")'):
        sampler = Sampler(1.5, seed=1, grammar=engine.grammars.of_text(text))
        pieces = list(engine.answer(engine.tokenizer.prompt("hi"), 20, sampler))
        assert re.fullmatch("n[0-9]{2,3}[xy]", "".join(p.text for p in pieces))


def test_a_model_with_pieces_of_sentencepiece(parrot: tuple[Path, Path]) -> None:
    engine = Engine(parrot[1])
    for word in ("neuron 🙂 re", " rests", "{x}"):
        assert "".join(engine.generate("neuron", 90, json_schema={"enum": [word]})) == f'"{word}"'


@pytest.mark.parametrize("stream", [False, True])
def test_forms_of_requests(client: openai.OpenAI, stream: bool) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}
    chat: Any = {"model": "tiny", "messages": HI, "temperature": 0, "stream": stream}
    asked: list[dict[str, Any]] = [
        {"response_format": schema},
        {"extra_body": {"json_schema": PERSON}},
    ]
    for more in asked:
        answer: Any = client.chat.completions.create(**chat, **more)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        text = "".join(c.delta.content or "" if stream else c.message.content for c in choices)
        assert choices[-1].finish_reason == "stop"
        fits(text)
    text = {
        "prompt": "hi",
        "max_tokens": 99,
        "model": "tiny",
        "extra_body": {"json_schema": PERSON},
    }
    if not stream:
        fits(client.completions.create(**text).choices[0].text)


def test_any_object_and_one_that_is_cut(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": HI, "response_format": {"type": "json_object"}}
    for seed in range(6):
        choice = client.chat.completions.create(**options, max_tokens=60, seed=seed).choices[0]
        said = choice.message.content or ""
        assert said.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(said), dict)
        else:
            assert choice.finish_reason == "length"
    schema = {"type": "json_schema", "json_schema": {"schema": PERSON}}
    options |= {"response_format": schema, "max_tokens": 5}
    assert client.chat.completions.create(**options).choices[0].finish_reason == "length"


def test_several_prompts_have_the_form_each(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="tiny",
        prompt=["hi", "neuron 3"],
        max_tokens=99,
        temperature=0,
        extra_body={"json_schema": PERSON},
    )
    for choice in found.choices:
        fits(choice.text)


def test_a_form_that_takes_too_much(address: str, engine: Engine) -> None:
    """Found out only on the way."""
    schema = {"type": "string", "pattern": "^(([a-z]{1,500}){1,500}){1,500}$"}
    body = {"model": "tiny", "prompt": "a", "max_tokens": 100, "json_schema": schema}
    body["logit_bias"] = {str(engine.tokenizer.encode('"')[0]): -100}
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "the form that is asked for cannot be followed: " in answer.json()["error"]["message"]


def test_a_model_without_an_end_token(talking: Path) -> None:
    engine = Engine(talking, threads=1)
    engine.tokenizer = dataclasses.replace(engine.tokenizer, eos_ids=())
    with pytest.raises(FallowError, match="this model has no end token"):
        engine.generate("hi", json_schema=PERSON)


def test_without_the_library(engine: Engine, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"model": "tiny", "messages": HI, "response_format": {"type": "json_object"}}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "pip install 'fallow[server]'" in answer.json()["error"]["message"]
    del body["response_format"]
    assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("schema", [{"$ref": "#/nowhere"}, {"type": "strin"}, {"not": {}}])
def test_schemas_that_are_not_understood(engine: Engine, schema: dict[str, Any]) -> None:
    with pytest.raises(FormError, match=r"^the form that is asked for is not understood: [^\n]+$"):
        engine.grammars.of_schema(schema)


def test_the_command(
    talking: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "person.json"
    for text, code in ((json.dumps(PERSON), 0), ("[]", 1)):
        file.write_text(text)
        command = [
            "fallow",
            "generate",
            str(talking),
            "hi",
            "-n",
            "120",
            "--json-schema",
            str(file),
        ]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        assert stop.value.code == code
        if code:
            assert f"{file} is damaged; give a JSON schema, which is an object" in printed.err
        else:
            fits(printed.out)
