"""Deduplication: an item that a language instance has received, or is about to, is not encoded again for it.

The cache is a guess about each instance's own cache. An instance that has dropped an embedding asks for it with the
item's token (:mod:`.failover`), and then it is encoded. So no answer depends on the guess, only how long it takes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embferry.protocol.layout import ITEM_BYTES
from embferry.serve.vllm.connectors import KEY, Encoded
from embferry.serve.vllm.fleet import Incarnation, Instance
from embferry.serve.vllm.item_encoder import ClientRequest, ItemEncoder, gather_or_cancel
from embferry.serve.vllm.items import Item

log = logging.getLogger(__name__)

MAX_KEPT = 512
"""The most embeddings that the connector keeps, regardless of their size."""


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


class _Received:
    """The latest items of one incarnation of an instance.

    Attributes:
        encoding: items that are being encoded, and an event that is set at the end of it.
        asks: the instance asks for items that it no longer has, as far as we know.
    """

    def __init__(self) -> None:
        self.entries: OrderedDict[str, _Entry] = OrderedDict()
        self.encoding: dict[str, asyncio.Event] = {}
        self.nbytes = 0
        self.asks = True

    def put(self, entry: _Entry, budget: int) -> None:
        uuid = entry.encoded.item.uuid
        self.drop(uuid)
        if nbytes_of(entry.encoded) > budget:
            return
        self.entries[uuid] = entry
        self.nbytes += nbytes_of(entry.encoded)
        while self.nbytes > budget or len(self.entries) > MAX_KEPT:
            self.drop(next(iter(self.entries)))

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

    def count(self, language: Instance, items: Collection[Item]) -> int:
        """Returns how many of these items the instance has received or is about to."""
        received = self._received.get(language.incarnation)
        return 0 if received is None else sum(item.uuid in received.entries for item in items)

    async def encode_all(
        self,
        request: ClientRequest,
        items: Sequence[Item],
        language: Instance | None,
        avoid: Collection[str],
        *,
        ignore_cache: bool,
    ) -> list[Encoded]:
        """Encodes, at the same time, the items that ``language`` has not received. A failure cancels the others.

        Args:
            request: the client's request.
            items: all different.
            language: the instance that will have the embeddings, for connectors that need to know.
            avoid: URLs of encoders that are asked last.
            ignore_cache: encodes all items.

        Raises:
            VerbatimError, ServeError: as :meth:`ItemEncoder.encode`.
        """
        received = None if language is None or ignore_cache or not self._budget else self._received_by(language)
        if received is not None and not received.asks:
            received = None
        try:
            return await gather_or_cancel(*(self._encode(request, item, language, avoid, received) for item in items))
        except BaseException:  # nothing fetches the items that were offered to this request
            if received is not None:
                for item in items:
                    if (entry := received.entries.get(item.uuid)) is not None and not entry.arrived:
                        received.drop(item.uuid)
            raise

    def arrived(self, language: Instance, encoded: Sequence[Encoded]) -> None:
        """Notes that the instance has begun to answer with these items."""
        for one in encoded:
            self._received_by(language).put(_Entry(_copied(one), arrived=True), self._budget)

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
    ) -> Encoded:
        if received is None:
            return await self._encoder.encode(request, item, language, avoid=avoid)
        if (encoding := received.encoding.get(item.uuid)) is not None:
            await encoding.wait()  # for its end; it may have failed
        if (entry := received.entries.get(item.uuid)) is not None:
            received.entries.move_to_end(item.uuid)
            return entry.for_request(item)
        received.encoding[item.uuid] = mine = asyncio.Event()
        try:
            encoded = await self._encoder.encode(request, item, language, avoid=avoid)
            received.put(_Entry(_copied(encoded)), self._budget)
            return encoded
        finally:
            mine.set()
            if received.encoding.get(item.uuid) is mine:
                del received.encoding[item.uuid]

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
