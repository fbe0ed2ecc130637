"""Around the application: paths, largest and slowest body, and a count of every response."""

import asyncio
from typing import Any

from starlette.exceptions import HTTPException

from fallow.serving.telemetry import Telemetry

BODY_SECONDS = 30.0  # that a request may take to arrive


class Limits:
    """ASGI middleware."""

    def __init__(self, app: Any, max_body: int, telemetry: Telemetry) -> None:
        self.app, self.max_body, self.telemetry = app, max_body, telemetry

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # As without a slash at the end. A redirection would lose the body of many clients' POST.
        scope = scope | {"path": scope["path"].rstrip("/") or "/"}
        body = _Body(receive, self.max_body)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.telemetry.responded(scope["path"], message["status"])
            await send(message)

        await self.app(scope, body.receive, counted)


class _Body:
    """The body of a request, which must not be too large or too slow."""

    def __init__(self, receive: Any, most: int) -> None:
        self._receive, self._most = receive, most
        self._size, self._whole = 0, False
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive(self) -> Any:
        """Raises HTTPException, which the application makes a response of."""
        if self._whole:  # waiting for the client to go away
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, f"the body took more than {BODY_SECONDS:.0f} s") from error
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._most:
                raise HTTPException(
                    413, f"the body has more than {self._most} bytes", {"Connection": "close"}
                )
        return message
