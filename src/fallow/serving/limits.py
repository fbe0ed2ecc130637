"""Around the application: who may ask, paths, largest and slowest body; counts responses."""

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fallow.serving.telemetry import Telemetry

BODY_SECONDS = 30.0  # that a request may take to arrive
OPEN_PATHS = ("/health", "/", "/page.css", "/page.js")  # for which no key is asked
NAMES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error", 500: "server_error", 503: "overloaded_error",
}  # fmt: skip


def error_response(
    code: int, message: str, param: str | None = None, name: str | None = None, **headers: str
) -> JSONResponse:
    """An error in OpenAI's form."""
    body = {"message": message, "type": NAMES.get(code, "invalid_request_error"), "param": param}
    return JSONResponse({"error": body | {"code": name}}, code, headers or None)


class Limits:
    """ASGI middleware. Who may not ask is told so before the body is read."""

    def __init__(
        self,
        app: Any,
        max_body: int,
        telemetry: Telemetry,
        api_key: str | None,
        hosts: Sequence[str],
    ) -> None:
        self.app, self.max_body, self.telemetry = app, max_body, telemetry
        self.api_key, self.hosts = api_key, hosts

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

        refused = self._refused(Headers(scope=scope), scope["path"])
        await (refused or self.app)(scope, body.receive, counted)

    def _refused(self, headers: Headers, path: str) -> JSONResponse | None:
        host = headers.get("host", "").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts and name not in self.hosts:
            # A page of the web may have its own name resolve to this machine (DNS rebinding).
            return error_response(
                403,
                f"the server answers as {', '.join(self.hosts)}, not as {name!r}; "
                "ask by such a name, or start it with --api-key",
            )
        if self.api_key is None or path in OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Compared in constant time: how long a wrong key takes must not tell how wrong it is.
        right = hmac.compare_digest(given.strip().encode(), self.api_key.encode())
        if scheme.lower() == "bearer" and right:
            return None
        return error_response(
            401,
            "the API key is missing or wrong; send Authorization: Bearer KEY",
            **{"WWW-Authenticate": "Bearer", "Connection": "close"},
        )


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
