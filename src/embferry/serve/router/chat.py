"""``POST /v1/chat/completions``: one request from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from embferry.observe.logs import about
from embferry.observe.metrics import RouterMetrics
from embferry.serve.body import read_body
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher
from embferry.serve.openai.messages import turns
from embferry.serve.openai.reply import DONE, Reply, error_event, event
from embferry.serve.openai.request import ChatRequest, parse
from embferry.serve.router.exchange import Exchange, draw_room
from embferry.serve.router.fleet import Fleet
from embferry.serve.router.intake import Intake, take_in

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Answer:
    """What has come of the answer so far."""

    started: float
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    def extension(self, room: int | None) -> dict[str, Any]:
        return {
            "room": room,
            "transfer": self.end.get("transfer"),
            "tokens": self.tokens,
            "timing": self.end.get("timing"),
        }


class Chat:
    """The endpoint, an ASGI application of its own: it has to see the client leave while it waits for workers."""

    def __init__(
        self, settings: Settings, fleet: Fleet, client: httpx.AsyncClient, fetcher: Fetcher, metrics: RouterMetrics
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._client = client
        self._fetcher = fetcher
        self._metrics = metrics
        self._closing: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        with self._metrics.in_flight.track_inprogress():
            try:
                body = await read_body(receive, self._settings.router.max_body_bytes)
            except ServeError as error:
                await self._refuse(error, scope, receive, send)
                return
            if body is None:
                return
            work = asyncio.create_task(self._answer(body, started, scope, receive, send))
            gone = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    log.info("the client went away")
                    self._metrics.aborted.inc()
            finally:
                for task in (work, gone):
                    task.cancel()
                await asyncio.wait({work, gone})
            if not work.cancelled():
                work.result()  # raises what nobody expected, for the 500 page
        self._metrics.seconds.observe(time.monotonic() - started)

    async def drain(self) -> None:
        """Waits until the workers have been told of every abort."""
        if self._closing:
            await asyncio.wait(self._closing)

    async def _answer(self, body: bytes, started: float, scope: Scope, receive: Receive, send: Send) -> None:
        stream = _Stream(send)
        room: int | None = None
        try:
            async with asyncio.timeout(self._settings.router.request_timeout):
                request = self._parsed(body)
                intake = await take_in(turns(request.messages), self._fetcher, self._settings.media)
                for item in intake.items:
                    self._metrics.media.labels(item["kind"]).inc()
                room = draw_room() if intake.items else None
                with about(room=room):
                    async with self._exchange(scope["state"]["request_id"], room) as exchange:
                        await self._generate(request, intake, exchange, Answer(started), stream, scope, receive)
        except TimeoutError:
            seconds = f"{self._settings.router.request_timeout:g} seconds (router.request_timeout)"
            message = f"the answer took longer than {seconds}; it has been given up"
            failure = ServeError("request_timeout", message, retryable=False)
        except ServeError as error:
            failure = error
        else:
            return
        with about(room=room):
            await self._fail(failure, stream, scope, receive, send)

    def _parsed(self, body: bytes) -> ChatRequest:
        try:
            content = json.loads(body)
            if b"\\u" in body:
                json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
            raise ServeError("invalid_json", f"the body is not JSON: {error}") from error
        request = parse(content)
        served = self._settings.public_model_name
        if request.model != served:
            raise ServeError(
                "model_not_found", f"the model {request.model!r} is not served here; {served!r} is", param="model"
            )
        return request

    @contextlib.asynccontextmanager
    async def _exchange(self, request_id: str, room: int | None) -> AsyncIterator[Exchange]:
        """Closed in a task of its own: an abort must reach the workers even though this request is being cancelled."""
        exchange = Exchange(self._fleet, self._client, self._metrics, request_id, room)
        try:
            yield exchange
        finally:
            task = asyncio.create_task(exchange.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _generate(
        self,
        request: ChatRequest,
        intake: Intake,
        exchange: Exchange,
        answer: Answer,
        stream: _Stream,
        scope: Scope,
        receive: Receive,
    ) -> None:
        if intake.items:
            await exchange.encode(intake)
        reply = Reply(self._settings.public_model_name)
        sampling = request.sampling(self._settings.router.default_max_tokens)
        async with contextlib.aclosing(exchange.events(intake.messages, sampling)) as events:
            async for told in events:
                if told["type"] == "end":
                    answer.end = told
                    break
                if not answer.tokens:
                    self._metrics.first_token_seconds.observe(time.monotonic() - answer.started)
                answer.tokens.append(told["token_id"])
                answer.text.append(told["text"])
                if request.stream:
                    await stream.delta(reply, told["text"])
        self._count(answer)
        extension = answer.extension(exchange.room)
        finish_reason, usage = answer.end["finish_reason"], answer.end["usage"]
        if request.stream:
            include_usage = request.stream_options is not None and request.stream_options.include_usage
            await stream.finish(reply, finish_reason, extension, usage if include_usage else None)
        else:
            whole = reply.completion("".join(answer.text), finish_reason, usage, extension)
            await JSONResponse(whole)(scope, receive, stream.send)

    def _count(self, answer: Answer) -> None:
        usage = answer.end["usage"]
        self._metrics.prompt_tokens.inc(usage.get("prompt_tokens", 0))
        self._metrics.completion_tokens.inc(usage.get("completion_tokens", 0))
        transfer = answer.end.get("transfer") or {}
        for phase in ("initial", "resumed"):
            self._metrics.transfers.labels(phase).inc(transfer.get(phase, 0))
        self._metrics.transfer_tokens.inc(transfer.get("total_tokens", 0))
        self._metrics.transfer_bytes.inc(transfer.get("bytes", 0))
        seconds = round(time.monotonic() - answer.started, 3)
        log.info("answered", extra={"seconds": seconds, "tokens": len(answer.tokens), **_flat(transfer)})

    async def _fail(self, error: ServeError, stream: _Stream, scope: Scope, receive: Receive, send: Send) -> None:
        if not stream.started:
            await self._refuse(error, scope, receive, send)
            return
        self._note(error)
        await stream.fail(error)

    async def _refuse(self, error: ServeError, scope: Scope, receive: Receive, send: Send) -> None:
        self._note(error)
        await error_response(error)(scope, receive, send)

    def _note(self, error: ServeError) -> None:
        self._metrics.errors.labels(error.code).inc()
        level = logging.INFO if error.status < 500 else logging.WARNING
        log.log(level, "refused: %s", error.message, extra={"code": error.code, "status": error.status})


class _Stream:
    """Server-sent events on one response, which begins with the first of them."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.started = False

    async def delta(self, reply: Reply, text: str) -> None:
        await self._begin(reply)
        if text:  # a token may be part of a character
            await self._write(event(reply.delta(text)))

    async def finish(self, reply: Reply, reason: str, extension: dict[str, Any], usage: Any) -> None:
        await self._begin(reply)
        await self._write(event(reply.closing(reason, extension)))
        if usage is not None:
            await self._write(event(reply.usage(usage)))
        await self._write(DONE, more=False)

    async def fail(self, error: ServeError) -> None:
        await self._write(error_event(error), more=False)

    async def _begin(self, reply: Reply) -> None:
        if self.started:
            return
        self.started = True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(event(reply.opening()))

    async def _write(self, data: bytes, more: bool = True) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})


def error_response(error: ServeError) -> JSONResponse:
    """``x-should-retry`` is what OpenAI's clients go by when it is there."""
    headers = {"x-should-retry": "true" if error.retryable else "false"} if error.status >= 500 else {}
    return JSONResponse(error.body(), error.status, headers)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _flat(transfer: dict[str, Any]) -> dict[str, Any]:
    return {f"transfer_{key}": value for key, value in transfer.items()}
