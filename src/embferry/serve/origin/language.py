"""``embferry language --wire origin``: the process, and the endpoints that the load balancer calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.engine.language import LanguageModel
from embferry.models import model_path
from embferry.observe.logs import about
from embferry.protocol.layout import Layout
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.http.body import Pace, parse_object, read_body
from embferry.serve.http.chat import ClientResponse
from embferry.serve.http.descriptors import raise_open_file_limit
from embferry.serve.http.disconnect import run_until_disconnect
from embferry.serve.http.serving import Report, unreported
from embferry.serve.language.job import Event
from embferry.serve.language.messages import GenerateRequest, Message, Sampling
from embferry.serve.language.process import MAX_BODY_BYTES
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.openai.reply import DONE, Answer, ChatForm, error_event, event
from embferry.serve.origin.language_service import OriginLanguageService
from embferry.serve.origin.managers import language_manager
from embferry.serve.origin.process import listen, serve
from embferry.serve.origin.request import OriginRequest, parse_origin
from embferry.serve.worker.errors import as_serve_error
from embferry.serve.worker.http import worker_app
from embferry.serve.worker.transfer_settings import DTYPES

log = logging.getLogger(__name__)

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_ABORT_BYTES = 4096


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the language model and serves until SIGINT or SIGTERM.

    Args:
        settings: Settings of the worker, which :func:`.check_origin` accepts.
        report: Called once, when the worker accepts requests.
    """
    raise_open_file_limit()
    listener = listen(settings, settings.language.port, "--language-port")
    model = LanguageModel.load(
        model_path(settings.model),
        DTYPES[settings.dtype],
        threads=settings.threads,
        prefill_chunk_tokens=settings.language.prefill_chunk_tokens,
    )
    manager = language_manager(Layout(model.fields), settings)
    service = OriginLanguageService(model, manager, settings)
    serve(build(service), service, listener, settings, "language", report)


def build(service: OriginLanguageService) -> ASGIApp:
    """Returns the application."""

    async def abort(request: Request) -> Response:
        body = await read_body(request.scope, request.receive, _ABORT_BYTES)
        rid = parse_object(body or b"{}").get("rid")
        if not isinstance(rid, str):
            raise ServeError("invalid_request", "rid must be the name of a request", param="rid")
        service.abort_request(rid)
        return Response(status_code=200)

    routes = [
        Route("/v1/chat/completions", LanguageChat(service), methods=["POST"]),
        Route("/abort_request", abort, methods=["POST"]),
    ]
    return worker_app(service, routes, behind_router=False)


class LanguageChat:
    """``POST /v1/chat/completions``: answers the prompt whose embedding is in the request's room."""

    def __init__(self, service: OriginLanguageService) -> None:
        self._service = service
        self._settings = service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hold, job, response = self._service.budget.hold(), None, ClientResponse(send)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(told: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(events.put_nowait, told)

        try:
            pace = Pace.of(self._settings.router)
            body = await read_body(scope, receive, MAX_BODY_BYTES, hold, pace=pace)
            if body is None:
                return
            asked = await off_loop(JSON_WEIGHT * len(body), self._parsed, body)
            del body
            with about(request_id=asked.rid, room=asked.room):
                job = self._service.submit(_generate_request(asked, self._settings), deliver, hold)
                answering = self._answer(asked, events, response)
                await run_until_disconnect(answering, receive, lambda: log.info("the caller left"))
        except Exception as error:
            if not response.started:
                raise
            await response.write(error_event(as_serve_error(error)), more=False)
        finally:
            if job is not None:
                self._service.abort(job)
            else:
                hold.release()  # otherwise the job does at its end

    def _parsed(self, body: bytes) -> OriginRequest:
        asked = parse_origin(body, self._settings, texts_only=True)
        if not asked.bootstrap_addr:
            why = "bootstrap_host is missing: the host of the encode side's bootstrap server"
            raise ServeError("invalid_request", why, param="bootstrap_host")
        return asked

    async def _answer(self, asked: OriginRequest, events: asyncio.Queue[Event], response: ClientResponse) -> None:
        request, answer = asked.request, Answer()
        form = ChatForm(self._settings.public_model_name, request.n or 1, request.includes_usage)
        while True:
            told = await events.get()
            if isinstance(told, ServeError):
                raise told
            if told["type"] == "end":
                break
            if told["type"] == "token":
                answer.add(told)
                if request.stream:
                    await _begin(response, form)
                    for one in form.token(told):
                        await response.write(event(one))
        answer.finish(told)
        extension = {"room": str(asked.room), "transfer": told["transfer"], "timing": told["timing"]}
        if not request.stream:
            await response.send_whole(JSONResponse(form.whole(answer, extension)))
            return
        await _begin(response, form)
        for one in form.closing(answer, extension):
            await response.write(event(one))
        await response.write(DONE, more=False)


async def _begin(response: ClientResponse, form: ChatForm) -> None:
    """Sends the head and the first events of a stream, unless they have been sent."""
    if not response.started:
        await response.start(200, _STREAM_HEADERS)
        for one in form.opening():
            await response.write(event(one))


def _generate_request(asked: OriginRequest, settings: Settings) -> GenerateRequest:
    messages = msgspec.convert(asked.messages, list[Message])
    sampling = asked.request.sampling(settings.router.default_max_tokens, asked.constraint)
    return GenerateRequest(
        asked.rid,
        messages,
        room=asked.room,
        endpoint=asked.bootstrap_addr,
        sampling=msgspec.convert(sampling, Sampling),
        opens=asked.request.template.get("opens", True),
        continues=asked.request.template.get("continues", False),
    )
