"""``embferry language``: the process of a language worker, and its HTTP endpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.engine.language import LanguageModel
from embferry.models import model_path
from embferry.observe.logs import about
from embferry.protocol.layout import Geometry, Layout
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.http.body import Pace
from embferry.serve.http.descriptors import raise_open_file_limit
from embferry.serve.http.disconnect import run_until_disconnect
from embferry.serve.http.proofs import line_writer
from embferry.serve.http.serving import Report, unreported
from embferry.serve.language import messages
from embferry.serve.language.job import ACCEPTED, Event
from embferry.serve.language.prompting import LONG_CHARACTERS
from embferry.serve.language.service import LanguageService
from embferry.serve.off_loop import off_loop
from embferry.serve.worker.errors import as_serve_error
from embferry.serve.worker.http import PING_SECONDS, read_request, response_with_signs_of_life, worker_app
from embferry.serve.worker.metrics import count_connections
from embferry.serve.worker.process import open_port, serve_worker
from embferry.serve.worker.transfer_settings import DTYPES, control_limits, language_timeouts
from embferry.serve.worker.transports import make_transports
from embferry.transfer.control.sockets import SocketControl
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transfer.runtime import ThreadRuntime
from embferry.transports.contract import Transport
from embferry.trust.digests import LINES, LineWriter

R = TypeVar("R", messages.TokenizeRequest, messages.DetokenizeRequest)
log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
"""Bytes of a request body: text and shapes, no media."""
_STREAM_HEADERS = [(b"content-type", LINES.encode()), (b"cache-control", b"no-cache")]


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the language model and serves until SIGINT or SIGTERM.

    Args:
        settings: settings of the deployment.
        report: called once, when the worker accepts requests.
    """
    raise_open_file_limit()
    listener = open_port(settings, settings.language.port, settings.place("language", "port"))
    transports = make_transports(settings)  # before the model, so that a bad transport fails at once
    log.info("loading the language model from %s", model_path(settings.model))
    model = LanguageModel.load(
        model_path(settings.model),
        DTYPES[settings.dtype],
        threads=settings.threads,
        prefill_chunk_tokens=settings.language.prefill_chunk_tokens,
    )
    service = service_of(model, settings, transports)
    serve_worker(build(service), service, listener, settings, "language", "", report)


def service_of(model: LanguageModel, settings: Settings, transports: list[Transport]) -> LanguageService:
    """Returns a running service. The caller closes it."""
    geometry = Geometry(Layout(model.fields), settings.transfer.num_blocks, settings.transfer.block_size)
    runtime = ThreadRuntime("embferry-receive", partial(SocketControl, limits=control_limits(settings)))
    manager = ReceiveManager(geometry, transports, settings=language_timeouts(settings), runtime=runtime)
    service = LanguageService(model, manager, settings)
    count_connections(service.metrics, transports)
    return service


def build(service: LanguageService) -> ASGIApp:
    """Returns the application."""

    async def pool(request: Request) -> Response:
        return JSONResponse(service.pool())

    async def answered(request: Request, decoder: msgspec.json.Decoder[R], call: Callable[[R], object]) -> Response:
        hold, pace = service.budget.hold(), Pace.of(service.settings.router)
        try:
            asked = await read_request(decoder, request.scope, request.receive, MAX_BODY_BYTES, hold, pace)
            if asked is None:
                return Response(status_code=499)
            is_long = hold.nbytes > LONG_CHARACTERS
            work = service.prompts.run(asked.client, is_long, partial(call, asked))
            answer = await run_until_disconnect(work, request.receive)
            return await off_loop(hold.nbytes, JSONResponse, answer)
        finally:
            hold.release()

    async def tokenize(request: Request) -> Response:
        work = answered(request, messages.TOKENIZE_DECODER, service.prompts.tokens)
        return await response_with_signs_of_life(request, work)

    async def detokenize(request: Request) -> Response:
        work = answered(request, messages.DETOKENIZE_DECODER, service.prompts.text)
        return await response_with_signs_of_life(request, work)

    routes = [
        Route("/generate", Generate(service), methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/debug/pool", pool),
    ]
    return worker_app(service, routes)


class Generate:
    """The ASGI endpoint of ``POST /generate``. It aborts the job when the client disconnects."""

    def __init__(self, service: LanguageService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = _EventStream(send, line_writer(scope))
        with contextlib.closing(stream):
            try:
                await self._answer(scope, receive, stream)
            except Exception as error:
                if not stream.started:
                    raise
                await stream.end(as_serve_error(error))

    async def _answer(self, scope: Scope, receive: Receive, stream: _EventStream) -> None:
        hold, job = self._service.budget.hold(), None
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            pace = Pace.of(self._service.settings.router)
            request = await read_request(messages.DECODER, scope, receive, MAX_BODY_BYTES, hold, pace)
            if request is None:
                return
            with about(request_id=request.request_id, room=request.room):
                call = self._service.call_in(scope["headers"])
                job = self._service.submit(request, deliver, hold, call)
                await run_until_disconnect(_forward(events, stream), receive, lambda: log.info("the caller left"))
        finally:
            if job is not None:
                self._service.abort(job)
            else:
                hold.release()  # otherwise the job does at its end


async def _forward(events: asyncio.Queue[Event], stream: _EventStream) -> None:
    """Sends the events. An error in first place is raised; a later one is the last event."""
    while True:
        event = await events.get()
        if isinstance(event, ServeError):
            if not stream.started:
                raise event
            await stream.end(event)
            return
        if event["type"] == "end":
            await stream.end(event)
            return
        if event is not ACCEPTED:
            await stream.write(event)
        else:
            await stream.begin()


class _EventStream:
    """The response: one line an event, and a ping every ``PING_SECONDS``, also while the request is being read.

    Attributes:
        started: the status has been sent, so an error can only be an event.
    """

    def __init__(self, send: Send, lines: LineWriter) -> None:
        self._send, self._lines = send, lines
        self.started = False
        self._writing = asyncio.Lock()  # no line is lost by a cancelled ping, because each has a number
        self._pinging = asyncio.create_task(self._ping())

    def close(self) -> None:
        """Ends the pings."""
        self._pinging.cancel()

    async def begin(self) -> None:
        """Sends the status."""
        async with self._writing:
            await self._write(b"")

    async def write(self, event: Event) -> None:
        """Sends an event, and the status before the first one."""
        async with self._writing:
            await self._write(self._lines.line(messages.encoded(event)))

    async def end(self, event: Event) -> None:
        """Sends the last event."""
        async with self._writing:
            self.close()  # it sleeps, or waits for the lock
            await self._write(self._lines.line(messages.encoded(event)), more=False)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            await self.write(messages.PING)
