"""What the server answers, by the clients that people use."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from fallow.engine.answer import Piece
from fallow.engine.engine import Engine
from fallow.engine.sampling import Sampler, TokenChoice
from served import HI, Slow, served


def test_chat_is_what_the_engine_says(client: openai.OpenAI, engine: Engine) -> None:
    options: Any = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 9}
    answer = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    expected = "".join(engine.generate("hi", 9, chat=True))
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == engine.stats.finish == "length"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    for usage in (answer.usage, chunks[-1].usage):
        assert usage is not None
        assert usage.completion_tokens == 9
        assert usage.total_tokens == usage.prompt_tokens + 9
    assert len(answer.usage.sparsity["neurons_idle_per_layer"]) == 2  # type: ignore[union-attr]


def test_completions(client: openai.OpenAI, engine: Engine) -> None:
    options: Any = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(prompt="neuron 3", logprobs=2, **options).choices[0]
    assert whole.text == "".join(engine.generate("neuron 3", 8))
    assert whole.logprobs is not None
    said = engine.answer(engine.tokenizer.prompt("neuron 3"), 8, Sampler())
    ids = np.r_[engine.tokenizer.prompt("neuron 3"), [t.id for p in said for t in p.tokens]]
    assert whole.logprobs.token_logprobs == pytest.approx(engine.score(ids)[-8:], abs=0.01)
    assert [len(each) for each in whole.logprobs.top_logprobs or []] == [2] * 8
    assert len(whole.logprobs.tokens or []) == 8
    for text, start in zip(
        whole.logprobs.tokens or [], whole.logprobs.text_offset or [], strict=True
    ):
        assert whole.text[start : start + len(text)] == text
    stop = whole.text[4:6]
    cut = client.completions.create(prompt="neuron 3", stop=[stop], **options).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    ids = engine.tokenizer.prompt("neuron 3").tolist()
    assert client.completions.create(prompt=ids, **options).choices[0].text == whole.text
    two = client.completions.create(prompt=["neuron 3", "the gate"], **options)
    assert [c.index for c in two.choices] == [0, 1]
    assert two.choices[0].text == whole.text
    pieces = client.completions.create(prompt="neuron 3", stream=True, logprobs=1, **options)
    assert "".join(c.choices[0].text for c in pieces) == whole.text


def test_sampling_repeats_with_its_seed(client: openai.OpenAI) -> None:
    def say(seed: int) -> str | None:
        answer = client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=20, seed=seed, temperature=1.5
        )
        return answer.choices[0].message.content

    say(1)  # from here on the prompt is in the cache
    assert say(1) == say(1)
    assert len({say(seed) for seed in range(6)}) > 1


def test_the_next_turn_reads_only_what_is_new(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=6)
    said = first.choices[0].message.content or ""
    turns: Any = [*HI, {"role": "assistant", "content": said}, {"role": "user", "content": "so?"}]
    usage = client.chat.completions.create(model="tiny", messages=turns, max_tokens=1).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens - 1  # type: ignore[union-attr]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None
    for token in found.content or []:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        assert token.logprob > token.top_logprobs[1].logprob
    assert "".join(t.token for t in found.content or []) == answer.choices[0].message.content


def test_tokens_have_their_own_text_and_bytes(parrot: tuple[Path, Path]) -> None:
    """Their bytes make the answer, whose first one is a space; its pieces are those of Llama 2."""
    words = [" rests", *["\ufffd"] * 4, " re"]
    with served(Engine(parrot[1])) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client:
            options: Any = {"model": "tiny", "prompt": "neuron", "temperature": 0}
            for stream in (False, True):
                answer = client.completions.create(**options, logprobs=2, stream=stream)
                chunks = [c.choices[0] for c in answer] if stream else [answer.choices[0]]  # type: ignore
                assert "".join(c.text for c in chunks) == " rests🙂 re"
                found = [c.logprobs for c in chunks if c.logprobs]
                assert [t for each in found for t in each.tokens or []] == words
                offsets = [i for each in found for i in each.text_offset or []]
                assert offsets == [0, 6, 6, 6, 6, 7]
        body = {"model": "tiny", "messages": [{"role": "user", "content": "neuron"}]}
        body |= {"temperature": 0, "logprobs": True, "top_logprobs": 2}
        template = "{{ messages[0].content }}"
        engine = Engine(parrot[1])
        engine.tokenizer = dataclasses.replace(engine.tokenizer, chat_template=template)
    with served(engine) as address:
        choice = httpx.post(f"{address}/v1/chat/completions", json=body).json()["choices"][0]
        content = choice["logprobs"]["content"]
        assert choice["message"]["content"] == " rests🙂 re"
        assert bytes(b for t in content for b in t["bytes"]) == " rests🙂 re".encode()
        assert [t["token"] for t in content] == words
        assert all(each["bytes"] is not None for t in content for each in t["top_logprobs"])


def test_control_tokens_in_a_prompt(parrot: tuple[Path, Path]) -> None:
    engine = Engine(parrot[1])
    with served(engine) as address:
        for parse_special, tokens in ((None, 2), (True, 2), (False, 4)):
            body = {"model": "tiny", "prompt": "neuron<s>", "temperature": 0, "max_tokens": 4}
            body["parse_special"] = parse_special
            answer = httpx.post(f"{address}/v1/completions", json=body).json()
            assert answer["usage"]["prompt_tokens"] == tokens
            assert (answer["choices"][0]["text"] == ".") == (tokens == 2)
        body["parse_special"] = 1
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 400


def test_several_prompts_of_token_ids(client: openai.OpenAI, engine: Engine) -> None:
    """https://platform.openai.com/docs/api-reference/completions: an array of token arrays."""
    prompts = [engine.tokenizer.prompt(text).tolist() for text in ("neuron 3", "the gate")]
    found = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=6)
    assert [c.text for c in found.choices] == ["".join(engine.generate(p, 6)) for p in prompts]
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(map(len, prompts))


def test_echo(client: openai.OpenAI, engine: Engine) -> None:
    """The prompt comes first, with what the model thinks of its tokens."""
    text = "the gate " * 12  # more than is read at once
    ids = engine.tokenizer.prompt(text)
    assert len(ids) > 32
    options: Any = {"model": "tiny", "temperature": 0, "echo": True}
    for prompt in (text, ids.tolist()):
        choice = client.completions.create(prompt=prompt, max_tokens=3, logprobs=1, **options)
        found = choice.choices[0].logprobs
        assert found is not None
        assert choice.choices[0].text == text + "".join(engine.generate(text, 3))
        assert "".join(found.tokens or []) == choice.choices[0].text
        starts = np.cumsum([0, *map(len, found.tokens or [])])[:-1]
        assert found.text_offset == starts.tolist()
        assert found.token_logprobs is not None
        assert found.token_logprobs[0] is None
        assert found.top_logprobs is not None
        assert found.top_logprobs[0] is None
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(engine.score(ids), abs=1e-3)
        best = engine.logits(ids)[:-1].max(axis=1)
        chosen = engine.logits(ids)[np.arange(len(ids) - 1), ids[1:]]
        for place in range(1, len(ids)):
            gap = max(found.top_logprobs[place].values()) - (found.token_logprobs[place] or 0)
            assert gap == pytest.approx(best[place - 1] - chosen[place - 1], abs=1e-3)
        only = client.completions.create(prompt=prompt, max_tokens=0, logprobs=1, **options)
        assert only.choices[0].text == text
        assert only.choices[0].finish_reason == "length"
        assert only.choices[0].logprobs is not None
        assert only.choices[0].logprobs.token_logprobs == found.token_logprobs[: len(ids)]
        assert only.usage is not None
        assert only.usage.completion_tokens == 0
    pieces = list(
        client.completions.create(prompt=text, max_tokens=3, logprobs=1, stream=True, **options)
    )
    assert "".join(p.choices[0].text for p in pieces) == choice.choices[0].text
    told = [p.choices[0].logprobs for p in pieces if p.choices[0].logprobs]
    assert [x for t in told for x in t.token_logprobs or []] == found.token_logprobs
    assert [x for t in told for x in t.text_offset or []] == found.text_offset
    plain = client.completions.create(prompt=text, max_tokens=3, **options).choices[0]
    assert plain.text == choice.choices[0].text
    assert plain.logprobs is None


def test_echo_of_an_added_bos_and_of_the_end(talking: Path) -> None:
    """As many tokens as the text has, and as were picked: lm-eval counts from both ends."""
    engine = Engine(talking, threads=1)
    first = int(engine.logits(engine.tokenizer.prompt("neuron"))[-1].argmax())
    bos = engine.tokenizer.backend.token_to_id("<s>")
    body: dict[str, Any] = {"model": "tiny", "temperature": 0, "echo": True, "logprobs": 1}

    def ask(address: str, prompt: Any) -> Any:
        answer = httpx.post(f"{address}/v1/completions", json=body | {"prompt": prompt})
        return answer.json()["choices"][0]

    with served(engine) as address:
        engine.tokenizer = dataclasses.replace(engine.tokenizer, eos_ids=(first,))
        ended = ask(address, "neuron")
        assert ended["text"] == "neuron"
        assert ended["finish_reason"] == "stop"
        assert len(ended["logprobs"]["token_logprobs"]) == 2
        engine.tokenizer = dataclasses.replace(engine.tokenizer, add_bos=True, bos_id=bos)
        ids = engine.tokenizer.prompt("neuron 3").tolist()
        assert ids[0] == bos
        added = ask(address, "neuron 3")
        assert added["text"].startswith("neuron 3")
        assert added["logprobs"]["text_offset"][:2] == [0, len("neuron")]
        assert added["logprobs"]["token_logprobs"][:2] == pytest.approx(engine.score(ids), abs=1e-3)
        typed = ask(address, "neuron 3</s> the gate")
        told = zip(typed["logprobs"]["tokens"], typed["logprobs"]["text_offset"], strict=True)
        n_prompt = len(engine.tokenizer.prompt("neuron 3</s> the gate")) - 1  # less the added BOS
        for token, start in list(told)[:n_prompt]:
            assert typed["text"][start : start + len(token)] == token
        own = ask(address, ids)  # the client's own BOS stays
        assert own["text"].startswith("<s>neuron 3")
        assert own["logprobs"]["token_logprobs"][0] is None


def test_lm_eval(address: str, engine: Engine, talking: Path) -> None:
    """EleutherAI's harness, by its client of completions, gets what the engine scores."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model="tiny",
        tokenizer=str(talking.parent / "model"),
        max_length=100,
        batch_size=3,
    )
    pairs = [("neuron 3", " the gate"), ("the", " neuron works"), ("gate", "y")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(requests, disable_tqdm=True)
    for (context, rest), (logprob, _) in zip(pairs, found, strict=True):
        ids = engine.tokenizer.encode(context + rest)
        start = len(engine.tokenizer.encode(context))
        assert logprob == pytest.approx(engine.score(ids)[start - 1 :].sum(), abs=1e-3)


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(
    client: openai.OpenAI, engine: Engine, temperature: float
) -> None:
    answer = client.completions.create(
        model="tiny", prompt="neuron 3", max_tokens=6, temperature=temperature, seed=1
    )
    assert answer.choices[0].text == "".join(engine.generate("neuron 3", 6))


def test_top_p_of_nothing_keeps_the_likeliest_token(client: openai.OpenAI, engine: Engine) -> None:
    """llama.cpp's top-p keeps one token at least; OpenAI takes 0, too."""
    answer = client.completions.create(
        model="tiny", prompt="neuron 3", max_tokens=6, temperature=2, top_p=0, seed=1
    )
    assert answer.choices[0].text == "".join(engine.generate("neuron 3", 6))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_impossible_is_a_number_in_json(engine: Engine, path: str, stream: bool) -> None:
    """https://platform.openai.com/docs/api-reference/chat/object: -9999.0 is "very unlikely"."""
    choice = TokenChoice(3, 0.0, ((3, 0.0), (4, -np.inf)))
    slow: Any = Slow(engine.tokenizer, Piece("a", (choice, choice)))
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 1, "stream": stream}
    if path == "/v1/completions":
        body |= {"prompt": "a", "logprobs": 2}
    else:
        body |= {"messages": HI, "logprobs": True, "top_logprobs": 2}
    with served(slow) as address:
        said = httpx.post(f"{address}{path}", json=body).text
        assert "-9999.0" in said
        assert not re.search("NaN|Infinity|null, ?null", said)
        slow.piece = Piece("a", (TokenChoice(3, np.nan, ((3, np.nan),)),))
        said = httpx.post(f"{address}{path}", json=body).text
        assert "the model's logits are NaN" in said
        slow.piece = KeyError("broken")
        said = httpx.post(f"{address}{path}", json=body).text
        assert "a defect of the server: KeyError" in said


@pytest.mark.parametrize(
    ("sent", "option"),
    [
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": 1}, {"frequency_penalty": 1}),
        ({"repeat_penalty": 1.5}, {"repeat_penalty": 1.5}),
        ({"repetition_penalty": 1.5, "repeat_penalty": None}, {"repeat_penalty": 1.5}),
        ({"logit_bias": {"9": 100}}, {"logit_bias": {9: 100}}),
        ({"logit_bias": {"9": 3.5, "10": -100}}, {"logit_bias": {9: 3.5, 10: -100}}),
    ],
)
def test_penalties_and_biases(
    address: str, engine: Engine, sent: dict[str, Any], option: dict[str, Any]
) -> None:
    body = {"model": "tiny", "temperature": 0, "max_tokens": 12} | sent
    said = httpx.post(f"{address}/v1/completions", json=body | {"prompt": "neuron 3"}).json()
    expected = "".join(engine.generate("neuron 3", 12, **option))
    assert said["choices"][0]["text"] == expected != "".join(engine.generate("neuron 3", 12))
    said = httpx.post(f"{address}/v1/chat/completions", json=body | {"messages": HI}).json()
    expected = "".join(engine.generate("hi", 12, chat=True, **option))
    assert said["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client: openai.OpenAI, engine: Engine, stream: bool) -> None:
    """Each is what its seed gives; the prompt counts once."""
    chat: Any = {"model": "tiny", "messages": HI, "max_tokens": 6, "temperature": 1.5, "seed": 4}
    options: Any = {"stream_options": {"include_usage": True}} if stream else {}
    each = [client.chat.completions.create(**chat | {"seed": seed}) for seed in (4, 5, 6)]
    alone = [answer.choices[0].message.content for answer in each]
    assert len(set(alone)) == 3
    answer: Any = client.chat.completions.create(**chat, n=3, stream=stream, **options)
    chunks = list(answer) if stream else [answer]
    said = [""] * 3
    for choice in (c for chunk in chunks for c in chunk.choices):
        said[choice.index] += (choice.delta if stream else choice.message).content or ""
    assert said == alone
    usage = chunks[-1].usage
    assert usage.completion_tokens == sum(a.usage.completion_tokens for a in each if a.usage)
    assert usage.prompt_tokens == len(engine.tokenizer.chat("hi"))
    text = client.completions.create(
        model="tiny", prompt=["neuron 3", "the gate"], n=2, temperature=0, max_tokens=5
    )
    expected = ["".join(engine.generate(p, 5)) for p in ("neuron 3", "the gate")]
    assert [c.text for c in text.choices] == [expected[i] for i in (0, 0, 1, 1)]
    assert [c.index for c in text.choices] == [0, 1, 2, 3]


def test_tokens_of_texts(address: str, engine: Engine, parrot: tuple[Path, Path]) -> None:
    def ask(address: str, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{address}/{path}", json=body)
        assert answer.status_code == 200
        return answer.json()

    text = "neuron 3</s> 🙂"
    ids = engine.tokenizer.encode(text, parse_special=True).tolist()
    assert ask(address, "tokenize", content=text) == {"tokens": ids}
    assert ask(address, "detokenize", tokens=ids) == {"content": text}
    plain = ask(address, "tokenize", content=text, parse_special=False)["tokens"]
    assert plain == engine.tokenizer.encode(text).tolist() != ids
    assert ask(address, "tokenize", content="") == {"tokens": []}
    assert ask(address, "detokenize", tokens=[]) == {"content": ""}
    pieces = ask(address, "tokenize", content=text, with_pieces=True)["tokens"]
    assert [p["id"] for p in pieces] == ids
    found = [
        p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces
    ]
    assert b"".join(found) == text.encode()
    assert any(isinstance(p["piece"], list) for p in pieces)
    with served(Engine(parrot[1])) as other:
        added = ask(other, "tokenize", content="neuron", add_special=True)["tokens"]
        assert added == Engine(parrot[1]).tokenizer.prompt("neuron").tolist()


def test_embeddings(client: openai.OpenAI, engine: Engine, address: str) -> None:
    texts = ["neuron 3", "the gate"]
    expected = [engine.embed(text).tolist() for text in texts]
    ids = [engine.tokenizer.prompt(text).tolist() for text in texts]
    before = tokens_counted(address)
    for given, wanted in (
        (texts, expected), (ids, expected), (texts[1], expected[1:]), (ids[0], expected[:1]),
    ):  # fmt: skip
        for encoding in ({}, {"encoding_format": "float"}):  # without one the client wants base64
            options: Any = {"dimensions": engine.hidden_size, "user": "a"} | encoding
            found = client.embeddings.create(model="tiny", input=given, **options)
            assert [each.index for each in found.data] == list(range(len(wanted)))
            # Rounding may depend on what else a slot was asked.
            np.testing.assert_allclose([e.embedding for e in found.data], wanted, atol=1e-6)
            assert np.linalg.norm(found.data[0].embedding) == pytest.approx(1)
            n = sum(len(ids[expected.index(each)]) for each in wanted)
            assert (found.usage.prompt_tokens, found.usage.total_tokens) == (n, n)
    assert tokens_counted(address) - before == 6 * sum(map(len, ids))
    metrics = httpx.get(f"{address}/metrics").text
    assert 'fallow_responses_total{path="/v1/embeddings",status="200"}' in metrics


def tokens_counted(address: str) -> float:
    metrics = httpx.get(f"{address}/metrics").text
    found = re.search(r'fallow_tokens_total\{kind="prompt"\} (\S+)', metrics)
    return float(found[1]) if found else 0.0


def test_embeddings_take_a_whole_context_and_no_more(client: openai.OpenAI, engine: Engine) -> None:
    ids = [7] * engine.context
    found = client.embeddings.create(model="tiny", input=ids).data[0].embedding
    np.testing.assert_allclose(found, engine.embed(ids), atol=1e-6)
    with pytest.raises(openai.BadRequestError, match="exceeds the context"):
        client.embeddings.create(model="tiny", input=[*ids, 7])


def test_langchain(address: str, engine: Engine) -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    options: Any = {"base_url": f"{address}/v1", "api_key": "any", "model": "tiny"}
    chat = ChatOpenAI(**options, temperature=0, max_completion_tokens=7)
    expected = "".join(engine.generate("hi", 7, chat=True))
    assert chat.invoke("hi").content == expected
    assert "".join(str(chunk.content) for chunk in chat.stream("hi")) == expected
    text = OpenAI(**options, temperature=0, max_tokens=7)
    assert text.batch(["neuron 3", "the gate"]) == [
        "".join(engine.generate(prompt, 7)) for prompt in ("neuron 3", "the gate")
    ]


def test_models_health_and_metrics(client: openai.OpenAI, address: str) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fallow"
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    metrics = httpx.get(f"{address}/metrics").text
    assert 'fallow_responses_total{path="/v1/models",status="200"}' in metrics
    assert "fallow_first_token_seconds_bucket" in metrics
    assert httpx.get(f"{address}/secret/path").status_code == 404
    metrics = httpx.get(f"{address}/metrics").text
    assert "secret" not in metrics
