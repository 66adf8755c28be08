"""Reads request bodies of limited size, and JSON in them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from embferry.serve.byte_budget import Hold
from embferry.serve.config import RouterSettings
from embferry.serve.errors import ServeError


def announced_bytes(scope: Scope) -> int:
    """Returns the length of a request's body by its header, or 0 if there is none."""
    text = Headers(scope=scope).get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


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
    receive: Receive,
    max_bytes: int,
    hold: Hold | None = None,
    *,
    announced: int = 0,
    pace: Pace = DEFAULT_PACE,
) -> bytes | None:
    """Reads a request body. Counts the bytes as they arrive: Content-Length may be absent or wrong.

    A body that is refused is not read further. The server drops what still comes of it (:mod:`.connections`).

    Args:
        receive: the request's.
        max_bytes: bytes of the body.
        hold: grows with the body, to ``announced`` bytes at once.
        announced: the length by the request's headers, 0 if unknown.
        pace: how fast it must arrive.

    Returns:
        The body; None if the client left before its end.

    Raises:
        ServeError: body_too_large; capacity_exhausted; body_timeout.
    """
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


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns a JSON object. Raises ServeError invalid_json if the body is none."""
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise ServeError("invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ServeError("invalid_json", "the body must be a JSON object")
    return value
