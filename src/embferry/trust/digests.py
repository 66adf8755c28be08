"""Digests of HTTP messages between parts of this project, so that a flipped bit is an error and no wrong answer. Pure.

=====================  ============================================================================================
``Content-Digest``     SHA-256 of a body (RFC 9530): of a request, or of an answer that is sent as a whole
``Embferry-Digest``    of a request: over its method, target, Content-Length and Content-Digest. Of a whole answer: over
                       the request's Embferry-Digest, the status and its own Content-Digest. So an answer belongs to one
                       request.
lines                  A streamed answer has a check in front of each line: over the request's Embferry-Digest, the
                       line's number and its content. A line that is lost, repeated, moved or changed is noticed.
=====================  ============================================================================================

They protect against faults. A stranger can compute them too: proofs of the cluster's key stand over them
(:mod:`embferry.trust.requests`), and the checks of lines then begin with a secret of both ends.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

CONTENT_DIGEST, MESSAGE_DIGEST = "Content-Digest", "Embferry-Digest"
LINES = "application/x-embferry-lines"
"""Media type of a streamed answer."""
MAX_LINE_BYTES = 16 << 20
CHECK_DIGITS = 16

_KEY = r"[a-z*][a-z0-9_.*-]*"
_BYTES = r":[A-Za-z0-9+/]*={0,2}:"
_BARE_ITEM = (
    r'"(?:[ !#-\[\]-~]|\\["\\])*"|%"[ !#-~]*"|\?[01]|@?-?[0-9]+(?:\.[0-9]+)?|'
    rf"[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*|{_BYTES}"
)
_MEMBER = re.compile(rf"({_KEY})=({_BYTES})(?:;[ ]*{_KEY}(?:=(?:{_BARE_ITEM}))?)*")
"""A member of a dictionary, with its parameters (RFC 8941, 3.2; RFC 9651 for newer items)."""
_COMMA = re.compile(r"[ \t]*,[ \t]*")
_ALGORITHMS: dict[str, Callable[..., Any]] = {"sha-256": hashlib.sha256, "sha-512": hashlib.sha512}


class DamagedError(Exception):
    """A message is not the one that was sent."""


def content_digest(body: bytes | bytearray) -> str:
    """Returns the ``Content-Digest`` of a body. Takes about a millisecond for 1 MiB."""
    hashed = ContentHash()
    hashed.update(body)
    return hashed.content_digest


class ContentHash:
    """The ``Content-Digest`` of a body that arrives in pieces."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, piece: bytes | bytearray) -> None:
        """Adds the next piece."""
        self._sha256.update(piece)

    @property
    def content_digest(self) -> str:
        """The digest of all pieces so far."""
        return f"sha-256=:{base64.b64encode(self._sha256.digest()).decode()}:"


def check_content(value: str | None, body: bytes | bytearray) -> None:
    """Checks a body against the ``Content-Digest`` that a part of this project has sent.

    Raises:
        DamagedError: it is missing or another one.
    """
    if value is None:
        raise DamagedError(f"{CONTENT_DIGEST} is missing")
    if value != content_digest(body):
        raise DamagedError(f"the {len(body)} bytes that arrived do not match their {CONTENT_DIGEST}")


def check_foreign_content(value: str, body: bytes | bytearray) -> None:
    """Checks a body against any ``Content-Digest`` of RFC 9530. Other algorithms and all parameters are ignored.

    The body is hashed once with each of the two, however many digests there are: of several, the last one counts.

    Raises:
        DamagedError: it is malformed or wrong.
    """
    claimed: dict[str, str] = {}
    value, at = value.strip(" \t"), 0
    while not claimed or at < len(value):
        comma = _COMMA.match(value, at) if claimed else None
        found = None if claimed and comma is None else _MEMBER.match(value, comma.end() if comma else 0)
        if found is None:
            raise DamagedError(f"{CONTENT_DIGEST} is malformed; it looks like sha-256=:…:")
        claimed[found[1]], at = found[2].strip(":"), found.end()
    for name, hashed in _ALGORITHMS.items():
        if name in claimed and base64.b64encode(hashed(body).digest()).decode() != claimed[name]:
            raise DamagedError(f"the {len(body)} bytes that arrived do not match their {CONTENT_DIGEST}")


def request_digest(method: str, target: str, length: str | None, content: str | None) -> str:
    """Returns the ``Embferry-Digest`` of a request.

    Args:
        method: in capital letters.
        target: path and query, as in the request line.
        length: its ``Content-Length``; a wrong one would be waited for.
        content: its ``Content-Digest``; None without a body.
    """
    return _digest(method, target, length or "", content or "")


def answer_digest(request: str, status: int, content: str) -> str:
    """Returns the ``Embferry-Digest`` of a whole answer.

    Args:
        request: the request's ``Embferry-Digest``.
        status: the answer's.
        content: the answer's ``Content-Digest``.
    """
    return _digest(request, str(status), content)


def check_answer(request: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Checks a whole answer.

    Args:
        request: the request's ``Embferry-Digest``.
        status: the answer's.
        headers: the answer's; found by their names in lower case.
        body: the answer's.

    Raises:
        DamagedError: it is not the answer to this request, or not as it was sent.
    """
    content = headers.get(CONTENT_DIGEST.lower())
    check_content(content, body)
    if headers.get(MESSAGE_DIGEST.lower()) != answer_digest(request, status, content or ""):
        raise DamagedError(f"the answer with status {status} does not match its {MESSAGE_DIGEST}")


class LineWriter:
    """Writes the lines of a streamed answer. ``request``: the request's ``Embferry-Digest``."""

    def __init__(self, request: str) -> None:
        self._request = request
        self._number = 0

    def line(self, content: bytes = b"") -> bytes:
        """Returns the next line. ``content`` has no line break; empty: a sign of life."""
        check = _check(self._request, self._number, content)
        self._number += 1
        return b"%s %s\n" % (check, content)


class LineReader:
    """Reads and checks the lines of a streamed answer. ``request``: the request's ``Embferry-Digest``."""

    def __init__(self, request: str) -> None:
        self._request = request
        self._number = 0
        self._rest = bytearray()

    def feed(self, received: bytes) -> list[bytes]:
        """Returns the contents of the lines that are complete now.

        Raises:
            DamagedError: a line is not the next one that was sent. The lines before it are lost too.
        """
        self._rest += received
        if len(self._rest) > MAX_LINE_BYTES:
            raise DamagedError(f"a line of the answer has more than {MAX_LINE_BYTES:,} bytes")
        if b"\n" not in received:
            return []
        *lines, self._rest = self._rest.split(b"\n")
        return [self._checked(bytes(line)) for line in lines]

    def _checked(self, line: bytes) -> bytes:
        check, space, content = line[:CHECK_DIGITS], line[CHECK_DIGITS : CHECK_DIGITS + 1], line[CHECK_DIGITS + 1 :]
        if space != b" " or check != _check(self._request, self._number, content):
            raise DamagedError(f"line {self._number} of the answer does not match its check")
        self._number += 1
        return content


def _check(request: str, number: int, content: bytes) -> bytes:
    seen = hashlib.sha256(f"{request} {number} ".encode() + content)
    return seen.hexdigest()[:CHECK_DIGITS].encode()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[: 2 * CHECK_DIGITS]
