"""Items that come again: for an instance that has received one, or is about to, it is not encoded once more.

What is known here is a guess. An instance that has given an embedding up asks for it, with the token that the item has
(:mod:`.transfers`), and then it is encoded. So no answer depends on the guess, only on how long it takes.
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
from embferry.serve.vllm.encoding import Asked, Encoding, together
from embferry.serve.vllm.fleet import Instance, Life
from embferry.serve.vllm.intake import Item

log = logging.getLogger(__name__)

MAX_KEPT = 512
"""As many as the connector keeps at most, whatever their size."""


@dataclass(slots=True)
class _Known:
    """``arrived``: it has been received. Until then its room is that of the request that had it encoded."""

    encoded: Encoded
    arrived: bool = False

    def again(self, item: Item) -> Encoded:
        entry = {**self.encoded.entry}
        if self.arrived:
            entry[KEY] = {**entry[KEY], "endpoint": None, "room": secrets.randbits(63)}
        return replace(self.encoded, item=item, entry=entry, repeated=True)


class _Received:
    """By one instance, in one of its lives: the latest ones."""

    def __init__(self) -> None:
        self.known: OrderedDict[str, _Known] = OrderedDict()
        self.making: dict[str, asyncio.Event] = {}
        self.nbytes = 0
        self.asks = True

    def put(self, known: _Known, budget: int) -> None:
        self.drop(known.encoded.item.uuid)
        if nbytes_of(known.encoded) > budget:
            return
        self.known[known.encoded.item.uuid] = known
        self.nbytes += nbytes_of(known.encoded)
        while self.nbytes > budget or len(self.known) > MAX_KEPT:
            self.drop(next(iter(self.known)))

    def drop(self, uuid: str) -> None:
        known = self.known.pop(uuid, None)
        self.nbytes -= nbytes_of(known.encoded) if known is not None else 0


class Repeats:
    """For the instances that answer. ``budget``: bytes of embeddings that each keeps; with 0, everything is encoded."""

    def __init__(self, encoding: Encoding, budget: int) -> None:
        self._encoding = encoding
        self._budget = budget
        self._received: dict[Life, _Received] = {}

    def count(self, language: Instance, items: Collection[Item]) -> int:
        """Of these, those that the instance has or is about to have."""
        received = self._received.get(language.life)
        return 0 if received is None else sum(item.uuid in received.known for item in items)

    async def all(
        self, asked: Asked, items: Sequence[Item], language: Instance, avoid: Collection[str], *, encode: bool
    ) -> list[Encoded]:
        """As :meth:`Encoding.all`, for the instance ``language``. ``encode``: whether to encode in any case."""
        received = self._of(language)
        if encode or not received.asks or not self._budget:
            return await self._encoding.all(asked, items, language, avoid)
        try:
            return await together(*(self._one(asked, item, language, avoid, received) for item in items))
        except BaseException:  # what it had offered for itself, nobody will fetch
            for item in items:
                if (known := received.known.get(item.uuid)) is not None and not known.arrived:
                    received.drop(item.uuid)
            raise

    def arrived(self, language: Instance, encoded: Sequence[Encoded]) -> None:
        """The instance has begun to answer with these."""
        for one in encoded:
            self._of(language).put(_Known(_bare(one), arrived=True), self._budget)

    def forget(self, language: Instance, encoded: Sequence[Encoded]) -> None:
        """Of these nothing is known any more."""
        for one in encoded:
            self._of(language).drop(one.item.uuid)

    def distrust(self, language: Instance) -> None:
        """It neither has an item that it should have nor asks for it. Nothing of the kind is expected of it again."""
        log.warning("%r does not ask for what it no longer has: has its connector the address of `router`?", language)
        self._of(language).asks = False

    async def _one(
        self, asked: Asked, item: Item, language: Instance, avoid: Collection[str], received: _Received
    ) -> Encoded:
        if (making := received.making.get(item.uuid)) is not None:
            await making.wait()  # whatever came of it
        if (known := received.known.get(item.uuid)) is not None:
            received.known.move_to_end(item.uuid)
            return known.again(item)
        received.making[item.uuid] = mine = asyncio.Event()
        try:
            encoded = await self._encoding.one(asked, item, language, avoid=avoid)
            received.put(_Known(_bare(encoded)), self._budget)
            return encoded
        finally:
            mine.set()
            if received.making.get(item.uuid) is mine:
                del received.making[item.uuid]

    def _of(self, language: Instance) -> _Received:
        if language.life not in self._received:
            for life in [life for life in self._received if life[0] == language.url]:
                del self._received[life]
            self._received[language.life] = _Received()
        return self._received[language.life]


def nbytes_of(encoded: Encoded) -> int:
    """Of its embedding."""
    where: dict[str, Any] = encoded.entry[KEY]
    return int(where["tokens"]) * int(where["width"]) * ITEM_BYTES.get(where["dtype"], 8)


def _bare(encoded: Encoded) -> Encoded:
    """To be kept: nobody else changes its entry."""
    return replace(encoded, entry={**encoded.entry, KEY: {**encoded.entry[KEY]}})
