"""A receiver's view of one sender: a poll that waits for its writes, and the connections that fetch them.

A write is fetched into the blocks, resumed at the byte where a connection broke, then reported. Before each receive,
the loop's thread checks the permit (:mod:`..receive_region`).

A sender that does not respond is polled again, ever more slowly, and forgotten after a while. Its writes are reported
on its side, by its time-outs. During a long fetch, the poll waits, so the progress is reported on a connection of its
own: without it, the sender could not tell a slow link from one that swallows everything.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable

from embferry.protocol.errors import shown
from embferry.trust.digests import CONTENT_DIGEST, DamagedError, check_content
from embferry.trust.keys import ClusterKeys
from embferry.trust.requests import Prover

from ..net.cursor import Cursor
from ..net.loop import Scope
from ..net.stalls import RECEIVING_BYTES, progress_interval
from ..net.stream import Stream
from ..receive_region import Permit, ReceiveRegion
from .connection import ClientConnection, ResponseHandler
from .heads import HttpError, Response
from .messages import (
    FAILED,
    MAX_POLL_BYTES,
    REFUSED,
    WRITTEN,
    Destination,
    Publication,
    parse_publications,
    proof_context,
)

log = logging.getLogger(__name__)

MAX_QUEUED = 256  # writes known and not fetched; polling pauses at this number
RETRY_S, RETRY_LIMIT_S = 0.05, 1.0
MAX_TRIES = 6  # to fetch, in a row without a new byte
BEYOND_ALL = 10**18 - 1  # more than the number of any write

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.A)


class RemoteSender(ResponseHandler):
    """Polls one sender and fetches its writes. All but the constructor is for the loop's thread.

    Args:
        token: Of this receiver, in hexadecimal.
        poll_s, stall_timeout_s, connections: As for :class:`HttpTransport`.
        keys: The cluster's, which both ends prove; None without any.
        on_end: Called once, when the sender is no longer polled. An exception in a handler ends it too.
    """

    def __init__(
        self,
        to: Destination,
        token: str,
        region: ReceiveRegion,
        loop: Scope,
        poll_s: float,
        stall_timeout_s: float,
        connections: int,
        keys: ClusterKeys | None,
        on_end: Callable[[RemoteSender], None],
    ) -> None:
        self.scope = loop.scope(self._failed)
        self._to, self._token, self._region, self._on_end = to, token, region, on_end
        self._poll_s, self._stall_timeout_s = poll_s, stall_timeout_s
        self._after = self._received = 0  # number of the last write known; bytes by finished fetches
        self._failures = 0  # polls in a row
        self._failing_since = 0.0
        self._polling = self._ended = False
        self._on_told: Callable[[], None] = lambda: None
        self._status = 0
        self._body = bytearray()
        self._digest: str | None = None
        self._queue: deque[Fetch] = deque()
        self._unfinished: set[Fetch] = set()
        prover = None if keys is None else Prover(keys.current, proof_context(to.secret))
        self._poll_connection = ClientConnection(to, self.scope, prover, stall_timeout_s)
        # Half of the time, so that a fetch whose connection stands still is tried once more before it is given up.
        self._idle = [ClientConnection(to, self.scope, prover, stall_timeout_s / 2) for _ in range(connections)]
        self._connections = tuple(self._idle)
        self._reports = ClientConnection(to, self.scope, prover, stall_timeout_s / 2)
        self._reported = 0  # bytes that the sender has been told of
        self._is_reporting = False
        self.scope.call(self.poll)

    def poll(self) -> None:
        """Starts a poll, unless one is under way or enough writes are waiting to be fetched."""
        if self._ended or self._polling or len(self._unfinished) >= MAX_QUEUED:
            return
        self._polling = True
        headers = {"Prefer": f"wait={self._poll_s:.0f}", "Accept-Encoding": "identity"}
        path = f"/{self._token}?after={self._after}&landed={self._landed()}"
        self._poll_connection.request("GET", path, headers, self, self._poll_s)

    def _landed(self) -> int:
        self._reported = self._received + sum(fetch.received for fetch in self._unfinished)
        return self._reported

    def _report_soon(self) -> None:
        if not self._is_reporting and self._unfinished:
            self._is_reporting = True
            self.scope.later(progress_interval(self._stall_timeout_s), self._report)

    def _report(self) -> None:
        self._is_reporting = False
        if self._ended or not self._unfinished:
            return
        for fetch in self._unfinished:
            fetch.report()
        before = self._reported
        if self._landed() != before and not self._reports.is_busy:
            path = f"/{self._token}?after={BEYOND_ALL}&landed={self._reported}"
            self._reports.request("GET", path, {"Prefer": "wait=0"}, ResponseHandler())
        self._report_soon()

    def stop(self, on_told: Callable[[], None]) -> None:
        """Closes every connection, then tells the sender on a new one, which :meth:`hang_up` must close.

        Calls ``on_told`` when the sender has responded or cannot be reached.
        """
        if self._ended:
            on_told()
            return
        self._end()
        self._on_told = on_told
        self._poll_connection.request("DELETE", f"/{self._token}", {"Connection": "close"}, self)

    def hang_up(self) -> None:
        self._poll_connection.close()

    def _failed(self, error: BaseException) -> None:
        why = f"this end failed to handle it: {shown(error)}"
        log.error("no longer polls the sender at %s: %s", self._to.authority, why)
        if not self._ended:
            self._end()
        self.hang_up()
        self._on_told()

    # The response to a poll, or to the last request

    def on_head(self, response: Response, length: int) -> None:
        self._status, self._digest = response.status, response.headers.get(CONTENT_DIGEST.lower())
        if length > MAX_POLL_BYTES:
            raise HttpError(f"a response of {length} bytes; {MAX_POLL_BYTES} are allowed")
        self._body = bytearray(length)

    def receive(self, sock: Stream, left: int) -> int:
        return sock.recv_into(memoryview(self._body)[-left:])

    def on_end(self) -> None:
        if self._ended:
            self._on_told()
        elif self._status not in (200, 204):
            self._on_poll_failure(f"it responded with status {self._status}", final=self._status in (403, 410))
        else:
            try:
                if self._digest is not None:
                    check_content(self._digest, self._body)
                self._take(parse_publications(self._body, self._after) if self._body else [])
            except (HttpError, DamagedError) as error:
                self._on_poll_failure(str(error))

    def on_failure(self, reason: str) -> None:
        if self._ended:
            self._on_told()
        else:
            self._on_poll_failure(reason)

    def _take(self, publications: list[Publication]) -> None:
        """Fetches the writes; raises HttpError, and fetches none of them, if one is malformed."""
        stall_s, path = self._stall_timeout_s, f"/{self._token}"
        fetches = [Fetch(one, path, self._region, stall_s, self._on_request_end) for one in publications]
        self._polling, self._failures = False, 0
        if fetches:
            self._after = publications[-1].number
            self._unfinished.update(fetches)
            self._queue.extend(fetches)
            self._fetch_next()
            self._report_soon()
        self.poll()

    def _on_poll_failure(self, reason: str, *, final: bool = False) -> None:
        self._polling = False
        if not self._failures:  # the time from here on counts: the poll itself may have waited for long
            self._failing_since = time.monotonic()
        self._failures += 1
        if final or time.monotonic() - self._failing_since >= 2 * self._stall_timeout_s:
            level = logging.INFO if final else logging.WARNING
            log.log(level, "no longer polls the sender at %s, which reports its writes: %s", self._to.authority, reason)
            self._end()
            return
        self._poll_connection.close()
        self.scope.later(min(RETRY_S * 2 ** min(self._failures - 1, 10), RETRY_LIMIT_S), self.poll)

    def _fetch_next(self) -> None:
        while self._queue and self._idle:
            self._queue.popleft().start_request(self._idle.pop())

    def _on_request_end(self, fetch: Fetch, connection: ClientConnection) -> None:
        self._idle.append(connection)
        if fetch.finished:
            self._unfinished.discard(fetch)
            self._received += fetch.received
        elif fetch.retry_delay_s:
            self.scope.later(fetch.retry_delay_s, lambda: self._fetch_again(fetch))
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
        for connection in (self._poll_connection, self._reports, *self._connections):
            connection.close()
        self._queue.clear()
        self._unfinished.clear()
        self._on_end(self)


class Fetch(ResponseHandler):
    """Makes requests until the write has ended and that has been reported to the sender. For the loop's thread.

    Args:
        path: Of this receiver's writes at the sender.
        stall_timeout_s: The write has failed when no new byte has landed for this time.
        on_request_end: Called when a request has ended, with its connection. The fetch is then ``finished``, or needs
            another request after ``retry_delay_s``.

    Attributes:
        received: Bytes of bodies so far; bytes that arrived twice count twice.
    """

    def __init__(
        self,
        publication: Publication,
        path: str,
        region: ReceiveRegion,
        stall_timeout_s: float,
        on_request_end: Callable[[Fetch, ClientConnection], None],
    ) -> None:
        self.publication = publication
        self.finished = False
        self.received = 0
        self._told = 0  # bytes of bodies when the own side was told
        self._path = f"{path}/{publication.number}"
        self._region, self._stall_timeout_s, self._on_request_end = region, stall_timeout_s, on_request_end
        self._progress_at = 0.0  # 0: not begun
        ranges = publication.parsed_ranges()
        self._permit = Permit(region.windows, publication.epoch, region.windows.rows.touched(ranges))
        inside = [] if self._permit.refused else ranges.tolist()
        self._views = [region.view[offset : offset + length] for offset, length in inside]
        self._at = self._furthest = 0  # bytes that have landed
        self._cursor = Cursor([])
        self._tries = 0
        self._status = 0
        self._outcome = ""  # to report; empty while the bytes are fetched
        with region.lock:
            if not self._permit.holds():
                self._outcome = REFUSED
            elif publication.length == 0:
                self._outcome = WRITTEN

    @property
    def retry_delay_s(self) -> float:
        """Seconds to wait before the next request: none after the first failure."""
        return 0.0 if self._tries < 2 else min(RETRY_S * 2 ** (self._tries - 2), RETRY_LIMIT_S)

    def start_request(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._progress_at = self._progress_at or time.monotonic()
        if self._outcome:
            connection.request("DELETE", f"{self._path}?outcome={self._outcome}", {}, self)
        else:
            resumes = {"Range": f"bytes={self._at}-", "If-Range": self.publication.etag} if self._at else {}
            connection.request("GET", self._path, {"Accept-Encoding": "identity", **resumes}, self)

    def report(self) -> None:
        """Tells the own side that bytes have come in, if enough have."""
        if self.received - self._told >= RECEIVING_BYTES:
            self._told = self.received
            self._region.receiving(self.publication.epoch)

    def on_head(self, response: Response, length: int) -> None:
        self._status = response.status
        if not self._is_payload:
            return
        total, headers = self.publication.length, response.headers
        if response.status == 206:
            match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if match is None or [int(number) for number in match.groups()] != [self._at, total - 1, total]:
                raise HttpError("the response has another Content-Range than was requested")
        else:
            self._at = 0  # a proxy may not support ranges: the bytes are the same, from the start
        if headers.get("etag") != self.publication.etag or "content-encoding" in headers:
            self._outcome = FAILED
            raise HttpError("the response has another ETag than was published, or a Content-Encoding")
        if length != total - self._at:
            raise HttpError(f"a response of {length} bytes where {total - self._at} are missing")
        self._cursor = Cursor(self._views, self._at)

    def receive(self, sock: Stream, left: int) -> int:
        if not self._is_payload:
            return super().receive(sock, left)
        with self._region.lock:
            if not self._permit.holds():
                self._outcome = REFUSED
                self._tries = -1  # the failure that follows is not one of the connection
                raise HttpError("the window of this write has been closed")
            received = sock.recvmsg_into(self._cursor.views())[0]
            self._cursor.advance(received)
        self.received += received
        self._at += received
        if self._at > self._furthest:
            self._furthest, self._tries, self._progress_at = self._at, 0, time.monotonic()
        return received

    def on_end(self) -> None:
        if self._is_payload:
            with self._region.lock:  # the last check: the window was open until the last byte had landed
                self._outcome = WRITTEN if self._permit.holds() else REFUSED
            self._tries = 0
            self._cursor.release()
        elif self._status >= 500 or self._status in (408, 425, 429):
            self._fail_once()  # from a proxy, not from the sender: RFC 9110 §15.6
        elif self._outcome or self._status in (404, 410):
            self.finished = True  # reported, or ended by the sender meanwhile
        else:
            self._outcome = FAILED
        self._on_request_end(self, self._connection)

    def on_failure(self, reason: str) -> None:
        self._fail_once()
        self._on_request_end(self, self._connection)

    @property
    def _is_payload(self) -> bool:
        return not self._outcome and self._status in (200, 206)

    def _fail_once(self) -> None:
        self._status = 0
        self._cursor.release()
        self._tries += 1
        stalled = not self._outcome and time.monotonic() - self._progress_at >= self._stall_timeout_s
        if self._tries > MAX_TRIES or stalled:
            self.finished = bool(self._outcome)  # the report failed too; the sender's time-outs end the write
            self._outcome, self._tries = self._outcome or FAILED, 0
