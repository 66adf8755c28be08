"""A router's application around its endpoints."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.serve.http.api_keys import ApiKeys
from embferry.serve.http.backends import Backends
from embferry.serve.http.chat import ChatEndpoint
from embferry.serve.http.clients import Clients
from embferry.serve.http.digests import Digests
from embferry.serve.http.edge import Edge
from embferry.serve.http.errors import error_response, exception_handlers
from embferry.serve.http.fleet_pages import fleet_routes
from embferry.serve.http.proofs import Proofs
from embferry.serve.http.status import status_routes
from embferry.trust.proof_checker import ProofChecker
from embferry.trust.requests import ROUTER
from embferry.trust.trust import Trust

PARTS = "/ec/"
"""Paths for parts of this project, not for clients."""


class RouterApp:
    """The ASGI application of a router.

    Attributes:
        own_addresses: IP addresses of backends, for whose connections the server keeps room.
    """

    def __init__(self, app: ASGIApp, own_addresses: Collection[str]) -> None:
        self._app, self.own_addresses = app, own_addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def router_app(chat: ChatEndpoint[Any], routes: Sequence[Route] = ()) -> RouterApp:
    """Returns the application. It watches the backends while its lifespan runs.

    Args:
        chat: the endpoint for chat completions.
        routes: endpoints beside that one and the status pages.

    Raises:
        ApiKeysError: ``router.api_keys_file`` cannot be used.
    """
    backends: Backends[Any] = chat.fleet
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        *status_routes(backends),
        *fleet_routes(backends),
        *routes,
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(backends.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await chat.drain()
            await backends.close()

    handlers = exception_handlers(error_response)
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    router = backends.settings.router
    keys = ApiKeys(router.api_keys_file, router.api_key.get_secret_value() if router.api_key else None)
    clients = Clients(keys, router, backends.metrics)
    # The edge is outside of Starlette, so that a 500 carries the request's id too.
    paths = frozenset(route.path for route in routes)
    edge = Edge(app, backends.metrics.requests, paths, clients)
    outer: ASGIApp = Digests(edge, error_response, lambda path: path.startswith(PARTS))
    if (cluster_keys := Trust.of_environment().keys) is not None:
        checker = ProofChecker(cluster_keys, ROUTER, "the router")
        outer = Proofs(outer, checker, lambda path: not path.startswith(PARTS))
    return RouterApp(outer, backends.own_addresses)
