"""A receiver's view of one sender: a poll that waits for its writes, and the connections that fetch them.

A sender that does not respond is polled again, ever more slowly, and forgotten after a while. Its writes are reported
on its side, by its time-outs.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from collections.abc import Callable

from ..net.loop import Loop
from ..receive_region import ReceiveRegion
from .client_connection import ClientConnection, ResponseHandler
from .fetch import Fetch
from .heads import HttpError, Response
from .messages import MAX_POLL_BYTES, Destination, parse_publications

log = logging.getLogger(__name__)

MAX_QUEUED = 256  # writes known and not fetched; polling pauses at this number
RETRY_S, RETRY_LIMIT_S = 0.05, 1.0


class RemoteSender:
    """Polls one sender and fetches its writes. All but the constructor is for the loop's thread.

    Args:
        token: Of this receiver, in hexadecimal.
        poll_s, timeout_s, connections: As for :class:`HttpTransport`.
        on_end: Called once, when the sender is no longer polled.
    """

    def __init__(
        self,
        to: Destination,
        token: str,
        landing: ReceiveRegion,
        loop: Loop,
        *,
        poll_s: float,
        timeout_s: float,
        connections: int,
        on_end: Callable[[RemoteSender], None],
    ) -> None:
        self._to, self._token, self._landing, self._loop, self._on_end = to, token, landing, loop, on_end
        self._poll_s, self._give_up_s = poll_s, 2 * timeout_s
        self._after = 0
        self._received = 0  # bytes, by finished fetches
        self._failures = 0  # polls in a row
        self._failing_since = 0.0
        self._ended = False
        self._polling = False
        self._queue: deque[Fetch] = deque()
        self._unfinished: set[Fetch] = set()
        self._poll_connection, *self._connections = (
            ClientConnection(to, loop, timeout_s) for _ in range(1 + connections)
        )
        self._idle = list(self._connections)
        loop.call(self.poll)

    def poll(self) -> None:
        """Starts a poll, unless one is under way or enough writes are waiting to be fetched."""
        if self._ended or self._polling or len(self._unfinished) >= MAX_QUEUED:
            return
        self._polling = True
        headers = {"Prefer": f"wait={self._poll_s:.0f}", "Accept-Encoding": "identity"}
        landed = self._received + sum(fetch.received for fetch in self._unfinished)
        path = f"/{self._token}?after={self._after}&landed={landed}"
        self._poll_connection.request("GET", path, headers, _Poll(self), self._poll_s)

    def stop(self, on_told: Callable[[], None]) -> None:
        """Closes every connection, then tells the sender on a new one, which :meth:`hang_up` must close.

        Calls ``on_told`` when the sender has responded or cannot be reached.
        """
        if self._ended:
            on_told()
            return
        self._end()
        goodbye = {"Connection": "close"}
        self._poll_connection.request("DELETE", f"/{self._token}", goodbye, _Goodbye(on_told))

    def hang_up(self) -> None:
        self._poll_connection.close()

    def on_publications(self, body: bytearray) -> None:
        """Takes the body of a response to a poll; raises HttpError, and takes none of it, if it is malformed."""
        publications = parse_publications(body, self._after) if body else []
        fetches = [Fetch(one, f"/{self._token}", self._landing, self._on_request_end) for one in publications]
        self._polling, self._failures = False, 0
        if fetches:
            self._after = publications[-1].number
            self._unfinished.update(fetches)
            self._queue.extend(fetches)
            self._fetch_next()
        self.poll()

    def on_poll_failure(self, reason: str, *, final: bool = False) -> None:
        self._polling = False
        if not self._failures:  # the time from here on counts: the poll itself may have waited for long
            self._failing_since = time.monotonic()
        self._failures += 1
        if final or time.monotonic() - self._failing_since >= self._give_up_s:
            level = logging.INFO if final else logging.WARNING
            log.log(level, "no longer polls the sender at %s, which reports its writes: %s", self._to.authority, reason)
            self._end()
            return
        self._poll_connection.close()
        self._loop.later(min(RETRY_S * 2 ** min(self._failures - 1, 10), RETRY_LIMIT_S), self.poll)

    def _fetch_next(self) -> None:
        while self._queue and self._idle:
            self._queue.popleft().start_request(self._idle.pop())

    def _on_request_end(self, fetch: Fetch, connection: ClientConnection) -> None:
        self._idle.append(connection)
        if fetch.finished:
            self._unfinished.discard(fetch)
            self._received += fetch.received
        elif fetch.retry_delay_s:
            self._loop.later(fetch.retry_delay_s, lambda: self._fetch_again(fetch))
        else:
            self._queue.appendleft(fetch)
        self._fetch_next()
        self.poll()

    def _fetch_again(self, fetch: Fetch) -> None:
        if not self._ended:
            self._queue.append(fetch)
            self._fetch_next()

    def _end(self) -> None:
        self._ended = True
        for connection in (self._poll_connection, *self._connections):
            connection.close()
        self._queue.clear()
        self._unfinished.clear()
        self._on_end(self)


class _Poll(ResponseHandler):
    def __init__(self, sender: RemoteSender) -> None:
        self._sender = sender
        self._status = 0
        self._body = bytearray()
        self._filled = 0

    def on_head(self, response: Response, length: int) -> None:
        self._status = response.status
        if self._status == 200:
            if length > MAX_POLL_BYTES:
                raise HttpError(f"a response of {length} bytes; {MAX_POLL_BYTES} are allowed")
            self._body = bytearray(length)

    def receive(self, sock: socket.socket, left: int) -> int:
        if self._status != 200:
            return super().receive(sock, left)
        received = sock.recv_into(memoryview(self._body)[self._filled :])
        self._filled += received
        return received

    def on_end(self) -> None:
        if self._status not in (200, 204):
            is_final = self._status in (403, 410)
            self._sender.on_poll_failure(f"it responded with status {self._status}", final=is_final)
            return
        try:
            self._sender.on_publications(self._body)
        except HttpError as error:
            self._sender.on_poll_failure(str(error))

    def on_failure(self, reason: str) -> None:
        self._sender.on_poll_failure(reason)


class _Goodbye(ResponseHandler):
    def __init__(self, on_told: Callable[[], None]) -> None:
        self._on_told = on_told

    def on_end(self) -> None:
        self._on_told()

    def on_failure(self, reason: str) -> None:
        self._on_told()
