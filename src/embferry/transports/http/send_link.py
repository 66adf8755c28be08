"""The writes of a sender to one receiver, from their publication until the receiver reports how they ended."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from embferry.protocol.errors import TransportError, TransportStalled

from ..contract import Piece, Written
from ..net.deadlines import Timeout
from ..net.link import OnEnd, SocketLink, refused
from ..net.loop import Scope
from ..outbox import Outbox
from ..windows import Ranges
from .messages import FAILED, MAX_LISTED, POLL_FULL_BYTES, REFUSED, Publication

UNDELIVERED = "the receiver tried several times, and the bytes of the write did not arrive"


@dataclass(slots=True, eq=False)
class PublishedWrite:
    """A write in flight.

    Attributes:
        readers: A function for each connection that is sending ``views``; it ends the connection, with a reason.
    """

    link: SendLink
    ticket: int
    entry: Publication
    views: list[memoryview]
    readers: set[Callable[[str], None]] = field(default_factory=set)

    def end_readers(self, reason: str) -> None:
        """Ends the connections that read the source memory; it is free when this returns."""
        for end in list(self.readers):
            end(reason)


class SendLink(SocketLink):
    """The link to one receiver. All methods but the constructor and ``write`` are for the loop's thread.

    Args:
        stall_timeout_s: The link is lost after this time without a request of the receiver, unless one is pending; also
            when, for this time, writes are published, none has ended, and the receiver has reported no new byte of
            them. That this end's kernel takes bytes means nothing.
        on_publish: Called when there is a new write to fetch.
        is_polled: Returns whether a poll of the receiver is pending.
    """

    _numbers = itertools.count(1)  # shared by all links: a new link goes on above the numbers the receiver has seen

    def __init__(
        self,
        loop: Scope,
        outbox: Outbox,
        on_end: OnEnd,
        *,
        stall_timeout_s: float,
        on_publish: Callable[[], None],
        is_polled: Callable[[], bool],
    ) -> None:
        super().__init__(loop, outbox, on_end)
        self._stall_timeout_s = stall_timeout_s
        self._on_publish, self._is_polled = on_publish, is_polled
        self._published: dict[int, PublishedWrite] = {}
        self._progress_at = self._heard_at = time.monotonic()
        self._landed = 0
        self._timeout = Timeout(self.scope, self._on_timeout)
        self.scope.call(self._await)

    def _enter(self, epoch: int, ranges: Ranges, pieces: Sequence[Piece], ticket: int) -> Callable[[], None]:
        number, length = next(self._numbers), int(ranges[:, 1].sum())
        etag = f'"{number}-{secrets.token_hex(8)}"'
        entry = Publication(number, epoch, etag, length, ranges.astype(">u8").tobytes())
        write = PublishedWrite(self, ticket, entry, [piece.source.cast("B") for piece in pieces])
        if not self._published:
            self._progress_at = time.monotonic()
        self._published[number] = write
        return partial(self.scope.call, self._announce)

    def _announce(self) -> None:
        self._on_publish()
        self._await()

    def encode_published(self, after: int) -> bytes:
        """Encodes the writes numbered above ``after``, as many as fit one response; empty if there are none."""
        entries: list[Publication] = []
        size = 0
        with self._lock:
            for number, published in self._published.items():  # ascending, as they are numbered under the lock
                if number > after and size < POLL_FULL_BYTES and len(entries) < MAX_LISTED:
                    entries.append(published.entry)
                    size += len(published.entry.ranges) + 128
        return msgspec.msgpack.encode(entries) if entries else b""

    def find(self, number: int) -> PublishedWrite | None:
        return self._published.get(number)

    def finish(self, number: int, outcome: str) -> None:
        """Ends a write with the outcome that the receiver has reported, unless it has ended before."""
        with self._lock:
            published = self._published.pop(number, None)
        if published is None:
            return
        published.end_readers("the receiver has ended this write")
        self._progress_at = time.monotonic()
        error = refused() if outcome == REFUSED else TransportStalled(UNDELIVERED) if outcome == FAILED else None
        self._outbox.post(Written(published.ticket, error))

    def on_request(self, landed: int = 0) -> None:
        """Notes a request of the receiver, and the bytes it has received of all writes if the request says so."""
        self._heard_at = time.monotonic()
        if landed > self._landed:
            self._landed, self._progress_at = landed, self._heard_at

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends every write in flight. ``lost`` is False if this side ends the link."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            published, self._published = self._published, {}
        self.scope.end()
        try:
            for write in published.values():
                write.end_readers("the link of this write has ended")
        finally:
            self._on_end(self, [write.ticket for write in published.values()], error, lost)

    def _await(self) -> None:
        """Sets the time-out to the next moment at which the link may have to be given up."""
        if self._error is None:
            since = self._heard_at
            if self._published:
                since = min(since, self._progress_at) if not self._is_polled() else self._progress_at
            elif self._is_polled():
                since = time.monotonic()
            self._timeout.set(max(0.0, since + self._stall_timeout_s - time.monotonic()))

    def _on_timeout(self) -> None:
        now, limit = time.monotonic(), self._stall_timeout_s
        if not self._is_polled() and now - self._heard_at >= limit:
            error = TransportError if not self._published else TransportStalled
            self.end(error(f"the receiver has sent no request for {limit:g} s"), lost=True)
        elif self._published and now - self._progress_at >= limit:
            self.end(TransportStalled(f"the receiver has not fetched a byte for {limit:g} s"), lost=True)
        else:
            self._await()
