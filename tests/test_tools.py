"""Calls of tools: what templates are told, how calls are read, and calls that must be."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers

from conftest import make_folder
from fallow.checkpoints.tokenizer import tokenizer_from_folder
from fallow.common.errors import FallowError
from fallow.engine.answer import Piece
from fallow.engine.engine import Engine
from fallow.engine.stats import Stats
from fallow.serving.tools import Reader, style_of
from served import HI, Slow, served

# As templates of the three kinds are made, cut down to what calls need.
HERMES = """{% if tools %}Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %}
{% for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}{% if m.role == "tool" %}({{ m.tool_call_id }}){% endif %}

{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
LLAMA = """{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
{"name": function name, "parameters": {...}} {# Environment: ipython #}
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}assistant:"""
MISTRAL = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}
{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}
{% endfor %}"""
TEMPLATES = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"const": {}}}}


class Scripted(Slow):
    """Stands for an engine that says these pieces, whatever it is asked."""

    def __init__(self, tokenizer: Any, pieces: list[str], finish: str = "stop") -> None:
        super().__init__(tokenizer)
        self.pieces, self.finish = pieces, finish

    def begin(self, ids: Any, max_tokens: int, *_: Any, **options: Any) -> Any:
        answer = super().begin(ids, max_tokens, **options)
        answer.stats = Stats(len(ids), new_tokens=len(self.pieces), finish=self.finish)
        answer.steps = lambda: (Piece(text) for text in self.pieces)
        return answer


def with_template(engine: Any, name: str) -> Any:
    return dataclasses.replace(engine.tokenizer, chat_template=TEMPLATES[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_told_of_tools_as_in_transformers(tmp_path: Path, name: str) -> None:
    folder = make_folder("llama", tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    reference.chat_template = TEMPLATES[name]
    tokenizer = dataclasses.replace(tokenizer_from_folder(folder), chat_template=TEMPLATES[name])
    call = {"id": "abcdefghi", "type": "function"}
    call |= {"function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
    chat: Any = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "no", "tool_call_id": "abcdefghi"},
    ]
    expected = reference.apply_chat_template(
        chat, tools=[WEATHER, CLOCK], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.render(chat, tools=[WEATHER, CLOCK]) == expected
    assert "Of a city." in expected


def test_a_template_that_works_with_tools_alone(talking: Path) -> None:
    """As NousResearch's Hermes 2 Pro has it."""
    engine = Engine(talking, threads=1)
    template = HERMES.replace("{% if tools %}", "").replace("{% endif %}", "", 1)
    tokenizer = dataclasses.replace(engine.tokenizer, chat_template=template)
    assert "weather" in tokenizer.backend.decode(tokenizer.chat(HI, [WEATHER]))
    with pytest.raises(FallowError, match="chat template does not work"):
        tokenizer.chat(HI)


def test_control_tokens_in_tools_are_text(talking: Path) -> None:
    engine = Engine(talking, threads=1)
    tokenizer = with_template(engine, "hermes")
    control = tokenizer.backend.token_to_id("</s>")
    for where in ("description", "parameters"):
        hostile = {"</s>x": "</s>"} if where == "parameters" else "</s>"
        tool = {"type": "function", "function": WEATHER["function"] | {where: hostile}}
        assert control not in tokenizer.chat(HI, [tool])


SAID: dict[str, tuple[str, str, str]] = {  # an answer, its text, its calls
    "one": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        "",
        'weather{"city": "Rome"}',
    ),
    "text before, two": (
        'So: <tool_call>{"name": "clock", "arguments": {}}</tool_call>\n<tool_call>'
        '{"name": "weather", "arguments": {"city": "Åre"}}</tool_call>',
        "So: ",
        'clock{}weather{"city": "Åre"}',
    ),
    "its end is missing": ('<tool_call>{"name": "clock", "arguments": {}}', "", "clock{}"),
    "another tool": (
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        "",
    ),
    "no JSON": ("<tool_call>{</tool_call> no", "<tool_call>{</tool_call> no", ""),
    "a name that is none": (
        '<tool_call>{"name": []}</tool_call>', '<tool_call>{"name": []}</tool_call>', ""
    ),
    "text": ("a <b> <tool_ca", "a <b> <tool_ca", ""),
    "deep": ("<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, ""),
}  # fmt: skip
UNTAGGED: dict[str, tuple[str, str, str]] = {
    "one": ('{"name": "clock", "parameters": {}}', "", "clock{}"),
    "two": (
        '{"name": "clock", "parameters": {}}; {"name": "weather", "parameters": {"days": 1}}',
        "",
        'clock{}weather{"days": 1}',
    ),
    "a list": (' [{"name": "clock", "arguments": {}}]', "", "clock{}"),
    "a list after its mark": ('[TOOL_CALLS] [{"name": "clock", "arguments": {}}]', "", "clock{}"),
    "a list of nothing": ("[]", "[]", ""),
    "other JSON": ('{"a": 1}', '{"a": 1}', ""),
    "text": ('Use {"name": "clock"}', 'Use {"name": "clock"}', ""),
    "nothing": ("", "", ""),
}


def read(reader: Reader, pieces: list[str]) -> tuple[str, str]:
    """The text and the calls of an answer, each in one."""
    said = [each for piece in pieces for each in reader.add(piece)] + reader.rest()
    calls = [each.function for each in said if not isinstance(each, str)]
    text = "".join(each for each in said if isinstance(each, str))
    return text, "".join(call.name + call.arguments for call in calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("case", [*SAID, *(f"{name}, untagged" for name in UNTAGGED)])
def test_calls_are_read_whatever_the_pieces(case: str, size: int) -> None:
    untagged = case.endswith(", untagged")
    said, *expected = UNTAGGED[case.removesuffix(", untagged")] if untagged else SAID[case]
    reader = Reader(style_of(LLAMA if untagged else HERMES), {"clock", "weather"}, True)
    pieces = [said[i : i + size] for i in range(0, len(said), size)]
    assert list(read(reader, pieces)) == expected


def test_one_call_where_several_are_not_wanted() -> None:
    reader = Reader(style_of(HERMES), {"clock", "weather"}, False)
    assert read(reader, [SAID["text before, two"][0]]) == ("So: ", "clock{}")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_an_answer(engine: Engine, stream: bool) -> None:
    said = list(SAID["text before, two"][0])
    slow: Any = Scripted(with_template(engine, "hermes"), said)
    options: Any = {"model": "tiny", "messages": HI, "tools": [WEATHER, CLOCK], "stream": stream}
    with served(slow) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="a") as client:
        answer: Any = client.chat.completions.create(**options)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        told = [c.delta if stream else c.message for c in choices]
        assert "".join(t.content or "" for t in told) == "So: "
        calls = [call for t in told for call in t.tool_calls or []]
        assert [c.function.name for c in calls] == ["clock", "weather"]
        assert json.loads(calls[1].function.arguments) == {"city": "Åre"}
        assert [c.type for c in calls] == ["function"] * 2
        assert all(len(c.id) == 9 and c.id.isalnum() for c in calls)
        assert calls[0].id != calls[1].id
        if stream:
            assert [c.index for c in calls] == [0, 1]
        assert choices[-1].finish_reason == "tool_calls"
        slow.finish = "length"
        answer = client.chat.completions.create(**options | {"stream": False})
        assert answer.choices[0].finish_reason == "length"
        without = client.chat.completions.create(
            **options | {"stream": False, "tool_choice": "none"}
        )
        assert without.choices[0].message.tool_calls is None
        assert without.choices[0].message.content == "".join(said)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed model with a context that holds what is said of tools."""
    from fallow.packing.packer import pack

    folder = make_folder("llama", tmp_path_factory.mktemp("roomy") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    pack(folder, folder.parent / "packed.gguf", quant="f32")
    return folder.parent / "packed.gguf"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be(roomy: Path, name: str, stream: bool) -> None:
    """A random model calls what there is, with arguments that fit."""
    engine = Engine(roomy, threads=1)
    engine.tokenizer = with_template(engine, name)
    named = {"type": "function", "function": {"name": "weather"}}
    options: Any = {"model": "tiny", "messages": HI, "tools": [CLOCK, WEATHER], "max_tokens": 200}
    options |= {"temperature": 0, "parallel_tool_calls": False, "stream": stream}
    with served(engine) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="a") as client:
        for choice in ("required", named):
            answer: Any = client.chat.completions.create(**options, tool_choice=choice)
            choices = [c.choices[0] for c in answer] if stream else answer.choices
            (call,) = [
                call
                for c in choices
                for call in (c.delta if stream else c.message).tool_calls or []
            ]
            assert choices[-1].finish_reason == "tool_calls"
            given = json.loads(call.function.arguments)
            if choice == named:
                assert call.function.name == "weather"
            if call.function.name == "weather":
                assert set(given) == {"city", "days"}
                assert given["city"] in ("Rome", "Oslo")
                assert given["days"] in range(1, 10)
            else:
                assert given == {}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_grammar_of_strict_calls(engine: Engine, name: str) -> None:
    """Text may be anything, but what is called fits."""
    from fallow.serving import schemas as api

    tools, style = [api.Tool.model_validate(WEATHER)], style_of(TEMPLATES[name])
    text = style.grammar(tools, must=False, several=True, tokenizer=engine.tokenizer)
    arguments = '{"city": "Rome", "days": 3}'
    call = f'{{"name": "weather", "{style.arguments}": {arguments}}}'
    whole = {"hermes": f"so <tool_call>\n{call}\n</tool_call> then", "llama": call}
    whole["mistral"] = f"[TOOL_CALLS][{call}, {call}]"
    for said, fits in (
        (whole[name], True),
        ("plain text <tool", True),
        (whole[name].replace("Rome", "Bonn"), False),
        (whole[name].replace("weather", "rm"), False),
    ):
        grammar = engine.grammars.of_lark(text)
        ids = engine.tokenizer.encode(said).tolist()
        taken = grammar._matcher.try_consume_tokens(ids)
        assert (taken == len(ids) and grammar._matcher.is_accepting()) == fits


def test_calls_that_are_sent_back(engine: Engine) -> None:
    slow: Any = Scripted(with_template(engine, "hermes"), ["dry"])
    rendered: list[str] = []
    call: Any = {"id": "abcdefghi", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
    messages: Any = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "no rain"},
    ]
    begin = slow.begin

    def recorded(ids: Any, *rest: Any, **options: Any) -> Any:
        rendered.append(slow.tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False))
        return begin(ids, *rest, **options)

    slow.begin = recorded
    body = {"model": "tiny", "messages": messages}
    with served(slow) as address:
        said = httpx.post(f"{address}/v1/chat/completions", json=body).json()
    assert said["choices"][0]["message"]["content"] == "dry"
    expected = '{"name": "weather", "arguments": {"city": "Rome", "days": 2}}'
    assert expected in rendered[0]
    assert "tool: no rain(abcdefghi)" in rendered[0]


@pytest.mark.parametrize(
    ("template", "change", "said"),
    [
        (None, {}, "tools: the way in which this model's chat template has tools called is none"),
        (
            '{# <tool_call> "arguments" #}{{ messages }}',
            {},
            "the model's chat template does not tell the model",
        ),
        (HERMES, {"tool_choice": "any"}, 'tool_choice: must be "none", "auto", "required" or'),
        (HERMES, {"tools": None, "tool_choice": "required"}, "tool_choice: needs tools"),
        (
            HERMES,
            {"tool_choice": {"type": "function", "function": {"name": "rm"}}},
            "tool_choice: names a tool that is none of tools",
        ),
        (HERMES, {"tools": [WEATHER, WEATHER]}, "tools: has two of one name"),
        (HERMES, {"tools": [WEATHER] * 129}, "tools: has too many entries; at most 128"),
        (HERMES, {"tools": [{"type": "retrieval"}]}, 'tools.0.type: must be "function"'),
        (
            HERMES,
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name: must be 1 to 64 letters",
        ),
        (HERMES, {"response_format": {"type": "json_object"}}, "the body asks for tools and for a"),
        (
            HERMES,
            {
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}
                ],
                "tool_choice": "required",
            },
            "tools: the form that is asked for is not understood",
        ),
        (
            None,
            {"tools": None, "messages": [{"role": "tool", "content": "x"}]},
            "messages: the model's chat template has no place for calls of tools",
        ),
        (
            HERMES,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a"}}]}]},
            "messages.0.tool_calls.0.function.arguments: is missing",
        ),
        (
            HERMES,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "a", "arguments": "[]"}}],
                    }
                ]
            },
            "messages.0.tool_calls.0.function.arguments: must be the text of a JSON object",
        ),
    ],
)
def test_refusals(engine: Engine, template: str | None, change: dict[str, Any], said: str) -> None:
    tokenizer = engine.tokenizer
    if template:
        tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    slow: Any = Scripted(tokenizer, ["no"])
    slow.grammars = engine.grammars
    body = {"model": "tiny", "messages": HI, "tools": [WEATHER]} | change
    with served(slow) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_ways_to_call_that_are_not_known() -> None:
    xml = "<tool_call><function=a>", "<tool_call>a<arg_key>city</arg_key>"
    for template in (*xml, "[TOOL_CALLS]a[ARGS]{}", "plain"):
        with pytest.raises(FallowError, match="is none of those known"):
            style_of(template)
