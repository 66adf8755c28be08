"""``POST /v1/chat/completions``: one request from start to end."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from embferry.serve.body import read_body
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher
from embferry.serve.openai.reply import error_event
from embferry.serve.vllm.answering import Answering, Begun
from embferry.serve.vllm.connectors import Connector, Embferry, Encoded
from embferry.serve.vllm.encoding import Asked, Encoding
from embferry.serve.vllm.failures import AgainError, VerbatimError
from embferry.serve.vllm.fleet import Fleet, Instance
from embferry.serve.vllm.intake import Item, take_in
from embferry.serve.vllm.metrics import VllmRouterMetrics
from embferry.serve.vllm.repeats import Repeats
from embferry.serve.vllm.split import Place, filled, nameless, places, read, without_names
from embferry.serve.vllm.transfers import Transfer, Transfers

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = "1"
_TAIL = 64
"""Bytes from the end of a stream that are looked at for its ``[DONE]``."""


class Chat:
    """The endpoint, an ASGI application of its own: it has to see the client leave while it waits for instances."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        client: httpx.AsyncClient,
        fetcher: Fetcher,
        metrics: VllmRouterMetrics,
        connector: Connector,
        encoding: Encoding,
        transfers: Transfers,
        repeats: Repeats,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._client = client
        self._fetcher = fetcher
        self._metrics = metrics
        self._connector = connector
        self._encoding = encoding
        self._transfers = transfers
        self._repeats = repeats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._metrics.in_flight.track_inprogress(), self._metrics.seconds.time():
            out = _Out(send)
            try:
                body = await read_body(receive, self._settings.router.max_body_bytes)
            except ServeError as error:
                await self._fail(error, out)
                return
            if body is None:
                return
            work = asyncio.create_task(self._answer(body, scope, out))
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

    async def _answer(self, body: bytes, scope: Scope, out: _Out) -> None:
        seconds = self._settings.router.request_timeout
        started = time.monotonic()
        try:
            async with asyncio.timeout(seconds), AsyncExitStack() as held:
                begun = await self._begin(body, _headers(scope, self._settings), held)
                if begun.rest is not None:
                    self._metrics.first_token_seconds.observe(time.monotonic() - started)
                await out.tell(begun)
        except TimeoutError:
            why = f"the answer took longer than {seconds:g} seconds (router.request_timeout); it has been given up"
            await self._fail(ServeError("request_timeout", why, retryable=False), out)
        except VerbatimError as refusal:
            self._metrics.failures.labels("instance").inc()
            log.info("refused by an instance: %s", refusal)
            await out.tell(Begun(refusal.status, refusal.content_type, refusal.body, None))
        except ServeError as error:
            await self._fail(error, out)

    async def _begin(self, body: bytes, headers: dict[str, str], held: AsyncExitStack) -> Begun:
        """The answer, as soon as it may be told. What must last until it is complete is put into ``held``."""
        asked = Asked(read(body), headers)
        found = places(asked.request)
        if not found:
            content = body if without_names(asked.request) else _json(nameless(asked.request))
            return await self._ask(asked, content, held, media=False)
        items = await take_in(found, asked.request, self._fetcher, self._settings.media)
        for item in items:
            self._metrics.items.labels(item.kind).inc()
        try:
            return await self._twice(asked, found, items, held)
        except ServeError as error:
            if not self._settings.vllm.language_encodes or error.status < 500:
                raise
            log.warning("sent undivided: %s", error.message)
        self._metrics.fallbacks.inc()
        whole = filled(asked.request, [(p, item.part()) for p, item in zip(found, items, strict=True)])
        return await self._ask(asked, _json(whole), held, media=False)

    async def _twice(self, asked: Asked, found: list[Place], items: list[Item], held: AsyncExitStack) -> Begun:
        """Encode and ask; and once more, elsewhere, if it fails behind the encode and trying again makes sense."""
        avoid: set[str] = set()
        try:
            return await self._split(asked, found, items, avoid, held)
        except AgainError as error:
            first = error
        if not first.retryable:
            raise first
        log.warning("encoding again: %s", first.message)
        self._metrics.second_attempts.inc()
        try:
            return await self._split(asked, found, items, avoid, held, again=True)
        except ServeError as error:
            error.message = f"{error.message} (before that: {first.message})"
            raise

    async def _split(
        self,
        asked: Asked,
        found: list[Place],
        items: list[Item],
        avoid: set[str],
        held: AsyncExitStack,
        *,
        again: bool = False,
    ) -> Begun:
        """One attempt. Adds to ``avoid`` the encoders that what it encoded could not be had from."""
        language, encoded = await self._encoded(asked, list(dict.fromkeys(items)), avoid, again=again)
        async with AsyncExitStack() as mine:
            transfers: list[Transfer] = []
            if isinstance(self._connector, Embferry):
                transfers = mine.enter_context(self._transfers.live(asked, encoded))
            parts = {one.item.uuid: one.part() for one in encoded}
            body = filled(asked.request, [(p, parts[item.uuid]) for p, item in zip(found, items, strict=True)])
            body |= {"ec_transfer_params": self._connector.tells(encoded)}
            try:
                begun = await self._ask(asked, _json(body), mine, media=True, first=language)
            except AgainError as error:
                avoid |= self._blamed(transfers, encoded)
                if language is not None and any(transfer.is_silent for transfer in transfers):
                    self._repeats.distrust(language)
                raise _explained(error, transfers) from error
            finally:
                if transfers and language is not None:
                    self._repeats.forget(language, encoded)
            if transfers and begun.by is not None:
                self._repeats.arrived(begun.by, [transfer.encoded for transfer in transfers])
            held.push_async_exit(mine.pop_all())
            return begun

    async def _encoded(
        self, asked: Asked, items: list[Item], avoid: set[str], *, again: bool
    ) -> tuple[Instance | None, list[Encoded]]:
        """The items, and the instance that they are for, where that matters."""
        if not self._connector.early:
            return None, await self._encoding.all(asked, items, None, frozenset(avoid))
        language = await self._fleet.language(asked.model, (), lambda one: self._repeats.count(one, items))
        if language is None:
            raise ServeError("no_worker", "; ".join(self._fleet.missing()) or "no language instance is there")
        with self._fleet.in_hand(language):
            return language, await self._repeats.all(asked, items, language, frozenset(avoid), encode=again)

    async def _ask(
        self, asked: Asked, content: bytes, held: AsyncExitStack, *, media: bool, first: Instance | None = None
    ) -> Begun:
        answering = Answering(self._fleet, self._client, asked.headers)
        held.push_async_callback(answering.close)
        alone = self._connector.pushes and first is not None
        return await answering.ask(content, asked.request, media=media, first=first, alone=alone)

    def _blamed(self, transfers: Sequence[Transfer], encoded: Sequence[Encoded]) -> set[str]:
        """Encoders that consumers could not get something from; without word from any consumer, all."""
        blamed = [transfer.encoded.encoder for transfer in transfers if transfer.failure is not None]
        blamed = blamed or [one.encoder for one in encoded]
        for encoder in blamed:
            self._fleet.suspect(encoder)
        return {encoder.url for encoder in blamed}

    async def _fail(self, error: ServeError, out: _Out) -> None:
        self._metrics.failures.labels(error.code).inc()
        level = logging.INFO if error.status < 500 else logging.WARNING
        log.log(level, "refused: %s", error.message, extra={"code": error.code, "status": error.status})
        await out.fail(error)


class _Out:
    """The response to the client, whose head goes out with the first thing to tell."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False

    async def tell(self, begun: Begun) -> None:
        """Raises:
        ServeError: worker_failed if the answer breaks off.
        """
        await self._begin(begun.status, begun.content_type)
        await self._write(begun.body, more=begun.rest is not None)
        if begun.rest is None:
            return
        tail = begun.body[-_TAIL:]
        try:
            async for piece in begun.rest:
                tail = (tail + piece)[-_TAIL:]
                await self._write(piece, more=True)
        except httpx.TransportError as error:
            why = f"the language instance broke off: {str(error) or type(error).__name__}"
            raise ServeError("worker_failed", why, retryable=True) from error
        if not tail.rstrip().endswith(b"[DONE]"):
            raise ServeError("worker_failed", "the language instance broke off before the end", retryable=True)
        await self._write(b"", more=False)

    async def fail(self, error: ServeError) -> None:
        """An error response, or the end of the stream that has begun."""
        if self._started:
            await self._write(error_event(error), more=False)
            return
        response = error_response(error)
        await self._begin(error.status, "application/json", response.raw_headers)
        await self._write(bytes(response.body), more=False)

    async def _begin(self, status: int, content_type: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self._started = True
        headers = headers or [(b"content-type", content_type.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def _write(self, data: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def error_response(error: ServeError) -> JSONResponse:
    """``x-should-retry`` is what OpenAI's clients go by when it is there."""
    headers = {"x-should-retry": "true" if error.retryable else "false"} if error.status >= 500 else {}
    headers |= {"retry-after": RETRY_AFTER_SECONDS} if error.status == 503 else {}
    return JSONResponse(error.body(), error.status, headers)


def _explained(error: AgainError, transfers: Sequence[Transfer]) -> AgainError:
    """The same failure with the reason that the consumer gave for it, if it gave one."""
    failures = [transfer.failure for transfer in transfers if transfer.failure is not None]
    if not failures:
        return error
    worst = min(failures, key=lambda failure: failure.retryable)
    return AgainError(worst.code, worst.message, status=worst.status, retryable=worst.retryable)


def _headers(scope: Scope, settings: Settings) -> dict[str, str]:
    """For instances: the request's id; and the router's own key, or the client's if the router has none."""
    given = Headers(scope=scope)
    key = settings.router.api_key
    authorization = f"Bearer {key.get_secret_value()}" if key else given.get("authorization")
    return {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "X-Request-Id": scope["state"]["request_id"],
    } | ({"Authorization": authorization} if authorization else {})


def _json(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
