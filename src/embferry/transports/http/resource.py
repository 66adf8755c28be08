"""Bytes as an HTTP resource: computes status, headers and byte range of the response to a request. Pure.

Sections are those of RFC 9110 unless another RFC is named. Where it leaves a choice to servers, this is chosen:

====================== ===============================================================================================
several ranges         The field is ignored and everything is sent with 200, as §14.2 allows. ``multipart/byteranges``
                       would put text between the bytes, and a client that requests several must accept 200 anyway.
Range with HEAD        Ignored: §14.2 defines it for GET alone. The headers are those of a GET without it.
malformed Range        Ignored (§14.2), like an unknown unit. A range without overlap is 416 (§15.5.17).
empty representation   A suffix range is satisfiable (§14.1.2), yet no Content-Range can express it: 200.
dates                  There is no modification date, so conditions on one are ignored (§13.1.3, §13.1.4), and an
                       If-Range with a date is false (§13.1.5).
digests                RFC 9530 puts them into the header, before the first byte, and a SHA-256 needs all bytes. So they
                       are sent once known: Repr-Digest with 200 and 206, Content-Digest with 200 alone, because that of
                       a part would need the part hashed before it is sent.
====================== ===============================================================================================
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_ETAG = re.compile(r'[ \t,]*((?:W/)?"[\x21\x23-\x7e\x80-\xff]*")[ \t]*(?:,[ \t,]*|$)')
_RANGE = re.compile(r"bytes[ \t]*=[ \t]*(?:(?P<first>\d+)-(?P<last>\d*)|-(?P<suffix>\d+))[ \t]*", re.I | re.A)
_WANTED = re.compile(r"(?:^|,)[ \t]*sha-256[ \t]*(?:=[ \t]*(\d{1,2}))?[ \t]*(?=,|$)", re.A)
_BEYOND = 1 << 62
"""Replaces numbers of more than 18 digits: §14.1.1 requires to expect any length, and int() refuses over 4,300."""


@dataclass(frozen=True, slots=True)
class Representation:
    """The bytes that are served.

    Attributes:
        length: Bytes, known from the start.
        etag: A strong entity-tag with its quotes: the same tag promises the same bytes (§8.8.1).
        ready: Bytes that can be sent already; the others are still being made.
        sha256: Digest of all bytes, if it is known.
        methods: Methods that the resource supports.
        fixed: Headers of every response with a representation.
    """

    length: int
    etag: str
    ready: int
    sha256: bytes | None = None
    methods: tuple[str, ...] = ("GET", "HEAD")
    fixed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: ``status`` and ``headers``, then the bytes ``[start, stop)`` of the representation, if any.

    Attributes:
        waits: Whether the first byte of the body has still to be made.
    """

    status: int
    headers: dict[str, str]
    start: int = 0
    stop: int = 0
    waits: bool = False


def answer(method: str, headers: Mapping[str, str], of: Representation) -> Answer:
    """Computes the response to a request for ``of``.

    Args:
        method: The request's method.
        headers: The request's, by name in lower case; values of repeated fields are joined by ``", "`` (§5.3).
        of: The representation that is requested.
    """
    if method not in of.methods:
        return Answer(405, {"Allow": ", ".join(of.methods), "Content-Length": "0"})  # §15.5.6
    failed = _failed_precondition(method, headers, of)
    if failed == 304:
        return Answer(304, {"ETag": of.etag, **of.fixed})  # §15.4.5: no Content-Length of a body that is not sent
    if failed:
        return Answer(412, {"ETag": of.etag, "Content-Length": "0"})  # §15.5.13
    if method not in ("GET", "HEAD"):
        return Answer(204, {})
    requested = _range(headers, of) if method == "GET" else None
    if requested is None:
        return _whole(method, of)
    start, stop = requested
    if start >= stop:
        unsatisfied = {"Content-Range": f"bytes */{of.length}", "Accept-Ranges": "bytes", "ETag": of.etag}
        return Answer(416, {**unsatisfied, "Content-Length": "0"})
    return _part(start, stop, of, brief="if-range" in headers)


def wants_digest(headers: Mapping[str, str]) -> bool:
    """Whether the client wants a SHA-256: ``Want-Repr-Digest`` or ``Want-Content-Digest`` (RFC 9530 §4)."""
    matches = (_WANTED.search(headers.get(name, "")) for name in ("want-repr-digest", "want-content-digest"))
    return any(match is not None and match[1] is not None and int(match[1]) > 0 for match in matches)


def _whole(method: str, of: Representation) -> Answer:
    headers = {**_described(of), "Content-Length": str(of.length)}
    if of.sha256 is not None:
        headers["Content-Digest"] = _digest(of.sha256)
    if method == "HEAD":
        return Answer(200, headers)
    return Answer(200, headers, 0, of.length, waits=of.length > 0 and of.ready <= 0)


def _part(start: int, stop: int, of: Representation, *, brief: bool) -> Answer:
    # §15.3.7: a client that sends If-Range has the other headers already.
    described = {"ETag": of.etag, "Accept-Ranges": "bytes"} if brief else _described(of)
    part = {"Content-Range": f"bytes {start}-{stop - 1}/{of.length}", "Content-Length": str(stop - start)}
    return Answer(206, {**described, **part}, start, stop, waits=start >= of.ready)


def _described(of: Representation) -> dict[str, str]:
    headers = {"ETag": of.etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **of.fixed}
    if of.sha256 is not None:
        headers["Repr-Digest"] = _digest(of.sha256)
    return headers


def _digest(sha256: bytes) -> str:
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"  # RFC 9530 §2, a byte sequence of RFC 8941 §3.3.5


def _failed_precondition(method: str, headers: Mapping[str, str], of: Representation) -> int:
    """Returns the status for the first condition that is false, in the order of §13.2.2; 0 if there is none."""
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if match is not None and match.strip() != "*" and of.etag not in _tags(match):
        return 412  # strong comparison, §13.1.1
    if none_match is not None:
        named = {tag.removeprefix("W/") for tag in _tags(none_match)}  # weak comparison, §13.1.2
        if none_match.strip() == "*" or of.etag in named:
            return 304 if method in ("GET", "HEAD") else 412
    return 0


def _tags(text: str) -> list[str]:
    """Returns the entity-tags of a list (§5.6.1, §8.8.3), which may contain commas; none if the list is malformed."""
    tags, at = [], 0
    while at < len(text):
        match = _ETAG.match(text, at)
        if match is None:
            return []
        tags.append(match[1])
        at = match.end()
    return tags


def _range(headers: Mapping[str, str], of: Representation) -> tuple[int, int] | None:
    """Returns the requested bytes ``[start, stop)``, empty if unsatisfiable; None if the range must be ignored."""
    if_range = headers.get("if-range")
    if if_range is not None and if_range.strip() != of.etag:  # strong comparison, §13.1.5: no W/, no list, no date
        return None
    match = _RANGE.fullmatch(headers.get("range", "").strip(" \t"))
    if match is None or (of.length == 0 and match["suffix"] is not None and _number(match["suffix"])):
        return None
    if match["suffix"] is not None:
        return max(0, of.length - _number(match["suffix"])), of.length
    first = _number(match["first"])
    last = _number(match["last"]) if match["last"] else _BEYOND
    if last < first:
        return None  # §14.1.1: invalid
    return first, min(last + 1, of.length)


def _number(digits: str) -> int:
    digits = digits.lstrip("0")
    return _BEYOND if len(digits) > 18 else int(digits or "0")
