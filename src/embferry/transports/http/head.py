"""The head of an HTTP/1.1 message (RFC 9112), read strictly: laxity is what smuggles requests past proxies. Pure.

Bodies have a Content-Length or there is none. Chunked ones are refused: no end of this transport sends any, and a
proxy has no reason to make them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_HEAD_BYTES = 16 << 10
MAX_FIELDS = 100
END = b"\r\n\r\n"

_REQUEST = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) (\S{1,8192}) HTTP/1\.([01])")
_STATUS = re.compile(r"HTTP/1\.([01]) ([1-5]\d\d)(?: [^\x00-\x08\x0a-\x1f\x7f]*)?", re.A)
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_LENGTH = re.compile(r"\d{1,18}", re.A)

REASONS = {
    200: "OK",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    410: "Gone",
    412: "Precondition Failed",
    413: "Content Too Large",
    416: "Range Not Satisfiable",
}


class HttpError(ValueError):
    """The peer, or a proxy between, broke the protocol; the text says how."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    headers: dict[str, str]
    """Names in lower case; repeated ones joined."""
    closes: bool
    """The connection ends after the answer."""


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    headers: dict[str, str]
    closes: bool


def parse_request(data: bytes) -> Request:
    """:param data: without the empty line at its end. :raises HttpError: it is none."""
    start, headers = _split(data)
    found = _REQUEST.fullmatch(start)
    if found is None:
        raise HttpError("this is not a request of HTTP/1.1")
    if found[3] == "1" and "host" not in headers:
        raise HttpError("a request without Host")  # RFC 9112 §3.2
    return Request(found[1], found[2], headers, found[3] == "0" or _says_close(headers))


def parse_response(data: bytes) -> Response:
    """:param data: without the empty line at its end. :raises HttpError: it is none."""
    start, headers = _split(data)
    found = _STATUS.fullmatch(start)
    if found is None:
        raise HttpError("this is not an answer of HTTP/1.1; is another program behind this port?")
    kept = found[1] == "1" or headers.get("connection", "").lower() == "keep-alive"
    return Response(int(found[2]), headers, not kept or _says_close(headers))


def content_length(headers: Mapping[str, str]) -> int | None:
    """Bytes of the body, or None when it is not said.

    :raises HttpError: nonsense, two values that differ, or a coding that has no length.
    """
    if "transfer-encoding" in headers:
        raise HttpError(f"a body in the coding {headers['transfer-encoding']!r}; it needs a Content-Length here")
    said = headers.get("content-length")
    if said is None:
        return None
    if _LENGTH.fullmatch(said) is None:
        raise HttpError("a Content-Length that is no number of at most 18 digits")
    return int(said)


def request(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    return _join(f"{method} {target} HTTP/1.1", headers)


def response(status: int, headers: Mapping[str, str]) -> bytes:
    return _join(f"HTTP/1.1 {status} {REASONS[status]}", headers)


def _join(start: str, headers: Mapping[str, str]) -> bytes:
    lines = [start, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def _split(data: bytes) -> tuple[str, dict[str, str]]:
    start, *lines = data.decode("latin-1").split("\r\n")
    if len(lines) > MAX_FIELDS:
        raise HttpError(f"more than {MAX_FIELDS} header fields")
    headers: dict[str, str] = {}
    for line in lines:
        found = _FIELD.fullmatch(line)
        if found is None:  # also a folded line, and a blank before the colon: RFC 9112 §5.1, §5.2
            raise HttpError("a malformed header field")
        name, value = found[1].lower(), found[2]
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return start, headers


def _says_close(headers: Mapping[str, str]) -> bool:
    return "close" in (option.strip() for option in headers.get("connection", "").lower().split(","))
