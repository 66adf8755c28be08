"""What the two ends say to each other, and where it stands. Everything that is parsed here came from the wire.

======================================== ========================================================================
request of the receiver                  answer of the sender
======================================== ========================================================================
``GET {base}/embferry/1/{token}``        the writes published for this receiver since number ``after``, as
``?after=N&landed=B``                    MessagePack, as soon as there is one; 204 when there was none for S seconds;
``Prefer: wait=S``                       410 when the sender is closing. B: bytes that have come from it so far, for a
                                         proxy may take them all at once and pass them on slowly
``GET .../{token}/{number}``             the bytes of one write (:mod:`resource`); ``Range`` and ``If-Range`` to resume
``DELETE .../{token}/{number}``          that write is over: ``?outcome=`` ``written``, ``refused`` (no window covers
                                         it) or ``failed`` (it did not come through); 404 when it is over already
``DELETE .../{token}``                   the receiver is closing
======================================== ========================================================================

Each has ``Authorization: Bearer`` with the secret of the sender's address. ``base`` may have a path, for a proxy in
front of the sender; ``Prefer: wait`` is RFC 7240 §4.3.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
import numpy as np

from embferry.protocol.errors import TransportError

from ..handles import TOKEN_BYTES, Token, decode_handle
from ..net import address as addresses
from ..windows import Ranges
from .head import HttpError

SECRET_BYTES = TOKEN_BYTES
MAX_RANGES = 1 << 16
MAX_PAYLOAD = 1 << 46  # bytes: more than any machine's memory, and times MAX_RANGES still below 64 bits
MAX_ANSWER_BYTES = 4 << 20  # of one answer to a poll: the ranges of the largest write, and room for others
ANSWER_FULL_BYTES = 1 << 20  # the sender puts no further write into an answer that has so many
MAX_LISTED = 256  # writes in one answer
WRITTEN, REFUSED, FAILED = OUTCOMES = ("written", "refused", "failed")

_PATH = re.compile(
    r"(?:https?://[^/?#]*)?(?:/[^?#]*)?/embferry/1/(?P<token>[0-9a-f]{32})(?:/(?P<number>\d{1,18}))?"
    rf"(?:\?(?:after=(?P<after>\d{{1,18}})(?:&landed=(?P<landed>\d{{1,18}}))?|outcome=(?P<outcome>{'|'.join(OUTCOMES)})))?",
    re.A,
)
_BASE = re.compile(r"(?:/[A-Za-z0-9._~-]{1,64}){0,8}/?")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class HttpHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-http-1"):
    """Of a receiver: it listens nowhere, so this only names it."""

    token: Token


class HttpAddress(msgspec.Struct, frozen=True, array_like=True, tag="embferry-http-sender-1"):
    """Of a sender."""

    base: Annotated[str, msgspec.Meta(max_length=512)]
    secret: Token


class Publication(msgspec.Struct, frozen=True, array_like=True):
    """A write that waits to be fetched. ``ranges``: pairs of offset and length, 64 bits each, big-endian."""

    number: Annotated[int, msgspec.Meta(ge=1, le=(1 << 62) - 1)]
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    etag: Annotated[str, msgspec.Meta(pattern=r'^"[0-9a-z-]{1,80}"$')]
    length: Annotated[int, msgspec.Meta(ge=0, le=MAX_PAYLOAD)]
    ranges: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16 * MAX_RANGES)]

    def parsed_ranges(self) -> Ranges:
        """:raises HttpError: they do not add up to ``length``."""
        if len(self.ranges) % 16:
            raise HttpError("ranges are pairs of 64-bit numbers")
        ranges = np.frombuffer(self.ranges, ">u8").astype(np.uint64).reshape(-1, 2)
        lengths = ranges[:, 1]
        # Each at most the payload, and at most MAX_RANGES of them: the sum cannot wrap.
        if (lengths > self.length).any() or int(lengths.sum()) != self.length:
            raise HttpError(f"the lengths of the ranges do not add up to the {self.length} bytes of the write")
        return ranges


_PUBLICATIONS = msgspec.msgpack.Decoder(list[Publication])


def parse_publications(body: bytes | bytearray, after: int) -> list[Publication]:
    """The answer to a poll. :raises HttpError: it is none, or its numbers do not grow from ``after`` on."""
    try:
        found = _PUBLICATIONS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(f"the sender's answer is no list of writes: {error}") from error
    if len(found) > MAX_LISTED:
        raise HttpError(f"an answer with {len(found)} writes; {MAX_LISTED} are allowed")
    for publication in found:
        if publication.number <= after:
            raise HttpError("the sender's writes are not numbered in order")
        after = publication.number
    return found


@dataclass(frozen=True, slots=True)
class Asked:
    """What the target of a request names."""

    token: str
    number: int | None
    after: int
    landed: int
    outcome: str


def parse_target(target: str) -> Asked | None:
    """None when there is no such thing here. Absolute form, which proxies use, is taken too (RFC 9112 §3.2.2)."""
    found = _PATH.fullmatch(target)
    if found is None:
        return None
    number = None if found["number"] is None else int(found["number"])
    return Asked(
        found["token"], number, int(found["after"] or 0), int(found["landed"] or 0), found["outcome"] or WRITTEN
    )


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the receiver connects to, and how it asks there."""

    host: str
    port: int
    authority: str
    prefix: str
    """Of every request's target."""
    secret: str


def destination(address: bytes, proxy: tuple[str, int] | None) -> Destination:
    """:param proxy: a forward proxy, which may look names up; without one only IP addresses are reached.
    :raises TransportError: malformed, or nobody can be there (not retryable)."""
    said = decode_handle(address, HttpAddress, "http")
    host, port, path = split_base(said.base, names=proxy is not None)
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    secret = said.secret.hex()
    if proxy is not None:
        return Destination(*proxy, authority, f"http://{authority}{path}/embferry/1", secret)
    return Destination(host, port, authority, f"{path}/embferry/1", secret)


def split_base(base: str, *, names: bool) -> tuple[str, int, str]:
    """``(host, port, path without a slash at its end)`` of a base URL.

    :raises TransportError: it is none that can be used (not retryable)."""
    try:
        if re.search(r"[\x00-\x20\x7f-\U0010ffff]", base):  # urlsplit would silently drop some of them
            raise ValueError("it has characters that no URL has")
        url = urlsplit(base)
        host, port = url.hostname or "", 80 if url.port is None else url.port
    except ValueError as error:
        raise TransportError(f"the sender's URL is malformed: {error}", retryable=False) from error
    plain = url.scheme == "http" and not (url.query or url.fragment or url.username or url.password)
    if not plain or not port or _BASE.fullmatch(url.path) is None:
        raise TransportError("the sender's URL must be like http://192.0.2.1:8080/path", retryable=False)
    if names and not _is_address(host) and _NAME.fullmatch(host):
        return host, port, url.path.rstrip("/")
    return addresses.reachable(host), port, url.path.rstrip("/")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
