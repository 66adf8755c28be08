"""One sender, as a receiver sees it: a poll that waits there for writes, and the connections that fetch them.

A sender that does not answer is asked again, ever more slowly, and forgotten after a while. Nothing of its writes is
reported here: the sender notices that nobody comes, and reports them.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..net.loop import Loop
from ..receive_region import ReceiveRegion
from .client import Connection, Exchange
from .fetch import Fetch
from .head import HttpError
from .wire import MAX_ANSWER_BYTES, Destination, parse_publications

log = logging.getLogger(__name__)

MAX_QUEUED = 256  # writes known and not fetched; no poll asks for more
RETRY_S, RETRY_LIMIT_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Habits:
    """How a receiver asks. Seconds.

    :param wait: how long a poll waits for something to fetch.
    :param patience: without a byte of an answer that is due.
    :param give_up: after a poll that failed, without one that succeeds, until the sender is forgotten.
    :param connections: fetching from one sender at the same time.
    """

    wait: float
    patience: float
    give_up: float
    connections: int


class Source:
    """All but the constructor is for the loop's thread.

    :param token: of this receiver.
    :param forget: called once, when the sender is no longer asked."""

    def __init__(
        self,
        to: Destination,
        token: str,
        landing: ReceiveRegion,
        loop: Loop,
        habits: Habits,
        forget: Callable[[Source], None],
    ) -> None:
        self._to, self._token, self._landing, self._loop, self._habits = to, token, landing, loop, habits
        self._forget = forget
        self._after = 0
        self._received = 0  # bytes, by fetches that are finished
        self._failures = 0  # polls in a row
        self._failing_since = 0.0
        self._ended = False
        self._poll = self._new_connection()
        self._polling = False
        self._queue: deque[Fetch] = deque()
        self._unfinished: set[Fetch] = set()
        self._busy: set[Connection] = set()
        self._idle: list[Connection] = []
        loop.call(self.ask)

    def ask(self) -> None:
        """Polls, unless it does already or has enough to do."""
        if self._ended or self._polling or len(self._unfinished) >= MAX_QUEUED:
            return
        self._polling = True
        prefer = {"Prefer": f"wait={self._habits.wait:.0f}", "Accept-Encoding": "identity"}
        landed = self._received + sum(fetch.received for fetch in self._unfinished)
        path = f"/{self._token}?after={self._after}&landed={landed}"
        self._poll.ask("GET", path, prefer, _Poll(self), self._habits.wait)

    def stop(self, told: Callable[[], None]) -> None:
        """Ends every connection, says goodbye on a new one, and calls ``told`` when that has been heard or failed.
        :meth:`hang_up` must follow."""
        if self._ended:
            told()
            return
        self._end()
        self._poll = self._new_connection()
        self._poll.ask("DELETE", f"/{self._token}", {"Connection": "close"}, _Goodbye(told))

    def hang_up(self) -> None:
        """Waits no longer for the goodbye to be heard."""
        self._poll.end()

    # What became of a poll

    def polled(self, body: bytearray, connection: Connection | None) -> None:
        """:raises HttpError: the answer makes no sense; nothing of it is believed."""
        publications = parse_publications(body, self._after) if body else []
        fetches = [Fetch(publication, f"/{self._token}", self._landing, self._over) for publication in publications]
        self._polling, self._failures = False, 0
        if connection is None:
            self._poll = self._new_connection()
        if fetches:
            self._after = publications[-1].number
            self._unfinished.update(fetches)
            self._queue.extend(fetches)
            self._fetch_on()
        self.ask()

    def poll_failed(self, reason: str, *, final: bool = False) -> None:
        self._polling = False
        if not self._failures:  # the poll may have waited in peace for long before
            self._failing_since = time.monotonic()
        self._failures += 1
        if final or time.monotonic() - self._failing_since >= self._habits.give_up:
            log.log(
                logging.INFO if final else logging.WARNING,
                "asks the sender at %s no more (%s); what it was writing is reported over there",
                self._to.authority,
                reason,
            )
            self._end()
            return
        self._poll = self._new_connection()
        self._loop.later(min(RETRY_S * 2 ** min(self._failures - 1, 10), RETRY_LIMIT_S), self.ask)

    # Fetching

    def _fetch_on(self) -> None:
        while self._queue and len(self._busy) < self._habits.connections and not self._ended:
            connection = self._idle.pop() if self._idle else self._new_connection()
            self._busy.add(connection)
            self._queue.popleft().begin(connection)

    def _over(self, fetch: Fetch, used: Connection, kept: bool) -> None:
        """An exchange of ``fetch`` has ended; ``kept``: its connection can be used again."""
        self._busy.discard(used)
        if self._ended:
            return
        if kept:
            self._idle.append(used)
        if fetch.finished:
            self._unfinished.discard(fetch)
            self._received += fetch.received
        elif fetch.delay:
            self._loop.later(fetch.delay, lambda: self._again(fetch))
        else:
            self._queue.appendleft(fetch)
        self._fetch_on()
        self.ask()

    def _again(self, fetch: Fetch) -> None:
        self._queue.append(fetch)
        self._fetch_on()

    def _new_connection(self) -> Connection:
        return Connection(self._to, self._loop, self._habits.patience, self._dropped)

    def _dropped(self, connection: Connection) -> None:
        """An idle connection was ended by the peer, as is its right."""
        if connection in self._idle:
            self._idle.remove(connection)

    def _end(self) -> None:
        self._ended = True
        for connection in (self._poll, *self._busy, *self._idle):
            connection.end()
        self._busy.clear()
        self._idle.clear()
        self._queue.clear()
        self._unfinished.clear()
        self._forget(self)


class _Poll(Exchange):
    def __init__(self, source: Source) -> None:
        self._source = source
        self._status = 0
        self._body = bytearray()
        self._filled = 0

    def begun(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self._status = status
        if status == 200:
            if length > MAX_ANSWER_BYTES:
                raise HttpError(f"an answer of {length} bytes; {MAX_ANSWER_BYTES} are allowed")
            self._body = bytearray(length)

    def take(self, data: memoryview) -> None:
        if self._status == 200:
            self._body[: data.nbytes] = data
            self._filled = data.nbytes

    def receive(self, sock: socket.socket, left: int) -> int:
        if self._status != 200:
            return len(sock.recv(min(left, 1 << 16)))
        received = sock.recv_into(memoryview(self._body)[self._filled :])
        self._filled += received
        return received

    def done(self, connection: Connection | None) -> None:
        if self._status not in (200, 204):
            if connection is not None:
                connection.end()
            gone = self._status in (403, 410)
            self._source.poll_failed(f"it answered with status {self._status}", final=gone)
            return
        try:
            self._source.polled(self._body, connection)
        except HttpError as error:
            if connection is not None:
                connection.end()
            self._source.poll_failed(str(error))

    def broken(self, reason: str) -> None:
        self._source.poll_failed(reason)


class _Goodbye(Exchange):
    def __init__(self, told: Callable[[], None]) -> None:
        self._told = told

    def begun(self, status: int, headers: Mapping[str, str], length: int) -> None:
        pass

    def take(self, data: memoryview) -> None:
        pass

    def receive(self, sock: socket.socket, left: int) -> int:
        return len(sock.recv(min(left, 1 << 16)))

    def done(self, connection: Connection | None) -> None:
        self._told()

    def broken(self, reason: str) -> None:
        self._told()
