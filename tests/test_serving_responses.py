"""/v1/responses, by OpenAI's client and by the types that it has for what comes back."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from fallow.common.errors import FallowError
from fallow.engine.engine import Engine
from served import HI, Slow, served
from test_tools import CLOCK, SAID, WEATHER, Scripted, with_template

OPTIONS: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 9}
TOOLS = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]


def events(address: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a stream, each of a type that OpenAI's client knows."""
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    found = []
    with httpx.stream("POST", f"{address}/v1/responses", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        for part in "".join(answer.iter_text()).split("\n\n")[:-1]:
            name, data = part.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            assert known.validate_python(event).type == event["type"]
            found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_a_response_is_what_the_engine_says(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.responses.create(input="hi", metadata={"a": "b"}, **OPTIONS)
    assert answer.output_text == "".join(engine.generate("hi", 9, chat=True))
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.input_tokens_details.cached_tokens) == (9, 0)
    assert answer.usage.total_tokens == answer.usage.input_tokens + 9
    assert answer.metadata == {"a": "b"}
    Response.model_validate(answer.model_dump())
    told = client.responses.create(input="hi", instructions="Be brief.", **OPTIONS)
    ids = engine.tokenizer.chat([{"role": "system", "content": "Be brief."}, *HI])
    assert told.output_text == "".join(engine.generate(ids, 9))
    assert told.usage is not None
    assert told.usage.input_tokens == len(ids)


def test_a_stream_says_the_same(client: openai.OpenAI, address: str, engine: Engine) -> None:
    expected = "".join(engine.generate("hi", 9, chat=True))
    found = events(address, OPTIONS | {"input": "hi"})
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event["delta"] for event in found[4:-4]) == expected
    assert found[0]["response"]["output"] == []
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == expected
    with client.responses.stream(input="hi", **OPTIONS) as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
    assert snapshots[-1] == expected


def test_the_next_turn_takes_what_came_back(client: openai.OpenAI, engine: Engine) -> None:
    first = client.responses.create(input=[{"role": "user", "content": "hi"}], **OPTIONS)
    more = {"role": "user", "content": [{"type": "input_text", "text": "and now"}]}
    items: Any = [*HI, *(item.model_dump() for item in first.output), more]
    second = client.responses.create(input=items, **OPTIONS)
    messages = [
        *HI,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and now"},
    ]
    ids = engine.tokenizer.chat(messages)
    assert second.usage is not None
    assert second.usage.input_tokens == len(ids)
    assert second.output_text == "".join(engine.generate(ids, 9))


def test_a_whole_answer_is_completed(engine: Engine) -> None:
    slow: Any = Scripted(engine.tokenizer, ["It ", "rains."])
    with served(slow) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="-") as client:
        with client.responses.stream(input="hi", **OPTIONS) as stream:
            final = stream.get_final_response()
        assert final.output_text == "It rains."
        assert final.status == final.output[0].status == "completed"


def test_no_words_are_a_message_too(engine: Engine) -> None:
    with served(Scripted(engine.tokenizer, [])) as address:
        found = httpx.post(f"{address}/v1/responses", json=OPTIONS | {"input": "hi"}).json()
    assert [part["text"] for part in found["output"][0]["content"]] == [""]


def test_calls_of_tools(engine: Engine) -> None:
    slow: Any = Scripted(with_template(engine, "hermes"), ["So: ", *SAID["one"][0]])
    body = OPTIONS | {"input": "hi", "tools": TOOLS}
    with served(slow) as address:
        found = events(address, body)
        whole = httpx.post(f"{address}/v1/responses", json=body).json()
        text, call = whole["output"]
        assert text["content"][0]["text"].strip() == "So:"
        assert (call["type"], call["name"]) == ("function_call", "weather")
        assert json.loads(call["arguments"]) == {"city": "Rome"}
        assert found[-1]["type"] == "response.completed"
        (done,) = (e for e in found if e["type"] == "response.function_call_arguments.done")
        assert done["arguments"] == call["arguments"]
        # What the model is told of the call and its result is what a chat tells it.
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
        input_ = [*HI, call, result]
        usage = httpx.post(f"{address}/v1/responses", json=body | {"input": input_}).json()["usage"]
        function = {"name": call["name"], "arguments": call["arguments"]}
        calls = [{"id": call["call_id"], "type": "function", "function": function}]
        messages = [*HI, {"role": "assistant", "content": None, "tool_calls": calls}]
        messages += [{"role": "tool", "content": "rain", "tool_call_id": call["call_id"]}]
        chat = {"model": "tiny", "messages": messages, "tools": [WEATHER, CLOCK]}
        asked = httpx.post(f"{address}/v1/chat/completions", json=chat).json()
        assert usage["input_tokens"] == asked["usage"]["prompt_tokens"]


def test_the_form_of_a_response(address: str) -> None:
    schema = {"enum": [12, 34]}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    body = OPTIONS | {"input": "hi", "text": {"format": form}}
    found = httpx.post(f"{address}/v1/responses", json=body).json()
    assert json.loads(found["output"][0]["content"][0]["text"]) in (12, 34)
    assert found["status"] == "completed"
    assert found["text"]["format"]["schema"] == schema


def test_what_fails_in_a_stream_is_an_event(engine: Engine) -> None:
    with served(Slow(engine.tokenizer, FallowError("the disk is gone"))) as address:
        found = events(address, OPTIONS | {"input": "hi"})
    assert (found[-1]["type"], found[-1]["message"]) == ("error", "the disk is gone")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "gpt"}, "model: "),
        ({"input": ""}, "input: "),
        ({"input": []}, "input: must not be empty"),
        ({"input": 3}, "input: must be text, or a list of items; it is 3"),
        ({"input": [{"type": "reasoning"}]}, "input.0: must be a message, a function_call or"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role: must be "),
        ({"input": [{"role": "user"}]}, "input.0.content: is missing"),
        ({"input": [HI[0] | {"weight": 1}]}, "input.0.weight: is not supported here"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            'input.0.content.0.type: must be "input_text" or',
        ),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "c"}]},
            "input.0.arguments: must be the text of a JSON object",
        ),
        ({"input": "neuron " * 140}, "input: the prompt of "),
        ({"max_output_tokens": 0}, "max_output_tokens: must be a whole number of at least 1"),
        ({"max_tokens": 3}, "max_tokens: is not supported here"),
        ({"n": 1}, "n: is not supported here"),
        ({"temperature": 3}, "temperature: must be a number from 0 to 2"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: must be null, as nothing is"),
        ({"background": True}, "background: must be false"),
        ({"truncation": "auto"}, 'truncation: must be "disabled"'),
        ({"include": ["x"]}, "include: must be empty"),
        ({"reasoning": {"effort": "low"}}, "reasoning: must be null"),
        ({"text": {"verbosity": "low"}}, "text.verbosity: is not supported here"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format: has a schema if its type"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: must be "),
        ({"tools": [TOOLS[0]] * 2}, "tools: has two of one name"),
        ({"tool_choice": "required"}, "tool_choice: needs tools"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage: is not"),
    ],
)
def test_bad_requests(address: str, change: dict[str, Any], said: str) -> None:
    answer = httpx.post(f"{address}/v1/responses", json=OPTIONS | {"input": "hi"} | change)
    assert answer.status_code == (404 if change == {"model": "gpt"} else 400), answer.text
    error = answer.json()["error"]
    assert error["param"] == said.partition(": ")[0]
    assert said.partition(": ")[2] in error["message"]


def test_what_changes_nothing_is_taken(address: str) -> None:
    harmless: dict[str, Any] = {
        "store": True, "metadata": {"a": "b"}, "user": "ann", "service_tier": "auto",
        "truncation": "disabled", "background": False, "include": [], "top_logprobs": 0,
        "max_tool_calls": 3, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
        "previous_response_id": None, "reasoning": None, "text": {"format": {"type": "text"}},
        "stream_options": {"include_obfuscation": False}, "safety_identifier": "x",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    }  # fmt: skip
    bodies: list[dict[str, Any]] = [{}, harmless, dict.fromkeys(harmless)]
    found = [
        httpx.post(f"{address}/v1/responses", json=OPTIONS | {"input": "hi"} | more)
        for more in bodies
    ]
    assert [each.status_code for each in found] == [200] * 3, [each.text for each in found]
    texts = [each.json()["output"][0]["content"] for each in found]
    assert texts[0] == texts[1] == texts[2]
