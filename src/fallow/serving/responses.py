"""The response of /v1/responses while it grows, and the events that tell of it."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from fallow.serving import schemas as api

Event = dict[str, Any]


class Growing:
    """A response: begun, given text and calls in their order, and ended.

    Each step gives the events that a stream tells it by, in the order in which OpenAI has them:
    https://platform.openai.com/docs/api-reference/responses-streaming
    """

    def __init__(self, body: api.ResponsesRequest, model: str) -> None:
        form = body.text and body.text.format
        told: dict[str, Any] = {"exclude_none": True, "by_alias": True}
        choice = body.tool_choice
        self.made = api.ResponseMade(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata if isinstance(body.metadata, dict) else {},
            model=model,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text={"format": form.model_dump(**told) if form else {"type": "text"}},
            tool_choice=choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
            tools=[_tool(tool) for tool in body.tools or ()],
            top_p=1.0 if body.top_p is None else body.top_p,
        )
        self._told = 0  # events
        self._message: api.OutputMessage | None = None  # that text is added to

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self.made.model_dump())
        yield self._event("response.in_progress", response=self.made.model_dump())

    def add(self, said: str | api.ToolCallMade) -> Iterator[Event]:
        """A piece of text, or a whole call."""
        if isinstance(said, api.ToolCallMade):
            yield from self._close("completed")
            yield from self._call(said)
        elif said:
            if self._message is None:
                yield from self._open()
            assert self._message is not None
            self._message.content[0].text += said
            yield self._of_part("response.output_text.delta", delta=said, logprobs=[])

    def end(self, finish: str, usage: api.Usage) -> Iterator[Event]:
        """`finish`: as of a chat."""
        status = "incomplete" if finish == "length" else "completed"
        if not self.made.output:  # the model said nothing
            yield from self._open()
        yield from self._close(status)
        self.made.status = status
        if status == "incomplete":
            self.made.incomplete_details = api.Incomplete(reason="max_output_tokens")
        cached = usage.prompt_tokens_details.cached_tokens
        self.made.usage = api.ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=api.WrittenTokens(cached_tokens=cached),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            sparsity=usage.sparsity,
        )
        yield self._event(f"response.{status}", response=self.made.model_dump())

    def fail(self, message: str) -> Event:
        return self._event("error", code="server_error", message=message, param=None)

    def _open(self) -> Iterator[Event]:
        self._message = api.OutputMessage(id=f"msg_{uuid.uuid4().hex}")
        yield self._added(self._message)
        self._message.content.append(api.OutputText())
        yield self._of_part("response.content_part.added", part=api.OutputText().model_dump())

    def _close(self, status: str) -> Iterator[Event]:
        """Ends the message that text is added to, if there is one."""
        message = self._message
        if message is None:
            return
        part = message.content[0]
        yield self._of_part("response.output_text.done", text=part.text, logprobs=[])
        yield self._of_part("response.content_part.done", part=part.model_dump())
        self._message = None
        yield self._done(message, status)

    def _call(self, called: api.ToolCallMade) -> Iterator[Event]:
        function = called.function
        item = api.OutputCall(id=f"fc_{uuid.uuid4().hex}", call_id=called.id, name=function.name)
        yield self._added(item)
        item.arguments = function.arguments
        where = {"item_id": item.id, "output_index": len(self.made.output) - 1}
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **where, delta=item.arguments)
        yield self._event(f"{kind}.done", **where, name=item.name, arguments=item.arguments)
        yield self._done(item, "completed")

    def _added(self, item: api.OutputMessage | api.OutputCall) -> Event:
        self.made.output.append(item)
        return self._of_item("response.output_item.added", item)

    def _done(self, item: api.OutputMessage | api.OutputCall, status: str) -> Event:
        item.status = status
        return self._of_item("response.output_item.done", item)

    def _of_item(self, kind: str, item: api.OutputMessage | api.OutputCall) -> Event:
        return self._event(kind, output_index=len(self.made.output) - 1, item=item.model_dump())

    def _of_part(self, kind: str, **fields: Any) -> Event:
        assert self._message is not None
        where = {"item_id": self._message.id, "output_index": len(self.made.output) - 1}
        return self._event(kind, **where, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._told += 1
        return {"type": kind, "sequence_number": self._told - 1, **fields}


def _tool(tool: api.FunctionTool) -> dict[str, Any]:
    return {"parameters": None, "strict": bool(tool.strict)} | tool.model_dump(exclude_none=True)
