"""Reads request bodies of limited size, and JSON in them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from embferry.serve.byte_budget import Hold
from embferry.serve.errors import ServeError
from embferry.serve.json_bounds import check_values


def announced_bytes(scope: Scope) -> int:
    """Returns the length of a request's body by its header, or 0 if there is none."""
    text = Headers(scope=scope).get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


async def read_body(
    receive: Receive,
    max_bytes: int,
    hold: Hold | None = None,
    *,
    announced: int = 0,
    stall_seconds: float | None = None,
) -> bytes | None:
    """Reads a request body. Counts the bytes as they arrive: Content-Length may be absent or wrong.

    Args:
        receive: the request's.
        max_bytes: bytes of the body.
        hold: grows with the body, to ``announced`` bytes at once.
        announced: the length by the request's headers, 0 if unknown.
        stall_seconds: the longest wait for the next bytes; None: no limit.

    Returns:
        The body; None if the client left before its end.

    Raises:
        ServeError: body_too_large; capacity_exhausted; body_timeout.
    """
    body, more = bytearray(), True
    try:
        if hold is not None:
            hold.set(min(announced, max_bytes))
        while more:
            try:
                async with asyncio.timeout(stall_seconds):
                    message = await receive()
            except TimeoutError:
                more = False
                why = f"no byte of the body has arrived for {stall_seconds:g} seconds"
                raise ServeError("body_timeout", why) from None
            if message["type"] == "http.disconnect":
                return None
            more = message.get("more_body", False)
            body += message.get("body", b"")
            if len(body) > max_bytes:
                raise ServeError("body_too_large", f"the body has more than {max_bytes:,} bytes")
            if hold is not None and len(body) > announced:
                hold.set(len(body))
    except ServeError:
        body.clear()
        if more:
            await _discard(receive, max_bytes, stall_seconds)
        raise
    return bytes(body)


async def _discard(receive: Receive, max_bytes: int, stall_seconds: float | None) -> None:
    """Reads up to ``max_bytes`` more: a client that is still sending would not see the response."""
    seen = 0
    while seen < max_bytes:
        try:
            async with asyncio.timeout(stall_seconds):
                message = await receive()
        except TimeoutError:
            return
        seen += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns a JSON object. Raises ServeError invalid_json if the body is none, or has too many values."""
    check_values(body)
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise ServeError("invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ServeError("invalid_json", "the body must be a JSON object")
    return value
