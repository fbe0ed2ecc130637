"""What requests may say and responses do: the part of OpenAI's API that one model on CPU can serve.

A field is honoured, or it cannot change the answer, or it is refused by name.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fallow.common.errors import FallowError
from fallow.engine.sampling import LARGEST_BIAS, LARGEST_PENALTY, REPEAT_PENALTIES

_NO_TEXT = "has half of a surrogate pair, which is no text"
_OURS = "fallow"  # the type of errors that are sentences of ours
# What pydantic calls the kinds of a message's content, and those of what goes into a response.
_TEXT, _PARTS = "(text)", "(parts)"
_MESSAGE, _CALL, _RESULT = "(message)", "(call)", "(result)"
_KINDS = (_TEXT, _PARTS, _MESSAGE, _CALL, _RESULT)
# What pydantic's own errors say, those that a field without `_takes` may have.
_SAID = {
    "missing": "is missing",
    "extra_forbidden": "is not supported here; leave it out",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "string_unicode": _NO_TEXT,
    "string_too_long": "is too long",
    "too_long": "has too many entries",
}
_NO_CONTENT = "must be text, or a list of parts of text"
_LONGEST = 60  # characters of a request that an error repeats
# What a request may ask for, before any work is done for it.
MOST_CHARACTERS = 1 << 19  # of a text: more than 100,000 tokens
MOST_IDS = 1 << 17  # of a prompt
MOST_PROMPTS = 256
MOST_ANSWERS = 128  # to a prompt, as OpenAI's API has it; each takes a place in the queue
MOST_MESSAGES = 2048  # and parts of a message
MOST_FIELDS = 100  # of an object
MOST_LEVELS = 64  # of a schema, and of a call's arguments
MOST_TOOLS = 128  # OpenAI's API takes as many
MOST_BIASES = 1024  # OpenAI's API takes as many
LONGEST_STOP = 256  # characters
LONGEST_NAME = 512  # characters of what is no text to read


def refusal(loc: tuple[int | str, ...], error: Mapping[str, Any]) -> tuple[str | None, str]:
    """The field's name, "messages.0.content" say, and one sentence about one of pydantic's errors.

    Args:
        loc: where it is in the body; (): the body.
    """
    if error["type"] == "json_invalid":
        return None, f"the body is no JSON: {error['ctx']['error']} at character {loc[0]}"
    where = ".".join(_cut(str(part)) for part in loc if part not in _KINDS)
    # pydantic's own words are about Python; a sentence that is not known is better left unsaid.
    said = error["msg"] if error["type"] == _OURS else _SAID.get(error["type"], "is not understood")
    if error["type"].endswith("too_long"):
        said += f"; at most {error['ctx']['max_length']} are taken"
    if said.startswith("must be "):
        said += f"; it is {_shown(error['input'])}"
    return where or None, f"{where}: {said}" if where else f"the body {said}"


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs cannot be sent
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


_T = TypeVar("_T")
_P = TypeVar("_P")


def _ours(said: str) -> PydanticCustomError:
    return PydanticCustomError(_OURS, "{said}", {"said": said})


def _unless_differs(value: _T, info: ValidationInfo, other: str) -> _T:
    """A field that another name stands for, too: both may be there with one value."""
    if value is not None and info.data.get(other, value) not in (None, value):
        raise _ours(f"differs from {other}; give one of them")
    return value


def _takes(what: str) -> WrapValidator:
    """In place of all that pydantic finds wrong with a field, says what it takes."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            said = next((e["msg"] for e in found if e["type"] == _OURS), f"must be {what}")
            raise _ours(said) from error

    return WrapValidator(check)


def _utf8(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _ours(_NO_TEXT) from error
    return text


def _bool(value: Any) -> Any:
    if type(value) is int:  # which is equal to a literal that it is not
        raise ValueError
    return value


def _shallow(value: Any) -> Any:
    """What is handled by recursion must not be deeper than that may be."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_LEVELS:
            raise _ours(f"is nested too deeply; at most {MOST_LEVELS} levels are taken")
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [each for v in inner for each in v if isinstance(each, dict | list)]
    return value


def _arguments(text: str) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _ours("must be the text of a JSON object") from error
    if not isinstance(found, dict):
        raise _ours("must be the text of a JSON object")
    _shallow(found)
    return text


def _kind(content: Any) -> str | None:
    return _TEXT if isinstance(content, str) else _PARTS if isinstance(content, list) else None


def _item(value: Any) -> str | None:
    kinds = {"message": _MESSAGE, "function_call": _CALL, "function_call_output": _RESULT}
    kind = value.get("type", "message") if isinstance(value, dict) else None
    return kinds.get(kind) if isinstance(kind, str) else None


Str = Annotated[str, Field(max_length=MOST_CHARACTERS), AfterValidator(_utf8)]
Name = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(_utf8)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP), AfterValidator(_utf8)]
NonEmpty = Annotated[Str, Field(min_length=1)]
TextOr = (  # text, or a list
    Annotated[_T, Tag(_TEXT)]
    | Annotated[
        list[_P], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True), Tag(_PARTS)
    ]
)
Several = Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)
Texts = Annotated[list[NonEmpty], Several]
Ids = Annotated[
    list[Annotated[int, Field(ge=0, lt=1 << 31)]],
    Field(min_length=1, max_length=MOST_IDS, fail_fast=True),
]
Count = Annotated[int | None, Field(ge=1), _takes("a whole number of at least 1")]
Flag = Annotated[bool | None, _takes("true or false")]
Temperature = Annotated[float | None, Field(ge=0, le=2), _takes("a number from 0 to 2")]
TopP = Annotated[float | None, Field(ge=0, le=1), _takes("a number from 0 to 1")]
# Fields that would change the answer and are not supported are taken with the value that says so.
One = Annotated[int | None, Field(ge=1, le=1), _takes("1, as no answers are left out")]
Answers = Annotated[
    int | None, Field(ge=1, le=MOST_ANSWERS), _takes(f"a whole number from 1 to {MOST_ANSWERS}")
]
Penalty = Annotated[
    float | None,
    Field(ge=-LARGEST_PENALTY, le=LARGEST_PENALTY),
    _takes(f"a number from -{LARGEST_PENALTY} to {LARGEST_PENALTY}"),
]
Factor = Annotated[
    float | None,
    Field(ge=REPEAT_PENALTIES[0], le=REPEAT_PENALTIES[1]),
    _takes("a number from {} to {}".format(*REPEAT_PENALTIES)),
]
Schema = Annotated[dict[str, Any], AfterValidator(_shallow), _takes("a JSON schema, an object")]
Nothing = Annotated[dict[str, Any], Field(max_length=0)] | Annotated[list[Any], Field(max_length=0)]
TokenId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-LARGEST_BIAS, le=LARGEST_BIAS)]
Biases = Annotated[
    dict[TokenId, Bias] | Annotated[list[Any], Field(max_length=0)] | None,
    Field(max_length=MOST_BIASES),
    _takes(
        f"an object of at most {MOST_BIASES} token ids, each with a number from -{LARGEST_BIAS} to "
        f"{LARGEST_BIAS}"
    ),
]
NoFunctions = Annotated[Nothing | None, _takes("empty, as it is tools that are supported")]
NoFunctionCall = Annotated[
    Literal["none", "auto"] | None, _takes('"none" or "auto", as it is tools that are supported')
]
No = Annotated[
    Literal[False] | None, BeforeValidator(_bool), _takes("false, as true is not supported")
]
Yes = Annotated[
    Literal[True] | None, BeforeValidator(_bool), _takes("true, as false is not supported")
]
Null = Annotated[None, _takes("null, as the model is not shown it")]
Harmless = Any  # cannot change the answer, whatever it says


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        """Every unknown one is an error, and pydantic collects them all."""
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise _ours(f"has too many fields; at most {MOST_FIELDS} are taken")
        return value


class StreamOptions(_Strict):
    include_usage: Flag = False
    include_obfuscation: Harmless = None  # padding, which is not sent


class TextPart(_Strict):
    type: Annotated[Literal["text"], _takes('"text", as images, audio and files are not supported')]
    text: Annotated[Str, _takes(f"text of at most {MOST_CHARACTERS} characters")]


FunctionName = Annotated[
    str,
    Field(pattern="^[a-zA-Z0-9_.-]{1,64}$"),
    _takes("1 to 64 letters, digits, underscores, dots and hyphens"),
]


class CalledFunction(_Strict):
    """Which tool is called, and with what, as JSON."""

    name: FunctionName
    arguments: Annotated[
        Str, AfterValidator(_arguments), _takes(f"text of at most {MOST_CHARACTERS} characters")
    ]


class ToolCall(_Strict):
    """A call that an earlier answer made, as the client sends it back."""

    id: Annotated[Name | None, _takes(f"text of at most {LONGEST_NAME} characters")] = None
    type: Annotated[Literal["function"], _takes('"function"')] = "function"
    function: CalledFunction
    index: Harmless = None  # of a stream


class Function(_Strict):
    name: FunctionName
    description: Annotated[Str | None, _takes("text")] = None
    parameters: Schema | None = None
    strict: Flag = None

    @property
    def schema_(self) -> dict[str, Any]:
        return {"type": "object"} if self.parameters is None else self.parameters


class Tool(_Strict):
    type: Annotated[Literal["function"], _takes('"function"')]
    function: Function


class NamedFunction(_Strict):
    name: FunctionName


class NamedTool(_Strict):
    type: Annotated[Literal["function"], _takes('"function"')]
    function: NamedFunction


class ChatMessage(_Strict):
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        _takes('"system", "developer", "user", "assistant" or "tool"'),
    ]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Annotated[Name | None, _takes(f"text of at most {LONGEST_NAME} characters")] = (
        None
    )
    # What clients send back of an answer.
    function_call: Null = None
    refusal: Null = None
    audio: Null = None
    annotations: Annotated[
        list[Any] | None, Field(max_length=0), _takes("empty, as the model is not shown it")
    ] = None
    name: Annotated[Name | None, _takes(f"text of at most {LONGEST_NAME} characters")] = None
    content: Annotated[TextOr[Str, TextPart], Discriminator(_kind, _OURS, _NO_CONTENT)] | None = (
        Field(default=None, validate_default=True)
    )

    @field_validator("tool_calls", "tool_call_id", "name")
    @classmethod
    def _in_its_role(cls, value: Any, info: ValidationInfo) -> Any:
        role = "assistant" if info.field_name == "tool_calls" else "tool"
        if value and info.data.get("role") != role:
            raise _ours(f'must be empty in a message that is not of the role "{role}"')
        return value

    @field_validator("content")
    @classmethod
    def _or_calls(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise _ours(_NO_CONTENT)
        return value

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    @property
    def passed(self) -> dict[str, Any]:
        """As chat templates take it: with arguments that are no longer text."""
        found: dict[str, Any] = {
            "role": self.role.replace("developer", "system"), "content": self.text,
            "name": self.name, "tool_call_id": self.tool_call_id,
        }  # fmt: skip
        if self.tool_calls:
            found["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.function.name,
                 "arguments": json.loads(c.function.arguments)}}
                for c in self.tool_calls
            ]  # fmt: skip
        return {key: value for key, value in found.items() if value is not None}


class SchemaFormat(_Strict):
    schema_: Schema = Field(alias="schema")
    name: Harmless = None
    description: Harmless = None
    strict: Flag = None  # an answer always fits


class ResponseFormat(_Strict):
    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        _takes('"text", "json_object" or "json_schema"'),
    ]
    json_schema: SchemaFormat | None = None

    @field_validator("json_schema")
    @classmethod
    def _of_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("type") != "json_schema":
            raise _ours('needs "type": "json_schema"')
        return value

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise _ours("has no json_schema, which its type needs")
        return self


class _Request(_Strict):
    """What both endpoints take."""

    model: Annotated[Name, _takes("the model's name")]
    stream: Flag = False
    stream_options: StreamOptions | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: Annotated[
        int | None, Field(ge=0, le=1 << 31), _takes("a whole number of at least 0")
    ] = 0
    min_p: Annotated[float | None, Field(ge=0, le=1), _takes("a number from 0 to 1")] = 0.0
    seed: Annotated[
        int | None, Field(ge=-(1 << 63), lt=1 << 64), _takes("a whole number of 64 bits")
    ] = None
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None,
        _takes(f"a text or a list of at most 4 texts, of 1 to {LONGEST_STOP} characters"),
    ] = None
    user: Annotated[Name | None, _takes(f"text of at most {LONGEST_NAME} characters")] = None
    cache_salt: Annotated[  # as vLLM has it: prompts are shared in the cache by those of one salt
        Name | None, _takes(f"text of at most {LONGEST_NAME} characters")
    ] = None
    n: Answers = 1
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repeat_penalty: Factor = None  # llama.cpp's name
    repetition_penalty: Factor = None  # vLLM's
    logit_bias: Biases = None
    # An answer's form, by llama.cpp's names.
    json_schema: Schema | None = None
    grammar: Annotated[Str | None, _takes(f"text of at most {MOST_CHARACTERS} characters")] = None
    ignore_eos: No = False
    min_tokens: Annotated[
        int | None, Field(ge=0, le=0), _takes("0, as others are not supported")
    ] = 0
    # Kept beside the answer, by OpenAI.
    metadata: Harmless = None
    store: Harmless = None
    safety_identifier: Harmless = None
    # When and how fast an answer comes.
    service_tier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None
    cache_prompt: Harmless = None
    fallow_plan: Flag = True  # ours: false leaves the server's plan aside

    @field_validator("repetition_penalty")
    @classmethod
    def _one_factor(cls, value: float | None, info: ValidationInfo) -> float | None:
        return _unless_differs(value, info, "repeat_penalty")

    @field_validator("grammar")
    @classmethod
    def _one_form(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and info.data.get("json_schema") is not None:
            raise _ours("goes without json_schema; give one of them")
        return value

    @property
    def biases(self) -> dict[int, float]:
        """Of token ids."""
        return {int(i): bias for i, bias in dict(self.logit_bias or {}).items()}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Request):
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    max_tokens: Count = None
    max_completion_tokens: Count = None
    logprobs: Flag = False
    top_logprobs: Annotated[
        int | None, Field(ge=0, le=20), _takes("a whole number from 0 to 20")
    ] = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | None,
        _takes('"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'),
    ] = None
    parallel_tool_calls: Flag = None
    functions: NoFunctions = None
    function_call: NoFunctionCall = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: Yes = True
    continue_final_message: No = False
    fallow_activity: Flag = False  # ours: chunks have an Activity of each of their tokens

    @field_validator("response_format")
    @classmethod
    def _only_form(cls, value: ResponseFormat | None, info: ValidationInfo) -> Any:
        given = info.data.get("grammar") or info.data.get("json_schema") is not None
        if value is not None and value.type != "text" and given:
            raise _ours("goes without grammar and json_schema; give one of them")
        return value

    @field_validator("tools")
    @classmethod
    def _differ(cls, value: list[Tool] | None) -> Any:
        if value and len({tool.function.name for tool in value}) < len(value):
            raise _ours("has two of one name")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _offered(cls, value: Any, info: ValidationInfo) -> Any:
        names = {tool.function.name for tool in info.data.get("tools") or ()}
        if value == "required" and not names:
            raise _ours("needs tools")
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise _ours("names a tool that is none of tools")
        return value

    @model_validator(mode="after")
    def _form_or_tools(self) -> "ChatRequest":
        wants_form = self.response_format is not None and self.response_format.type != "text"
        if self.offered and (wants_form or self.grammar or self.json_schema is not None):
            raise _ours("asks for tools and for a form of the answer; give one of them")
        return self

    @property
    def offered(self) -> list[Tool]:
        """Those that the model is told of."""
        if self.tool_choice == "none" or not self.tools:
            return []
        return self.tools

    @property
    def callable(self) -> list[Tool]:
        """Those of them that it may, where it was told of all."""
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered if tool.function.name == name]
        return self.offered

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        return _unless_differs(value, info, "max_tokens")

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise _ours('needs "logprobs": true')
        return value

    @field_validator("fallow_activity")
    @classmethod
    def _with_stream(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and not info.data.get("stream"):
            raise _ours('needs "stream": true')
        return value


Prompts = Annotated[
    NonEmpty | Texts | Ids | Annotated[list[Ids], Several],
    _takes(
        f"a text of at most {MOST_CHARACTERS} characters, a list of at most {MOST_IDS} token "
        f"ids, or a list of at most {MOST_PROMPTS} of either, without empty ones"
    ),
]


class CompletionRequest(_Request):
    prompt: Prompts
    parse_special: Flag = True  # ours: control tokens in a text are tokens; false: text
    echo: Flag = False
    max_tokens: Annotated[
        int | None, Field(ge=0), _takes("a whole number of at least 1, or 0 with echo")
    ] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=5), _takes("a whole number from 0 to 5")] = None
    best_of: One = 1
    suffix: Annotated[
        str | None, Field(max_length=0), _takes("empty, as filling in is not supported")
    ] = None

    @field_validator("max_tokens")
    @classmethod
    def _zero_with_echo(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and not info.data.get("echo"):
            raise _ours('must be at least 1, or 0 with "echo": true')
        return value


class EmbeddingRequest(_Strict):
    model: Annotated[Name, _takes("the model's name")]
    input: Prompts
    encoding_format: Annotated[Literal["float", "base64"] | None, _takes('"float" or "base64"')] = (
        "float"
    )
    dimensions: Count = None  # only as many as there are
    parse_special: Flag = True  # as for completions
    user: Annotated[Name | None, _takes(f"text of at most {LONGEST_NAME} characters")] = None
    fallow_plan: Flag = True  # as for completions


class InputText(_Strict):
    type: Annotated[
        Literal["input_text", "output_text"],
        _takes('"input_text" or "output_text", as images and files are not supported'),
    ]
    text: Annotated[Str, _takes(f"text of at most {MOST_CHARACTERS} characters")]
    annotations: Annotated[
        list[Any] | None, Field(max_length=0), _takes("empty, as the model is not shown it")
    ] = None
    logprobs: Harmless = None


InputContent = Annotated[TextOr[Str, InputText], Discriminator(_kind, _OURS, _NO_CONTENT)]


class _Item(_Strict):
    id: Harmless = None
    status: Harmless = None


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        _takes('"system", "developer", "user" or "assistant"'),
    ]
    content: InputContent
    phase: Harmless = None


class InputCall(_Item, CalledFunction):
    """A call that an earlier response made."""

    type: Literal["function_call"]
    call_id: Annotated[Name, _takes(f"text of at most {LONGEST_NAME} characters")]


class InputResult(_Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Annotated[Name, _takes(f"text of at most {LONGEST_NAME} characters")]
    output: InputContent


InputItem = Annotated[
    Annotated[InputMessage, Tag(_MESSAGE)]
    | Annotated[InputCall, Tag(_CALL)]
    | Annotated[InputResult, Tag(_RESULT)],
    Discriminator(
        _item, _OURS, "must be a message, a function_call or a function_call_output, by its type"
    ),
]


class _OfFunction(_Strict):
    type: Annotated[Literal["function"], _takes('"function"')]


class FunctionTool(Function, _OfFunction):
    """A tool as /v1/responses has it: without the level in between."""


class NamedFunctionTool(NamedFunction, _OfFunction):
    pass


class TextFormat(SchemaFormat):
    """A response's form: as ResponseFormat, without the level in between."""

    type: Annotated[
        Literal["text", "json_object", "json_schema"],
        _takes('"text", "json_object" or "json_schema"'),
    ]
    schema_: Schema | None = Field(default=None, alias="schema")  # type: ignore[assignment]

    @model_validator(mode="after")
    def _of_its_type(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise _ours('has a schema if its type is "json_schema", and only then')
        return self


class TextConfig(_Strict):
    format: TextFormat | None = None


class ResponseStreamOptions(_Strict):
    include_obfuscation: Harmless = None  # padding, which is not sent


NotKept = Annotated[None, _takes("null, as nothing is kept here: send what was said as input")]
Unsupported = Annotated[None, _takes("null, as it is not supported here")]


class ResponsesRequest(_Strict):
    model: Annotated[Name, _takes("the model's name")]
    input: Annotated[
        TextOr[NonEmpty, InputItem],
        Discriminator(_kind, _OURS, "must be text, or a list of items"),
    ]
    instructions: Annotated[Str | None, _takes(f"text of at most {MOST_CHARACTERS} characters")] = (
        None
    )
    stream: Flag = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Count = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedFunctionTool | None,
        _takes('"none", "auto", "required" or {"type": "function", "name": ...}'),
    ] = None
    parallel_tool_calls: Flag = None
    fallow_plan: Flag = True  # as for chats
    # What is supported only as what changes nothing.
    background: No = False
    conversation: NotKept = None
    previous_response_id: NotKept = None
    prompt: Unsupported = None
    reasoning: Unsupported = None
    include: Annotated[
        list[Any] | None, Field(max_length=0), _takes("empty, as nothing more is told")
    ] = None
    truncation: Annotated[
        Literal["disabled"] | None, _takes('"disabled", as input is never cut')
    ] = None
    top_logprobs: Annotated[
        int | None, Field(ge=0, le=0), _takes("0, as they are told by /v1/chat/completions")
    ] = None
    max_tool_calls: Harmless = None  # of tools that OpenAI runs
    metadata: Harmless = None
    store: Harmless = None
    user: Harmless = None
    safety_identifier: Harmless = None
    service_tier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None

    def chat(self) -> ChatRequest:
        """The same for /v1/chat/completions. Raises pydantic's ValidationError."""
        found: dict[str, Any] = {"model": self.model, "messages": self._messages()}
        found |= {"max_tokens": self.max_output_tokens, "temperature": self.temperature}
        found |= {"top_p": self.top_p, "stream": self.stream, "fallow_plan": self.fallow_plan}
        found["parallel_tool_calls"] = self.parallel_tool_calls
        if self.tools is not None:
            found["tools"] = [_nested(tool) for tool in self.tools]
        choice = self.tool_choice
        found["tool_choice"] = _nested(choice) if isinstance(choice, BaseModel) else choice
        form = self.text and self.text.format
        if form:
            found["response_format"] = {"type": form.type}
            if form.schema_ is not None:
                found["response_format"]["json_schema"] = {"schema": form.schema_}
        return ChatRequest.model_validate(found)

    def _messages(self) -> list[dict[str, Any]]:
        """Calls that follow each other are one message, as chat templates have them."""
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        names: dict[str, str] = {}  # of calls, by their ids
        for item in self.input:
            if isinstance(item, InputMessage):
                found.append({"role": item.role, "content": _joined(item.content)})
            elif isinstance(item, InputCall):
                names[item.call_id] = item.name
                function = {"name": item.name, "arguments": item.arguments}
                if not found or "tool_calls" not in found[-1]:
                    found.append({"role": "assistant", "content": None, "tool_calls": []})
                found[-1]["tool_calls"].append({"id": item.call_id, "function": function})
            else:
                result: dict[str, Any] = {"role": "tool", "content": _joined(item.output)}
                result |= {"tool_call_id": item.call_id, "name": names.get(item.call_id)}
                found.append(result)
        return found


def _nested(tool: BaseModel) -> dict[str, Any]:
    """A tool, or its name, as chats have it."""
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _joined(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class TokenizeRequest(_Strict):
    """As llama.cpp's server has it."""

    content: Annotated[Str, _takes(f"text of at most {MOST_CHARACTERS} characters")]
    add_special: Flag = False  # BOS, where the model wants one
    parse_special: Flag = True  # control tokens in the text are tokens
    with_pieces: Flag = False


class DetokenizeRequest(_Strict):
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, lt=1 << 31)]],
        Field(max_length=MOST_IDS, fail_fast=True),
        _takes(f"a list of at most {MOST_IDS} token ids"),
    ]


# Responses ---------------------------------------------------------------------------------------


def _json_logprob(value: float) -> float:
    """-9999 for what is impossible, as OpenAI has it: JSON knows no infinity."""
    if math.isnan(value):
        raise FallowError("the model's logits are NaN; check the file with: fallow evaluate")
    return max(value, -9999.0)


Logprob = Annotated[float, AfterValidator(_json_logprob)]  # nats


class Sparsity(BaseModel):
    """Ours: how sparsely the answer was made."""

    neurons_idle: float  # share, mean of layers
    neurons_idle_per_layer: list[float]
    bytes_per_token: float  # weights and cache read per decoded token
    decode_tps: float  # tokens per second


class Activity(BaseModel):
    """Ours: what was used for one token of a chunk. Shares are of neurons, from 0 to 1."""

    active_per_layer: list[float]
    active_bins: list[list[float]]  # of each layer, in ranges of its neurons
    bytes_read: int | None  # null: with the prompt


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    sparsity: Sparsity


class TopToken(BaseModel):
    token: str
    logprob: Logprob
    bytes: list[int] | None


class TokenLogprob(TopToken):
    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class FunctionCalled(BaseModel):
    name: str
    arguments: str  # an object of JSON


class ToolCallMade(BaseModel):
    index: int  # in the answer
    id: str
    type: Literal["function"] = "function"
    function: FunctionCalled


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCallMade] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[Logprob | None]  # None: a prompt's first token
    top_logprobs: list[dict[str, Logprob] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    status: str = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class OutputCall(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: str = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


class WrittenTokens(CachedTokens):
    cache_write_tokens: int = 0  # OpenAI's price list has them


class ReasoningTokens(BaseModel):
    reasoning_tokens: int = 0  # those of a model that thinks are output as any other


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: WrittenTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int
    sparsity: Sparsity


class Incomplete(BaseModel):
    reason: str


class ResponseMade(BaseModel):
    """What /v1/responses answers; what was asked for is told again, as OpenAI does."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: str = "in_progress"
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage | OutputCall] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class EmbeddingMade(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str  # or base64 of float32, little-endian


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingMade]
    model: str
    usage: EmbeddingUsage


class TokenPiece(BaseModel):
    id: int
    piece: str | list[int]  # bytes, where they are a part of a character


class TokenList(BaseModel):
    tokens: list[int] | list[TokenPiece]


class Content(BaseModel):
    content: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["fallow"] = "fallow"
    plan: str | None = None  # ours: the plan that it is served with


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    waiting: int
    running: bool


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorBody
