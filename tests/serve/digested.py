"""Requests to workers with the digests that a router adds."""

from __future__ import annotations

import httpx

from embferry.serve.http.calls import add_digests
from embferry.trust.digests import MESSAGE_DIGEST, LineReader, content_digest


def digested(request: httpx.Request) -> httpx.Request:
    """Adds the digests to a request; for ``auth`` of httpx."""
    return add_digests(request, content_digest(request.content) if request.content else None)


def lines_of(response: httpx.Response) -> list[bytes]:
    """Returns the lines of a streamed answer, checked, without the empty ones."""
    return [line for line in LineReader(response.request.headers[MESSAGE_DIGEST]).feed(response.content) if line]
