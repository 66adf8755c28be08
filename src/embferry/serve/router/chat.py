"""``POST /v1/chat/completions`` before workers of this project: one request from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from embferry.observe.logs import about
from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.http.chat import ChatEndpoint, ClientResponse
from embferry.serve.openai.messages import parse_messages
from embferry.serve.openai.reply import DONE, Reply, event
from embferry.serve.openai.request import ChatRequest, parse
from embferry.serve.router.fleet import Fleet
from embferry.serve.router.media import load_media
from embferry.serve.router.worker_call import WorkerCall, draw_room

log = logging.getLogger(__name__)

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(slots=True)
class Answer:
    """The part of an answer that has arrived. ``end``: the last event, once it is there."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    def extension(self, room: int | None) -> dict[str, Any]:
        """Returns the field ``embferry`` of the reply."""
        return {
            "room": room,
            "transfer": self.end.get("transfer"),
            "tokens": self.tokens,
            "timing": self.end.get("timing"),
        }


class Chat(ChatEndpoint[Fleet]):
    """The endpoint."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self._closing: set[asyncio.Task[None]] = set()

    async def drain(self) -> None:
        if self._closing:  # workers are still being told of an abort
            await asyncio.wait(self._closing)

    async def answer(self, body: bytes, scope: Scope, response: ClientResponse) -> None:
        request = self._parsed(body)
        messages, media = parse_messages(request.messages)
        items = await load_media(media, self.fleet.fetcher, self._settings.media)
        for item in items:
            self.fleet.metrics.media.labels(item["kind"]).inc()
        response.room = draw_room() if items else None
        with about(room=response.room):
            async with self._worker_call(scope["state"]["request_id"], response.room) as call:
                if items:
                    await call.encode(items)
                await self._generate(request, messages, call, response)

    def _parsed(self, body: bytes) -> ChatRequest:
        content = parse_object(body)
        if b"\\u" in body:
            try:
                json.dumps(content, ensure_ascii=False).encode()
            except ValueError as error:
                raise ServeError("invalid_json", f"the body has half a surrogate pair: {error}") from error
        request = parse(content)
        served = self._settings.public_model_name
        if request.model != served:
            why = f"the model {request.model!r} is not served here; {served!r} is"
            raise ServeError("model_not_found", why, param="model")
        return request

    @contextlib.asynccontextmanager
    async def _worker_call(self, request_id: str, room: int | None) -> AsyncIterator[WorkerCall]:
        """Closes the call in a task of its own: workers must hear of an abort even if this task is being cancelled."""
        call = WorkerCall(self.fleet, request_id, room)
        try:
            yield call
        finally:
            task = asyncio.create_task(call.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _generate(
        self, request: ChatRequest, messages: list[dict[str, Any]], call: WorkerCall, response: ClientResponse
    ) -> None:
        reply, answer = Reply(self._settings.public_model_name), Answer()
        sampling = request.sampling(self._settings.router.default_max_tokens)
        async with contextlib.aclosing(call.events(messages, sampling)) as events:
            async for told in events:
                if told["type"] == "end":
                    answer.end = told
                    break
                if not answer.tokens:
                    self.fleet.metrics.first_token_seconds.observe(response.seconds)
                answer.tokens.append(told["token_id"])
                answer.text.append(told["text"])
                if request.stream:
                    await _begin_stream(response, reply)
                    if told["text"]:  # empty where a token ends within a character
                        await response.write(event(reply.delta(told["text"])))
        self._count(answer, response.seconds)
        extension = answer.extension(call.room)
        finish_reason, usage = answer.end["finish_reason"], answer.end["usage"]
        if not request.stream:
            whole = reply.completion("".join(answer.text), finish_reason, usage, extension)
            await response.send_whole(JSONResponse(whole))
            return
        await _begin_stream(response, reply)
        await response.write(event(reply.closing(finish_reason, extension)))
        if request.stream_options is not None and request.stream_options.include_usage:
            await response.write(event(reply.usage(usage)))
        await response.write(DONE, more=False)

    def _count(self, answer: Answer, seconds: float) -> None:
        usage = answer.end["usage"]
        self.fleet.metrics.prompt_tokens.inc(usage.get("prompt_tokens", 0))
        self.fleet.metrics.completion_tokens.inc(usage.get("completion_tokens", 0))
        transfer = answer.end.get("transfer") or {}
        for phase in ("initial", "resumed"):
            self.fleet.metrics.transfers.labels(phase).inc(transfer.get(phase, 0))
        self.fleet.metrics.transfer_tokens.inc(transfer.get("total_tokens", 0))
        self.fleet.metrics.transfer_bytes.inc(transfer.get("bytes", 0))
        facts = {f"transfer_{key}": value for key, value in transfer.items()}
        log.info("answered", extra={"seconds": round(seconds, 3), "tokens": len(answer.tokens), **facts})


async def _begin_stream(response: ClientResponse, reply: Reply) -> None:
    """Sends the head and the first event, unless they have been sent."""
    if not response.started:
        await response.start(200, _STREAM_HEADERS)
        await response.write(event(reply.opening()))
