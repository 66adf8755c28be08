"""Heads of HTTP/1.1 messages, parsed and written with h11. Pure.

h11 sees heads only: bodies move between a socket and the memory of a write without a copy. Two programs that read a
head differently let requests be smuggled past a proxy, so what h11 tolerates beyond RFC 9112 is rejected first. A body
needs a Content-Length; chunked bodies are rejected, since neither end of this transport sends any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

import h11

MAX_HEAD_BYTES = 16 << 10
MAX_FIELDS = 100
END = b"\r\n\r\n"

_TOLERATED_BY_H11 = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"  # control characters
    rb"|\r(?!\n)|(?<!\r)\n"  # lines that end with CR or LF alone
    rb"|\n[ \t]|\n\r\n"  # folded lines (RFC 9112 §5.2), and empty ones
    rb"|\ncontent-length:(?:[^\n]*,|(?s:.*)\ncontent-length:)"  # several lengths, even if they are equal
    rb"|\ncontent-length:[ \t]*\d{19}",
    re.IGNORECASE,
)
_ANY_REQUEST = h11.Request(method="GET", target="/", headers=[("Host", "any")])


class HttpError(ValueError):
    """The peer, or a proxy in between, violated the protocol; the text says how."""


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request.

    Attributes:
        headers: By name in lower case; values of repeated fields are joined with a comma.
        closes: Whether the connection ends after the response.
    """

    method: str
    target: str
    headers: dict[str, str]
    closes: bool


@dataclass(frozen=True, slots=True)
class Response:
    """The head of a response; the attributes are those of :class:`Request`."""

    status: int
    headers: dict[str, str]
    closes: bool


def head_length(received: bytes | bytearray) -> int:
    """Returns the length of a head without :data:`END`, -1 if it is incomplete; raises HttpError if it is too long."""
    end = received.find(END)
    if (end if end >= 0 else len(received)) > MAX_HEAD_BYTES:
        raise HttpError(f"the head is longer than {MAX_HEAD_BYTES} bytes")
    return end


def parse_request(head: bytes) -> Request:
    """Parses ``head``, which comes without :data:`END`; raises HttpError if it is malformed."""
    event = _parse(h11.Connection(h11.SERVER), head)
    if not isinstance(event, h11.Request):
        raise HttpError("this is not a request")
    headers = _headers_of(event)
    closes = event.http_version == b"1.0" or _says_close(headers)
    return Request(event.method.decode(), event.target.decode(), headers, closes)


def parse_response(head: bytes) -> Response:
    """Parses ``head``, which comes without :data:`END`; raises HttpError if it is malformed."""
    connection = h11.Connection(h11.CLIENT)
    if head.startswith(b"1", len(b"HTTP/1.1 ")):
        connection.send(_ANY_REQUEST)  # without one, h11 accepts no informational response
    event = _parse(connection, head)
    if not isinstance(event, h11.Response | h11.InformationalResponse) or event.status_code > 599:
        raise HttpError("this is not a response")
    headers = _headers_of(event)
    keeps = event.http_version == b"1.1" or headers.get("connection", "").lower() == "keep-alive"
    return Response(event.status_code, headers, not keeps or _says_close(headers))


def content_length(headers: Mapping[str, str]) -> int | None:
    """Returns the bytes of the body, None without a Content-Length; raises HttpError if the body is chunked."""
    if "transfer-encoding" in headers:
        raise HttpError("the body is chunked; this transport needs a Content-Length")
    text = headers.get("content-length")
    return None if text is None else int(text)  # h11 has checked the digits


def write_request(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """Returns a request's head with :data:`END`."""
    request = h11.Request(method=method, target=target, headers=list(headers.items()))
    return h11.Connection(h11.CLIENT).send(request)


def write_response(status: int, headers: Mapping[str, str]) -> bytes:
    """Returns a response's head with :data:`END`."""
    reason = HTTPStatus(status).phrase
    response = h11.Response(status_code=status, headers=list(headers.items()), reason=reason)
    return h11.Connection(h11.SERVER).send(response)


def _parse(connection: h11.Connection, head: bytes) -> object:
    if _TOLERATED_BY_H11.search(head):
        raise HttpError(
            "the head has a control character, a bare line end, a folded line, or several or absurd lengths"
        )
    connection.receive_data(head + END)
    try:
        return connection.next_event()
    except h11.RemoteProtocolError as error:
        # Without h11's text, which quotes the line: that may hold a secret, or 16 KiB.
        raise HttpError("this is not HTTP/1.1; is another program behind this port?") from error


def _headers_of(event: h11.Request | h11.Response | h11.InformationalResponse) -> dict[str, str]:
    if event.http_version not in (b"1.0", b"1.1"):
        raise HttpError("this is another version of HTTP than 1.1")
    if len(event.headers) > MAX_FIELDS:
        raise HttpError(f"the head has more than {MAX_FIELDS} fields")
    headers: dict[str, str] = {}
    for raw_name, raw_value in event.headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _says_close(headers: Mapping[str, str]) -> bool:
    return "close" in (option.strip() for option in headers.get("connection", "").lower().split(","))
