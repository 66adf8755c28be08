"""Calls from one part of this project to another one over httpx, with the digests of :mod:`embferry.trust.digests`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

from embferry.serve.http.proofs import line_reader
from embferry.trust.digests import (
    CONTENT_DIGEST,
    LINES,
    MESSAGE_DIGEST,
    DamagedError,
    check_answer,
    request_digest,
)


def add_digests(request: httpx.Request, content: str | None = None) -> httpx.Request:
    """Adds the digests to a request and returns it.

    Args:
        request: complete otherwise.
        content: the Content-Digest of its body; None without a body.
    """
    if content is not None:
        request.headers[CONTENT_DIGEST] = content
    target, length = request.url.raw_path.decode("ascii"), request.headers.get("content-length")
    request.headers[MESSAGE_DIGEST] = request_digest(request.method, target, length, content)
    return request


def is_streamed(response: httpx.Response) -> bool:
    """Returns whether a response consists of checked lines."""
    return response.status_code == 200 and response.headers.get("content-type") == LINES


async def checked_body(response: httpx.Response) -> bytes:
    """Reads a whole answer and returns its body.

    Raises:
        DamagedError: it is not the answer that was sent to this request.
        httpx.TransportError: it broke off.
    """
    if CONTENT_DIGEST not in response.headers:
        raise DamagedError(f"the answer with status {response.status_code} has no {CONTENT_DIGEST}")
    body = await response.aread()
    check_answer(response.request.headers[MESSAGE_DIGEST], response.status_code, response.headers, body)
    return body


async def checked_lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yields the lines of a streamed answer without the empty ones, which are signs of life.

    Raises:
        DamagedError: a line is not the next one that was sent.
        httpx.TransportError: the answer broke off.
    """
    reader = line_reader(response.request)
    async for received in response.aiter_raw():
        for line in reader.feed(received):
            if line:
                yield line
