"""Reads request bodies of limited size, and JSON in them."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Receive

from embferry.serve.errors import ServeError


async def read_body(receive: Receive, max_bytes: int) -> bytes | None:
    """Reads a request body. Counts the bytes as they arrive: Content-Length may be absent or wrong.

    Returns:
        The body; None if the client left before its end.

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
        if len(body) > max_bytes:
            if more:
                await _discard(receive, max_bytes)
            raise ServeError("body_too_large", f"the body has more than {max_bytes:,} bytes")
        if not more:
            return bytes(body)


async def _discard(receive: Receive, max_bytes: int) -> None:
    """Reads up to ``max_bytes`` more: a client that is still sending would not see the response."""
    seen = 0
    while seen < max_bytes:
        message = await receive()
        seen += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns a JSON object. Raises ServeError invalid_json if the body is none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise ServeError("invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ServeError("invalid_json", "the body must be a JSON object")
    return value
