"""Calls of tools: how models write them, read from an answer, and the grammar of one that must be.

Three ways to write them are known, by what the chat template says: Hermes's and Qwen's
<tool_call>{"name": ..., "arguments": {...}}</tool_call>, Llama 3's {"name": ..., "parameters":
{...}} as the whole answer, and Mistral's [TOOL_CALLS][{"name": ..., "arguments": {...}}].
"""

import json
import re
import secrets
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from fallow.checkpoints.tokenizer import TextTokenizer
from fallow.common.errors import FallowError
from fallow.engine.grammar import json_rule
from fallow.serving import schemas as api

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL = "[TOOL_CALLS]"
_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Style:
    """How a model writes calls."""

    arguments: str
    is_tagged: bool = False  # anywhere in an answer; otherwise calls are the whole answer
    is_list: bool = False

    def grammar(
        self, tools: Sequence[api.Tool], must: bool, several: bool, tokenizer: TextTokenizer
    ) -> str:
        """A Lark grammar, as llguidance has it, of answers whose calls fit the tools' parameters.

        `must`: an answer is calls alone; otherwise it may be text, too.

        Raises:
            FormError: a tool's parameters have what a schema may not have.
        """
        lines = ["call: " + " | ".join(f"call{i}" for i in range(len(tools)))]
        for i, tool in enumerate(tools):
            head = json.dumps(f'{{"name": "{tool.function.name}", "{self.arguments}": ')
            lines.append(f'call{i}: {head} args{i} "}}"')
            lines.append(f"args{i}: {json_rule(tool.function.schema_)}")
        if self.is_tagged:
            tag, end = json.dumps(_OPEN), json.dumps(f"\n{_CLOSE}")
            one = f'"\\n" call {end}'
            if must:
                more = f' ("\\n" {tag} {one})*' if several else ""
                return "\n".join([f"start: {tag} {one}{more}", *lines])
            # A lazy lexeme ends with the first tag that comes (llguidance's docs/syntax.md).
            lines += [f"open[lazy]: TEXT {tag}", "TEXT: /(.|\\n)*/"]
            return "\n".join([f"start: (open {one}){'*' if several else '?'} TEXT", *lines])
        calls = "call"
        if self.is_list:
            marker = tokenizer.backend.token_to_id(_MISTRAL)
            is_token = marker is not None and tokenizer.is_control(marker)
            start = f"<[{marker}]>" if is_token else json.dumps(_MISTRAL)
            more = ' (", " call)*' if several else ""
            calls = f'{start} "[" call{more} "]"'
        plain = "" if must else " | TEXT"
        return "\n".join([f"start: {calls}{plain}", *lines, "TEXT: /([^{\\[\\s](.|\\n)*)?/"])


_HERMES = Style("arguments", is_tagged=True)
_LLAMA = Style("parameters")
_MISTRALS = Style("arguments", is_list=True)


def style_of(template: str) -> Style:
    """How a model with this chat template writes calls.

    Raises:
        FallowError: in a way that is not known.
    """
    if _OPEN in template and '"arguments"' in template and "<tool_calls>" not in template:
        return _HERMES
    if _MISTRAL in template and "[ARGS]" not in template:
        return _MISTRALS
    if '"parameters"' in template and "ipython" in template:
        return _LLAMA
    raise FallowError(
        "the way in which this model's chat template has tools called is none of those known: "
        f"{_OPEN}, {_MISTRAL} with a list, and JSON as Llama 3 has it"
    )


def check_messages(template: str, messages: Sequence[api.ChatMessage]) -> None:
    """Raises FallowError where there are calls or results that a template does not write."""
    has_calls = any(message.tool_calls for message in messages)
    has_results = any(message.role == "tool" for message in messages)
    if (has_calls and "tool_calls" not in template) or (
        has_results and not re.search("[\"'](tool|ipython)[\"']", template)
    ):
        raise FallowError("the model's chat template has no place for calls of tools")


Said = list[str | api.ToolCallMade]  # text and calls, in their order


class Reader:
    """Tells the calls in an answer from its text, while it grows.

    What may become a call is held back. What looks like one but calls none of the tools that were
    offered is text.
    """

    def __init__(self, style: Style, names: Collection[str], several: bool) -> None:
        self._style, self._names, self._several = style, names, several
        self._held = ""
        self._inside = False  # of a tagged call
        self._is_text = False  # an answer that is none of untagged calls
        self.n_calls = 0

    def add(self, text: str) -> Said:
        """What more of an answer lets say."""
        self._held += text
        return self._tagged() if self._style.is_tagged else self._untagged()

    def rest(self) -> Said:
        """What is held back when the answer has ended; a call whose end is missing may be whole."""
        held, self._held = self._held, ""
        if self._inside:
            calls = self._called([_value(held)])
            return [_OPEN + held] if calls is None else calls
        if self._style.is_tagged or self._is_text or not held:
            return [held] if held else []
        text = held.strip().removeprefix(_MISTRAL).strip()
        found = _value(text)
        if found is None:  # Llama 3 puts a semicolon between several
            found = [_value(part) for part in text.split(";")]
        calls = self._called(found if isinstance(found, list) else [found])
        return [held] if calls is None else calls

    def _tagged(self) -> Said:
        said: Said = []
        while True:
            if self._inside:
                body, end, rest = self._held.partition(_CLOSE)
                if not end:
                    return said
                calls = self._called([_value(body)])
                said += [_OPEN + body + _CLOSE] if calls is None else calls
                self._inside, self._held = False, rest
            if self.n_calls:  # line breaks between calls
                self._held = self._held.lstrip()
            text, self._inside, rest = _before(self._held)
            if text:
                said.append(text)
            self._held = rest
            if not self._inside:
                return said

    def _untagged(self) -> Said:
        begun = self._held.lstrip()
        if self._is_text or (
            begun and begun[0] not in "[{" and not _MISTRAL.startswith(begun[: len(_MISTRAL)])
        ):
            self._is_text = True
            held, self._held = self._held, ""
            return [held] if held else []
        return []

    def _called(self, found: list[Any]) -> Said | None:
        """The calls that these values are; None where one of them is no call."""
        made = [
            api.FunctionCalled(name=name, arguments=json.dumps(given, ensure_ascii=False))
            for value in found
            if isinstance(value, dict)
            and isinstance(name := value.get("name"), str)
            and name in self._names
            and isinstance(given := value.get("arguments", value.get("parameters", {})), dict)
        ]
        if not found or len(made) < len(found):
            return None
        if not self._several:  # of more than one the first counts
            made = [] if self.n_calls else made[:1]
        calls: Said = []
        for function in made:
            # Mistral's templates take ids of nine letters and digits alone.
            name = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))
            calls.append(api.ToolCallMade(index=self.n_calls, id=name, function=function))
            self.n_calls += 1
        return calls


def _before(text: str) -> tuple[str, bool, str]:
    """What is before a tagged call or its beginning, whether it is open, and what follows."""
    before, tag, rest = text.partition(_OPEN)
    if tag:
        return before, True, rest
    n = next((n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n])), 0)
    return text[: len(text) - n], False, text[len(text) - n :]


def _value(text: str) -> Any:
    """A value of JSON; None for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
