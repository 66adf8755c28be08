"""The requests of a receiver to a sender, and the parsing of everything that arrives in them.

======================================== ========================================================================
request of the receiver                  response of the sender
======================================== ========================================================================
``GET {base}/embferry/1/{token}``        200 as soon as writes numbered above ``after`` are published for this
``?after=N&landed=B``                    receiver: a MessagePack list of them. 204 when there were none for S seconds,
``Prefer: wait=S``                       410 when the sender closes. B is the number of bytes received from this
                                         sender: what the kernel or a proxy takes from the sender says nothing. While
                                         a write is being fetched, it is reported every second (``after`` above every
                                         number, S = 0)
``GET .../{token}/{number}``             the bytes of one write (:mod:`resource`); ``Range`` and ``If-Range`` resume
``DELETE .../{token}/{number}``          ends that write with ``?outcome=`` ``written``, ``refused`` (no window covers
                                         it) or ``failed`` (its bytes did not arrive); 404 when it has ended before
``DELETE .../{token}``                   ends the link: the receiver closes
======================================== ========================================================================

Each request has ``Authorization: Bearer`` with the secret of the sender's address. With a cluster key it has a proof of
that instead (:mod:`embferry.trust.requests`), which covers the secret too. The target in the proof begins with
``/embferry/1``, because ``base`` may have a path, for a proxy in front of the sender. Every answer has a proof then.
``Prefer: wait`` is defined in RFC 7240 §4.3. Lists have a ``Content-Digest``; the bytes of writes have the checksums of
their transfer.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from embferry.protocol.errors import TlsFailed, TransportError
from embferry.trust.tls import Tls
from embferry.trust.trust import Trust

from ..handles import TOKEN_BYTES, Token, decode_handle
from ..net import address as addresses
from ..windows import MAX_PAYLOAD, MAX_RANGES, RANGE_BYTES, Ranges, parse_ranges
from .heads import HttpError

SECRET_BYTES = TOKEN_BYTES
PATH = "/embferry/1"
MAX_POLL_BYTES = 4 << 20  # of one response to a poll: the ranges of the largest write, and room for others
POLL_FULL_BYTES = 1 << 20  # the sender adds no further write to a response of this size
MAX_LISTED = 256  # writes in one response
WRITTEN, REFUSED, FAILED = OUTCOMES = ("written", "refused", "failed")

_PATH = re.compile(
    r"(?:https?://[^/?#]*)?(?:/[^?#]*)?/embferry/1/(?P<token>[0-9a-f]{32})(?:/(?P<number>\d{1,18}))?"
    rf"(?:\?(?:after=(?P<after>\d{{1,18}})(?:&landed=(?P<landed>\d{{1,18}}))?|outcome=(?P<outcome>{'|'.join(OUTCOMES)})))?",
    re.A,
)
_BASE_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]{1,64}){0,8}/?")
_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class HttpHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-http-2"):
    """Handle of a receiver, which does not listen: the token only names it."""

    token: Token


class HttpAddress(msgspec.Struct, frozen=True, array_like=True, tag="embferry-http-sender-1"):
    """Address of a sender: its base URL, and the secret that its requests must carry."""

    base: Annotated[str, msgspec.Meta(max_length=512)]
    secret: Token


class Publication(msgspec.Struct, frozen=True, array_like=True):
    """A write that can be fetched.

    Attributes:
        etag: A strong entity-tag with its quotes.
        length: Bytes in all ranges.
        ranges: Pairs of offset in the region and length, 64 bits each, big-endian.
    """

    number: Annotated[int, msgspec.Meta(ge=1, le=(1 << 62) - 1)]
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    etag: Annotated[str, msgspec.Meta(pattern=r'^"[0-9a-z-]{1,80}"$')]
    length: Annotated[int, msgspec.Meta(ge=0, le=MAX_PAYLOAD)]
    ranges: Annotated[bytes, msgspec.Meta(min_length=RANGE_BYTES, max_length=RANGE_BYTES * MAX_RANGES)]

    def parsed_ranges(self) -> Ranges:
        """Returns the ranges as uint64 ``[n, 2]``; raises HttpError if they do not add up to ``length``."""
        if len(self.ranges) % RANGE_BYTES:
            raise HttpError("ranges are pairs of 64-bit numbers")
        ranges = parse_ranges(self.ranges, self.length)
        if ranges is None:
            raise HttpError(f"the lengths of the ranges do not add up to the {self.length} bytes of the write")
        return ranges


_PUBLICATIONS = msgspec.msgpack.Decoder(list[Publication])


def parse_publications(body: bytes | bytearray, after: int) -> list[Publication]:
    """Parses the body of a response to a poll; raises HttpError unless its numbers ascend from above ``after``."""
    try:
        publications = _PUBLICATIONS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(f"the sender's response is not a list of writes: {error}") from error
    if len(publications) > MAX_LISTED:
        raise HttpError(f"a response with {len(publications)} writes; {MAX_LISTED} are allowed")
    for publication in publications:
        if publication.number <= after:
            raise HttpError("the sender's writes are not numbered in order")
        after = publication.number
    return publications


@dataclass(frozen=True, slots=True)
class Target:
    """The parsed target of a request; ``number`` is None for the receiver itself."""

    token: str
    number: int | None
    after: int
    landed: int
    outcome: str


def parse_target(target: str) -> Target | None:
    """Parses a request's target, also in the absolute form that proxies use (RFC 9112 §3.2.2); None if unknown."""
    match = _PATH.fullmatch(target)
    if match is None:
        return None
    number = None if match["number"] is None else int(match["number"])
    after, landed = int(match["after"] or 0), int(match["landed"] or 0)
    return Target(match["token"], number, after, landed, match["outcome"] or WRITTEN)


def proved_target(target: str) -> str:
    """Returns the part of a request's target that its proof covers. What stands before it, a proxy may change."""
    return target[max(0, target.rfind(PATH + "/")) :]


def proof_context(secret: str) -> bytes:
    """Returns what the proofs of requests to a sender cover beside them, by the secret of its address."""
    return b"http " + secret.encode()


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the receiver connects to, and what its requests contain.

    Attributes:
        authority: The value of ``Host``.
        prefix: The start of every request's target.
        tls: The certificate for the connection; None: it is not encrypted.
    """

    host: str
    port: int
    authority: str
    prefix: str
    secret: str
    tls: Tls | None


def parse_address(address: bytes, proxy: tuple[str, int] | None, trust: Trust) -> Destination:
    """Parses a sender's address.

    Args:
        address: The encoded :class:`HttpAddress`.
        proxy: Host and port of a forward proxy. It may resolve names; without one the address must be an IP address.
        trust: Has this end's certificate.

    Raises:
        TransportError: The address is malformed or cannot be reached (not retryable).
        TlsFailed: There should be TLS, and this end has no certificate or goes through a forward proxy.
    """
    decoded = decode_handle(address, HttpAddress, "http")
    host, port, path = split_base(decoded.base, allow_names=proxy is not None)
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    secret, tls = decoded.secret.hex(), trust.tls_for(decoded.base[:6].lower() == "https:")
    if proxy is None:
        return Destination(host, port, authority, f"{path}{PATH}", secret, tls)
    if tls is not None:
        raise TlsFailed("there is no TLS to a sender through a forward proxy")
    return Destination(*proxy, authority, f"http://{authority}{path}{PATH}", secret, None)


def split_base(base: str, *, allow_names: bool) -> tuple[str, int, str]:
    """Splits a base URL into host, port and path without a slash at its end.

    Raises:
        TransportError: The URL cannot be used (not retryable).
    """
    try:
        if re.search(r"[\x00-\x20\x7f-\U0010ffff]", base):  # urlsplit would silently drop some of them
            raise ValueError("it has characters that are not allowed in a URL")
        url = urlsplit(base)
        default = 443 if url.scheme == "https" else 80
        host, port = url.hostname or "", default if url.port is None else url.port
    except ValueError as error:
        raise TransportError(f"the sender's URL is malformed: {error}", retryable=False) from error
    plain = url.scheme in ("http", "https") and not (url.query or url.fragment or url.username or url.password)
    if not plain or not port or _BASE_PATH.fullmatch(url.path) is None:
        raise TransportError("the sender's URL must be like http://192.0.2.1:8080/path", retryable=False)
    path = url.path.rstrip("/")
    if allow_names and _HOST_NAME.fullmatch(host):
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return host, port, path
    return addresses.reachable(host), port, path
