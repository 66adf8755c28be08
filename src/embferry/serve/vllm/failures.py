"""What goes wrong behind the router and is no plain error: the client's own, and what is worth another attempt."""

from __future__ import annotations

import httpx

from embferry.serve.errors import ServeError


class VerbatimError(Exception):
    """An instance's answer that goes to the client as it is: the request is at fault, or all are busy."""

    def __init__(self, status: int, content_type: str, body: bytes) -> None:
        super().__init__(f"status {status}: {body[:300].decode(errors='replace')}")
        self.status = status
        self.content_type = content_type
        self.body = body

    @classmethod
    def of(cls, response: httpx.Response, body: bytes) -> VerbatimError:
        return cls(response.status_code, response.headers.get("content-type", "application/json"), body)


class AgainError(ServeError):
    """It failed behind the encode, and nothing has been said to the client: encoding anew may help."""


def busy(status: int) -> bool:
    """Whether an instance says that another one may have the time."""
    return status in (429, 503)


def unreachable(error: httpx.TransportError) -> bool:
    """Whether the request has not even arrived."""
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
