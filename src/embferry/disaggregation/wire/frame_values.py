"""Values of single frames of the origin's messages, each with its bounds.

Every function checks the length of a frame before it converts it, and raises :class:`RemoteProtocolError` for a frame
that is malformed or out of bounds.
"""

from __future__ import annotations

import re
import struct

from embferry.protocol.errors import RemoteProtocolError

MAX_ROOM = (1 << 63) - 1
MAX_TOKENS = (1 << 40) - 1
MAX_PORT = 65535
MAX_DESTINATIONS = 4096
"""Largest number of destination ranks of one room."""
MAX_HOST = 255
MAX_POINTER = (1 << 62) - 1
"""Larger than any address of a process; a pointer plus an offset stays below 63 bits."""
MIN_BUFFERS, MAX_BUFFERS = 4, 5
"""Base pointers of a registration. The fifth one, deepstack_embeddings, exists only where the model has any."""

POINTER = struct.Struct("=Q")
SHOWN_BYTES = 40

_NUMBER = re.compile(rb"0|[1-9][0-9]*")
_HOST = re.compile(rb"[0-9A-Za-z._:%\[\]-]+")


def shown(frame: bytes) -> str:
    """Returns a frame as text for an error message, cut off when it is long."""
    cut = "…" if len(frame) > SHOWN_BYTES else ""
    return repr(frame[:SHOWN_BYTES])[1:] + cut


def number(frame: bytes, name: str, lowest: int, highest: int) -> int:
    """Reads ASCII decimal digits without sign, space or leading zero, in ``[lowest, highest]``."""
    if len(frame) > len(str(highest)) or not _NUMBER.fullmatch(frame):
        raise RemoteProtocolError(f"{name} is {shown(frame)}; it must be decimal digits, {lowest} to {highest}")
    value = int(frame)
    if not lowest <= value <= highest:
        raise RemoteProtocolError(f"{name} is {value}; it must be {lowest} to {highest}")
    return value


def host(frame: bytes, name: str = "the receiver's host") -> str:
    """Reads a host name or an address, IPv6 included."""
    if len(frame) > MAX_HOST or not _HOST.fullmatch(frame):
        raise RemoteProtocolError(f"{name} is {shown(frame)}; it must be a host name or address")
    return frame.decode("ascii")


def session_id(frame: bytes) -> str:
    """Reads the ``host:port`` of a transfer engine."""
    name, colon, port = frame.rpartition(b":")
    if not colon:
        raise RemoteProtocolError(f"the session id is {shown(frame)}; it must be host:port")
    host(name, "the session's host")
    number(port, "the session's port", 1, MAX_PORT)
    return frame.decode("ascii")


def pointers(frame: bytes) -> tuple[int, ...]:
    """Reads base addresses, 8 bytes each in the byte order of this machine."""
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
    """Reads comma separated block indices below ``num_blocks``, at least one and each only once.

    Tokens fill the blocks in the order of the list.
    """
    if not frame:
        raise RemoteProtocolError("the list of blocks is empty; a request must bring at least one block")
    if len(frame) > num_blocks * (len(str(num_blocks)) + 1) or frame.count(b",") >= num_blocks:
        raise RemoteProtocolError(f"a list of blocks of {len(frame)} bytes; there are {num_blocks} blocks in all")
    blocks = tuple(number(part, "a block index", 0, num_blocks - 1) for part in frame.split(b","))
    if len(set(blocks)) != len(blocks):
        raise RemoteProtocolError("a block stands twice in the list; its tokens would overwrite each other")
    return blocks
