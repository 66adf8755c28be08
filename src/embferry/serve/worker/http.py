"""The HTTP application of a worker: its own endpoints beside those that every worker has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from embferry.engine.errors import EngineError
from embferry.observe.metrics import CONTENT_TYPE
from embferry.protocol.errors import EmbeddingTransferError
from embferry.serve.http.errors import exception_handlers
from embferry.serve.worker.errors import as_serve_error, error_response


class Service(Protocol):
    """The work of a worker, without HTTP. Every method may be called from any thread."""

    @property
    def registry(self) -> CollectorRegistry:
        """The worker's metrics."""

    @property
    def load(self) -> float:
        """Number of requests that have begun and not ended."""

    @property
    def fault(self) -> BaseException | None:
        """The bug that has stopped the service for good; None while it works."""

    def abort_room(self, room: int) -> bool:
        """Ends the work for a room; returns false if there is none. Idempotent."""

    def refuse(self) -> None:
        """Makes the service refuse every new request with status 503."""

    def wait_idle(self, seconds: float) -> bool:
        """Waits until no request is left; returns false if that takes longer than ``seconds``."""

    def close(self) -> None:
        """Ends the remaining requests with an error, all threads and the transfers. Idempotent."""


def worker_app(service: Service, routes: Sequence[Route]) -> Starlette:
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
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE)

    common = [
        Route("/rooms/{room:int}", abort, methods=["DELETE"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]
    handlers = exception_handlers(error_response, as_serve_error, (EmbeddingTransferError, EngineError))
    return Starlette(routes=[*routes, *common], exception_handlers=handlers)
