"""The writes of a sender to one receiver, from their publication until the receiver reports how they ended."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec

from embferry.protocol.errors import TransportError

from ..contract import Piece, Written
from ..net.link import OnEnd, SocketLink, refused
from ..net.loop import Scope, Timeout
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
        silence_timeout_s: The link is lost after this time without a request of the receiver, unless one is pending.
        stall_timeout_s: The link is lost when, for this time, writes are published and no byte of them is sent or
            has landed, and none has ended.
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
        silence_timeout_s: float,
        stall_timeout_s: float,
        on_publish: Callable[[], None],
        is_polled: Callable[[], bool],
    ) -> None:
        super().__init__(loop, outbox, on_end)
        self._silence_timeout_s, self._stall_timeout_s = silence_timeout_s, stall_timeout_s
        self._on_publish, self._is_polled = on_publish, is_polled
        self._published: dict[int, PublishedWrite] = {}
        self._progress_at = time.monotonic()
        self._landed = 0
        self._timeout = Timeout(loop, self._on_silence)
        loop.call(self.on_request)

    def _enter(self, epoch: int, ranges: Ranges, pieces: Sequence[Piece], ticket: int) -> Callable[[], None]:
        number, length = next(self._numbers), int(ranges[:, 1].sum())
        etag = f'"{number}-{secrets.token_hex(8)}"'
        entry = Publication(number, epoch, etag, length, ranges.astype(">u8").tobytes())
        if not self._published:
            self._progress_at = time.monotonic()
        self._published[number] = PublishedWrite(self, ticket, entry, [piece.source.cast("B") for piece in pieces])
        return partial(self._loop.call, self._on_publish)

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
        error = refused() if outcome == REFUSED else TransportError(UNDELIVERED) if outcome == FAILED else None
        self._outbox.post(Written(published.ticket, error))

    def on_request(self, landed: int = 0) -> None:
        """Notes a request of the receiver, and the bytes it has received of all writes if the request says so."""
        if landed > self._landed:
            self._landed = landed
            self._progress_at = time.monotonic()
        if self._error is None and not self._end_if_stalled():
            self._timeout.set(self._silence_timeout_s)

    def on_bytes_sent(self) -> None:
        self._progress_at = time.monotonic()

    def end(self, error: TransportError, *, lost: bool) -> None:
        """Ends every write in flight. ``lost`` is False if this side ends the link."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            published, self._published = self._published, {}
        self._timeout.clear()
        for write in published.values():
            write.end_readers("the link of this write has ended")
        self._on_end(self, [write.ticket for write in published.values()], error, lost)

    def _end_if_stalled(self) -> bool:
        """Ends the link of a receiver that sends requests but fetches nothing; returns whether it did."""
        quiet = time.monotonic() - self._progress_at
        if self._published and quiet >= self._stall_timeout_s:
            self.end(TransportError(f"the receiver has not fetched a byte for {quiet:.1f} s"), lost=True)
            return True
        return False

    def _on_silence(self) -> None:
        """Ends the link, unless a request is still pending or being served."""
        with self._lock:
            is_read = any(published.readers for published in self._published.values())
        if self._is_polled() or (is_read and time.monotonic() - self._progress_at < self._silence_timeout_s):
            self.on_request()
        else:
            self.end(TransportError(f"the receiver has sent no request for {self._silence_timeout_s} s"), lost=True)
