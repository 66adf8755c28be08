"""Slots that the clients of a process share, for work on the event loop that waits for others, such as fetches."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator

from embferry.serve.shared_threads import current_client


class SharedSlots:
    """A number of slots, and a queue for each client. For one event loop.

    A client gets a further slot only while more are free than it has, so that no client, however many it asks for,
    keeps all others waiting. Of several that wait, the client with the fewest slots is next.

    Args:
        count: slots.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of turns; no queue is empty
        self._held: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Waits for a slot of the current client, and holds it while the context lasts."""
        client, turn = current_client(), asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._forget(client, turn)
            else:
                self._take_back(client)  # it was given at the same time
            raise
        try:
            yield
        finally:
            self._take_back(client)

    def _give(self) -> None:
        while (client := min(self._waiting, key=self._held.__getitem__, default=None)) is not None:
            if self._held[client] >= self._free:
                return
            turn = self._waiting[client][0]
            self._forget(client, turn)
            if not turn.cancelled():
                self._free -= 1
                self._held[client] += 1
                turn.set_result(None)

    def _take_back(self, client: str) -> None:
        self._free += 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._give()

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        """Removes a turn, and puts its client behind the others."""
        queue = self._waiting.pop(client, deque())
        with contextlib.suppress(ValueError):
            queue.remove(turn)
        if queue:
            self._waiting[client] = queue
