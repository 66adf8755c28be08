"""``embferry encode``: the process of an encode worker, and its HTTP endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive

from embferry.cache.contract import Store
from embferry.engine.encoder import Encoder
from embferry.models import model_path
from embferry.observe.logs import about
from embferry.protocol.layout import Layout
from embferry.serve.config import Settings
from embferry.serve.encode import messages
from embferry.serve.encode.embedding_resource import EmbeddingResource
from embferry.serve.encode.messages import EncodeRequest
from embferry.serve.encode.room import Room
from embferry.serve.encode.service import EncodeService
from embferry.serve.encode.shared_cache import open_store
from embferry.serve.http.address import address_of
from embferry.serve.http.body import Pace, announced_bytes
from embferry.serve.http.connections import caller_of
from embferry.serve.http.descriptors import raise_open_file_limit
from embferry.serve.http.disconnect import wait_for_disconnect
from embferry.serve.http.serving import Report, unreported
from embferry.serve.worker.http import read_request, response_with_signs_of_life, worker_app
from embferry.serve.worker.metrics import count_connections
from embferry.serve.worker.process import open_port, serve_worker
from embferry.serve.worker.transfer_settings import DTYPES, control_limits, encode_timeouts
from embferry.serve.worker.transports import make_transports
from embferry.transfer.control.sockets import SocketControl
from embferry.transfer.runtime import ThreadRuntime
from embferry.transfer.send_manager import SendManager
from embferry.transports.contract import Transport

log = logging.getLogger(__name__)

ENVELOPE_BYTES = 1 << 20
"""Bytes that a request body may have beside its media."""


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the vision tower and serves until SIGINT or SIGTERM.

    Args:
        settings: settings of the deployment.
        report: called once, when the worker accepts requests.
    """
    raise_open_file_limit()
    listener = open_port(settings, settings.encode.port, settings.place("encode", "port"))
    transports, store = make_transports(settings), open_store(settings)  # before the model: bad ones fail at once
    log.info("loading the vision encoder from %s", model_path(settings.model))
    encoder = Encoder.load(model_path(settings.model), DTYPES[settings.dtype], threads=settings.threads)
    service = service_of(encoder, settings, transports, store)
    serve_worker(build(service), service, listener, settings, "encode", service.manager.endpoint, report)


def service_of(
    encoder: Encoder, settings: Settings, transports: list[Transport], store: Store | None = None
) -> EncodeService:
    """Returns a running service. The caller closes it."""
    host, advertise = address_of(settings.host), address_of(settings.reachable_host)
    control = partial(SocketControl, host=host, advertise=advertise, limits=control_limits(settings))
    runtime = ThreadRuntime("embferry-send", control)
    manager = SendManager(Layout(encoder.fields), transports, settings=encode_timeouts(settings), runtime=runtime)
    service = EncodeService(encoder, manager, settings, store)
    count_connections(service.metrics, transports)
    return service


def build(service: EncodeService) -> ASGIApp:
    """Returns the application."""
    max_bytes = service.settings.media.max_total_bytes + ENVELOPE_BYTES

    async def encode(request: Request) -> Response:
        """Responds when length and digest of the embedding are known, before the vision encoder runs."""
        return await response_with_signs_of_life(request, admit(request))

    async def admit(request: Request) -> Response:
        hold = service.budget.hold()
        try:
            pace, scope, receive = Pace.of(service.settings.router), request.scope, request.receive
            await service.check_fit()
            service.expect(announced_bytes(scope), caller_of(scope))
            encode_request = await read_request(messages.DECODER, scope, receive, max_bytes, hold, pace)
            if encode_request is None:
                hold.release()
                return Response(status_code=499)
            with about(request_id=encode_request.request_id, room=encode_request.room):
                room = service.admit(encode_request, hold, caller_of(scope), service.call_in(scope["headers"]))
        except BaseException:
            hold.release()
            raise
        return await announce(encode_request, room, request.receive)

    async def announce(request: EncodeRequest, room: Room, receive: Receive) -> Response:
        with about(request_id=request.request_id, room=room.number), _watched(receive, room, service):
            try:
                items = await service.prepare_all(request, room)
                service.announce(room, items)
            except BaseException:
                service.drop(room)
                raise
            log.debug("announced", extra={"tokens": room.total_tokens, "items": len(items)})
            return JSONResponse(messages.response(room.number, service.manager.endpoint, items))

    routes = [Route("/encode", encode, methods=["POST"]), Route("/embeddings/{room}", EmbeddingResource(service))]
    return worker_app(service, routes)


@contextlib.contextmanager
def _watched(receive: Receive, room: Room, service: EncodeService) -> Iterator[None]:
    """Aborts the room if the caller leaves while the context lasts: no other part can abort it yet."""

    def left(watching: asyncio.Task[None]) -> None:
        if not watching.cancelled():
            log.info("the caller left")
            service.abort_room(room.number)

    watching = asyncio.create_task(wait_for_disconnect(receive))
    watching.add_done_callback(left)
    try:
        yield
    finally:
        watching.cancel()
