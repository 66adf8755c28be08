"""Reads request bodies of limited size, checks their digests, and reads JSON in them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from codecs import BOM_UTF8
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from embferry.serve.byte_budget import Hold
from embferry.serve.config import RouterSettings
from embferry.serve.errors import ServeError
from embferry.serve.http.disconnect import run_until_disconnect
from embferry.serve.json_bounds import check_values
from embferry.serve.off_loop import off_loop
from embferry.trust.digests import CONTENT_DIGEST, DamagedError, check_content, check_foreign_content


def announced_bytes(scope: Scope) -> int:
    """Returns the length of a request's body by its header, or 0 if there is none; of 19 digits at most."""
    text = Headers(scope=scope).get("content-length", "")
    return int(text.lstrip("0")[:19] or 0) if text.isascii() and text.isdigit() else 0


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a request body must arrive.

    Attributes:
        stall_seconds: the longest wait for the next bytes, and the head start of the average.
        least_rate: bytes a second on average.
        total_seconds: seconds for the whole body; a longer announced length needs a higher rate.
    """

    stall_seconds: float = 30.0
    least_rate: float = 16_384.0
    total_seconds: float = 300.0

    @classmethod
    def of(cls, router: RouterSettings) -> Pace:
        """Returns the pace that the settings ask for, in workers too."""
        return cls(router.body_timeout, router.body_least_rate, router.request_timeout)

    def seconds_until(self, received: int, announced: int) -> float:
        """Returns after how many seconds from its beginning a body must be further than ``received`` bytes."""
        rate = max(self.least_rate, announced / self.total_seconds)
        return self.stall_seconds + received / rate


DEFAULT_PACE = Pace()


async def read_body(
    scope: Scope,
    receive: Receive,
    max_bytes: int,
    hold: Hold | None = None,
    *,
    pace: Pace = DEFAULT_PACE,
    between_parts: bool = False,
) -> bytes | None:
    """Reads a request body and checks its digest. Counts the bytes as they arrive: Content-Length may be wrong.

    A body that is refused is not read further. The server drops what still comes of it (:mod:`.connections`).

    Args:
        scope: the request's.
        receive: the request's.
        max_bytes: bytes of the body.
        hold: grows with the body, to the length by its header at once.
        pace: how fast it must arrive.
        between_parts: the caller is a part of this project, so the body must have a digest.

    Returns:
        The body; None if the client left before it was checked.

    Raises:
        ServeError: body_too_large; capacity_exhausted; body_timeout; body_damaged.
    """
    body = await _received(receive, max_bytes, hold, announced_bytes(scope), pace)
    values = Headers(scope=scope).getlist(CONTENT_DIGEST)
    if body is None or not (values or between_parts):
        return body
    return await run_until_disconnect(_checked(values, body, between_parts), receive)


async def _checked(values: list[str], body: bytes, between_parts: bool) -> bytes:
    """Returns the body if its digest is right."""
    value = ",".join(values) if values else None
    try:
        if between_parts or value is None:
            await off_loop(len(body), check_content, value, body)
        else:
            await off_loop(len(body), check_foreign_content, value, body)
    except DamagedError as error:
        raise ServeError("body_damaged", f"{error}; send the request again") from error
    return body


async def _received(receive: Receive, max_bytes: int, hold: Hold | None, announced: int, pace: Pace) -> bytes | None:
    _check_length(announced, max_bytes)
    if hold is not None:
        hold.set(announced)
    body, more, began = bytearray(), True, time.monotonic()
    while more:
        left = began + pace.seconds_until(len(body), announced) - time.monotonic()
        try:
            async with asyncio.timeout(min(pace.stall_seconds, max(0.0, left))):
                message = await receive()
        except TimeoutError:
            raise _too_slow(len(body), left, pace) from None
        if message["type"] == "http.disconnect":
            return None
        more = message.get("more_body", False)
        body += message.get("body", b"")
        _check_length(len(body), max_bytes)
        if hold is not None and len(body) > announced:
            hold.set(len(body))
    return bytes(body)


def _check_length(nbytes: int, max_bytes: int) -> None:
    if nbytes > max_bytes:
        raise ServeError("body_too_large", f"the body has more than {max_bytes:,} bytes")


def _too_slow(received: int, left: float, pace: Pace) -> ServeError:
    if left >= pace.stall_seconds:
        why = f"no byte of the body has arrived for {pace.stall_seconds:g} seconds"
    else:
        why = f"the body arrives too slowly: {received:,} bytes have come"
    return ServeError("body_timeout", why)


async def discard_body(receive: Receive, max_bytes: int, seconds: float) -> None:
    """Reads up to ``max_bytes`` more, for ``seconds`` at most: a client that is sending would not see the response."""
    seen, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while more and seen < max_bytes:
                message = await receive()
                seen += len(message.get("body", b""))
                more = message["type"] != "http.disconnect" and message.get("more_body", False)


_HALF_A_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
"""The first half of a surrogate pair alone. The parser's own message for it says that the body ends too early."""


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns a JSON object. A byte order mark is passed over (RFC 8259, section 8.1).

    Raises:
        ServeError: invalid_json: the body is none, or has too many values.
    """
    check_values(body)
    try:
        value = msgspec.json.decode(memoryview(body)[len(BOM_UTF8) :] if body.startswith(BOM_UTF8) else body)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        why = "it has half of a surrogate pair" if _HALF_A_PAIR.search(body) else error
        raise ServeError("invalid_json", f"the body is not JSON: {why}") from error
    if not isinstance(value, dict):
        raise ServeError("invalid_json", "the body must be a JSON object")
    return value
