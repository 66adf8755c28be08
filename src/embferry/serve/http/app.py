"""A router's application around its endpoints."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.serve.http.api_keys import ApiKeys
from embferry.serve.http.backends import Backends
from embferry.serve.http.chat import ChatEndpoint
from embferry.serve.http.clients import Clients
from embferry.serve.http.digests import Digests
from embferry.serve.http.edge import Edge
from embferry.serve.http.errors import error_response, exception_handlers
from embferry.serve.http.exact_paths import exact_paths_app
from embferry.serve.http.fleet_pages import fleet_routes
from embferry.serve.http.proofs import Proofs
from embferry.serve.http.status import status_routes
from embferry.serve.http.unproved import Unproved, rates_of
from embferry.serve.http.watching import Watching
from embferry.serve.openai.ignored import HEADER
from embferry.serve.page import FOLDER, page_routes
from embferry.trust.proof_checker import ProofChecker
from embferry.trust.requests import ROUTER
from embferry.trust.trust import Trust

PARTS = "/ec/"
"""Paths for parts of this project, not for clients."""


class RouterApp:
    """The ASGI application of a router.

    Attributes:
        own_addresses: IP addresses of backends, for whose connections the server keeps room.
        stop: to be called before connections are closed: ends what has no end of its own.
    """

    def __init__(self, app: ASGIApp, own_addresses: Collection[str], stop: Callable[[], Awaitable[None]]) -> None:
        self._app, self.own_addresses, self.stop = app, own_addresses, stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def router_app(
    backends: Backends[Any], endpoints: Mapping[str, ChatEndpoint[Any]], routes: Sequence[Route] = ()
) -> RouterApp:
    """Returns the application. It watches the backends while its lifespan runs.

    Args:
        backends: those of the endpoints.
        endpoints: what clients may post to, by path.
        routes: others beside these and the status pages.

    Raises:
        ApiKeysError: ``router.api_keys_file`` cannot be used.
    """
    watching = Watching(backends)
    posts = [Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()]
    pages = [*status_routes(backends), *fleet_routes(backends), *watching.routes, *page_routes()]
    routes = [*posts, *pages, *routes]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        probing = asyncio.create_task(backends.watch())
        try:
            yield
        finally:
            probing.cancel()
            await watching.end()
            await asyncio.wait({probing})
            for endpoint in endpoints.values():
                await endpoint.drain()
            await backends.close()

    public = [route for route in routes if not route.path.startswith((PARTS, FOLDER))]
    handlers = exception_handlers(error_response, paths=sorted(map(_described, public)))
    app = exact_paths_app(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    router = backends.settings.router
    keys = ApiKeys(router.api_keys_file, router.api_key.get_secret_value() if router.api_key else None)
    clients = Clients(keys, router, backends.metrics)
    # The edge is outside of Starlette, so that a 500 carries the request's id too.
    paths = frozenset(route.path for route in routes)
    rates = rates_of(backends.settings.security)
    others = Unproved(app, rates, "the router", error_response, backends.metrics)
    edge = _for_pages(Edge(app, backends.metrics.requests, paths, clients, others), router.cors_origins)
    outer: ASGIApp = Digests(edge, error_response, lambda path: path.startswith(PARTS))
    if (cluster_keys := Trust.of_environment().keys) is not None:
        checker = ProofChecker(cluster_keys, ROUTER, "the router")
        outer = Proofs(outer, checker, lambda path: not path.startswith(PARTS))
    return RouterApp(outer, backends.own_addresses, watching.end)


def _for_pages(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Returns an application that web pages of these origins may ask from a browser (CORS).

    A browser asks first, without an API key, so this is in front of what checks them.
    """
    if not origins:
        return app
    methods, exposed = ("GET", "POST"), (HEADER, "X-Request-Id", "X-Should-Retry", "Retry-After")
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=methods, allow_headers=("*",), expose_headers=exposed
    )


def _described(route: Route) -> str:
    """Returns a path with its method, as errors name it."""
    method = "POST" if "POST" in (route.methods or ()) else "GET"
    return f"{method} {route.path.replace('{name:path}', 'NAME')}"
