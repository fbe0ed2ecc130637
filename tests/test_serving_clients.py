"""What Open WebUI and Continue send, and whether they understand what comes back.

The requests are made by hand as these programs make them: open-webui's backend/open_webui
routers/openai.py and utils/payload.py, Continue's core/llm/openaiTypeConverters.ts and
packages/openai-adapters/src/apis/OpenAI.ts.
"""

import json
from typing import Any

import httpx
import pytest

from fallow.engine.engine import Engine
from served import HI, served
from test_tools import SAID, WEATHER, Scripted, with_template


def events(address: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stream says, as both read it: a line of data each, until [DONE]."""
    found = []
    with httpx.stream("POST", f"{address}/v1/{path}", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return found
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
    raise AssertionError("the stream has no end")


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content") or "" for event in found for c in event["choices"])


def test_open_webui(address: str, engine: Engine) -> None:
    headers = {"Authorization": "Bearer none", "X-OpenWebUI-User-Name": "ann"}
    (card,) = httpx.get(f"{address}/v1/models", headers=headers).json()["data"]
    body: dict[str, Any] = {
        "model": card["id"], "messages": HI, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    params: dict[str, Any] = {
        "temperature": 0.0, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 8, "seed": 3,
        "frequency_penalty": 0.5, "presence_penalty": 0.5, "repeat_penalty": 1.1,
        "stop": ["\n\n"], "logit_bias": {"9": -100.0},
    }  # fmt: skip
    found = events(address, "chat/completions", body | params)
    expected = engine.generate(
        "hi", 8, chat=True, frequency_penalty=0.5, presence_penalty=0.5, repeat_penalty=1.1,
        logit_bias={9: -100.0}, stop=["\n\n"],
    )  # fmt: skip
    assert text_of(found) == "".join(expected)
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == engine.stats.new_tokens
    # A title for the conversation, which it asks the same model for.
    title = {"model": card["id"], "messages": HI, "stream": False, "max_completion_tokens": 20}
    answer = httpx.post(f"{address}/v1/chat/completions", json=title, headers=headers).json()
    assert isinstance(answer["choices"][0]["message"]["content"], str)


def continued(**more: Any) -> dict[str, Any]:
    """A body of Continue's; what it leaves undefined is not sent."""
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0, "stream": True}
    return body | {"frequency_penalty": 0, "presence_penalty": 0} | more


def test_continue(address: str, engine: Engine) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    options = {"include_usage": True}
    found = events(
        address, "chat/completions", continued(messages=messages, stream_options=options)
    )
    ids = engine.tokenizer.chat(messages)
    assert text_of(found) == "".join(engine.generate(ids, 8))
    # What it completes in an editor: the model's own tokens around the gap are in the prompt.
    prompt = "<fim_prefix>neuron<fim_suffix>rests<fim_middle>"
    stops = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "\n\n"]
    found = events(address, "completions", continued(prompt=prompt, stop=stops))
    text = "".join(event["choices"][0]["text"] for event in found)
    assert text == "".join(engine.generate(prompt, 8, stop=stops))


@pytest.mark.parametrize("calls", [True, False])
def test_continue_with_tools(engine: Engine, calls: bool) -> None:
    said = SAID["one"][0] if calls else "It rains."
    slow: Any = Scripted(with_template(engine, "hermes"), list(said))
    call = {"id": "abcdefghi", "type": "function"}
    call |= {"function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 1}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": " ", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"},
    ]
    with served(slow) as address:
        body = continued(messages=messages, tools=[WEATHER], parallel_tool_calls=False)
        found = events(address, "chat/completions", body)
    told = [c["delta"] for event in found for c in event["choices"]]
    made = [each for delta in told for each in delta.get("tool_calls") or []]
    assert [each["function"]["name"] for each in made] == ["weather"] * calls
    assert text_of(found) == ("" if calls else said)
    assert found[-1]["choices"][0]["finish_reason"] == ("tool_calls" if calls else "stop")
