"""Bytes as an HTTP resource: a request and a representation in, status, headers and a byte range out. Pure.

Sections are those of RFC 9110 unless another is named. What a server may choose, and what is chosen here:

====================== ===============================================================================================
several ranges         The field is ignored and the whole is sent with 200, as §14.2 allows. ``multipart/byteranges``
                       would put text between the bytes, and whoever asks for several must take a 200 anyway.
Range beside HEAD      Ignored: §14.2 defines it for GET alone. The headers are those of a GET without it.
malformed Range        Ignored (§14.2), like an unknown unit. A range without overlap is 416 (§15.5.17).
empty representation   A suffix range is satisfiable (§14.1.2), yet no Content-Range can say so: 200.
dates                  There is no modification date, so conditions on one are ignored (§13.1.3, §13.1.4), and an
                       If-Range with a date is false (§13.1.5).
digests                RFC 9530 puts them into the header, before the first byte, and a SHA-256 needs them all. So they
                       are sent once known: Repr-Digest with 200 and 206, Content-Digest with 200 alone, for that of a
                       part would have the part hashed before it is sent.
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
"""Stands for every number of more than 18 digits: §14.1.1 asks to expect any length, and int() refuses over 4,300."""


@dataclass(frozen=True, slots=True)
class Representation:
    """What is served.

    :param length: bytes, known from the start.
    :param etag: a strong entity-tag with its quotes: the same tag promises the same bytes (§8.8.1).
    :param ready: bytes that can be sent already; the others are being made.
    :param sha256: of all bytes, once somebody knows it.
    :param fixed: headers that every answer with a representation has.
    """

    length: int
    etag: str
    ready: int
    sha256: bytes | None = None
    methods: tuple[str, ...] = ("GET", "HEAD")
    fixed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` and ``headers``, then the bytes ``[start, stop)`` of the representation (none: 0, 0)."""

    status: int
    headers: dict[str, str]
    start: int = 0
    stop: int = 0
    waits: bool = False
    """The first byte of the body has still to be made."""


def answer(method: str, headers: Mapping[str, str], of: Representation) -> Answer:
    """:param headers: the request's, names in lower case; of repeated fields, the values joined by ``", "`` (§5.3)."""
    if method not in of.methods:
        return Answer(405, {"Allow": ", ".join(of.methods), "Content-Length": "0"})  # §15.5.6
    failed = _precondition(method, headers, of)
    if failed == 304:
        return Answer(304, {"ETag": of.etag, **of.fixed})  # §15.4.5: no Content-Length of a body that is not sent
    if failed:
        return Answer(412, {"ETag": of.etag, "Content-Length": "0"})  # §15.5.13
    if method not in ("GET", "HEAD"):
        return Answer(204, {})
    asked = _range(headers, of) if method == "GET" else None
    if asked is None:
        return _whole(method, of)
    start, stop = asked
    if start >= stop:
        unsatisfied = {"Content-Range": f"bytes */{of.length}", "Accept-Ranges": "bytes", "ETag": of.etag}
        return Answer(416, {**unsatisfied, "Content-Length": "0"})
    return _part(start, stop, of, brief="if-range" in headers)


def wants_digest(headers: Mapping[str, str]) -> bool:
    """Whether the client would like a SHA-256: ``Want-Repr-Digest`` or ``Want-Content-Digest`` (RFC 9530 §4)."""
    wishes = (_WANTED.search(headers.get(name, "")) for name in ("want-repr-digest", "want-content-digest"))
    return any(wish is not None and wish[1] is not None and int(wish[1]) > 0 for wish in wishes)


def _whole(method: str, of: Representation) -> Answer:
    headers = {**_described(of), "Content-Length": str(of.length)}
    if of.sha256 is not None:
        headers["Content-Digest"] = _digest(of.sha256)
    if method == "HEAD":
        return Answer(200, headers)
    return Answer(200, headers, 0, of.length, waits=of.length > 0 and of.ready <= 0)


def _part(start: int, stop: int, of: Representation, *, brief: bool) -> Answer:
    # §15.3.7: who asks with If-Range has the other headers already.
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


def _precondition(method: str, headers: Mapping[str, str], of: Representation) -> int:
    """The status of a condition that is false, or 0. In the order of §13.2.2."""
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if match is not None and match.strip() != "*" and of.etag not in _tags(match):
        return 412  # strong comparison, §13.1.1
    if none_match is not None:
        named = {tag.removeprefix("W/") for tag in _tags(none_match)}  # weak comparison, §13.1.2
        if none_match.strip() == "*" or of.etag in named:
            return 304 if method in ("GET", "HEAD") else 412
    return 0


def _tags(listed: str) -> list[str]:
    """The entity-tags of a list (§5.6.1, §8.8.3), which may have commas inside; of a malformed one, none."""
    found, at = [], 0
    while at < len(listed):
        tag = _ETAG.match(listed, at)
        if tag is None:
            return []
        found.append(tag[1])
        at = tag.end()
    return found


def _range(headers: Mapping[str, str], of: Representation) -> tuple[int, int] | None:
    """The bytes [start, stop) asked for; empty when there are none of them; None: all, for no range counts."""
    if_range = headers.get("if-range")
    if if_range is not None and if_range.strip() != of.etag:  # strong comparison, §13.1.5: no W/, no list, no date
        return None
    found = _RANGE.fullmatch(headers.get("range", "").strip(" \t"))
    if found is None or (of.length == 0 and found["suffix"] is not None and _number(found["suffix"])):
        return None
    if found["suffix"] is not None:
        return max(0, of.length - _number(found["suffix"])), of.length
    first = _number(found["first"])
    last = _number(found["last"]) if found["last"] else _BEYOND
    if last < first:
        return None  # §14.1.1: invalid
    return first, min(last + 1, of.length)


def _number(digits: str) -> int:
    digits = digits.lstrip("0")
    return _BEYOND if len(digits) > 18 else int(digits or "0")
