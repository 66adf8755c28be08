"""Reading the body of a request, no more of it than is allowed."""

from __future__ import annotations

from starlette.types import Receive

from embferry.serve.errors import ServeError


async def read_body(receive: Receive, most: int) -> bytes | None:
    """The body of a request, counted as it comes: an announced length may be absent or a lie. None if the client left.

    Raises:
        ServeError: body_too_large.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most:
            if more:
                await _discard(receive, most)
            raise ServeError("body_too_large", f"the body has more than {most:,} bytes")
        if not more:
            return bytes(body)


async def _discard(receive: Receive, most: int) -> None:
    """Reads on for a while: a client that is still sending would not see the answer."""
    seen = 0
    while seen < most:
        message = await receive()
        seen += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
