"""What the server refuses and how it says so, and that its schema tells the same."""

import http.client
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fallow.common.errors import UsageError
from fallow.engine.engine import Engine
from fallow.serving import limits, server
from fallow.serving import schemas as api
from fallow.serving.server import LOOPBACK, serve
from served import HI, JSON, served


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    """A conversation of one message."""
    return {"messages": [{"role": role, "content": content} | more]}


def nested(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(levels - 1):
        found = {"items": found}
    return found


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"model": "gpt"}, 404, "there is no model 'gpt' here; this is 'tiny'"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages: the model's chat temp"),
        ({"messages": [{"role": "function", "content": "x"}]}, 400, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ({"messages": [{"role": "user", "content": "neuron " * 140}]}, 400, "fills the context"),
        ({"messages": [{"role": "assistant", "content": "refuse"}]}, 400, "no such talk"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"temperature": -1}, 400, "temperature: "),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p: "),
        ({"n": 0}, 400, "n: must be a whole number from 1 to 128"),
        ({"n": 129}, 400, "n: must be a whole number from 1 to 128"),
        ({"n": 17}, 400, "n: 17 are more than the 16 that may wait"),
        ({"tools": [{"type": "function"}]}, 400, "tools.0.function: is missing"),
        ({"frequency_penalty": 2.1}, 400, "frequency_penalty: must be a number from -2 to 2"),
        ({"presence_penalty": "1"}, 400, "presence_penalty: must be a number from -2 to 2"),
        ({"logit_bias": {"3": 101}}, 400, "logit_bias: must be an object of at most 1024 token"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias: must be an object of at most 1024 token"),
        ({"logit_bias": {"300": 1}}, 400, "logit_bias: token id 300 is outside the vocabulary"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias: must be an object"),
        ({"response_format": {"type": "xml"}}, 400, 'response_format.type: must be "text", "json_'),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format: has no json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
            400,
            'response_format.json_schema: needs "type": "json_schema"',
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            400,
            "response_format.json_schema.schema: is missing",
        ),
        (
            {"response_format": {"type": "json_object"}, "json_schema": {}},
            400,
            "response_format: goes without grammar and json_schema",
        ),
        ({"grammar": "a", "json_schema": {}}, 400, "grammar: goes without json_schema"),
        ({"json_schema": []}, 400, "json_schema: must be a JSON schema, an object"),
        ({"json_schema": {"not": {}}}, 400, "json_schema: the form that is asked for is not under"),
        ({"json_schema": {"enum": ["a" * 33000]}}, 400, "json_schema: the form that is asked for"),
        ({"json_schema": {"x-guidance": {}}}, 400, "json_schema: x-guidance sets options"),
        ({"grammar": "root ::= ("}, 400, "grammar: the grammar is not understood"),
        ({"grammar": "start: other"}, 400, "grammar: the form that is asked for is not understood"),
        ({"stop": ["a"] * 5}, 400, "stop: must be a text or a list of at most 4 texts"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"temprature": 0}, 400, "temprature: is not supported here"),
        ({"fallow_activity": True}, 400, 'fallow_activity: needs "stream": true'),
        ({"fallow_plan": 1}, 400, "fallow_plan: must be true or false"),
        ({"reasoning_effort": "low"}, 400, "reasoning_effort: is not supported here"),
        ({"stream_options": {"x": 1}}, 400, "stream_options.x: is not supported here"),
        ({"response_format": {"type": "text", "x": 1}}, 400, "response_format.x: is not"),
        ({"functions": [{"name": "w"}]}, 400, "functions: "),
        ({"function_call": {"name": "w"}}, 400, "function_call: "),
        ({"tool_choice": "required"}, 400, "tool_choice: "),
        ({"repeat_penalty": 0}, 400, "repeat_penalty: must be a number from 0.1 to 10"),
        ({"repetition_penalty": 11}, 400, "repetition_penalty: must be a number from 0.1 to 10"),
        (
            {"repetition_penalty": 1.1, "repeat_penalty": 1.3},
            400,
            "repetition_penalty: differs from repeat_penalty",
        ),
        ({"ignore_eos": True}, 400, "ignore_eos: "),
        ({"min_tokens": 8}, 400, "min_tokens: "),
        ({"continue_final_message": True}, 400, "continue_final_message: "),
        ({"add_generation_prompt": False}, 400, "add_generation_prompt: "),
        ({"top_logprobs": 2}, 400, 'top_logprobs: needs "logprobs": true'),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_completion_tokens: differs"),
        ({"\ud800": 1}, 400, "half of a surrogate pair"),
        ({"x" * 999: 1}, 400, f"{'x' * 60}...: is not supported here"),
        (says("assistant", None), 400, "messages.0.content: must be text, or a list"),
        (
            says("assistant", None, tool_calls=[{"id": "a"}]),
            400,
            "messages.0.tool_calls.0.function: is missing",
        ),
        (
            says("user", "a", tool_calls=[{"function": {"name": "a", "arguments": "{}"}}]),
            400,
            "messages.0.tool_calls: must be empty in a message that is not of the role",
        ),
        (says("user", "a", tool_call_id="b"), 400, "messages.0.tool_call_id: must be empty"),
        ({"json_schema": nested(65)}, 400, "json_schema: is nested too deeply; at most 64 levels"),
        (says("user", "a", name="Ann"), 400, "messages.0.name: "),
        (says("user", "a", weight=1), 400, "messages.0.weight: is not supported"),
        (says("user", []), 400, "messages.0.content: must not be empty"),
        (says("user", [{"type": "image_url"}]), 400, 'messages.0.content.0.type: must be "text"'),
        (says("user", [{"type": "text"}]), 400, "messages.0.content.0.text: is missing"),
        ({"messages": [3]}, 400, "messages.0: must be an object; it is 3"),
        ({"messages": "hi"}, 400, 'messages: must be a list; it is "hi"'),
    ],
)
def test_bad_requests(address: str, change: dict[str, Any], code: int, said: str) -> None:
    body = json.dumps({"model": "tiny", "messages": HI} | change)
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == code
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[code]
    if ": " in said:
        assert error["param"] == said.partition(": ")[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"suffix": "b"}, "suffix: must be empty"),
        ({"best_of": 2}, "best_of: "),
        (
            {"prompt": None},
            "prompt: must be a text of at most 524288 characters, a list of at most",
        ),
        ({"prompt": []}, "prompt: "),
        ({"prompt": ["a", 1]}, "prompt: "),
        ({"prompt": [[1], []]}, "prompt: "),
        ({"prompt": [[1, "a"]]}, "prompt: "),
        ({"prompt": [-1]}, "prompt: "),
        ({"prompt": ["a"] * 6, "n": 3}, "n: 18 are more than the 16 that may wait"),
        ({"prompt": ["a"] * 17}, "prompt: 17 are more than the 16 that may wait"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, or 0 with"),
        ({"max_tokens": -1}, "max_tokens: "),
        ({"logprobs": 6}, "logprobs: "),
        ({"logprobs": True}, "logprobs: "),
        ({"messages": HI}, "messages: is not supported here"),
        ({"model": None}, "model: "),
    ],
)
def test_bad_completions(address: str, change: dict[str, Any], said: str) -> None:
    body = {"model": "tiny", "prompt": "a"} | change
    answer = httpx.post(f"{address}/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(said)
    assert error["param"] == said.partition(": ")[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": None}, "input: must be a text of at most 524288 characters, a list of at most"),
        ({"input": ""}, "input: "),
        ({"input": []}, "input: "),
        ({"input": ["a", ""]}, "input: "),
        ({"input": [[]]}, "input: "),
        ({"input": [300]}, "input: token id 300 is outside the vocabulary of 300"),
        ({"input": ["a"] * 17}, "input: 17 are more than the 16 that may wait"),
        ({"input": "a" * ((1 << 19) + 1)}, "input: must be a text of at most 524288"),
        ({"input": "neuron " * 140}, "input: the prompt of "),
        ({"dimensions": 8}, "dimensions: must be 24, which embeddings of this model have"),
        ({"dimensions": 0}, "dimensions: must be a whole number of at least 1"),
        ({"encoding_format": "int8"}, 'encoding_format: must be "float" or "base64"'),
        ({"embd_normalize": 0}, "embd_normalize: is not supported here"),
        ({"prompt": "a"}, "prompt: is not supported here"),
        ({"model": None}, "model: "),
        ({"model": "other"}, "model: "),
    ],
)
def test_bad_embeddings(address: str, change: dict[str, Any], said: str) -> None:
    answer = httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": "a"} | change)
    assert answer.status_code == (404 if change == {"model": "other"} else 400)
    error = answer.json()["error"]
    assert error["param"] == said.partition(": ")[0]
    assert said.partition(": ")[2] in error["message"]


# What clients send that changes nothing, and what is the same as leaving a field out.
HARMLESS: dict[str, Any] = {
    "user": "ann", "cache_salt": "s", "metadata": {"a": "b"}, "store": True,
    "safety_identifier": "x", "service_tier": "auto",
    "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "cache_prompt": False, "stream_options": {"include_usage": True, "include_obfuscation": False},
    "n": 1, "stop": [], "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
    "repeat_penalty": 1, "repetition_penalty": 1.0, "ignore_eos": False, "min_tokens": 0,
}  # fmt: skip
HARMLESS_IN_CHAT: dict[str, Any] = {
    "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": [],
    "function_call": "none", "response_format": {"type": "text"}, "logprobs": False,
    "top_logprobs": None, "add_generation_prompt": True, "continue_final_message": False,
}  # fmt: skip


def test_what_changes_nothing_is_taken(address: str) -> None:
    sent = {"role": "assistant", "content": "so", "refusal": None, "annotations": [], "audio": None}
    sent |= {"function_call": None, "tool_calls": None, "name": None}
    chat = {"messages": [*HI, sent]}, HARMLESS | HARMLESS_IN_CHAT
    text = {"prompt": "neuron 3"}, HARMLESS | {"best_of": 1, "suffix": "", "echo": False}
    for path, (body, harmless) in {"chat/completions": chat, "completions": text}.items():
        start = {"model": "tiny", "temperature": 0, "max_tokens": 5}
        answers = [
            httpx.post(f"{address}/v1/{path}", json=start | body | more)
            for more in ({}, harmless, dict.fromkeys(harmless))
        ]
        assert [a.status_code for a in answers] == [200] * 3, [a.text for a in answers]
        first, *rest = ({"index": 0} | a.json()["choices"][0] for a in answers)
        assert all(each == first for each in rest)


def test_parts_of_text_are_one_text(address: str) -> None:
    parts = [{"type": "text", "text": "neu"}, {"type": "text", "text": "ron"}]
    said = [
        httpx.post(
            f"{address}/v1/chat/completions",
            json={"model": "tiny", "temperature": 0, "max_tokens": 9} | says("user", content),
        ).json()
        for content in ("neuron", parts)
    ]
    assert said[0]["choices"] == said[1]["choices"]
    assert said[0]["usage"]["prompt_tokens"] == said[1]["usage"]["prompt_tokens"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "tool_calls", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
INTERNALS = re.compile(
    r"(?i:traceback|object at 0x|union|function-|literal|pydantic|instance|input should)"
    r"|(?i:value error)|\bNone\b|NoneType|\b(str|int|dict|bool|float)\b|is not understood"
    r"|TextPart|ChatMessage|StreamOptions|ResponseFormat|InputText|\(\w+\)"
)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_refusals_are_plain(data: st.DataObject) -> None:
    """Whatever a field is, it is taken or its name and one sentence are said, nothing of Python."""
    kinds: dict[Any, dict[str, Any]] = {
        api.ChatRequest: {"messages": HI}, api.CompletionRequest: {"prompt": "a"},
        api.ResponsesRequest: {"input": "a"},
    }  # fmt: skip
    kind = data.draw(st.sampled_from(list(kinds)))
    name = data.draw(st.sampled_from([*kind.model_fields, "strange"]))
    body = {"model": "tiny"} | kinds[kind]
    try:
        kind.model_validate(body | {name: data.draw(JSON_VALUES)})
    except ValidationError as error:
        for each in error.errors():
            where, said = api.refusal(each["loc"], each)
            assert where is not None
            assert where.split(".")[0] == name
            assert said.startswith(f"{where}: ")
            assert "\n" not in said
            # What was sent is repeated, and may be anything.
            assert not INTERNALS.search(said.partition("; it is ")[0].replace(name, "")), said


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 6000]
)
def test_garbage_is_refused(address: str, body: bytes) -> None:
    answer = httpx.post(f"{address}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert "message" in answer.json()["error"]


def test_another_kind_of_body(address: str) -> None:
    """What curl -d sends: also what a web page could send unasked."""
    answer = httpx.post(f"{address}/v1/completions", data={"model": "tiny"})
    assert answer.status_code == 400
    assert "send Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [("OPTIONS", "/v1/models", 405), ("GET", "/v1/completions", 405), ("GET", "/v1", 404)],
)
def test_routes_that_there_are_not(address: str, method: str, path: str, code: int) -> None:
    preflight = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    answer = httpx.request(method, f"{address}{path}", headers=preflight)
    assert answer.status_code == code
    assert answer.json()["error"]["message"].startswith(f"{method} {path}: ")
    assert "access-control-allow-origin" not in answer.headers
    assert ("allow" in answer.headers) == (code == 405)


def test_a_slash_at_the_end(address: str) -> None:
    assert httpx.get(f"{address}/v1/models/").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{address}/v1/models/tiny/").json()["id"] == "tiny"
    for path, body in (("chat/completions", {"messages": HI}), ("completions", {"prompt": "a"})):
        answer = httpx.post(f"{address}/v1/{path}/", json={"model": "tiny", "max_tokens": 1} | body)
        assert answer.status_code == 200


def test_web_pages_of_an_origin(engine: Engine) -> None:
    """https://fetch.spec.whatwg.org/#http-cors-protocol"""
    page = {"Origin": "http://localhost:3000"}
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    with served(engine, api_key="secret", cors=["http://localhost:3000"]) as address:
        url = f"{address}/v1/completions"
        preflight = httpx.options(url, headers=page | ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page["Origin"]
        assert "POST" in preflight.headers["access-control-allow-methods"]
        allowed = preflight.headers["access-control-allow-headers"].lower()
        assert {"authorization", "content-type"} <= set(re.split(", *", allowed))
        for key, code in (("secret", 200), ("wrong", 401)):
            headers = page | {"Authorization": f"Bearer {key}"}
            answer = httpx.post(url, json=body, headers=headers)
            assert answer.status_code == code
            assert answer.headers["access-control-allow-origin"] == page["Origin"]
        other = {"Origin": "http://example.com"}
        assert httpx.options(url, headers=other | ask).status_code == 400
        assert "access-control-allow-origin" not in httpx.get(url, headers=other).headers


@pytest.mark.parametrize("origin", ["localhost:3000", "http://localhost:3000/", "http://", ""])
def test_what_no_browser_sends_as_its_origin(engine: Engine, origin: str) -> None:
    with pytest.raises(UsageError, match="is no origin; give one such as http://localhost:3000"):
        serve(engine, "tiny", port=0, cors=["*", origin])


def test_a_token_outside_the_vocabulary(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="token id 300 is outside the vocabulary"):
        client.completions.create(model="tiny", prompt=[300])


def test_the_key(engine: Engine) -> None:
    with served(engine, api_key="secret") as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answer = httpx.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("metrics", "openapi.json"):
            assert httpx.get(f"{address}/{path}").status_code == 401
        assert httpx.post(f"{address}/tokenize", json={"content": "a"}).status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret") as client:
            assert [m.id for m in client.models.list()] == ["tiny"]


def test_the_key_is_asked_for_before_the_body_is_read(engine: Engine) -> None:
    with served(engine, api_key="secret") as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", "100000")
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 401
        assert json.loads(answer.read())["error"]["type"] == "authentication_error"
        connection.close()


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key(engine: Engine, key: str) -> None:
    with pytest.raises(UsageError, match="the API key is empty"):
        serve(engine, "tiny", port=0, api_key=key)


def test_names_that_resolve_here_by_design_of_a_web_page(engine: Engine) -> None:
    with served(engine, hosts=LOOPBACK) as address:
        port = address.rpartition(":")[2]
        for host in (
            f"127.0.0.1:{port}",
            f"localhost:{port}",
            "LOCALHOST",
            f"[::1]:{port}",
            "[::1]",
        ):
            assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == 200
        for host in (f"evil.example:{port}", "127.0.0.1.evil.example", "[::2]"):
            answer = httpx.get(f"{address}/v1/models", headers={"Host": host})
            assert answer.status_code == 403
            assert "start it with --api-key" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "hosts", "warns"),
    [
        ({}, LOOPBACK, False),
        ({"host": "::1"}, LOOPBACK, False),
        ({"api_key": "k"}, (), False),
        ({"host": "0.0.0.0"}, (), True),
        ({"host": "0.0.0.0", "api_key": "k"}, (), False),
    ],
)
def test_who_may_ask(
    engine: Engine,
    options: Any,
    hosts: Any,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(server, "create_app", lambda *given: made.append(given))
    monkeypatch.setattr(server, "run", lambda _, sockets: [s.close() for s in sockets])
    serve(engine, "tiny", port=0, **options)
    assert made[0][-1] == hosts
    assert ("give it an --api-key" in capsys.readouterr().err) == warns


def test_no_page_with_scripts_of_another_server(address: str) -> None:
    for path in ("docs", "redoc"):
        assert httpx.get(f"{address}/{path}").status_code == 404


def test_large_and_slow_bodies(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    with served(engine, max_body=1000) as address:
        large = httpx.post(f"{address}/v1/completions", content=b"x" * 1001)
        assert large.status_code == 413
        assert large.json()["error"]["message"] == "the body has more than 1000 bytes"
        chunked = httpx.post(f"{address}/v1/completions", content=iter([b"x" * 600] * 2))
        assert chunked.status_code == 413
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"model"')
        assert connection.getresponse().status == 408
        connection.close()


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("tokenize", {}, "content: is missing"),
        ("tokenize", {"content": "a" * ((1 << 19) + 1)}, "content: must be text of at most 524288"),
        ("tokenize", {"content": "a", "add_bos": True}, "add_bos: is not supported here"),
        ("detokenize", {"tokens": "a"}, "tokens: must be a list of at most 131072 token ids"),
        ("detokenize", {"tokens": [0, 300]}, "tokens: token id 300 is outside the vocabulary"),
        ("detokenize", {"tokens": [-1]}, "tokens: must be a list"),
    ],
)
def test_bad_texts_and_tokens(address: str, path: str, body: Any, said: str) -> None:
    answer = httpx.post(f"{address}/{path}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(said)


# The schema --------------------------------------------------------------------------------------


def test_schemathesis(address: str, tmp_path: Path) -> None:
    """What the schema allows is answered as it says, and what it forbids is refused."""
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"),
            "run",
            f"{address}/openapi.json",
            "--max-examples=25",
            "--seed=0",
            "--exclude-checks=positive_data_acceptance",  # a prompt may be too long for the model
            "--no-color",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-4000:]
