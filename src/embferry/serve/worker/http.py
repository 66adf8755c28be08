"""HTTP around a service: the endpoints every worker has, bodies within a limit, errors in one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive

from embferry.engine.errors import EngineError
from embferry.observe.metrics import CONTENT_TYPE
from embferry.protocol.errors import EmbeddingTransferError
from embferry.serve.errors import ServeError
from embferry.serve.worker.errors import as_serve_error, error_response


class Service(Protocol):
    """What a worker does, apart from HTTP. All methods may be called from any thread."""

    @property
    def registry(self) -> CollectorRegistry: ...

    @property
    def load(self) -> float:
        """Requests in hand."""

    @property
    def fault(self) -> BaseException | None:
        """The bug that has stopped the service for good, if one has."""

    def abort_room(self, room: int) -> bool:
        """Ends what goes on in a room; False if nothing does. Idempotent."""

    def refuse(self) -> None:
        """Takes no new requests from here on: they are answered with 503."""

    def wait_idle(self, seconds: float) -> bool:
        """Waits until nothing is in hand; False if that took longer than ``seconds``."""

    def close(self) -> None:
        """Ends what is left with an error, every thread and the transfers. Idempotent."""


def worker_app(service: Service, routes: Sequence[Route]) -> Starlette:
    """``routes`` beside ``DELETE /rooms/{room}``, ``/health``, ``/ready`` and ``/metrics``."""

    async def abort(request: Request) -> Response:
        service.abort_room(request.path_params["room"])
        return Response(status_code=204)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"} if service.fault is None else _broken(service), _status(service))

    async def ready(request: Request) -> Response:
        body = {"ready": True, "load": service.load} if service.fault is None else {"ready": False, **_broken(service)}
        return JSONResponse(body, _status(service))

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE)

    common = [
        Route("/rooms/{room:int}", abort, methods=["DELETE"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]
    kinds = (ServeError, EmbeddingTransferError, EngineError, Exception)
    handlers: dict[Any, Any] = {HTTPException: _http_error} | dict.fromkeys(kinds, _refused)
    return Starlette(routes=[*routes, *common], exception_handlers=handlers)


def _status(service: Service) -> int:
    return 200 if service.fault is None else 503


def _broken(service: Service) -> dict[str, str]:
    return {"status": "broken", "reason": f"the worker has stopped by a bug: {service.fault!r}; restart it"}


async def _refused(request: Request, error: Exception) -> Response:
    return error_response(as_serve_error(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return error_response(ServeError(code, f"{request.method} {request.url.path}", status=error.status_code))


async def disconnected(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
