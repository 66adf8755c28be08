"""The journal of a router over HTTP: ``GET /activity`` once, ``GET /activity/stream`` as server-sent events.

It costs nothing without readers. Pools are asked only while there are some, at most once a second for all together.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from embferry import __version__
from embferry.serve.errors import ServeError
from embferry.serve.http.backends import Backends
from embferry.serve.http.disconnect import run_until_disconnect
from embferry.serve.http.journal import NEVER

ACTIVITY, STREAM = "/activity", "/activity/stream"
MAX_WATCHERS = 32
"""Streams at a time."""
TICK = 0.25
"""Seconds between two events of a stream, at least."""
HEARTBEAT = 10.0
"""Seconds without an event after which a stream has a comment, so that proxies keep it open."""
POOL_SECONDS = 1.0
"""Seconds between two questions for the pools, at least."""
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on at once
]


class Watching:
    """The readers of the journal of a router.

    Args:
        backends: the workers or instances, with the journal.
        clock: monotonic seconds.
    """

    def __init__(self, backends: Backends[Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._backends, self._clock = backends, clock
        self._watchers = 0
        self._ending = asyncio.Event()
        self._pools: list[dict[str, Any]] | None = None
        self._pools_asked: float | None = None
        self._asking = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    @property
    def routes(self) -> list[Route]:
        """The routes of both paths."""
        return [Route(ACTIVITY, self._activity), Route(STREAM, _Stream(self), methods=["GET"])]

    async def end(self) -> None:
        """Ends all streams, now and later."""
        self._ending.set()

    async def _activity(self, request: Request) -> Response:
        await self._refresh_pools()
        return JSONResponse(self._told(NEVER), headers={"cache-control": "no-store"})

    async def watch(self, receive: Receive, send: Send) -> None:
        """Sends events until the client leaves or :meth:`end` is called.

        Raises:
            ServeError: capacity_exhausted; as many as may watch do.
        """
        if self._watchers >= MAX_WATCHERS:
            why = f"{self._watchers} clients watch this router, as many as may; close a page, or ask {ACTIVITY}"
            raise ServeError("capacity_exhausted", why, status=503)
        self._watchers += 1
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._keep_pools())
        try:
            await run_until_disconnect(self._send_events(send), receive)
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._refreshing.cancel()
                self._refreshing = None

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        version, surroundings, sent_at = NEVER, None, self._clock()
        while not self._ending.is_set():
            now = self._surroundings()
            if self._backends.journal.version != version or now != surroundings:
                told = self._told(version) | {"first": version == NEVER}
                version, surroundings = told["version"], now
                data = b"data: " + msgspec.json.encode(told) + b"\n\n"
            else:
                data = b": nothing new\n\n" if self._clock() - sent_at >= HEARTBEAT else b""
            if data:
                sent_at = self._clock()
                await send({"type": "http.response.body", "body": data, "more_body": True})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), TICK)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _told(self, version: int) -> dict[str, Any]:
        return {
            **self._backends.journal.since(version),
            **self._surroundings(),
            "router": __version__,
            "engine": self._backends.settings.router.engine,
            "totals": self._backends.metrics.totals(),
        }

    def _surroundings(self) -> dict[str, Any]:
        """Returns the state beside the journal."""
        workers = [asdict(worker) for worker in self._backends.known()]
        return {"workers": workers, "pools": self._pools, "missing": self._backends.missing()}

    async def _keep_pools(self) -> None:
        while True:
            await self._refresh_pools()
            await asyncio.sleep(POOL_SECONDS)

    async def _refresh_pools(self) -> None:
        """Asks for the pools, unless that was done within the last second."""
        async with self._asking:
            if self._pools_asked is None or self._clock() - self._pools_asked >= POOL_SECONDS:
                try:
                    self._pools = await self._backends.pools()
                except ServeError:  # instances of vLLM have none
                    self._pools = None
                self._pools_asked = self._clock()


class _Stream:
    """The ASGI endpoint of the stream: it has to notice that the client leaves."""

    def __init__(self, watching: Watching) -> None:
        self._watching = watching

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await Response(headers={name.decode(): value.decode() for name, value in _HEADERS})(scope, receive, send)
            return
        await self._watching.watch(receive, send)
