"""The encode worker's HTTP endpoints."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from embferry.observe.logs import about
from embferry.serve.encode import wire
from embferry.serve.encode.embeddings import Embeddings
from embferry.serve.encode.service import EncodeService
from embferry.serve.http.body import read_body
from embferry.serve.worker.http import worker_app

log = logging.getLogger(__name__)

DECODERS = 2
"""Requests decoded at the same time: a long video does not hold the pictures up."""
ENVELOPE_BYTES = 1 << 20
"""What a request may have beside its media."""


def build(service: EncodeService) -> Starlette:
    """The application."""
    decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
    most = service.settings.media.max_total_bytes + ENVELOPE_BYTES

    async def encode(request: Request) -> Response:
        """Answered when length and content are known, before the vision encoder runs."""
        body = await read_body(request.receive, most)
        if body is None:
            return Response(status_code=499)
        asked = wire.parse(body)
        with about(request_id=asked.request_id, room=asked.room):
            room = service.admit(asked)
            try:
                loop = asyncio.get_running_loop()
                items = await loop.run_in_executor(decoders, service.prepare, asked)
                service.announce(room, items)
            except BaseException:
                service.forget(room)
                raise
            log.info("announced", extra={"tokens": room.total_tokens, "items": len(items)})
            return JSONResponse(wire.answer(room.number, service.manager.endpoint, items))

    routes = [Route("/encode", encode, methods=["POST"]), Route("/embeddings/{room}", Embeddings(service))]
    return worker_app(service, routes)
