"""The router before vLLM as a Starlette application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from embferry import __version__
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher
from embferry.serve.router.edge import Edge
from embferry.serve.vllm.chat import Chat, error_response
from embferry.serve.vllm.connectors import CONNECTORS
from embferry.serve.vllm.encoding import Encoding
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.metrics import VllmRouterMetrics
from embferry.serve.vllm.repeats import Repeats
from embferry.serve.vllm.transfers import Transfers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
KEEPALIVE_SECONDS = 2.0
"""Less than the 5 s after which vLLM closes an idle connection: nothing is written to one that is just being closed."""


def build(settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> ASGIApp:
    """The application. It probes the instances while its lifespan runs. ``transport``: instead of the network."""
    metrics = VllmRouterMetrics()
    # Answers take as long as they take: ``router.request_timeout`` ends them, not a pause between two tokens.
    timeout = httpx.Timeout(None, connect=settings.router.connect_timeout)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEPALIVE_SECONDS)
    certificates = httpx.create_ssl_context(trust_env=False)  # slow to read, so once for both clients
    client = httpx.AsyncClient(
        trust_env=False, timeout=timeout, limits=limits, verify=certificates, transport=transport
    )
    fleet = Fleet(settings, client, metrics)
    fetcher = Fetcher(settings.media, certificates)
    connector = CONNECTORS[settings.vllm.connector]()
    encoding = Encoding(settings, fleet, client, metrics, connector)
    transfers = Transfers(encoding, settings.vllm.replacements_per_item, metrics)
    repeats = Repeats(encoding, settings.vllm.received_bytes if settings.vllm.connector == "embferry" else 0)
    chat = Chat(settings, fleet, client, fetcher, metrics, connector, encoding, transfers, repeats)
    status = _Status(fleet, metrics)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", status.models),
        Route("/v1/models/{name:path}", status.model),
        Route("/health", status.health),
        Route("/ready", status.ready),
        Route("/metrics", status.metrics),
        Route("/version", status.version),
        Route("/ec/replacements/{token}", transfers.replace, methods=["POST"]),
        Route("/ec/failures/{token}", transfers.fail, methods=["POST"]),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(fleet.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})
            await fetcher.close()
            await client.aclose()

    key = settings.router.api_key.get_secret_value() if settings.router.api_key else None
    handlers: dict[Any, Any] = {ServeError: _refused, HTTPException: _http_error, Exception: _unexpected}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    # Around all of it, so that a 500 has its id too.
    return Edge(app, metrics.requests, frozenset(route.path for route in routes), key)


class _Status:
    """The endpoints that tell something about the router itself."""

    def __init__(self, fleet: Fleet, metrics: VllmRouterMetrics) -> None:
        self._fleet = fleet
        self._metrics = metrics

    async def models(self, request: Request) -> Response:
        """What instances of both roles serve, as those that answer describe it."""
        return JSONResponse({"object": "list", "data": list(self._fleet.models().values())})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if (model := self._fleet.models().get(name)) is None:
            raise ServeError("model_not_found", f"the model {name!r} is not served here", param="model")
        return JSONResponse(model)

    async def health(self, request: Request) -> Response:
        """The process is alive and its event loop turns."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether a request with a picture would find its instances."""
        missing = self._fleet.missing()
        body = {"ready": not missing, "missing": missing, "workers": self._fleet.counts()}
        return JSONResponse(body, 503 if missing else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})


async def _refused(request: Request, error: ServeError) -> Response:
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = error_response(ServeError(code, message, status=error.status_code))
    response.headers.update(error.headers or {})
    return response


async def _unexpected(request: Request, error: Exception) -> Response:
    """The traceback goes to the log (uvicorn writes it), never to the client."""
    return error_response(ServeError("internal_error", "something went wrong here; the log has the details"))
