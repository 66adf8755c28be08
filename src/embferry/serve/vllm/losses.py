"""Instances that were lost while they encoded an item: an item that has cost two is given to no other.

A file can end the process that decodes it. What else the instance was encoding is innocent, and looks the same. So an
item that was there when an instance ended is encoded elsewhere, and not beside another such item: if that one ends the
next instance, too, it does not take the innocent with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Set

from embferry.serve.errors import ServeError
from embferry.serve.vllm.instance import Incarnation
from embferry.serve.vllm.items import Item
from embferry.serve.vllm.media_parts import WORDS

log = logging.getLogger(__name__)

MOST = 2
"""Instances that may be lost with an item."""
REMEMBERED_SECONDS = 600.0
MAX_REMEMBERED = 10_000
"""Items that are remembered, the latest ones."""


class ItemError(ServeError):
    """An error of one item of a request: the item is to blame, not an instance."""

    def __init__(self, code: str, detail: str, item: Item) -> None:
        super().__init__(code, detail)
        self.item = item


class Losses:
    """The items of all requests with which instances were lost.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lost: OrderedDict[str, tuple[float, frozenset[Incarnation]]] = OrderedDict()
        self._alone = asyncio.Lock()

    def note(self, item: Item, incarnation: Incarnation, of_request: set[Incarnation]) -> None:
        """Notes that an instance has ended during the encode of an item, also in those lost with its request."""
        of_request.add(incarnation)
        lost = self._of(item) | {incarnation}
        self._lost[item.uuid] = (self._clock() + REMEMBERED_SECONDS, lost)
        self._lost.move_to_end(item.uuid)
        if len(self._lost) > MAX_REMEMBERED:
            self._lost.popitem(last=False)
        log.warning("an encode instance ended while it encoded %s %s", item.kind, item.uuid, extra={"lost": len(lost)})

    def forget(self, item: Item) -> None:
        """Forgets the losses with an item that has been encoded."""
        self._lost.pop(item.uuid, None)

    @contextlib.asynccontextmanager
    async def guarded(self, item: Item, of_request: Set[Incarnation] = frozenset()) -> AsyncIterator[None]:
        """Lasts for one encode of an item. One with a loss waits for those of other such items.

        Raises:
            ItemError: media_decoder_failed, if the item or its request has cost ``MOST`` instances.
        """
        self._check(item, of_request)
        if not self._of(item):
            yield
            return
        async with self._alone:
            self._check(item, of_request)
            yield

    def _check(self, item: Item, of_request: Set[Incarnation]) -> None:
        lost = max(self._of(item), of_request, key=len)
        if len(lost) >= MOST and self._of(item):
            where = " and ".join(sorted({url for url, _ in lost}))
            word = WORDS[item.kind]
            what = f"this {word}" if lost is not of_request else f"this {word} and others of its request"
            why = f"{len(lost)} instances ended while they encoded {what} ({where}), so it is given to no other"
            raise ItemError("media_decoder_failed", f"{why}; send it in another format", item)

    def _of(self, item: Item) -> frozenset[Incarnation]:
        until, lost = self._lost.get(item.uuid, (0.0, frozenset[Incarnation]()))
        if lost and until <= self._clock():
            del self._lost[item.uuid]
            return frozenset()
        return lost
