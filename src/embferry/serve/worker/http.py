"""The HTTP application of a worker: its own endpoints beside those that every worker has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from embferry.engine.errors import EngineError
from embferry.observe.metrics import CONTENT_TYPE
from embferry.protocol.errors import EmbeddingTransferError
from embferry.serve.http.errors import exception_handlers
from embferry.serve.worker.errors import as_serve_error, error_response
from embferry.serve.worker.service import Service


def worker_app(service: Service[Any, Any, Any], routes: Sequence[Route]) -> Starlette:
    """Returns an application with ``routes``, ``DELETE /rooms/{room}``, ``/health``, ``/ready`` and ``/metrics``."""

    def report(good: dict[str, object], bad: dict[str, object]) -> Response:
        if service.fault is None:
            return JSONResponse(good)
        reason = f"the worker has stopped by a bug: {service.fault!r}; restart it"
        return JSONResponse({**bad, "status": "broken", "reason": reason}, 503)

    async def abort(request: Request) -> Response:
        service.abort_room(request.path_params["room"])
        return Response(status_code=204)

    async def health(request: Request) -> Response:
        return report({"status": "ok"}, {})

    async def ready(request: Request) -> Response:
        return report({"ready": True, "load": service.load}, {"ready": False})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)

    common = [
        Route("/rooms/{room:int}", abort, methods=["DELETE"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]
    handlers = exception_handlers(error_response, as_serve_error, (EmbeddingTransferError, EngineError))
    return Starlette(routes=[*routes, *common], exception_handlers=handlers)
