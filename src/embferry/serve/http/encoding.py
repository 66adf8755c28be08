"""Request bodies that are packed with gzip (RFC 9110, 8.4.1.3): unpacked on a thread, and bounded meanwhile."""

from __future__ import annotations

import zlib

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from embferry.serve.byte_budget import Hold
from embferry.serve.errors import ServeError
from embferry.serve.http.disconnect import run_until_disconnect
from embferry.serve.off_loop import LARGE_BYTES, off_loop
from embferry.serve.shared_threads import stop_if_unwanted

INPUT_BYTES, OUTPUT_BYTES = 64 << 10, 1 << 20
"""Bytes that are unpacked at a time, before and after."""
MAX_MEMBERS = 1000
"""Parts of a body, each packed by itself (RFC 1952, 2.2)."""
_NONE, _GZIP = ("", "identity"), ("gzip", "x-gzip")


async def unpacked(scope: Scope, receive: Receive, body: bytes, max_bytes: int, hold: Hold) -> bytes | None:
    """Returns the body of a request without its encoding.

    Args:
        scope: the request's.
        receive: the request's, which has been read to its end.
        body: as it has arrived.
        max_bytes: bytes of the unpacked body.
        hold: grows with the unpacked body.

    Returns:
        The body; None if the client left before it was unpacked.

    Raises:
        ServeError: unsupported_encoding; invalid_encoding; body_too_large; capacity_exhausted.
    """
    coding = ", ".join(Headers(scope=scope).getlist("content-encoding")).strip().lower()
    if coding in _NONE:
        return body
    if coding not in _GZIP:
        why = "the body has another Content-Encoding than gzip, of which one is read"
        raise ServeError("unsupported_encoding", why)
    # A few kilobytes may become megabytes, so a short body leaves the event loop too.
    return await run_until_disconnect(off_loop(max(len(body), LARGE_BYTES), _unpack, body, max_bytes, hold), receive)


def _unpack(body: bytes, max_bytes: int, hold: Hold) -> bytes:
    out, at = bytearray(), 0
    for _ in range(MAX_MEMBERS):
        at = _unpack_member(body, at, out, max_bytes, hold)
        if at == len(body):
            hold.set(len(out))
            return bytes(out)
    raise _invalid(f"it has more than {MAX_MEMBERS} parts")


def _unpack_member(body: bytes, at: int, out: bytearray, max_bytes: int, hold: Hold) -> int:
    """Unpacks the part that begins at ``at``, adds it to ``out``, and returns where it ends."""
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    waiting = b""
    while not unpacker.eof:
        stop_if_unwanted()
        if not waiting:
            waiting = body[at : at + INPUT_BYTES]
            at += len(waiting)
        if not waiting:
            raise _invalid("it ends too early")
        try:
            piece = unpacker.decompress(waiting, OUTPUT_BYTES)
        except zlib.error as error:
            raise _invalid(str(error)) from error
        waiting = unpacker.unconsumed_tail
        out += piece
        if len(out) > max_bytes:
            raise ServeError("body_too_large", f"the body has more than {max_bytes:,} bytes when it is unpacked")
        hold.add(len(piece))
    return at - len(unpacker.unused_data)


def _invalid(why: str) -> ServeError:
    return ServeError("invalid_encoding", f"the body is not gzip: {why}")
