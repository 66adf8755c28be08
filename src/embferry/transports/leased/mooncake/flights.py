"""What one engine of a sender has under way.

A write is cut into slices of at most :data:`SLICE_BYTES`; writes take turns, slice by slice, so that a small one does
not wait for a large one.

After a failure the engine is exchanged for a new one as soon as nothing is under way. The old one remembers connections
that failed, and for a second answers everything with failure; and it keeps what it once learned of the peer for good.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from embferry.protocol.errors import TransportError

from .engine import Engine
from .sources import Sources

log = logging.getLogger(__name__)

SLICE_BYTES = 4 << 20
IN_FLIGHT = 64  # slices; the engine queues what its connections cannot take, but not without limit
IN_FLIGHT_BYTES = 32 << 20  # what cannot be stopped any more
PAUSE_FRACTION = 1 / 24
MIN_PAUSE_S, MAX_PAUSE_S = 50e-6, 2e-3

Slice = tuple[int, int, int]
"""Where it comes from, how far into the region it goes, how long it is."""


@dataclass(eq=False, slots=True)
class Cargo:
    """One write.

    ``stage``: the receiver has been asked, has let it in, has been told of its end.
    """

    key: int
    epoch: int
    spans: list[Slice]
    source: object
    """Keeps the memory alive."""
    stage: Literal["asked", "inside", "left"] = "asked"
    base: int = 0
    slices: deque[Slice] = field(default_factory=deque)
    in_flight: int = 0
    whole: bool = True
    """Nothing was left out."""
    clean: bool = True
    """Every slice that was begun has been applied."""

    def cut(self) -> None:
        for source, offset, length in self.spans:
            for at in range(0, length, SLICE_BYTES):
                self.slices.append((source + at, offset + at, min(SLICE_BYTES, length - at)))

    def drop(self) -> None:
        """Begins nothing more."""
        self.whole = self.whole and not self.slices
        self.slices.clear()


class Flights:
    """For one thread.

    :param segment: the peer's name among engines.
    :param register_sources: the engine reads from registered memory only.
    :param on_carried: told of each cargo that is over, once.
    :raises TransportError: there is no engine to be had.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        segment: str,
        register_sources: bool,
        on_carried: Callable[[Cargo], None],
    ) -> None:
        self._open_engine, self._segment, self._on_carried = open_engine, segment, on_carried
        self._engine = open_engine()
        self._sources = Sources(self._engine) if register_sources else None
        self._turns: deque[Cargo] = deque()
        self._flying: dict[int, tuple[Cargo, int, float]] = {}  # ticket: cargo, length, since when; oldest first
        self._failed = False

    def close(self) -> None:
        """Ends the engine: no source is read any more."""
        self._engine.close()

    def load(self, cargo: Cargo) -> None:
        cargo.cut()
        if self._sources is not None:
            try:
                self._sources.take(cargo.spans)
            except TransportError as error:
                log.warning("a write cannot begin: %s", error)
                cargo.drop()
                self._on_carried(cargo)
                return
        self._turns.append(cargo)

    def drop(self, epochs: set[int]) -> None:
        """Begins nothing more under these."""
        for cargo in [cargo for cargo in self._turns if cargo.slices and cargo.epoch in epochs]:
            cargo.drop()
            self._finish_if_over(cargo)

    def advance(self) -> bool:
        """Hands slices to the engine, and takes in what has become of others. Whether anything has.

        :raises TransportError: the engine is stuck, or no new one is to be had."""
        if self._failed and not self._flying:
            self._exchange()
        if not self._failed:
            self._submit()
        return self._look()

    def pause(self) -> float | None:
        """How long to do something else, seconds; None: as long as you like.

        The engine cannot be waited for. So the pause is a fraction of the time the oldest slice has taken until now:
        that is the most it adds."""
        if not self._flying:
            return 0.0 if self._turns else None
        _, _, began = next(iter(self._flying.values()))
        return min(MAX_PAUSE_S, max(MIN_PAUSE_S, (time.monotonic() - began) * PAUSE_FRACTION))

    def _submit(self) -> None:
        room = IN_FLIGHT_BYTES - sum(length for _, length, _ in self._flying.values())
        while self._turns and room > 0 and len(self._flying) < IN_FLIGHT:
            cargo = self._turns.popleft()
            if not cargo.slices:  # dropped
                continue
            source, offset, length = cargo.slices.popleft()
            ticket = self._engine.submit(self._segment, source, cargo.base + offset, length)
            if ticket:
                self._flying[ticket] = (cargo, length, time.monotonic())
                cargo.in_flight += 1
                room -= length
            else:
                self._failed = True
                cargo.whole = False
                cargo.drop()
                self._finish_if_over(cargo)
            if cargo.slices:
                self._turns.append(cargo)

    def _look(self) -> bool:
        before = len(self._flying)
        for ticket, (cargo, _, _) in list(self._flying.items()):
            outcome = self._engine.outcome(ticket)
            if outcome == 0:
                continue
            if outcome == -2:
                raise TransportError("the Mooncake engine's own time limit passed with a write under way")
            del self._flying[ticket]
            cargo.in_flight -= 1
            if outcome != 1:
                self._failed = True
                cargo.clean = cargo.whole = False
                cargo.drop()
            self._finish_if_over(cargo)
        return len(self._flying) < before

    def _finish_if_over(self, cargo: Cargo) -> None:
        if not cargo.slices and not cargo.in_flight:
            if self._sources is not None:
                self._sources.give_back(cargo.spans)
            self._on_carried(cargo)

    def _exchange(self) -> None:
        self._engine.close()
        self._engine = self._open_engine()
        if self._sources is not None:
            self._sources.move(self._engine)
        self._failed = False
