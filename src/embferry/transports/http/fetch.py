"""One write on its way into the blocks: fetched, resumed at the byte where it stands, and then reported.

Before each receive the thread asks whether the bytes may still land (:mod:`..base.landing`).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Mapping

from ..net.cursor import Cursor
from ..receive_region import Permit, ReceiveRegion
from .client import Connection, Exchange
from .head import HttpError
from .wire import FAILED, REFUSED, WRITTEN, Publication

MAX_TRIES = 6  # in a row without a new byte

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.A)


class _WindowClosedError(HttpError):
    """The rest of the write is not wanted."""


class Fetch(Exchange):
    """:param path: of the receiver's writes at the sender.
    :param over: is called when an exchange has ended, with its connection and whether that can be used again. What
    the fetch wants then: to be :attr:`finished`, or another exchange :attr:`delay` seconds later."""

    def __init__(
        self,
        publication: Publication,
        path: str,
        landing: ReceiveRegion,
        over: Callable[[Fetch, Connection, bool], None],
    ) -> None:
        self.publication = publication
        self.finished = False
        self.received = 0
        """Bytes of bodies so far, those that came twice counted twice."""
        self._path = f"{path}/{publication.number}"
        self._landing, self._over = landing, over
        ranges = publication.parsed_ranges()
        self._permit = Permit(landing.windows, publication.epoch, landing.windows.rows.touched(ranges))
        self._views: list[memoryview] = []
        if not self._permit.refused:
            self._views = [landing.view[offset : offset + length] for offset, length in ranges.tolist()]
        self._at = self._furthest = 0  # bytes that have landed
        self._cursor = Cursor([])
        self._tries = 0
        self._status = 0
        self._outcome = ""
        with landing.lock:
            if not self._permit.holds():
                self._outcome = REFUSED
            elif publication.length == 0:
                self._outcome = WRITTEN

    @property
    def delay(self) -> float:
        """Seconds to wait before the next exchange: none after the first failure."""
        return 0.0 if self._tries < 2 else min(0.05 * 2 ** (self._tries - 2), 1.0)

    def begin(self, connection: Connection) -> None:
        self._connection = connection
        if self._outcome:
            connection.ask("DELETE", f"{self._path}?outcome={self._outcome}", {}, self)
            return
        headers = {"Accept-Encoding": "identity"}
        if self._at:
            headers |= {"Range": f"bytes={self._at}-", "If-Range": self.publication.etag}
        connection.ask("GET", self._path, headers, self)

    # Exchange

    def begun(self, status: int, headers: Mapping[str, str], length: int) -> None:
        self._status = status
        if self._outcome or status not in (200, 206):
            return
        total = self.publication.length
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if found is None or [int(number) for number in found.groups()] != [self._at, total - 1, total]:
                raise HttpError("an answer with another Content-Range than was asked for")
        else:
            self._at = 0  # a proxy may not know ranges: the bytes are the same
        if headers.get("etag") != self.publication.etag or "content-encoding" in headers:
            self._outcome = FAILED
            raise HttpError("an answer with other bytes than the sender published: another ETag or a Content-Encoding")
        if length != total - self._at:
            raise HttpError(f"an answer of {length} bytes where {total - self._at} are missing")
        self._cursor = Cursor(self._views, self._at)

    def take(self, data: memoryview) -> None:
        if not self._is_payload:
            return
        with self._landing.lock:
            self._check_window()
            self._cursor.take(data)
        self._landed(data.nbytes)

    def receive(self, sock: socket.socket, left: int) -> int:
        if not self._is_payload:
            return len(sock.recv(min(left, 1 << 16)))
        with self._landing.lock:
            self._check_window()
            received = sock.recvmsg_into(self._cursor.views())[0]
            self._cursor.advance(received)
        self._landed(received)
        return received

    def done(self, connection: Connection | None) -> None:
        if self._is_payload:
            with self._landing.lock:  # the last word
                self._outcome = WRITTEN if self._permit.holds() else REFUSED
            self._tries = 0
            self._cursor.release()
        elif self._status >= 500 or self._status in (408, 425, 429):
            self._failed()  # a proxy's word, not the sender's; RFC 9110 §15.6
        elif self._outcome or self._status in (404, 410):
            self.finished = True  # reported, or the sender has ended it meanwhile
        else:
            self._outcome = FAILED
        self._over(self, self._connection, connection is not None)

    def broken(self, reason: str) -> None:
        self._failed()
        self._over(self, self._connection, False)

    # Windows

    @property
    def _is_payload(self) -> bool:
        return not self._outcome and self._status in (200, 206)

    def _check_window(self) -> None:
        if not self._permit.holds():
            self._outcome = REFUSED
            self._tries = -1  # what breaks now is no failure
            raise _WindowClosedError("the window of this write has been closed")

    def _landed(self, count: int) -> None:
        self.received += count
        self._at += count
        if self._at > self._furthest:
            self._furthest, self._tries = self._at, 0

    def _failed(self) -> None:
        self._status = 0
        self._cursor.release()
        self._tries += 1
        if self._tries > MAX_TRIES:
            self.finished = bool(self._outcome)  # cannot even be reported: the sender will notice by itself
            self._outcome, self._tries = self._outcome or FAILED, 0
