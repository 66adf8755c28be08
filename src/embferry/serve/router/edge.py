"""The outermost layer: an id for every request, the key, the size of the body, and a line in the log."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embferry.observe.logs import about
from embferry.serve.errors import ServeError

log = logging.getLogger(__name__)

_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines; logged at debug level."""


class Edge:
    """ASGI middleware. ``scope["state"]["request_id"]`` is the client's ``X-Request-Id`` if it gave a sane one.

    Args:
        requests: counted by path and status.
    """

    def __init__(self, app: ASGIApp, requests: Counter, paths: frozenset[str], api_key: str | None) -> None:
        self._app = app
        self._requests = requests
        self._paths = paths
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 499  # what is logged if the client leaves before an answer

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with about(request_id=request_id):
            try:
                if scope["path"].startswith("/v1/") and not self._key_fits(headers):
                    await _answer_plainly(ServeError("invalid_api_key", "the API key is missing or wrong"), marked)
                else:
                    await self._app(scope, receive, marked)
            finally:
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._requests.labels(path, status).inc()
                facts = {"method": scope["method"], "path": scope["path"], "status": status}
                facts["seconds"] = round(time.monotonic() - started, 3)
                log.log(logging.DEBUG if path in _QUIET else logging.INFO, "request", extra=facts)

    def _key_fits(self, headers: Headers) -> bool:
        if self._api_key is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._api_key.encode())


async def _answer_plainly(error: ServeError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
