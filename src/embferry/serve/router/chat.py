"""The paths that generate, before workers of this project: one request from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from embferry.observe.logs import about
from embferry.serve.byte_budget import Hold
from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.http.chat import ChatEndpoint, ClientResponse, Incoming
from embferry.serve.http.journal import current_record
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.reply import Answer
from embferry.serve.router.asked import Asked, Read, read_chat
from embferry.serve.router.attempts import Attempts
from embferry.serve.router.fleet import Fleet
from embferry.serve.router.media import load_media
from embferry.serve.router.worker_call import WorkerCall, WorkerLostError, draw_room, nbytes_of

log = logging.getLogger(__name__)

LOGPROB_BYTES = 500
"""Bytes of one log probability in an answer that is not streamed, about."""
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Chat(ChatEndpoint[Fleet]):
    """The endpoint of one path.

    Args:
        fleet: the workers.
        read: reads the requests of the path.
    """

    def __init__(self, fleet: Fleet, read: Read = read_chat) -> None:
        super().__init__(fleet)
        self._read = read
        self._closing: set[asyncio.Task[None]] = set()

    async def drain(self) -> None:
        if self._closing:  # workers are still being told of an abort
            await asyncio.wait(self._closing)

    async def answer(self, incoming: Incoming, scope: Scope, response: ClientResponse) -> None:
        ignored = Ignored()
        asked = await off_loop(JSON_WEIGHT * incoming.nbytes, self._parsed, incoming.take(), ignored)
        response.note_ignored(ignored)
        current_record().describe(streams=asked.streams, kinds=[one.kind for one in asked.media])
        await self.fleet.check_language()
        asked.items = await load_media(asked.media, self.fleet.fetcher, self._settings.media, incoming.hold.add)
        asked.media.clear()
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
                await self._attempt(asked, request_id, attempts, response, incoming.hold)
                return
            except ServeError as error:
                if response.started or not (isinstance(error, WorkerLostError) and attempts.another(error)):
                    attempts.explain(error)
                    asked.place(error)
                    raise

    async def _attempt(
        self, asked: Asked, request_id: str, attempts: Attempts, response: ClientResponse, hold: Hold
    ) -> None:
        """Makes one attempt, in a room of its own: workers of an earlier one may still be at work in theirs."""
        response.room = draw_room() if asked.items else None
        response.facts |= {"room": response.room}
        with about(room=response.room):
            async with self._worker_call(request_id, response.room, attempts) as call:
                if asked.items:
                    await self.fleet.check_language(attempts.avoid)  # it may have taken long to fetch the files
                    attempts.encoder = await call.encode(asked.items)
                await self._generate(asked, call, response, hold)

    def _parsed(self, body: bytes, ignored: Ignored) -> Asked:
        return self._read(parse_object(body), self._settings, ignored)

    @contextlib.asynccontextmanager
    async def _worker_call(self, request_id: str, room: int | None, attempts: Attempts) -> AsyncIterator[WorkerCall]:
        """Closes the call in a task of its own: workers must hear of an abort even if this task is being cancelled."""
        call = WorkerCall(self.fleet, request_id, room, attempts.avoid, attempts.prefer, attempts.encoder)
        try:
            yield call
        finally:
            task = asyncio.create_task(call.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _generate(self, asked: Asked, call: WorkerCall, response: ClientResponse, hold: Hold) -> None:
        answer, form = Answer(keeps_logprobs=not asked.streams), asked.form
        async with contextlib.aclosing(call.events(asked.prompt, asked.nbytes, asked.sampling)) as events:
            async for told in events:
                if told["type"] == "end":
                    answer.finish(told)
                    break
                if not answer.num_tokens:
                    response.first_token(self.fleet.metrics)
                answer.add(told)
                if "top" in told and not asked.streams:
                    hold.add(LOGPROB_BYTES * (1 + len(told["top"])))
                if asked.streams:
                    await _begin_stream(response, asked)
                    for one in form.token(told):
                        await response.write(form.encoded(one))
        response.facts |= self._count(answer)
        extension = answer.extension(call.room)
        if not asked.streams:
            await response.send_whole(JSONResponse(form.whole(answer, extension)))
            return
        await _begin_stream(response, asked)
        for one in form.closing(answer, extension):
            await response.write(form.encoded(one))
        await response.write(form.done, more=False)

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
        if transfer:
            tokens, grants = transfer.get("total_tokens", 0), transfer.get("initial", 0) + transfer.get("resumed", 0)
            current_record().progress({**transfer, "tokens": tokens, "transfers": grants})
        facts = {f"transfer_{key}": value for key, value in transfer.items()}
        return {"outcome": "answered", "tokens": answer.num_tokens, **facts}


async def _begin_stream(response: ClientResponse, asked: Asked) -> None:
    """Sends the head and the first events, unless they have been sent."""
    if not response.started:
        await response.start(200, _STREAM_HEADERS)
        for one in asked.form.opening():
            await response.write(asked.form.encoded(one))
