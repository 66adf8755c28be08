"""The transfer of one write into the blocks: fetched, resumed at the byte where a connection broke, then reported.

Before each receive, the loop's thread checks that the bytes may still land (:mod:`..base.landing`).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable

from ..net.cursor import Cursor
from ..receive_region import Permit, ReceiveRegion
from .client_connection import ClientConnection, ResponseHandler
from .heads import HttpError, Response
from .messages import FAILED, REFUSED, WRITTEN, Publication

MAX_TRIES = 6  # in a row without a new byte

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.A)


class Fetch(ResponseHandler):
    """Makes requests until the write has ended and that has been reported to the sender. For the loop's thread.

    Args:
        path: Of this receiver's writes at the sender.
        on_request_end: Called when a request has ended, with its connection. The fetch is then ``finished``, or needs
            another request after ``retry_delay_s``.

    Attributes:
        received: Bytes of bodies so far; bytes that arrived twice count twice.
    """

    def __init__(
        self,
        publication: Publication,
        path: str,
        landing: ReceiveRegion,
        on_request_end: Callable[[Fetch, ClientConnection], None],
    ) -> None:
        self.publication = publication
        self.finished = False
        self.received = 0
        self._path = f"{path}/{publication.number}"
        self._landing, self._on_request_end = landing, on_request_end
        ranges = publication.parsed_ranges()
        self._permit = Permit(landing.windows, publication.epoch, landing.windows.rows.touched(ranges))
        self._views: list[memoryview] = []
        if not self._permit.refused:
            self._views = [landing.view[offset : offset + length] for offset, length in ranges.tolist()]
        self._at = self._furthest = 0  # bytes that have landed
        self._cursor = Cursor([])
        self._tries = 0
        self._status = 0
        self._outcome = ""  # to report; empty while the bytes are fetched
        with landing.lock:
            if not self._permit.holds():
                self._outcome = REFUSED
            elif publication.length == 0:
                self._outcome = WRITTEN

    @property
    def retry_delay_s(self) -> float:
        """Seconds to wait before the next request: none after the first failure."""
        return 0.0 if self._tries < 2 else min(0.05 * 2 ** (self._tries - 2), 1.0)

    def start_request(self, connection: ClientConnection) -> None:
        self._connection = connection
        if self._outcome:
            connection.request("DELETE", f"{self._path}?outcome={self._outcome}", {}, self)
            return
        headers = {"Accept-Encoding": "identity"}
        if self._at:
            headers |= {"Range": f"bytes={self._at}-", "If-Range": self.publication.etag}
        connection.request("GET", self._path, headers, self)

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

    def receive(self, sock: socket.socket, left: int) -> int:
        if not self._is_payload:
            return super().receive(sock, left)
        with self._landing.lock:
            if not self._permit.holds():
                self._outcome = REFUSED
                self._tries = -1  # the failure that follows is not one of the connection
                raise HttpError("the window of this write has been closed")
            received = sock.recvmsg_into(self._cursor.views())[0]
            self._cursor.advance(received)
        self.received += received
        self._at += received
        if self._at > self._furthest:
            self._furthest, self._tries = self._at, 0
        return received

    def on_end(self) -> None:
        if self._is_payload:
            with self._landing.lock:  # the last check: the window was open until the last byte had landed
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
        if self._tries > MAX_TRIES:
            self.finished = bool(self._outcome)  # the report failed too; the sender's time-outs end the write
            self._outcome, self._tries = self._outcome or FAILED, 0
