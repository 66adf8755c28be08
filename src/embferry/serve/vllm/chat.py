"""``POST /v1/chat/completions`` before vLLM: one request from start to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import httpx
import msgspec
from starlette.responses import Response
from starlette.types import Scope

from embferry.serve.errors import ServeError
from embferry.serve.http.backends import reason_of
from embferry.serve.http.chat import ClientResponse, Incoming
from embferry.serve.http.journal import current_record
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.text_limit import check_characters
from embferry.serve.vllm.client_request import CHAT, ClientRequest
from embferry.serve.vllm.connectors import EmbferryConnector, Encoded
from embferry.serve.vllm.early import Early, NotAsExpectedError, beside
from embferry.serve.vllm.endpoint import InstanceEndpoint, headers_of, owner_of
from embferry.serve.vllm.failover import Failover, Transfer
from embferry.serve.vllm.failures import EncodeAgainError, LostTwiceError
from embferry.serve.vllm.fields import ignored_fields
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.given_up import unless_given_up
from embferry.serve.vllm.instance import Instance
from embferry.serve.vllm.item_encoder import ItemEncoder
from embferry.serve.vllm.items import Item, load_items
from embferry.serve.vllm.language_call import Answer, ask
from embferry.serve.vllm.losses import ItemError
from embferry.serve.vllm.media_parts import (
    MediaPart,
    check_messages,
    media_parts,
    parse_request,
    with_parts,
    without_uuids,
)
from embferry.serve.vllm.named_media import NamedMedia
from embferry.serve.vllm.prompt_prefixes import prefixes_of
from embferry.serve.vllm.received_cache import ReceivedCache
from embferry.serve.vllm.stages import ask_in_stages, check_decoders, is_divided
from embferry.serve.vllm.texts import characters_of
from embferry.trust.digests import DamagedError

log = logging.getLogger(__name__)

T = TypeVar("T")
_TAIL = 64
"""Bytes from the end of a stream that are searched for its ``[DONE]``."""


class Chat(InstanceEndpoint):
    """The endpoint. Its ``failover`` takes the reports of consumers, its ``encoder`` other endpoints' pictures."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self.encoder = ItemEncoder(fleet)
        self._connector = self.encoder.connector
        self._received = ReceivedCache(self.encoder)
        self._ask = ask_in_stages if fleet.decoders else ask
        self._early = Early(fleet, self.encoder.offerings)
        self.failover = Failover(self.encoder)
        vllm = self._settings.vllm
        self._named = NamedMedia(vllm.uuid_bytes, vllm.uuid_timeout, fleet.metrics)

    async def drain(self) -> None:
        await self.encoder.fitness.close()

    async def answer(self, incoming: Incoming, scope: Scope, response: ClientResponse) -> None:
        async with AsyncExitStack() as held:
            answer = await self._answer(incoming, scope, held, response)
            if answer.rest is not None:
                response.first_token(self.fleet.metrics)
            await _forward(self.fleet, answer, response)

    async def _answer(self, incoming: Incoming, scope: Scope, held: AsyncExitStack, response: ClientResponse) -> Answer:
        """Returns the answer as soon as the client may have it. Contexts that must last to its end go into ``held``."""
        body = incoming.take()
        parsed = await off_loop(JSON_WEIGHT * len(body), _Parsed, body, self._named.is_on)
        text_alone, headers = parsed.text_alone, headers_of(scope, self._settings)
        request = ClientRequest(parsed.request, headers, len(body), incoming.hold.add)
        response.note_ignored(parsed.ignored)
        streams = parsed.request.get("stream") is True
        current_record().describe(streams=streams, kinds=[part.kind for part in parsed.parts])
        check_characters(parsed.characters, self.fleet.text_limits(request.model))
        del body
        fetcher, limits = self.fleet.fetcher, self._settings.media
        if text_alone is not None:
            return await self._ask(self.fleet, request, text_alone, held)
        if not self._settings.vllm.language_encodes:
            self.fleet.check_model(request.model)
        owner = owner_of(scope, self._settings)
        parts = self._named.resolved(owner, parsed.parts, incoming.hold.add)
        items = await load_items(parts, request.content, fetcher, limits, incoming.hold.add)
        self._named.keep(owner, parts, items)
        media = list(zip(parts, items, strict=True))
        for item in items:
            self.fleet.metrics.media.labels(item.kind).inc()
        try:
            return await self._split_with_retry(request, media, held)
        except ServeError as error:
            if isinstance(error, ItemError):
                error.at(next(part.param for part, item in media if item == error.item))
            is_final = error.http_status < 500 or isinstance(error, LostTwiceError)
            if is_final or not self._settings.vllm.language_encodes:
                raise
            log.warning("sent undivided: %s", error.detail)
        self.fleet.metrics.fallbacks.inc()
        self.fleet.journal.event("fallback")
        undivided = with_parts(request.content, [(part, item.part()) for part, item in media])
        return await self._ask(self.fleet, request, await request.as_json(undivided, items), held)

    async def _split_with_retry(
        self, request: ClientRequest, media: list[tuple[MediaPart, Item]], held: AsyncExitStack
    ) -> Answer:
        """Encodes and asks; once more, elsewhere, after a retryable failure behind the encode."""
        avoid: set[str] = set()
        request = replace(request, prefixes=await off_loop(request.nbytes, prefixes_of, request.content, media))
        try:
            return await self._split(request, media, avoid, held)
        except EncodeAgainError as error:
            first = error
        if not first.retryable:
            raise first
        log.warning("encoding again: %s", first.detail)
        self.fleet.metrics.second_attempts.inc()
        current_record().begins_again(first.code, "")
        try:
            return await self._split(request, media, avoid, held, again=True)
        except ServeError as error:
            error.detail = f"{error.detail} (before that: {first.detail})"
            raise

    async def _split(
        self,
        request: ClientRequest,
        media: list[tuple[MediaPart, Item]],
        avoid: set[str],
        held: AsyncExitStack,
        *,
        again: bool = False,
    ) -> Answer:
        """Makes one attempt. Adds to ``avoid`` the encoders whose embeddings did not arrive."""
        if self.fleet.decoders and is_divided(request.content):
            await check_decoders(self.fleet, request.model)  # before the encodes
        current_record().phase("encode")
        items = list(dict.fromkeys(item for _, item in media))
        language = await self._language(request, items)
        expected = None if again or language is None else await self._expected(request, items, language, avoid)
        if language is not None and expected is not None:
            told = [expected[item.uuid] for item in items]
            return await self._split_early(request, media, language, told, avoid, held)
        encoded = await self._encode(request, items, language, avoid, ignore_cache=again)
        return await self._ask_with(request, media, language, encoded, avoid, held)

    async def _split_early(
        self,
        request: ClientRequest,
        media: list[tuple[MediaPart, Item]],
        language: Instance,
        told: list[Encoded],
        avoid: set[str],
        held: AsyncExitStack,
    ) -> Answer:
        """Tells the language instance how items will be offered while they are encoded. Asks again if that fails."""
        items, expected = [one.item for one in told], {one.item.uuid: one for one in told}
        begun = asyncio.Semaphore(0)
        announced = replace(request, on_encode=begun.release)
        encoding = self._received.encode_all(announced, items, language, avoid, ignore_cache=False, expected=expected)
        async with _in_background(encoding) as encodes:
            try:
                await _first(encodes, _acquired(begun, sum(not one.repeated for one in told)))  # they take longest
                answer = await self._ask_with(request, media, language, told, avoid, held, encodes)
            except (NotAsExpectedError, _NotReceivedError) as error:
                self._early.note(language, "failed" if isinstance(error, _NotReceivedError) else "unexpected")
                log.info("asked again after the encode: %s", error)
                encoded = await encodes
            else:
                self._early.note(language, "used")
                return answer
        return await self._ask_with(request, media, language, encoded, avoid, held)

    async def _ask_with(
        self,
        request: ClientRequest,
        media: list[tuple[MediaPart, Item]],
        language: Instance | None,
        encoded: list[Encoded],
        avoid: set[str],
        held: AsyncExitStack,
        encodes: asyncio.Task[list[Encoded]] | None = None,
    ) -> Answer:
        """Asks for the answer to encoded items, or to those that will be ``encoded`` when ``encodes`` is done.

        Raises:
            NotAsExpectedError: they were encoded otherwise.
            _NotReceivedError: they were not, and did not arrive all the same.
            VerbatimError, ServeError: of the encodes, or of the request for the answer.
        """
        async with AsyncExitStack() as mine:
            transfers: list[Transfer] = []
            if isinstance(self._connector, EmbferryConnector):
                transfers = mine.enter_context(self.failover.tracked(request, encoded))
            encoded_parts = {one.item.uuid: one.part() for one in encoded}
            body = with_parts(request.content, [(part, encoded_parts[item.uuid]) for part, item in media])
            body |= {"ec_transfer_params": self._connector.answer_params(encoded)}
            content = await request.as_json(body, [one.item for one in encoded])
            only_first = self._connector.pushes and language is not None
            asking = self._ask(
                self.fleet, request, content, mine, has_media=True, first=language, only_first=only_first
            )
            try:
                if encodes is None:
                    answer = await asking
                else:
                    answer = await beside(asking, encodes, encoded, lambda now: _set_encoded(transfers, now))
            except EncodeAgainError as error:
                if encodes is not None and any(transfer.failure is not None for transfer in transfers):
                    raise _NotReceivedError(_with_reason(error, transfers).detail) from error
                avoid |= self._suspects(error, transfers, encoded)
                if language is not None and any(transfer.was_not_requested for transfer in transfers):
                    self._received.distrust(language)
                raise _with_reason(error, transfers) from error
            finally:
                if transfers and language is not None:
                    self._received.forget(language, encoded)
            if transfers and answer.receiver is not None:
                used = [transfer.encoded for transfer in transfers]
                self._received.arrived(answer.receiver, request, encoded, used)
            held.push_async_exit(mine.pop_all())
            return answer

    async def _language(self, request: ClientRequest, items: list[Item]) -> Instance | None:
        """Returns the language instance, where the connector needs to know it before the encode."""
        if not self._connector.needs_language:
            return None
        language = await self.fleet.language(request.model, (), lambda one: self._received.count(one, request, items))
        if language is None:
            raise ServeError(
                "no_worker", "; ".join(self.fleet.missing()) or f"no {self.fleet.receiving} instance is available"
            )
        return language

    async def _encode(
        self,
        request: ClientRequest,
        items: list[Item],
        language: Instance | None,
        avoid: set[str],
        *,
        ignore_cache: bool,
    ) -> list[Encoded]:
        if language is None:
            return await self._received.encode_all(request, items, None, avoid, ignore_cache=True)
        with self.fleet.count_in_flight(language):
            return await self._received.encode_all(request, items, language, avoid, ignore_cache=ignore_cache)

    async def _expected(
        self, request: ClientRequest, items: list[Item], language: Instance, avoid: set[str]
    ) -> Mapping[str, Encoded] | None:
        """Returns how each item will be offered, if the language instance can be told so before the encode."""
        if not isinstance(self._connector, EmbferryConnector) or not self._early.allows(request.content, language):
            return None
        known = self._received.known(request, items, language)
        return None if known is None else await self._early.expect(items, request.model, avoid, known)

    def _suspects(self, error: EncodeAgainError, transfers: Sequence[Transfer], encoded: Sequence[Encoded]) -> set[str]:
        """Returns the encoders whose embeddings did not arrive.

        If no consumer has reported any, these are all, or none if the language instance is to blame.
        """
        suspects = [transfer.encoded.encoder for transfer in transfers if transfer.failure is not None]
        if not suspects and not error.of_language:
            suspects = [one.encoder for one in encoded]
        for encoder in suspects:
            self.fleet.suspect(encoder)
        return {encoder.url for encoder in suspects}


class _NotReceivedError(Exception):
    """An embedding of which the language instance was told before its encode did not arrive there."""


@asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Yields a task, which is cancelled at the end of the context."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()  # nothing, if it is done
        await asyncio.gather(task, return_exceptions=True)


async def _first(task: asyncio.Task[Any], other: Coroutine[Any, Any, object]) -> None:
    """Waits until one of the two has ended, and cancels the second one."""
    async with _in_background(other) as waiting:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)


async def _acquired(semaphore: asyncio.Semaphore, times: int) -> None:
    for _ in range(times):
        await semaphore.acquire()


def _set_encoded(transfers: Sequence[Transfer], encoded: Sequence[Encoded]) -> None:
    for transfer, one in zip(transfers, encoded, strict=True):
        transfer.set_encoded(one)


async def _forward(fleet: Fleet, answer: Answer, response: ClientResponse) -> None:
    """Sends the answer to the client.

    Raises:
        ServeError: worker_failed if the answer breaks off, is given up or its instance stalls; network_damage if it
            arrives damaged.
    """
    if answer.rest is None or answer.instance is None:
        await response.send_whole(Response(answer.body, answer.status, {"content-type": answer.content_type}))
        return
    await response.start(answer.status, [(b"content-type", answer.content_type.encode())])
    await response.write(answer.body)
    tail = answer.body[-_TAIL:]
    try:
        async with fleet.unless_stalled(answer.instance):
            async for piece in unless_given_up(answer.instance, answer.rest):
                tail = (tail + piece)[-_TAIL:]
                await response.write(piece)
    except httpx.TransportError as error:
        why = f"the {answer.instance.role} instance broke off: {reason_of(error)}"
        raise ServeError("worker_failed", why) from error
    except DamagedError as error:
        raise ServeError(
            "network_damage", f"the answer of the {answer.instance.role} instance arrived damaged: {error}"
        ) from error
    if not tail.rstrip().endswith(b"[DONE]"):
        raise ServeError("worker_failed", f"the {answer.instance.role} instance broke off before the end")
    await response.write(b"", more=False)


def _with_reason(error: EncodeAgainError, transfers: Sequence[Transfer]) -> EncodeAgainError:
    """Returns the same failure with the reason that the consumer has reported, if it has."""
    failures = [transfer.failure for transfer in transfers if transfer.failure is not None]
    if not failures:
        return error
    worst = min(failures, key=lambda failure: failure.retryable)
    return EncodeAgainError(worst.code, worst.detail, status=worst.http_status, retryable=worst.retryable)


class _Parsed:
    """A request as it was read.

    Attributes:
        request: the whole.
        parts: its pictures, videos and sounds.
        characters: the number of those of its texts.
        ignored: the fields that have no effect.
        text_alone: what an instance gets if there are none of these.
    """

    def __init__(self, body: bytes, keeps_names: bool) -> None:
        self.request = parse_request(body)
        check_messages(self.request)
        self.parts = media_parts(self.request)
        self.characters = characters_of(self.request, self.parts)
        self.ignored = ignored_fields(self.request, CHAT, keeps_names=keeps_names)
        self.text_alone: bytes | None = None
        if not self.parts:
            stripped = without_uuids(self.request)
            self.text_alone = body if stripped == self.request else msgspec.json.encode(stripped)
