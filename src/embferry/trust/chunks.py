"""A bound on the chunks of a body, and empty lines before a request.

Each chunk costs the event loop as much as a few hundred bytes of a large one. A piece of a body that the kernel has
received can hold 40,000 chunks of one byte, for which all other connections would wait a quarter of a second.
"""

from __future__ import annotations

import re
from typing import Any

import h11

FREE_CHUNKS = 1024
"""Chunks of a body that may have any size."""
LEAST_AVERAGE = 256
"""Bytes that the further chunks of a body must have on average."""
_EMPTY_LINES = re.compile(rb"(?:\r?\n)+")


def too_many(chunks: int, body_bytes: int) -> bool:
    """Returns whether a body with so many bytes so far has too many chunks."""
    return chunks > FREE_CHUNKS + body_bytes // LEAST_AVERAGE


class BoundedChunks(h11.Connection):
    """h11's state of a connection. A body in more chunks than allowed is an error like any other of the protocol.

    Attributes:
        status: of the last response; 0 before the first one.
    """

    status = 0
    _chunks = _body_bytes = 0

    def next_event(self) -> Any:
        if self.our_role is h11.SERVER and self.their_state is h11.IDLE and self._is_at_empty_line():
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._body_bytes += len(event.data)
            if too_many(self._chunks, self._body_bytes):
                why = f"{self._chunks:,} chunks of the body have {self._body_bytes:,} bytes; send fewer and larger ones"
                raise h11.RemoteProtocolError(why)
        return event

    def send_with_data_passthrough(self, event: Any) -> Any:
        if isinstance(event, h11.Response):
            self.status = event.status_code
        return super().send_with_data_passthrough(event)

    def _is_at_empty_line(self) -> bool:
        """Passes over empty lines before a request, which some clients send behind a body (RFC 9112, 2.2).

        Returns:
            Whether half of another one is there, and more may come.
        """
        data, is_over = self.trailing_data
        if not data.startswith((b"\r", b"\n")):
            return False
        lines = _EMPTY_LINES.match(data)
        self._receive_buffer.maybe_extract_at_most(lines.end() if lines else 0)
        return self.trailing_data[0] == b"\r" and not is_over
