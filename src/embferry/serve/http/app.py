"""A router's application around its endpoints."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from embferry.serve.http.backends import Backends
from embferry.serve.http.chat import ChatEndpoint
from embferry.serve.http.digests import Digests
from embferry.serve.http.edge import Edge
from embferry.serve.http.errors import error_response, exception_handlers
from embferry.serve.http.proofs import Proofs
from embferry.serve.http.status import status_routes
from embferry.trust.proof_checker import ProofChecker
from embferry.trust.requests import ROUTER
from embferry.trust.trust import Trust

PARTS = "/ec/"
"""Paths for parts of this project, not for clients."""


def router_app(chat: ChatEndpoint[Any], routes: Sequence[Route] = ()) -> ASGIApp:
    """Returns the application. It watches the backends while its lifespan runs.

    Args:
        chat: the endpoint for chat completions.
        routes: endpoints beside that one and the status pages.
    """
    backends: Backends[Any] = chat.fleet
    routes = [Route("/v1/chat/completions", chat, methods=["POST"]), *status_routes(backends), *routes]

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
    api_key = backends.settings.router.api_key
    key = api_key.get_secret_value() if api_key else None
    # The edge is outside of Starlette, so that a 500 carries the request's id too.
    edge = Edge(app, backends.metrics.requests, frozenset(route.path for route in routes), key)
    digests, keys = Digests(edge, error_response, lambda path: path.startswith(PARTS)), Trust.of_environment().keys
    if keys is None:
        return digests
    return Proofs(digests, ProofChecker(keys, ROUTER, "the router"), lambda path: not path.startswith(PARTS))
