"""``embferry encode --wire origin``: the process, and the endpoint that the load balancer calls."""

from __future__ import annotations

import contextlib
import logging

import httpx
import msgspec
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from embferry.engine.encoder import Encoder
from embferry.engine.prompt import PromptBuilder
from embferry.engine.whole_prompt import text_table
from embferry.models import model_path
from embferry.observe.logs import about
from embferry.protocol.layout import Layout
from embferry.serve.bootstrap import bootstrap_server
from embferry.serve.byte_budget import Hold
from embferry.serve.config import Settings
from embferry.serve.encode.messages import EncodeItem, EncodeRequest
from embferry.serve.encode.process import ENVELOPE_BYTES
from embferry.serve.encode.shared_cache import open_store
from embferry.serve.http.body import Pace, announced_bytes, read_body
from embferry.serve.http.connections import caller_of
from embferry.serve.http.descriptors import raise_open_file_limit, within_open_files
from embferry.serve.http.disconnect import run_until_disconnect
from embferry.serve.http.serving import Report, unreported
from embferry.serve.media.fetch import Fetcher
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.openai.reply import Choice, Reply
from embferry.serve.origin.encode_service import OriginEncodeService, PromptRoom
from embferry.serve.origin.managers import encode_manager
from embferry.serve.origin.process import listen, serve
from embferry.serve.origin.request import OriginRequest, parse_origin
from embferry.serve.router.media import load_media
from embferry.serve.shared_threads import acting_for
from embferry.serve.worker.http import worker_app
from embferry.serve.worker.transfer_settings import DTYPES
from embferry.transfer.waiting import transferred

log = logging.getLogger(__name__)

MAX_FETCHES, FETCHES_SHARE = 100, 0.1
"""Media that are fetched at once, and the part of the process's descriptors that they may have."""


def run(settings: Settings, report: Report = unreported) -> None:
    """Loads the vision tower and the embeddings of text, and serves until SIGINT or SIGTERM.

    Args:
        settings: Settings of the worker, which :func:`.check_origin` accepts. Its bootstrap server listens on
            ``bootstrap.port``.
        report: Called once, when the worker accepts requests.
    """
    raise_open_file_limit()
    listener = listen(settings, settings.encode.port, "--encode-port")
    store = open_store(settings)
    path, dtype = model_path(settings.model), DTYPES[settings.dtype]
    # As in SGLang, the server is up before the model is loaded: peers ask again until the rank has registered.
    with bootstrap_server(settings, unproved_ranks=True) as bootstrap:
        encoder = Encoder.load(path, dtype, threads=settings.threads)
        table = text_table(path, dtype)
        prompts = PromptBuilder.load(path, settings.language.max_prompt_tokens)
        manager = encode_manager(Layout(encoder.fields), settings, bootstrap.url)
        service = OriginEncodeService(encoder, manager, settings, prompts, table, store)
        serve(build(service), service, listener, settings, "encode", report)


def build(service: OriginEncodeService) -> ASGIApp:
    """Returns the application."""
    return worker_app(
        service, [Route("/v1/chat/completions", EncodeChat(service), methods=["POST"])], behind_router=False
    )


class EncodeChat:
    """``POST /v1/chat/completions``: responds when the language side has the whole embedding, without an answer."""

    def __init__(self, service: OriginEncodeService) -> None:
        self._service = service
        self._settings = settings = service.settings
        self._max_bytes = settings.media.max_total_bytes * 4 // 3 + ENVELOPE_BYTES  # files come in base64
        certificates = httpx.create_ssl_context(trust_env=False)
        self._fetcher = Fetcher(settings.media, certificates, within_open_files(MAX_FETCHES, FETCHES_SHARE))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, caller = self._service, caller_of(scope)
        with service.budget.hold() as hold, acting_for(caller):
            service.expect(announced_bytes(scope), caller)
            body = await read_body(scope, receive, self._max_bytes, hold, pace=Pace.of(self._settings.router))
            if body is None:
                return
            asked = await off_loop(JSON_WEIGHT * len(body), self._parsed, body)
            del body

            async def work() -> None:
                tokens = await self._encode(asked, hold, caller)
                usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
                reply, nothing = Reply(self._settings.public_model_name), [Choice(finish_reason="length")]
                extension = {"room": str(asked.room)}
                await JSONResponse(reply.completion(nothing, usage, extension))(scope, receive, send)

            with about(request_id=asked.rid, room=asked.room):
                await run_until_disconnect(work(), receive, lambda: log.info("the caller left"))

    def _parsed(self, body: bytes) -> OriginRequest:
        return parse_origin(body, self._settings, texts_only=False)

    async def _encode(self, asked: OriginRequest, hold: Hold, caller: str) -> int:
        """Serves a room to its end. Returns the length of the prompt. Cancelled when the caller leaves."""
        service = self._service
        items = await load_media(asked.media, self._fetcher, self._settings.media, hold.add)
        request = EncodeRequest(asked.room, asked.rid, msgspec.convert(items, list[EncodeItem]))
        room = service.admit(request, hold, caller)
        assert isinstance(room, PromptRoom)
        room.chat = asked.chat
        try:
            prepared = await service.prepare_all(request, room)
            service.announce(room, prepared)
            assert room.sender is not None
            await transferred(room.sender)
        except BaseException:
            service.drop(room)
            with contextlib.suppress(Exception):
                if service.room(room.number) is room:
                    service.abort_room(room.number)
            raise
        return room.total_tokens
