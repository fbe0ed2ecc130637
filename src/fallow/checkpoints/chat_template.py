"""Chat templates, run as transformers runs them (its utils/chat_template_utils.py)."""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fallow.common.errors import FallowError, in_one_line

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""One of a conversation: {"role": "system", "user", "assistant" ..., "content": text, ...}."""

# Unicode's noncharacters are for use inside a program: no text has them.
_BEGIN, _END = "\ufdd0", "\ufdd1"


def generate(
    template: str,
    conversation: Sequence[Message],
    special_tokens: Mapping[str, str],
    answer: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[str]:
    """What a template makes of a conversation, in pieces; `answer`: up to where one begins.

    `tools` are those that the model may call, as OpenAI's API has them.

    Raises:
        FallowError: the template refuses the conversation, or does not work.
        MemoryError: it takes too much.
    """
    try:
        yield from _compiled(template).generate(
            **special_tokens,
            messages=[_as_passed(message) for message in conversation],
            tools=tools,
            documents=None,
            add_generation_prompt=answer,
        )
    except (FallowError, MemoryError):
        raise
    except Exception as error:  # a template is a program: it may divide by zero
        raise FallowError(
            f"the model's chat template does not work: {in_one_line(error)}"
        ) from error


def _as_passed(message: Message) -> dict[str, Any]:
    """A message without what is None, and with its reasoning under the names that templates use."""
    found = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((found[name] for name in names if name in found), None)
    if reasoning is not None:
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


@lru_cache(maxsize=8)
def _compiled(template: str) -> "Template":
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, around what a model has said: for training masks, no part of a text."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own way

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    """What chat templates call for a conversation that they cannot express."""
    raise FallowError(f"the model's chat template refuses the prompt: {in_one_line(message)}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that jinja's own filter makes."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if not ensure_ascii:
        return text
    # Marks must stay what they are.
    return re.sub(rf"[^\x00-\x7e{_BEGIN}{_END}]", lambda c: json.dumps(c[0])[1:-1], text)


class Marks:
    """Tells the control tokens that a template writes from those in what it is given.

    As transformers' `sanitize_control_tokens`: control tokens in a conversation are put between two
    marks before the template sees them; all else stays as it is, so that filters and conditions
    work. A text that ends like the beginning of a control token gets a mark behind it, lest the
    next text completes it. A template that takes characters out of a text may still make a control
    token of what is left.
    """

    def __init__(self, tokens: Collection[str]) -> None:
        any_token = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"
        # Gemma has 6000 of them: few characters may begin one.
        first = "".join(sorted({re.escape(token[0]) for token in tokens}))
        any_token = f"(?=[{first}])(?:{any_token})" if tokens else any_token
        self._tokens = re.compile(any_token)
        self._marked = re.compile(f"{_BEGIN}({any_token}){_END}|[{_BEGIN}{_END}]")
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, self._beginnings), default=0)

    def put(self, value: Any) -> Any:
        """A conversation, or any part of one, with marks."""
        if isinstance(value, str):
            return self._put(value)
        if isinstance(value, Mapping):
            # Templates look for names such as "content"; others are of a tool's parameters.
            return {
                key if key.isidentifier() else self._put(key): self.put(each)
                for key, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.put(each) for each in value]
        return value

    def _put(self, text: str) -> str:
        text = text.replace(_BEGIN, "").replace(_END, "")
        rest = text.rstrip()
        begun = any(rest[-n:] in self._beginnings for n in range(1, self._longest + 1))
        marked = self._tokens.sub(rf"{_BEGIN}\g<0>{_END}", text)
        if not begun:
            return marked
        rest = marked.rstrip()
        return rest + _END + marked[len(rest) :]

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The pieces of a text with marks, and whether each is a control token that is text."""
        if _BEGIN not in text and _END not in text:
            yield text, False
            return
        at = 0
        for found in self._marked.finditer(text):
            yield text[at : found.start()], False
            if found[1]:
                yield found[1], True
            at = found.end()
        yield text[at:], False
