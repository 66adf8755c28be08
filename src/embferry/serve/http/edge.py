"""The outermost layer of a router: an id for every request, the limits of its client, and a line in the access log."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embferry.observe.logs import about
from embferry.protocol.text import printable
from embferry.serve.errors import ServeError
from embferry.serve.http.clients import Clients
from embferry.serve.http.connections import caller_of
from embferry.serve.http.disconnect import before_end
from embferry.serve.http.errors import error_response
from embferry.serve.http.heads import UnambiguousHeads
from embferry.trust.occasions import Occasions

log = logging.getLogger(__name__)

CLIENT_LEFT_STATUS = 499
"""Logged when the client leaves before the response begins."""
LIMITED = ("/v1/", "/tokenize", "/detokenize", "/workers", "/sd", "/debug/", "/activity")
"""The beginnings of paths whose clients are limited, and need an API key where there are some."""
MAX_PATH = 80
"""Characters of a path in a line on a terminal."""
_ACCEPTABLE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_POLLED = frozenset({"/health", "/ready", "/metrics", "/sd", "/activity"})
"""Paths that monitoring asks every few seconds; logged at debug level."""


class Edge:
    """ASGI middleware.

    Sets ``scope["state"]["request_id"]`` to the client's ``X-Request-Id``, or to a new id if the client sent none or an
    unacceptable one. Logs one line at the end of the request, before the last part of the response goes out: its client
    and its outcome, with what the application has added to ``scope["state"]["facts"]``. An overload
    makes refusals with 503 by the thousand: one a minute is logged, with the number ``more`` of refusals since the last
    line.

    Args:
        app: the application behind.
        requests: counts requests by path and status.
        paths: the values that the path label may have; every other path counts as "other".
        clients: whose requests for paths of LIMITED are limited.
        others: the same application for requests for other paths, with limits of its own.
    """

    def __init__(
        self, app: ASGIApp, requests: Counter, paths: frozenset[str], clients: Clients, others: ASGIApp
    ) -> None:
        self._app, self._others = app, others
        self._unambiguous = UnambiguousHeads(self._limited, error_response)
        self._requests = requests
        self._paths = paths
        self._clients = clients
        self._refusals = Occasions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), CLIENT_LEFT_STATUS

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with about(request_id=request_id), contextlib.ExitStack() as ending:
            ending.callback(lambda: self._note(scope, status, started))
            await self._unambiguous(scope, receive, before_end(send_with_id, ending.close))

    def _note(self, scope: Scope, status: int, started: float) -> None:
        """Counts a request that has ended, and logs its line."""
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._requests.labels(path, status).inc()
        facts: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "status": status}
        facts["seconds"] = round(time.monotonic() - started, 3)
        facts["client"] = scope["state"].get("client") or f"address {caller_of(scope)}"
        facts |= scope["state"].get("facts", {})
        is_told = path not in _POLLED
        if is_told and status == 503:
            count = self._refusals.count("503")
            is_told = count is not None
            facts |= {"more": count} if count else {}
        log.log(logging.INFO if is_told else logging.DEBUG, "request", extra=facts | {"short": _short(facts)})

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request within its client's limits."""
        if not scope["path"].startswith(LIMITED):
            await self._others(scope, receive, send)
            return
        with contextlib.ExitStack() as held:
            try:
                client = held.enter_context(self._clients.request(scope))
            except ServeError as error:
                response = error_response(error)
                if error.http_status == 401:
                    response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
            await self._app(scope, self._clients.counted(client, receive), before_end(send, held.close))


def _short(facts: Mapping[str, Any]) -> str:
    """Returns what a person who watches a terminal needs to know of a request."""
    text = f"{facts['method']} {printable(facts['path'], MAX_PATH)}: {facts['status']} in {facts['seconds']} s"
    told = [str(facts.get("error") or ("client left" if facts.get("outcome") == "client left" else ""))]
    told += [f"ignored: {facts['ignored']}"] if "ignored" in facts else []
    told += [f"{facts['more']} more such requests"] if "more" in facts else []
    return "; ".join([text, *filter(None, told)])
