"""The encode side's engines: one for each session that is written to, so that a failure harms that session alone."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ...protocol.errors import TransportError
from ..courier import Courier
from ..flights import Cargo, Flights, Slice
from .manager import OpenEngine

log = logging.getLogger(__name__)

MAX_IDLE = 16  # engines kept for sessions that nothing is written to

Over = Callable[[str], None]
"""Told once that a write is over, on any thread; with why its bytes are not there, or with nothing."""


@dataclass(eq=False, slots=True)
class _Road:
    courier: Courier | None = None
    under_way: dict[int, Over] = field(default_factory=dict)
    error: str = "the encode side is ending"
    ended: bool = False


class Roads:
    """Thread-safe.

    A write that failed leaves its session usable: :class:`~..flights.Flights` exchanges the engine as soon as nothing
    is under way, and an engine that is stuck or did not start is replaced at the next write.
    """

    def __init__(self, open_engine: OpenEngine, register_sources: bool) -> None:
        self._open_engine, self._register_sources = open_engine, register_sources
        self._keys = itertools.count(1)
        self._lock = threading.Lock()
        self._roads: OrderedDict[str, _Road] = OrderedDict()
        self._retired: set[_Road] = set()
        self._closed = False

    def write(self, session: str, slices: list[Slice], source: object, over: Over) -> None:
        """Begins to write; ``over`` is told when no byte of ``source`` is read any more, and never before.

        :param slices: from which address of ours to which of theirs, how many bytes.
        """
        cargo = Cargo(next(self._keys), 0, slices, source)
        with self._lock:
            closed = self._closed
            if not closed:
                road = self._road(session)
                road.under_way[cargo.key] = over
                assert road.courier is not None
                road.courier.carry(cargo)
        if closed:
            over("the encode side is ending")

    def forget(self, session: str) -> None:
        """What was learned of the engine at this address is no longer true."""
        with self._lock:
            road = self._roads.pop(session, None)
            if road is not None:
                self._retire(road)

    def close(self) -> None:
        """Ends every engine, then says of each write that it is over. Idempotent."""
        with self._lock:
            self._closed = True
            roads = [*self._roads.values(), *self._retired]
            self._roads.clear()
            for road in roads:
                self._retire(road)
        for road in roads:
            if road.courier is not None:
                road.courier.join()

    def _road(self, session: str) -> _Road:
        road = self._roads.get(session)
        if road is None or road.ended:
            road = self._roads[session] = _Road()
            flights = partial(Flights, self._open_engine, session, self._register_sources)
            road.courier = Courier(
                flights, partial(self._carried, road), partial(self._broken, road), partial(self._ended, road)
            )
            road.courier.start()
        self._roads.move_to_end(session)
        idle = [name for name, other in self._roads.items() if not other.under_way and other is not road]
        for name in idle[: max(0, len(idle) - MAX_IDLE)]:
            self._retire(self._roads.pop(name))
        return road

    def _retire(self, road: _Road) -> None:
        self._retired.add(road)
        if road.courier is not None:
            road.courier.quit()

    # On a courier's thread

    def _carried(self, road: _Road, cargo: Cargo) -> None:
        with self._lock:
            over = road.under_way.pop(cargo.key)
        over("" if cargo.whole and cargo.clean else "the Mooncake engine could not carry it all; its log says why")

    def _broken(self, road: _Road, error: TransportError) -> None:
        log.warning("an engine is given up: %s", error.detail)
        road.error = error.detail

    def _ended(self, road: _Road) -> None:
        with self._lock:
            road.ended = True
            self._retired.discard(road)
            left, road.under_way = list(road.under_way.values()), {}
        for over in left:
            over(road.error)
