"""A router's application around its endpoints, and its client for the backends."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import httpx
from prometheus_client import Counter
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from embferry.serve.config import RouterSettings
from embferry.serve.http.edge import Edge
from embferry.serve.http.errors import error_response, exception_handlers

KEEPALIVE_CONNECTIONS = 64


def backend_client(
    settings: RouterSettings,
    certificates: ssl.SSLContext,
    *,
    keepalive_seconds: float = 5.0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> httpx.AsyncClient:
    """Returns the client for workers or instances.

    It has no read time-out: ``router.request_timeout`` ends a long answer, a pause between two tokens does not.

    Args:
        settings: for ``connect_timeout``.
        certificates: slow to load, so shared with the fetcher.
        keepalive_seconds: seconds until an idle connection is closed.
        transport: replaces the network in tests.
    """
    limits = httpx.Limits(max_keepalive_connections=KEEPALIVE_CONNECTIONS, keepalive_expiry=keepalive_seconds)
    timeout = httpx.Timeout(None, connect=settings.connect_timeout)
    return httpx.AsyncClient(trust_env=False, timeout=timeout, limits=limits, verify=certificates, transport=transport)


def router_app(
    routes: Sequence[Route],
    settings: RouterSettings,
    requests: Counter,
    watch: Callable[[], Coroutine[Any, Any, None]],
    close: Callable[[], Awaitable[None]],
    *,
    retry_after: bool = False,
) -> ASGIApp:
    """Returns the application.

    Args:
        routes: all endpoints.
        settings: for ``api_key``.
        requests: counts requests by path and status.
        watch: runs while the application's lifespan does, and is cancelled at its end.
        close: runs after ``watch`` has ended.
        retry_after: error responses with status 503 have Retry-After.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await close()

    handlers = exception_handlers(partial(error_response, retry_after=retry_after))
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    # The edge is outside of Starlette, so that a 500 carries the request's id too.
    return Edge(app, requests, frozenset(route.path for route in routes), key)
