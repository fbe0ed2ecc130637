"""The web page: a chat, beside the neurons that its tokens use. It asks no other server."""

import hashlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

_HERE = Path(__file__).parent
_TYPES = {"page.css": "text/css", "page.js": "text/javascript"}
PATHS = ("/", *(f"/{name}" for name in _TYPES))
# Scripts and styles are our own files, requests go here alone, and no other page frames this one.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_page(app: FastAPI) -> None:
    """The route `/` and those of its style and script, which need no key: see OPEN_PATHS."""
    html = (_HERE / "page.html").read_text(encoding="utf-8")
    for name, media_type in _TYPES.items():
        content = (_HERE / name).read_bytes()
        # Another content has another address, so that browsers need not ask for it again.
        html = html.replace(f'"{name}"', f'"{name}?{hashlib.sha256(content).hexdigest()[:16]}"')
        app.add_api_route(
            f"/{name}",
            _sends(content, media_type, "public, max-age=31536000, immutable"),
            include_in_schema=False,
        )
    app.add_api_route("/", _sends(html.encode(), "text/html", "no-cache"), include_in_schema=False)


def _sends(
    content: bytes, media_type: str, caching: str
) -> Callable[[], Coroutine[Any, Any, Response]]:
    headers = _HEADERS | {"Cache-Control": caching}

    async def send() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return send
