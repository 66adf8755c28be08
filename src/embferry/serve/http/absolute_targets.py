"""Requests that name their target by a whole URL, as clients do that are set up for a proxy (RFC 9112, 3.2.2)."""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

_ORIGIN = re.compile(rb"https?://[^/]+", re.IGNORECASE)


class AbsoluteTargets:
    """ASGI middleware: gives the application the path of a URL. The host in it is ignored, as that of ``Host`` is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw: bytes = scope.get("raw_path") or b""
        if origin := _ORIGIN.match(raw):
            path = raw[origin.end() :] or b"/"
            scope = {**scope, "raw_path": path, "path": unquote(path.decode("latin-1"))}
        await self._app(scope, receive, send)
