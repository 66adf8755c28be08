"""The writes of a sender to one receiver, from when they are published until the receiver has said how they ended."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from embferry.protocol.errors import TransportError

from ..contract import LinkLost, Piece, Written
from ..net.loop import Loop
from ..outbox import Outbox
from ..windows import MAX_EPOCH, Ranges, ranges_of
from .deadline import Deadline
from .wire import ANSWER_FULL_BYTES, FAILED, MAX_LISTED, MAX_PAYLOAD, MAX_RANGES, REFUSED, Publication

log = logging.getLogger(__name__)

OUTCOMES = {
    REFUSED: ("the receiver has no open window that covers the write", False),
    FAILED: ("the receiver tried several times, and the bytes of the write did not come through", True),
}
"""What a write's outcome means here, and whether to try again; none: it is written."""


class Reader(Protocol):
    """A connection that is sending the bytes of a write."""

    def end(self, reason: str) -> None: ...


@dataclass(slots=True, eq=False)
class Published:
    """A write in flight."""

    ticket: int
    entry: Publication
    views: list[memoryview]
    readers: set[Reader] = field(default_factory=set)

    def cut(self, reason: str) -> None:
        """Nobody reads the source any more."""
        for reader in list(self.readers):
            reader.end(reason)


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds.

    :param silence: without a request of the receiver, none being under way.
    :param stall: without a byte sent or landed and without a write ended, though writes are published.
    """

    silence: float
    stall: float


class Link:
    """To the receiver behind ``handle``. All but the constructor and ``write`` is for the loop's thread.

    :param publish: called when there is something new to be fetched.
    :param waiting: whether a request of the receiver waits for that.
    :param forget: called once when the link is over, before :class:`LinkLost` is posted.
    """

    _numbers = itertools.count(1)  # of all links: a link made anew goes on where the receiver stands

    def __init__(
        self,
        handle: bytes,
        patience: Patience,
        loop: Loop,
        outbox: Outbox,
        publish: Callable[[], None],
        waiting: Callable[[], bool],
        forget: Callable[[bytes, Link], None],
    ) -> None:
        self._handle, self._patience, self._loop, self._outbox = handle, patience, loop, outbox
        self._publish, self._waiting, self._forget = publish, waiting, forget
        # A write is in flight from the moment it was asked for, so that its end is reported before the link's.
        self._lock = threading.Lock()
        self._error: TransportError | None = None
        self._published: dict[int, Published] = {}
        self._progress_at = time.monotonic()
        self._landed = 0
        self._deadline = Deadline(loop, self._expired)
        loop.call(self.heard)

    def write(self, epoch: int, pieces: Sequence[Piece], ticket: int) -> None:
        """From any thread."""
        ranges = _ranges(epoch, pieces)
        if isinstance(ranges, TransportError):
            self._outbox.post(Written(ticket, ranges))
            return
        etag, length = secrets.token_hex(8), int(ranges[:, 1].sum())
        with self._lock:
            error = self._error
            if error is None:
                number = next(self._numbers)
                entry = Publication(number, epoch, f'"{number}-{etag}"', length, ranges.astype(">u8").tobytes())
                if not self._published:
                    self._progress_at = time.monotonic()
                self._published[number] = Published(ticket, entry, [piece.source.cast("B") for piece in pieces])
        if error is not None:
            self._outbox.post(Written(ticket, error))
        else:
            self._loop.call(self._publish)

    def since(self, after: int) -> bytes:
        """The writes numbered above ``after``, as many as one answer takes; empty: there are none."""
        chosen: list[Publication] = []
        size = 0
        with self._lock:  # numbered and put in under it, so in order
            for number, published in self._published.items():
                if number > after and size < ANSWER_FULL_BYTES and len(chosen) < MAX_LISTED:
                    chosen.append(published.entry)
                    size += len(published.entry.ranges) + 128
        return msgspec.msgpack.encode(chosen) if chosen else b""

    def find(self, number: int) -> Published | None:
        return self._published.get(number)

    def finish(self, number: int, outcome: str) -> bool:
        """The receiver has said how a write ended; False: it is over already."""
        with self._lock:
            published = self._published.pop(number, None)
        if published is None:
            return False
        published.cut("the receiver has ended this write")
        self._progress_at = time.monotonic()
        what = OUTCOMES.get(outcome)
        error = None if what is None else TransportError(what[0], retryable=what[1])
        self._outbox.post(Written(published.ticket, error))
        return True

    def heard(self, landed: int = 0) -> None:
        """The receiver is there, and has ``landed`` bytes of ours if it says so."""
        if landed > self._landed:
            self._landed = landed
            self._progress_at = time.monotonic()
        if self._error is None and not self._stalled():
            self._deadline.set(self._patience.silence)

    def progressed(self) -> None:
        """Bytes of a write have left."""
        self._progress_at = time.monotonic()

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends every write in flight. ``lost``: it was not this side that wanted it."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            published, self._published = self._published, {}
        self._deadline.clear()
        self._forget(self._handle, self)
        for write in published.values():
            write.cut("this write is over")
            self._outbox.post(Written(write.ticket, error))
        if lost:
            log.info("lost the connection to a receiver: %s", error)
            self._outbox.post(LinkLost(self._handle, error))

    def _stalled(self) -> bool:
        """Ends the link when the receiver has had time enough to fetch something: asking is not enough."""
        quiet = time.monotonic() - self._progress_at
        if self._published and quiet >= self._patience.stall:
            self.end(TransportError(f"the receiver has not fetched a byte for {quiet:.1f} s"), lost=True)
            return True
        return False

    def _expired(self) -> None:
        """Nothing was heard for a while, which is in order while something is under way."""
        with self._lock:
            reading = any(published.readers for published in self._published.values())
        if self._waiting() or (reading and time.monotonic() - self._progress_at < self._patience.silence):
            self.heard()
        else:
            self.end(TransportError(f"the receiver has not asked for {self._patience.silence} s"), lost=True)


def _ranges(epoch: int, pieces: Sequence[Piece]) -> Ranges | TransportError:
    """Or why there is no such write. Not raised: an error that is kept keeps the frames, and so the source, alive."""
    size = sum(piece.source.nbytes for piece in pieces)
    if not 1 <= len(pieces) <= MAX_RANGES or size > MAX_PAYLOAD:
        why = f"a write of {len(pieces)} pieces, {size} bytes; make it 1 to {MAX_RANGES}, {MAX_PAYLOAD} bytes"
        return TransportError(why, retryable=False)
    try:
        if 0 <= epoch <= MAX_EPOCH:
            return ranges_of(pieces)
    except OverflowError:
        pass
    return TransportError("an offset or the epoch of the write is beyond 64 bits", retryable=False)
