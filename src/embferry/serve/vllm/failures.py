"""Failures behind the router that need their own handling."""

from __future__ import annotations

import httpx

from embferry.serve.errors import ServeError


class VerbatimError(Exception):
    """An instance's error response that the client gets unchanged: the request is wrong, or all instances are busy."""

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        super().__init__(f"status {status}: {body[:300].decode(errors='replace')}")
        self.status = status
        self.content_type = content_type
        self.body = body

    @classmethod
    def of(cls, response: httpx.Response, body: bytes) -> VerbatimError:
        return cls(response.status_code, response.headers.get("content-type", "application/json"), body)


class EncodeAgainError(ServeError):
    """A failure after the encode and before the first byte to the client: encoding once more may help."""


def is_busy(status: int) -> bool:
    """Returns whether this status means that another instance may have capacity."""
    return status in (429, 503)


def is_unreachable(error: httpx.TransportError) -> bool:
    """Returns whether the request did not even arrive."""
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
