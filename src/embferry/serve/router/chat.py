"""``POST /v1/chat/completions`` before workers of this project: one request from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from embferry.observe.logs import about
from embferry.protocol.text import shown
from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.http.chat import ChatEndpoint, ClientResponse, Incoming
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.openai.messages import Media, parse_messages
from embferry.serve.openai.reply import DONE, Reply, event
from embferry.serve.openai.request import ChatRequest, parse
from embferry.serve.router.attempts import Attempts
from embferry.serve.router.fleet import Fleet
from embferry.serve.router.media import load_media
from embferry.serve.router.worker_call import WorkerCall, WorkerLostError, draw_room, nbytes_of
from embferry.serve.text_limit import check_characters

log = logging.getLogger(__name__)

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


@dataclass(slots=True)
class _Asked:
    """A request.

    Attributes:
        messages: for the language worker.
        items: its media, for the encode worker.
    """

    request: ChatRequest
    messages: list[dict[str, Any]]
    items: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the texts, about."""
        return sum(len(part.get("text", "")) for message in self.messages for part in message["parts"])


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

    async def answer(self, incoming: Incoming, scope: Scope, response: ClientResponse) -> None:
        asked, media = await off_loop(JSON_WEIGHT * incoming.nbytes, self._parsed, incoming.take())
        asked.items = await load_media(media, self.fleet.fetcher, self._settings.media, incoming.hold.add)
        media.clear()
        incoming.hold.set(asked.nbytes + nbytes_of(asked.items))
        for item in asked.items:
            self.fleet.metrics.media.labels(item["kind"]).inc()
        request_id, attempts = scope["state"]["request_id"], Attempts(self.fleet)

        def begun() -> None:
            asked.items.clear()  # there is no further attempt once the client has a part of the answer
            incoming.hold.set(asked.nbytes)

        response.on_start = begun
        while True:
            try:
                await self._attempt(asked, request_id, attempts, response)
                return
            except ServeError as error:
                if response.started or not (isinstance(error, WorkerLostError) and attempts.another(error)):
                    attempts.explain(error)
                    raise

    async def _attempt(self, asked: _Asked, request_id: str, attempts: Attempts, response: ClientResponse) -> None:
        """Makes one attempt, in a room of its own: workers of an earlier one may still be at work in theirs."""
        response.room = draw_room() if asked.items else None
        response.facts |= {"room": response.room}
        with about(room=response.room):
            async with self._worker_call(request_id, response.room, attempts) as call:
                if asked.items:
                    await call.encode(asked.items)
                await self._generate(asked, call, response)

    def _parsed(self, body: bytes) -> tuple[_Asked, list[Media]]:
        request = parse(parse_object(body))
        served = self._settings.public_model_name
        if request.model != served:
            why = f"the model {shown(request.model, 80)} is not served here; {served!r} is"
            raise ServeError("model_not_found", why, param="model")
        messages, media = parse_messages(request.messages)
        asked = _Asked(request.model_copy(update={"messages": []}), messages)
        check_characters(asked.nbytes, self._settings.language)
        return asked, media

    @contextlib.asynccontextmanager
    async def _worker_call(self, request_id: str, room: int | None, attempts: Attempts) -> AsyncIterator[WorkerCall]:
        """Closes the call in a task of its own: workers must hear of an abort even if this task is being cancelled."""
        call = WorkerCall(self.fleet, request_id, room, attempts.avoid, attempts.prefer)
        try:
            yield call
        finally:
            task = asyncio.create_task(call.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _generate(self, asked: _Asked, call: WorkerCall, response: ClientResponse) -> None:
        request = asked.request
        reply, answer = Reply(self._settings.public_model_name), Answer()
        sampling = request.sampling(self._settings.router.default_max_tokens)
        async with contextlib.aclosing(call.events(asked.messages, asked.nbytes, sampling)) as events:
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
        response.facts |= self._count(answer)
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

    def _count(self, answer: Answer) -> dict[str, Any]:
        """Counts an answer. Returns what the log says of it."""
        usage = answer.end["usage"]
        self.fleet.metrics.prompt_tokens.inc(usage.get("prompt_tokens", 0))
        self.fleet.metrics.completion_tokens.inc(usage.get("completion_tokens", 0))
        transfer = answer.end.get("transfer") or {}
        for phase in ("initial", "resumed"):
            self.fleet.metrics.transfers.labels(phase).inc(transfer.get(phase, 0))
        self.fleet.metrics.transfer_tokens.inc(transfer.get("total_tokens", 0))
        self.fleet.metrics.transfer_bytes.inc(transfer.get("bytes", 0))
        facts = {f"transfer_{key}": value for key, value in transfer.items()}
        return {"outcome": "answered", "tokens": len(answer.tokens), **facts}


async def _begin_stream(response: ClientResponse, reply: Reply) -> None:
    """Sends the head and the first event, unless they have been sent."""
    if not response.started:
        await response.start(200, _STREAM_HEADERS)
        await response.write(event(reply.opening()))
