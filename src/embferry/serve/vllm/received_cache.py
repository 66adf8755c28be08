"""Deduplication: an item that a language instance has received, or is about to, is not encoded again for it.

The cache is a guess about each instance's own cache. An instance that has dropped an embedding asks for it with the
item's token (:mod:`.failover`), and then it is encoded. So no answer depends on the guess, only how long it takes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from embferry.protocol.errors import EmbferryError
from embferry.protocol.layout import ITEM_BYTES
from embferry.serve.errors import ServeError
from embferry.serve.vllm.client_request import ClientRequest
from embferry.serve.vllm.connectors import KEY, Encoded
from embferry.serve.vllm.failures import VerbatimError
from embferry.serve.vllm.instance import Incarnation, Instance
from embferry.serve.vllm.item_encoder import ItemEncoder, gather_or_cancel
from embferry.serve.vllm.items import Item

log = logging.getLogger(__name__)

MAX_KEPT = 512
"""The most embeddings that the connector keeps, regardless of their size."""
MAX_ANSWERED, MAX_METADATA = 4096, 8192
"""Items that an instance has answered with and may have forgotten, and the bytes of the metadata of one."""
MAX_WRONG, TRY_AGAIN = 4, 16
"""After so many items in a row that the prefix cache of an instance did not cover, one of so many is tried."""


@dataclass(slots=True)
class _Entry:
    """One item. Until it has ``arrived``, its room is that of the request that had it encoded."""

    encoded: Encoded
    arrived: bool = False

    def for_request(self, item: Item) -> Encoded:
        """Returns the item for another request, in a room of its own and without an endpoint once it has arrived."""
        entry = {**self.encoded.entry}
        if self.arrived:
            entry[KEY] = {**entry[KEY], "endpoint": None, "room": secrets.randbits(63)}
        return replace(self.encoded, item=item, entry=entry, repeated=True)


class _SharedEncode:
    """An encode that several requests may wait for. It goes on as long as one of them does.

    Args:
        encode: the work.
        on_end: called when it has ended, or nothing waits for it any more.
    """

    def __init__(self, encode: Coroutine[Any, Any, Encoded], on_end: Callable[[], object]) -> None:
        self._task, self._on_end = asyncio.create_task(encode), on_end
        self._task.add_done_callback(lambda _: on_end())
        self._waiting = 0

    async def result(self) -> Encoded:
        """Returns a copy of the encoded item. Raises what the encode raises."""
        self._waiting += 1
        try:
            return _copied(await asyncio.shield(self._task))
        except EmbferryError as error:  # each request says in it where its item is
            raise error.copied() from error
        finally:
            self._waiting -= 1
            if not self._waiting and not self._task.done():
                self._task.cancel()  # closes the connection to the encoder, which then aborts
                self._on_end()  # now: no other request may wait for it


class _Received:
    """The latest items of one incarnation of an instance.

    Attributes:
        encoding: encodes under way, by item.
        asks: the instance asks for items that it no longer has, as far as we know.
        answered: items of requests that it has answered, by what was before their end in the prompt, the latest last.
        wrong: how often in a row its prefix cache did not cover such an item.
    """

    def __init__(self) -> None:
        self.entries: OrderedDict[str, _Entry] = OrderedDict()
        self.encoding: dict[str, _SharedEncode] = {}
        self.nbytes = 0
        self.asks = True
        self.answered: OrderedDict[bytes, Encoded] = OrderedDict()
        self.wrong = self.skipped = 0

    def put(self, entry: _Entry, budget: int) -> None:
        uuid = entry.encoded.item.uuid
        entry.encoded = _without_file(entry.encoded)
        self.drop(uuid)
        if nbytes_of(entry.encoded) > budget:
            return
        self.entries[uuid] = entry
        self.nbytes += nbytes_of(entry.encoded)
        while self.nbytes > budget or len(self.entries) > MAX_KEPT:
            self.drop(next(iter(self.entries)))

    def answer(self, prefix: bytes, encoded: Encoded) -> None:
        """Notes that the instance has answered a request with this item."""
        self.answered.pop(prefix, None)
        if _metadata_bytes(encoded) <= MAX_METADATA:
            self.answered[prefix] = _without_file(encoded)
        while len(self.answered) > MAX_ANSWERED:
            self.answered.popitem(last=False)

    def guess(self, prefix: bytes | None) -> Encoded | None:
        """Returns the item that the prefix cache of the instance may cover; none while it often does not."""
        found = None if prefix is None else self.answered.get(prefix)
        if found is None or self.wrong < MAX_WRONG:
            return found
        self.skipped += 1
        return found if self.skipped % TRY_AGAIN == 0 else None

    def drop(self, uuid: str) -> None:
        entry = self.entries.pop(uuid, None)
        self.nbytes -= nbytes_of(entry.encoded) if entry is not None else 0


class ReceivedCache:
    """The items that each language instance has received."""

    def __init__(self, encoder: ItemEncoder) -> None:
        self._encoder = encoder
        settings = encoder.fleet.settings.vllm
        self._budget = settings.received_bytes if settings.connector == "embferry" else 0
        self._received: dict[Incarnation, _Received] = {}

    def count(self, language: Instance, request: ClientRequest, items: Collection[Item]) -> int:
        """Returns how many of these items the instance has received, is about to, or may have in its prefix cache."""
        received = self._received.get(language.incarnation)
        if received is None:
            return 0
        return sum(one.uuid in received.entries or request.prefixes.get(one.uuid) in received.answered for one in items)

    async def encode_all(
        self,
        request: ClientRequest,
        items: Sequence[Item],
        language: Instance | None,
        avoid: Collection[str],
        *,
        ignore_cache: bool,
        expected: Mapping[str, Encoded] | None = None,
    ) -> list[Encoded]:
        """Encodes, at the same time, the items that ``language`` has not received. A failure cancels the others.

        Args:
            request: the client's request.
            items: all different.
            language: the instance that will have the embeddings, for connectors that need to know.
            avoid: URLs of encoders that are asked last.
            ignore_cache: encodes all items.
            expected: how each item, by its uuid, is to be offered, if that can be. None: in any way.

        Raises:
            VerbatimError, ServeError: as :meth:`ItemEncoder.encode`.
        """
        received = None if ignore_cache else self._usable(language)
        wanted = expected or {}
        try:
            return await gather_or_cancel(
                *(self._encode(request, item, language, avoid, received, wanted.get(item.uuid)) for item in items)
            )
        except BaseException:  # nothing fetches the items that were offered to this request
            if received is not None:
                for item in items:
                    if (entry := received.entries.get(item.uuid)) is not None and not entry.arrived:
                        received.drop(item.uuid)
            raise

    def known(self, request: ClientRequest, items: Sequence[Item], language: Instance) -> dict[str, Encoded] | None:
        """Returns, by uuid, the items that need not be encoded, as this request will name them.

        Returns:
            None if one of the others is being encoded for another request.
        """
        found: dict[str, Encoded] = {}
        if (received := self._usable(language)) is None:
            return found
        for item in items:
            if (entry := received.entries.get(item.uuid)) is not None:
                found[item.uuid] = entry.for_request(item)
            elif item.uuid in received.encoding:
                return None
            elif (guessed := received.guess(request.prefixes.get(item.uuid))) is not None:
                found[item.uuid] = replace(_Entry(guessed, arrived=True).for_request(item), by_prefix=True)
        return found

    def arrived(
        self, language: Instance, request: ClientRequest, sent: Sequence[Encoded], used: Sequence[Encoded]
    ) -> None:
        """Notes that the instance has begun to answer.

        Args:
            language: the instance.
            request: the client's request.
            sent: the items that it was sent.
            used: the same, or what the instance has asked for in their place.
        """
        received = self._received_by(language)
        for before, after in zip(sent, used, strict=True):
            if before.by_prefix:
                received.wrong = 0 if after.by_prefix else received.wrong + 1
            if not after.by_prefix:  # otherwise the instance has the keys and values, and not the embedding
                received.put(_Entry(_copied(after), arrived=True), self._budget)
            received.answer(request.prefixes[after.item.uuid], _copied(after))

    def forget(self, language: Instance, encoded: Sequence[Encoded]) -> None:
        """Forgets whether the instance has these items."""
        for one in encoded:
            self._received_by(language).drop(one.item.uuid)

    def distrust(self, language: Instance) -> None:
        """Encodes everything for this instance from now on: it lacked an item and did not ask for it."""
        log.warning("%r does not ask for items it no longer has; does its connector have `router` set?", language)
        self._received_by(language).asks = False

    async def _encode(
        self,
        request: ClientRequest,
        item: Item,
        language: Instance | None,
        avoid: Collection[str],
        received: _Received | None,
        expected: Encoded | None,
    ) -> Encoded:
        first, room = (None, None) if expected is None else (expected.encoder, expected.entry[KEY]["room"])
        if received is None:
            return await self._encoder.encode(request, item, language, room=room, avoid=avoid, first=first)
        if expected is not None and expected.by_prefix:
            return expected
        may_try_again = True
        while True:
            if (entry := received.entries.get(item.uuid)) is not None:
                received.entries.move_to_end(item.uuid)
                return expected if expected is not None and expected.repeated else entry.for_request(item)
            under_way = received.encoding.get(item.uuid)
            if under_way is None and (known := received.guess(request.prefixes.get(item.uuid))) is not None:
                return replace(_Entry(known, arrived=True).for_request(item), by_prefix=True)
            is_mine = under_way is None
            if under_way is None:
                under_way = self._begin(request, item, language, avoid, received, expected)
            try:
                encoded = await under_way.result()
                return encoded if is_mine else _Entry(encoded).for_request(item)
            except (ServeError, VerbatimError):
                if is_mine or not may_try_again:
                    raise
                may_try_again = False  # that of another request has failed; once more, for this one

    def _begin(
        self,
        request: ClientRequest,
        item: Item,
        language: Instance | None,
        avoid: Collection[str],
        received: _Received,
        expected: Encoded | None,
    ) -> _SharedEncode:
        """Begins an encode that other requests may share."""
        first, room = (None, None) if expected is None else (expected.encoder, expected.entry[KEY]["room"])

        async def encode() -> Encoded:
            encoded = await self._encoder.encode(request, item, language, room=room, avoid=avoid, first=first)
            received.put(_Entry(_copied(encoded)), self._budget)
            return encoded

        def ended() -> None:
            if received.encoding.get(item.uuid) is shared:
                del received.encoding[item.uuid]

        shared = received.encoding[item.uuid] = _SharedEncode(encode(), ended)
        return shared

    def _usable(self, language: Instance | None) -> _Received | None:
        """Returns what an instance has received, if that may be relied upon."""
        received = None if language is None or not self._budget else self._received_by(language)
        return None if received is None or not received.asks else received

    def _received_by(self, language: Instance) -> _Received:
        incarnation = language.incarnation
        if incarnation not in self._received:
            for old in [old for old in self._received if old[0] == language.url]:
                del self._received[old]
            self._received[incarnation] = _Received()
        return self._received[incarnation]


def nbytes_of(encoded: Encoded) -> int:
    """Returns the bytes of the item's embedding."""
    where: dict[str, Any] = encoded.entry[KEY]
    return int(where["tokens"]) * int(where["width"]) * ITEM_BYTES.get(where["dtype"], 8)


def _copied(encoded: Encoded) -> Encoded:
    """Returns a copy with an entry of its own: failover changes the entries of a request."""
    return replace(encoded, entry={**encoded.entry, KEY: {**encoded.entry[KEY]}})


def _without_file(encoded: Encoded) -> Encoded:
    """Returns a copy that does not keep the file in memory."""
    return replace(encoded, item=replace(encoded.item, url=""), by_prefix=False)


def _metadata_bytes(encoded: Encoded) -> int:
    return len(msgspec.json.encode(encoded.entry))
