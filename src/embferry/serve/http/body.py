"""Reads request bodies of limited size, checks their digests, and reads JSON in them."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from embferry.serve.byte_budget import Hold
from embferry.serve.errors import ServeError
from embferry.serve.json_bounds import check_values
from embferry.serve.off_loop import off_loop
from embferry.trust.digests import CONTENT_DIGEST, DamagedError, check_content, check_foreign_content


def announced_bytes(scope: Scope) -> int:
    """Returns the length of a request's body by its header, or 0 if there is none."""
    text = Headers(scope=scope).get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


async def read_body(
    scope: Scope,
    receive: Receive,
    max_bytes: int,
    hold: Hold | None = None,
    *,
    stall_seconds: float | None = None,
    between_parts: bool = False,
) -> bytes | None:
    """Reads a request body and checks its digest. Counts the bytes as they arrive: Content-Length may be wrong.

    Args:
        scope: the request's.
        receive: the request's.
        max_bytes: bytes of the body.
        hold: grows with the body, to the length by its header at once.
        stall_seconds: the longest wait for the next bytes; None: no limit.
        between_parts: the caller is a part of this project, so the body must have a digest.

    Returns:
        The body; None if the client left before its end.

    Raises:
        ServeError: body_too_large; capacity_exhausted; body_timeout; body_damaged.
    """
    announced = announced_bytes(scope)
    body = await _received(receive, max_bytes, hold, announced, stall_seconds)
    if body is not None:
        await _check_digest(Headers(scope=scope).getlist(CONTENT_DIGEST), body, between_parts)
    return body


async def _check_digest(values: list[str], body: bytes, between_parts: bool) -> None:
    if not (values or between_parts):
        return
    value = ",".join(values) if values else None
    try:
        if between_parts or value is None:
            await off_loop(len(body), check_content, value, body)
        else:
            await off_loop(len(body), check_foreign_content, value, body)
    except DamagedError as error:
        raise ServeError("body_damaged", f"{error}; send the request again") from error


async def _received(
    receive: Receive, max_bytes: int, hold: Hold | None, announced: int, stall_seconds: float | None
) -> bytes | None:
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
            await discard_body(receive, max_bytes, stall_seconds)
        raise
    return bytes(body)


async def discard_body(receive: Receive, max_bytes: int, stall_seconds: float | None) -> None:
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
