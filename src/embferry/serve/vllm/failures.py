"""Failures behind the router that need their own handling."""

from __future__ import annotations

import json

import httpx

from embferry.serve.errors import ServeError

MAX_BODY_BYTES = 64 << 10
"""Bytes of an instance's error response that clients get; of a longer one, the beginning."""


class VerbatimError(Exception):
    """An instance's error response that the client gets unchanged: the request is wrong, or all instances are busy."""

    code = "instance"

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        super().__init__(f"status {status}: {body[:300].decode(errors='replace')}")
        self.status = status
        self.content_type = content_type
        self.body = body

    @classmethod
    def of(cls, response: httpx.Response, body: bytes) -> VerbatimError:
        content_type = response.headers.get("content-type", "application/json")
        if len(body) > MAX_BODY_BYTES:  # it repeats what the client has sent
            error = ServeError("invalid_request", body[:MAX_BODY_BYTES].decode(errors="replace"))
            content_type, body = "application/json", json.dumps(error.body()).encode()
        return cls(response.status_code, content_type, body)


class EncodeAgainError(ServeError):
    """A failure after the encode and before the first byte to the client: encoding once more may help.

    Args:
        code: as for ServeError.
        detail: as for ServeError.
        status: as for ServeError.
        retryable: as for ServeError.
        of_language: the language instance was lost, or what it and the router sent each other was damaged. Then no
            encoder is to blame, and the cache of each is asked first.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int | None = None,
        retryable: bool | None = None,
        of_language: bool = False,
    ) -> None:
        super().__init__(code, detail, status=status, retryable=retryable)
        self.of_language = of_language


class LostTwiceError(ServeError):
    """Two language instances were lost while they had the request, which may be the cause: no third one gets it."""


def is_busy(status: int) -> bool:
    """Returns whether this status means that another instance may have capacity."""
    return status in (429, 503)


def is_unreachable(error: httpx.TransportError) -> bool:
    """Returns whether the request did not even arrive."""
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
