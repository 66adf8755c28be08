"""A bound on the chunks of a body.

Each chunk costs the event loop as much as a few hundred bytes of a large one. A piece of a body that the kernel has
received can hold 40,000 chunks of one byte, for which all other connections would wait a quarter of a second.
"""

from __future__ import annotations

from typing import Any

import h11

FREE_CHUNKS = 1024
"""Chunks of a body that may have any size."""
LEAST_AVERAGE = 256
"""Bytes that the further chunks of a body must have on average."""


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
