"""Single frames of the origin's messages, each with its bounds. Nothing is converted before its length is known."""

from __future__ import annotations

import re
import struct

from embferry.protocol.errors import RemoteProtocolError

MAX_ROOM = (1 << 63) - 1
MAX_TOKENS = (1 << 40) - 1
MAX_PORT = 65535
MAX_DESTINATIONS = 4096
"""Destination ranks of one room at most."""
MAX_HOST = 255
MAX_POINTER = (1 << 62) - 1
"""Beyond any address of a process; what is added to one stays below 63 bits."""
MIN_BUFFERS, MAX_BUFFERS = 4, 5
"""Base pointers of a registration: the fifth, deepstack_embeddings, only where the model has any."""

POINTER = struct.Struct("=Q")
SHOWN_BYTES = 40

_NUMBER = re.compile(rb"0|[1-9][0-9]*")
_HOST = re.compile(rb"[0-9A-Za-z._:%\[\]-]+")


def shown(frame: bytes) -> str:
    """A frame as it may stand in a sentence: as text, cut off when long."""
    cut = "…" if len(frame) > SHOWN_BYTES else ""
    return repr(frame[:SHOWN_BYTES])[1:] + cut


def number(frame: bytes, what: str, lowest: int, highest: int) -> int:
    """ASCII decimal digits, without sign, space or leading zero.

    :raises RemoteProtocolError: it is something else, or outside ``[lowest, highest]``.
    """
    if len(frame) > len(str(highest)) or not _NUMBER.fullmatch(frame):
        raise RemoteProtocolError(f"{what} is {shown(frame)}; it must be decimal digits, {lowest} to {highest}")
    value = int(frame)
    if not lowest <= value <= highest:
        raise RemoteProtocolError(f"{what} is {value}; it must be {lowest} to {highest}")
    return value


def host(frame: bytes, what: str = "the receiver's host") -> str:
    """A name or an address, IPv6 included."""
    if len(frame) > MAX_HOST or not _HOST.fullmatch(frame):
        raise RemoteProtocolError(f"{what} is {shown(frame)}; it must be a host name or address")
    return frame.decode("ascii")


def session_id(frame: bytes) -> str:
    """The transfer engine's ``host:port``."""
    name, colon, port = frame.rpartition(b":")
    if not colon:
        raise RemoteProtocolError(f"the session id is {shown(frame)}; it must be host:port")
    host(name, "the session's host")
    number(port, "the session's port", 1, MAX_PORT)
    return frame.decode("ascii")


def pointers(frame: bytes) -> tuple[int, ...]:
    """Base addresses, 8 bytes each in the byte order of this machine."""
    count, rest = divmod(len(frame), POINTER.size)
    if rest or not MIN_BUFFERS <= count <= MAX_BUFFERS:
        raise RemoteProtocolError(
            f"base pointers of {len(frame)} bytes; they must be {MIN_BUFFERS} or {MAX_BUFFERS} of {POINTER.size} bytes"
        )
    values = tuple(value for (value,) in POINTER.iter_unpack(frame))
    if not all(values):
        raise RemoteProtocolError("a base pointer is 0; every buffer must be registered before it is announced")
    if max(values) > MAX_POINTER:
        raise RemoteProtocolError(f"a base pointer is {max(values):#x}, which is no address; is its byte order ours?")
    return values


def block_indices(frame: bytes, num_blocks: int) -> tuple[int, ...]:
    """Comma separated block indices, each of them once, in the order in which tokens fill them.

    :raises RemoteProtocolError: none, one that does not exist or stands twice, or no such list.
    """
    if not frame:
        raise RemoteProtocolError("the list of blocks is empty; a request must bring at least one block")
    if len(frame) > num_blocks * (len(str(num_blocks)) + 1) or frame.count(b",") >= num_blocks:
        raise RemoteProtocolError(f"a list of blocks of {len(frame)} bytes; there are {num_blocks} blocks in all")
    blocks = tuple(number(part, "a block index", 0, num_blocks - 1) for part in frame.split(b","))
    if len(set(blocks)) != len(blocks):
        raise RemoteProtocolError("a block stands twice in the list; its tokens would overwrite each other")
    return blocks
