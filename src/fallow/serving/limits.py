"""Around the application: who may ask, paths, what bodies may be; counts responses."""

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fallow.serving.page import PATHS
from fallow.serving.telemetry import Telemetry

BODY_SECONDS = 30.0  # that a request may take to arrive
BODIES = 32  # of the largest size, that requests in hand may have together
MOST_VALUES = 1 << 18  # of a body; twice as many as a prompt may have ids
MOST_CONTAINERS = 1 << 14  # lists and objects of a body, which cost Python most
LARGE = 1 << 14  # bytes of a body that takes milliseconds
LAPS = 10  # of the event loop, in which a request such as /health is taken and answered
OPEN_PATHS = ("/health", *PATHS)  # for which no key is asked
NAMES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error", 500: "server_error", 503: "overloaded_error",
}  # fmt: skip


def error_response(
    code: int, message: str, param: str | None = None, name: str | None = None, **headers: str
) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse(error_body(code, message, param, name), code, headers or None)


def error_body(
    code: int, message: str, param: str | None = None, name: str | None = None
) -> dict[str, Any]:
    """What such a response says."""
    body = {"message": message, "type": NAMES.get(code, "invalid_request_error"), "param": param}
    return {"error": body | {"code": name}}


@lru_cache(maxsize=1024)
def network_of(address: str) -> str:
    """What one client may have of addresses: one, of IPv6 the 64 bits that a site is given."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address  # of a Unix socket, say
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


@dataclass(frozen=True)
class Client:
    """Who asks, as the server itself can tell: by key and address, not by what a request says."""

    turn: str  # by this clients take turns: the key if there are several, else the address
    cache: str  # requests of one share cached prompts: the key, without one the address


class Limits:
    """ASGI middleware. Who may not ask is told so before the body is read."""

    def __init__(
        self,
        app: Any,
        max_body: int,
        telemetry: Telemetry,
        api_keys: Sequence[str],
        hosts: Sequence[str],
    ) -> None:
        self.app, self.max_body, self.telemetry = app, max_body, telemetry
        self.api_keys, self.hosts = api_keys, hosts
        self._in_hand = 0  # bytes of bodies whose requests are not answered
        self._one_parsed = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # As without a slash at the end. A redirection would lose the body of many clients' POST.
        scope = scope | {"path": scope["path"].rstrip("/") or "/"}
        body = _Body(receive, self)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.telemetry.responded(scope["path"], message["status"])
            await send(message)

        headers = Headers(scope=scope)
        key = self._key(headers)
        address = network_of(scope["client"][0] if scope.get("client") else "")
        client = Client(
            address if key is None or len(self.api_keys) == 1 else key,
            address if key is None else key,
        )
        scope["state"] = scope.get("state", {}) | {"client": client}
        refused = self._refused(headers, scope["path"], key)
        try:
            await (refused or self.app)(scope, body.receive, counted)
        finally:
            self._in_hand -= body.size

    def takes(self, n: int) -> bool:
        """Whether there is room for n more bytes of a body, which then count."""
        if self._in_hand + n > BODIES * self.max_body:
            return False
        self._in_hand += n
        return True

    async def wait_to_parse(self, size: int) -> None:
        """Waits until a body of so many bytes may be parsed, which keeps all others waiting.

        It is one body at a time, and small requests are answered between two large ones.
        """
        async with self._one_parsed:
            for _ in range(LAPS if size > LARGE else 1):
                await asyncio.sleep(0)

    def _key(self, headers: Headers) -> str | None:
        """Which of the keys a request has, by its number."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        # Compared in constant time: how long a wrong key takes must not tell how wrong it is.
        found = [hmac.compare_digest(given.strip().encode(), k.encode()) for k in self.api_keys]
        return f"key {found.index(True)}" if any(found) else None

    def _refused(self, headers: Headers, path: str, key: str | None) -> JSONResponse | None:
        host = headers.get("host", "").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts and name not in self.hosts:
            # A page of the web may have its own name resolve to this machine (DNS rebinding).
            return error_response(
                403,
                f"the server answers as {', '.join(self.hosts)}, not as {name!r}; "
                "ask by such a name, or start it with --api-key",
            )
        if not self.api_keys or key is not None or path in OPEN_PATHS:
            return None
        return error_response(
            401,
            "the API key is missing or wrong; send Authorization: Bearer KEY",
            **{"WWW-Authenticate": "Bearer", "Connection": "close"},
        )


def excess(body: bytes) -> str | None:
    """What a body of JSON has too much of to be parsed, which is told at a small part of the cost.

    It has as many values as commas, and one more.
    """
    if body.count(b"[") + body.count(b"{") <= MOST_CONTAINERS and body.count(b",") < MOST_VALUES:
        return None
    if b"\0" not in body:  # as in UTF-16, which Python's parser takes too: texts count as well
        body = _without_texts(body)
    if body.count(b"[") + body.count(b"{") > MOST_CONTAINERS:
        return f"has more than {MOST_CONTAINERS} lists and objects"
    return f"has more than {MOST_VALUES} values" if body.count(b",") >= MOST_VALUES else None


def _without_texts(body: bytes) -> bytes:
    """What of JSON in UTF-8 is outside of quotation marks."""
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    letters = np.frombuffer(unescaped, np.uint8)
    return letters[~np.logical_xor.accumulate(letters == ord('"'))].tobytes()


class _Body:
    """The body of a request, which must not be too large, too slow or too much to parse."""

    def __init__(self, receive: Any, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self.size, self._whole = 0, False  # bytes, of which the limits know
        self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def receive(self) -> Any:
        """All of the body at once, as soon as it may be parsed.

        Raises HTTPException, which the application makes a response of.
        """
        if self._whole:  # waiting for the client to go away
            return await self._receive()
        parts: list[bytes] = []
        while not self._whole:
            message = await self._next()
            if message["type"] != "http.request":
                return message
            parts.append(message.get("body", b""))
            self._whole = not message.get("more_body", False)
        body = b"".join(parts)
        too_much = excess(body)
        if too_much is not None:
            raise HTTPException(400, f"the body {too_much}")
        await self._limits.wait_to_parse(len(body))
        return {"type": "http.request", "body": body, "more_body": False}

    async def _next(self) -> Any:
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(
                408, f"the body took more than {BODY_SECONDS:.0f} s", {"Connection": "close"}
            ) from error
        n, most = len(message.get("body", b"")), self._limits.max_body
        if self.size + n > most:
            raise HTTPException(
                413, f"the body has more than {most} bytes", {"Connection": "close"}
            )
        if not self._limits.takes(n):
            raise HTTPException(
                503,
                "the requests in hand take all the memory there is for them; try again later",
                {"Connection": "close", "Retry-After": "1"},
            )
        self.size += n
        return message
