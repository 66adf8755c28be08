"""Encodes items at instances: each item at one instance, all at the same time, elsewhere if that fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import msgspec

from embferry.serve.errors import ServeError
from embferry.serve.http.answers import read_json
from embferry.serve.http.backends import reason_of
from embferry.serve.http.calls import add_digests
from embferry.serve.http.journal import current_record
from embferry.serve.off_loop import off_loop
from embferry.serve.vllm.client_request import CHAT, ClientRequest
from embferry.serve.vllm.connectors import CONNECTORS, Encoded, UnusableResponseError
from embferry.serve.vllm.early import Offerings
from embferry.serve.vllm.failures import VerbatimError, is_busy, is_unreachable
from embferry.serve.vllm.fitness import Fitness
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.instance import Incarnation, Instance
from embferry.serve.vllm.instance_digests import whole_body
from embferry.serve.vllm.items import Item
from embferry.serve.vllm.losses import ItemError, Losses
from embferry.serve.vllm.media_parts import WORDS, Kind
from embferry.serve.vllm.probe_items import probe_item, probe_picture, probe_sound
from embferry.serve.vllm.refused_items import refused_item
from embferry.trust.digests import DamagedError, content_digest

log = logging.getLogger(__name__)

_FORWARDED = ("model", "mm_processor_kwargs", "media_io_kwargs", "priority")
"""Fields of the client's request that apply to the encode too."""

T = TypeVar("T")


class InstanceFaultError(Exception):
    """An encoder has answered with a status that blames itself. The item may be to blame all the same."""


@dataclass(slots=True)
class _Tries:
    """The tries to encode one item.

    Attributes:
        avoid: URLs of encoders that are asked last.
        tried: encoders that are not asked again.
        failed: one sentence for each failure.
        damaged: encoders from or to which a message arrived damaged.
        faults: how many encoders blamed themselves.
        was_taken: whether an encoder has failed at the item; if not, none could take it.
    """

    request: ClientRequest
    item: Item
    avoid: Collection[str]
    tried: set[Incarnation]
    failed: list[str] = field(default_factory=list)
    damaged: set[Incarnation] = field(default_factory=set)
    faults: int = 0
    was_taken: bool = False


class ItemEncoder:
    """Encodes items at the instances of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.connector = CONNECTORS[fleet.settings.vllm.connector]()
        self.offerings = Offerings()
        self._losses = Losses()
        self.fitness = Fitness(self._why_unfit)

    async def encode(
        self,
        request: ClientRequest,
        item: Item,
        language: Instance | None = None,
        *,
        room: int | None = None,
        avoid: Collection[str] = (),
        never: Collection[Incarnation] = (),
        first: Instance | None = None,
    ) -> Encoded:
        """Encodes one item at one instance after the other until one succeeds.

        Args:
            request: the client's request.
            item: the item.
            language: the instance that will have the embedding, for connectors that need to know.
            room: the room to offer the embedding in; None lets the encoder choose.
            avoid: URLs of encoders that are asked last.
            never: encoders that are not asked at all.
            first: the encoder to ask first, if it is up.

        Raises:
            VerbatimError: an encoder refuses the request as wrong.
            ItemError: image_corrupt, video_corrupt or audio_corrupt, if an encoder cannot read the item, or if encoders
                fail on it and encode another one;
                media_decoder_failed, if two ended during its encode.
            ServeError: no_worker if no encoder can be reached or has capacity, worker_failed if all fail.
        """
        tries = _Tries(request, item, avoid, set(never))
        encoder = first if first is not None and first.up else await self._next(tries)
        while encoder is not None:
            if len(tries.tried) > len(never):
                self.fleet.metrics.encode_retries.inc()
                self.fleet.journal.event("encode_retry", worker=encoder.url)
            incarnation = encoder.incarnation
            tries.tried.add(incarnation)
            try:
                name, entry, transfer_id = await self._try(encoder, request, item, language, room)
            except (httpx.TransportError, InstanceFaultError, DamagedError, UnusableResponseError) as error:
                await self._after(error, encoder, incarnation, tries)
            else:
                self.fleet.metrics.encodes.inc()
                self._losses.forget(item)
                self.fitness.encoded(encoder)
                encoder.remember(item.uuid)
                encoded = Encoded(item, encoder, incarnation, name, entry, transfer_id)
                self.offerings.learn(encoded)
                return encoded
            encoder = await self._next(tries)
        raise _not_encoded(tries, self.fleet.encoders)

    async def _next(self, tries: _Tries) -> Instance | None:
        return await self.fleet.encoder(tries.item.uuid, tries.request.model, tries.tried, tries.avoid)

    async def _try(
        self, encoder: Instance, request: ClientRequest, item: Item, language: Instance | None, room: int | None
    ) -> tuple[str, dict[str, Any], str | None]:
        """Encodes an item at one encoder. Returns and raises as :meth:`_encode_at`."""
        call = current_record().asks("encode", encoder.url, beside_others=True)
        if item.uuid in encoder.encoded:
            self.fleet.metrics.affinity_hits.inc()
        async with self._guarded(item, request):
            with call, self.fleet.count_in_flight(encoder), self.fleet.metrics.encode_seconds.time():
                return await self._encode_at(encoder, request.under(call), item, language, room)

    async def _after(
        self,
        error: httpx.TransportError | InstanceFaultError | DamagedError | UnusableResponseError,
        encoder: Instance,
        incarnation: Incarnation,
        tries: _Tries,
    ) -> None:
        """Records that an encoder has failed on an item, and decides whether it gets the item once more.

        Raises:
            ItemError: the item is to blame.
        """
        if isinstance(error, httpx.TransportError):
            tries.failed.append(self.fleet.failed(encoder, error))
            if _broke_off(error):
                await self._note_if_lost(tries.item, encoder, incarnation, tries.request)
        elif isinstance(error, InstanceFaultError):
            await self._after_fault(error, encoder, incarnation, tries)
        elif isinstance(error, DamagedError):
            tries.failed.append(self.fleet.damaged(encoder, error))
            tries.was_taken = True
            if incarnation not in tries.damaged:  # once more
                tries.damaged.add(incarnation)
                tries.tried.discard(incarnation)
        else:
            tries.failed.append(f"{encoder!r}: {error}")
            log.warning("%s", tries.failed[-1])
            self.fleet.suspect(encoder)
            if not error.is_capacity:
                self.fitness.failed(encoder)
                tries.was_taken = True

    async def _after_fault(
        self, error: InstanceFaultError, encoder: Instance, incarnation: Incarnation, tries: _Tries
    ) -> None:
        """Finds out whether the encoder or the item is to blame, after two faults at the latest.

        Raises:
            ItemError: the item is: an encoder that failed on it encodes another one.
        """
        tries.failed.append(f"{encoder!r}: {error}")
        log.warning("%s", tries.failed[-1])
        self.fitness.failed(encoder)
        tries.faults += 1
        tries.was_taken = True
        if await self._note_if_lost(tries.item, encoder, incarnation, tries.request):
            return
        if tries.faults == 1:
            if await self._next(tries) is None:
                tries.tried.discard(incarnation)  # once more here: there is no other
        elif await self._encodes_another(encoder, tries.request, tries.item.kind):
            raise self._not_encodable(tries.item, str(error)) from error
        else:
            self.fleet.suspect(encoder)

    @contextlib.asynccontextmanager
    async def _guarded(self, item: Item, request: ClientRequest) -> AsyncIterator[None]:
        try:
            async with self._losses.guarded(item, request.lost):
                yield
        except ItemError as error:
            if error.code == "media_decoder_failed":  # not what an instance says about a damaged file
                self.fleet.metrics.media_refused.labels("instances_lost").inc()
                log.warning("refused %s %s: %s", item.kind, item.uuid, error.detail)
            raise

    async def _note_if_lost(
        self, item: Item, encoder: Instance, incarnation: Incarnation, request: ClientRequest
    ) -> bool:
        """Returns whether an instance has ended during the encode of an item; a connection may end without it."""
        if await self.fleet.is_alive(encoder):
            return False
        self._losses.note(item, incarnation, request.lost)
        return True

    async def _encodes_another(self, encoder: Instance, request: ClientRequest, kind: Kind) -> bool:
        """Returns whether an encoder that failed on an item encodes one of the router's own."""
        plain = ClientRequest({"model": request.model} if request.model else {}, request.headers)
        try:
            with self.fleet.count_in_flight(encoder):
                response, _ = await self._post(encoder, plain, probe_item(kind), None)
        except (httpx.TransportError, DamagedError) as error:
            log.warning("%r does not encode the router's own item: %s", encoder, reason_of(error))
            return False
        if response.status_code != 200:
            log.warning("%r does not encode the router's own item: status %s", encoder, response.status_code)
        return response.status_code == 200

    async def _why_unfit(self, encoder: Instance) -> str:
        """Returns why an encoder fails on a picture of the router's own; empty if it does not, or is down or busy.

        One whose model takes no pictures gets a sound.
        """
        if not self.fleet.languages:  # to none of which an embedding could go
            return ""
        model = next(iter(encoder.models), None)
        request = ClientRequest({"model": model} if model else {}, self.fleet.own_headers("fitness"))
        try:
            with self.fleet.count_in_flight(encoder):
                try:
                    await self._encode_at(encoder, request, probe_picture(), self.fleet.languages[0], None)
                except VerbatimError:
                    await self._encode_at(encoder, request, probe_sound(), self.fleet.languages[0], None)
        except InstanceFaultError as error:
            return str(error)
        except UnusableResponseError as error:
            return "" if error.is_capacity else str(error)
        except (httpx.TransportError, DamagedError, VerbatimError, ServeError) as error:
            log.debug("%r could not be tested: %s", encoder, error)
        return ""

    def _not_encodable(self, item: Item, why: str) -> ItemError:
        self.fleet.metrics.media_refused.labels("not_encodable").inc()
        another = WORDS["audio" if item.kind == "audio" else "image"]
        text = f"the {WORDS[item.kind]} cannot be encoded, by instances that encode another {another}: {why}"
        log.warning("refused %s %s: %s", item.kind, item.uuid, text)
        return ItemError(f"{item.kind}_corrupt", text, item)

    async def _encode_at(
        self, encoder: Instance, request: ClientRequest, item: Item, language: Instance | None, room: int | None
    ) -> tuple[str, dict[str, Any], str | None]:
        """Returns the encoder's name for the item, the item's entry, and the transfer's name."""
        params, transfer_id = self.connector.encode_params(language, room)
        response, answer = await self._post(encoder, request, item, params)
        status = response.status_code
        if self.fleet.is_refused(status):
            raise UnusableResponseError("it refuses the router's API key")
        if status != 200:
            if 400 <= status < 500 and not is_busy(status):
                raise refused_item(item, answer, request.content) or VerbatimError.of(response, answer)
            why = f"status {status}: {answer[:300].decode(errors='replace')}"
            if is_busy(status):
                raise UnusableResponseError(why, is_capacity=True)
            raise InstanceFaultError(why)
        name, entry = _only_entry(answer)
        self.connector.check(entry)
        return name, entry, transfer_id

    async def _post(
        self, encoder: Instance, request: ClientRequest, item: Item, params: dict[str, Any] | None
    ) -> tuple[httpx.Response, bytes]:
        """Asks an encoder to encode an item. Returns its response, and the body."""
        body: dict[str, Any] = {name: request.content[name] for name in _FORWARDED if name in request.content}
        body |= {"messages": [{"role": "user", "content": [item.part()]}], "max_tokens": 1, "stream": False}
        body |= {"ec_transfer_params": params} if params else {}
        settings = self.fleet.settings
        timeout = httpx.Timeout(settings.vllm.encode_timeout, connect=settings.router.connect_timeout)
        headers = {**request.headers, "X-Request-Id": f"{request.headers['X-Request-Id']}-{item.uuid[:8]}"}
        content = await off_loop(len(item.url), msgspec.json.encode, body)
        post = self.fleet.client.build_request(
            "POST", encoder.url + CHAT, content=content, headers=headers, timeout=timeout
        )
        add_digests(post, await off_loop(len(content), content_digest, content))
        request.on_encode()
        async with self.fleet.unless_stalled(encoder):
            return await self._answer(encoder, post)

    async def _answer(self, encoder: Instance, post: httpx.Request) -> tuple[httpx.Response, bytes]:
        response = await self.fleet.send(encoder, post)
        try:
            return response, await whole_body(response)
        finally:
            await response.aclose()


async def gather_or_cancel(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Returns all results. The first failure cancels the others, and its exception is raised unchanged."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


def _broke_off(error: httpx.TransportError) -> bool:
    """Returns whether the instance had the item when the connection ended."""
    return not is_unreachable(error) and not isinstance(error, httpx.TimeoutException)


def _only_entry(answer: bytes) -> tuple[str, dict[str, Any]]:
    """Returns name and entry of the only item. Raises UnusableResponseError unless there is exactly one."""
    try:
        ((name, entry),) = read_json(answer)["ec_transfer_params"].items()
        if not isinstance(entry.get("metadata"), dict | None):
            raise TypeError("metadata is no object")
        return name, dict(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = "the answer has no ec_transfer_params for the item; is the instance started as ec_producer?"
        raise UnusableResponseError(why) from error


def _not_encoded(tries: _Tries, encoders: Sequence[Instance]) -> ServeError:
    if tries.failed:
        code = "worker_failed" if tries.was_taken else "no_worker"
        return ServeError(code, f"the item could not be encoded: {'; '.join(tries.failed)}")
    down = "; ".join(f"{one.url} {one.trouble}" for one in encoders if not one.up) or "all have been tried"
    return ServeError("no_worker", f"no encode instance is available: {down}")
