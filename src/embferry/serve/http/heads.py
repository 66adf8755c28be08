"""Requests with an ambiguous head are refused, and their connections end (RFC 9112, 6.3)."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.serve.errors import ServeError
from embferry.trust.ambiguity import ambiguity_of


class UnambiguousHeads:
    """ASGI middleware.

    Args:
        app: the application behind.
        respond: makes the response to an ambiguous request.
    """

    def __init__(self, app: ASGIApp, respond: Callable[[ServeError], Response]) -> None:
        self._app, self._respond = app, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (why := ambiguity_of(name for name, _ in scope["headers"])):
            app = self._respond(ServeError("invalid_request", why))
            app.headers["connection"] = "close"
        await app(scope, receive, send)
