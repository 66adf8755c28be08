"""The HTTP application of a worker: its own endpoints beside those that every worker has."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.engine.errors import EngineError
from embferry.observe.metrics import CONTENT_TYPE
from embferry.protocol.errors import EmbeddingTransferError
from embferry.serve.byte_budget import Hold
from embferry.serve.errors import ServeError
from embferry.serve.http.body import Pace, read_body
from embferry.serve.http.digests import Digests
from embferry.serve.http.disconnect import run_until_disconnect
from embferry.serve.http.errors import exception_handlers, retry_after
from embferry.serve.http.exact_paths import exact_paths_app
from embferry.serve.http.heads import UnambiguousHeads
from embferry.serve.http.proofs import line_writer
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.worker.errors import as_serve_error, decoded, error_response
from embferry.serve.worker.service import Service
from embferry.trust.digests import LINES, LineWriter

T = TypeVar("T")

EMBEDDINGS = "/embeddings/"
MAX_ROOM_DIGITS = 19
"""Digits of the largest room, 2⁶³ - 1."""
PING_SECONDS = 1.0
"""Seconds between two signs of life at most, so that the router can tell a slow worker from a stalled one."""


async def response_with_signs_of_life(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Returns the response of ``work``, or, if that takes long, one that begins at once with signs of life.

    Such a response consists of checked lines (:mod:`embferry.trust.digests`). Its status is 200 even if ``work`` fails;
    the JSON in its last line then holds the error with its status. All other lines are empty. ``work`` may still be
    reading the request.
    """
    working = asyncio.create_task(work)
    try:
        done, _ = await asyncio.wait({working}, timeout=PING_SECONDS)
    except asyncio.CancelledError:
        working.cancel()
        raise
    return working.result() if done else _SignsOfLife(working, line_writer(request.scope))


class _SignsOfLife(Response):
    media_type = LINES

    def __init__(self, working: asyncio.Task[Response], lines: LineWriter) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._working, self._lines = working, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while not self._working.done():
                await send({"type": "http.response.body", "body": self._lines.line(), "more_body": True})
                await asyncio.wait({self._working}, timeout=PING_SECONDS)
            try:
                response = self._working.result()
            except Exception as error:  # noqa: BLE001 - the status has been sent, so the body tells
                response = error_response(as_serve_error(error))
            last = self._lines.line(bytes(response.body))
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self._working.cancel()


async def read_request(
    decoder: msgspec.json.Decoder[T] | msgspec.msgpack.Decoder[T],
    scope: Scope,
    receive: Receive,
    max_bytes: int,
    hold: Hold,
    pace: Pace,
) -> T | None:
    """Reads and decodes the request of another part.

    Args:
        decoder: of the body.
        scope: the request's.
        receive: the request's.
        max_bytes: bytes of the body.
        hold: grows with the body.
        pace: how fast the body must arrive.

    Returns:
        The request; None if the caller left before it was decoded.

    Raises:
        ServeError: those of :func:`.read_body` and :func:`.decoded`.
    """
    body = await read_body(scope, receive, max_bytes, hold, pace=pace, between_parts=True)
    if body is None:
        return None
    return await run_until_disconnect(off_loop(JSON_WEIGHT * len(body), decoded, decoder, body), receive)


def worker_app(service: Service[Any, Any, Any], routes: Sequence[Route], *, behind_router: bool = True) -> ASGIApp:
    """Returns an application with ``routes``, ``DELETE /rooms/{room}``, ``/health``, ``/ready`` and ``/metrics``.

    Args:
        service: the worker.
        routes: its own endpoints.
        behind_router: requests come from our router, so they must have digests; but those to ``/embeddings/`` need
            none, since any HTTP client may send them.
    """

    def report(good: dict[str, object], bad: dict[str, object], trouble: str | None = None) -> Response:
        if service.fault is None and trouble is None:
            return JSONResponse(good)
        status, reason = "unfit", trouble
        if service.fault is not None:
            status, reason = "broken", f"the worker has stopped by a bug: {service.fault!r}; restart it"
        return JSONResponse({**bad, "status": status, "reason": reason}, 503, retry_after(503))

    async def abort(request: Request) -> Response:
        number = request.path_params["room"]
        if len(number) > MAX_ROOM_DIGITS or not (number.isascii() and number.isdigit()):
            raise ServeError("not_found", "a room has a number of at most 19 digits")
        service.abort_room(int(number))
        return Response(status_code=204)

    async def health(request: Request) -> Response:
        return report({"status": "ok"}, {})

    async def ready(request: Request) -> Response:
        trouble = None if service.fault is not None else await service.unready()
        return report({"ready": True, "load": service.load}, {"ready": False}, trouble)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)

    common = [
        Route("/rooms/{room}", abort, methods=["DELETE"]),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
    ]
    handlers = exception_handlers(error_response, as_serve_error, (EmbeddingTransferError, EngineError))
    app = exact_paths_app(routes=[*routes, *common], exception_handlers=handlers)
    digests = Digests(
        app, error_response, lambda path: behind_router and not path.startswith(EMBEDDINGS), streams=(EMBEDDINGS,)
    )
    return UnambiguousHeads(digests, error_response)
