"""Messages of the side channel: MessagePack in checked frames on one TCP connection beside the engine's own.

They follow the greeting (:mod:`embferry.trust.greeting`).

A frame is ``length(4) check(4)``, big-endian, and a message, an array whose first item is its tag. ``check`` is the low
half of the xxh3-64 of the message, seeded with the number of the frame in its direction. A message with a flipped bit
can be a valid message that says something else. One that is lost, repeated or moved is noticed with the next frame,
which comes within a second while a write is open.

========= ================ =============================================================================================
from      tag              meaning
========= ================ =============================================================================================
sender    ``hello``        first message: the token of the handle, and the boot id of the sender's host
receiver  ``welcome``      what the engine needs to reach the receiver (empty for Mooncake), and the address of the
                           region; sent again, without the former, before a verdict that refers to another address
sender    ``ask``          request for a lease for the write ``serial``: epoch and byte ranges (little-endian pairs of
                           64 bits)
receiver  ``verdict``      lease granted, or refused
receiver  ``stop``         start no more of this write and send ``done`` soon: its window has closed, or the region has
                           moved to another address
sender    ``done``         the write is over and no byte of it is in flight
sender    ``failed``       the write is over; its engine failed and bytes of it may still be in flight
receiver  ``acknowledged`` ``done`` or ``failed`` has been taken in; whether the window is still open (Mooncake only)
sender    ``ping``         sent every second while a write is open; ``pong`` is the answer. Without it, a sender could
receiver  ``pong``         not tell a receiver that lets an ask wait from one that is gone
sender    ``broken``       the engine is of no more use and bytes may still be in flight: cut this sender off, then
                           close the connection
========= ================ =============================================================================================

A peer that breaks the format loses the connection.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
import numpy as np
import xxhash

from ..handles import Token
from ..windows import MAX_RANGES, RANGE_BYTES, Ranges

MAX_METADATA = 1 << 20
"""Bytes. NIXL's grows with the network devices of the host and exceeds the 1 KiB of a handle, hence ``welcome``."""
MAX_HELLO_FRAME = 256
MAX_FRAME = (1 << 20) + 256
HEADER = struct.Struct("!II")

Natural = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no integer beyond 64 bits


class FrameError(ValueError):
    """The peer broke the format; the text says how."""


def framed(message: bytes, number: int) -> bytes:
    """Returns an encoded message as it travels; ``number`` counts the frames of its direction from 0 on."""
    return HEADER.pack(len(message), check(message, number)) + message


def check(message: bytes, number: int) -> int:
    """Returns the check of an encoded message."""
    return xxhash.xxh3_64_intdigest(message, seed=number) & 0xFFFFFFFF


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=str.lower):
    pass


class Hello(_Message, frozen=True):
    token: Token
    boot_id: Annotated[str, msgspec.Meta(max_length=64)]


class Welcome(_Message, frozen=True):
    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_METADATA)]
    base: Natural


class Ask(_Message, frozen=True):
    serial: Natural
    epoch: Natural
    ranges: Annotated[bytes, msgspec.Meta(min_length=RANGE_BYTES, max_length=RANGE_BYTES * MAX_RANGES)]


class Verdict(_Message, frozen=True):
    serial: Natural
    go: bool


class Stop(_Message, frozen=True):
    serial: Natural


class Done(_Message, frozen=True):
    serial: Natural


class Failed(_Message, frozen=True):
    serial: Natural


class Acknowledged(_Message, frozen=True):
    serial: Natural
    window_open: bool


class Ping(_Message, frozen=True):
    pass


class Pong(_Message, frozen=True):
    pass


class Broken(_Message, frozen=True):
    pass


Message = Hello | Welcome | Ask | Verdict | Stop | Done | Failed | Acknowledged | Ping | Pong | Broken

_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
encode = msgspec.msgpack.encode


def decode(frame: bytes) -> Message:
    """Returns the message in ``frame``; raises ``FrameError`` if there is none of this protocol."""
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"a malformed message ({error})") from error


def pack_ranges(ranges: Ranges) -> bytes:
    return ranges.astype("<u8").tobytes()


def unpack_ranges(data: bytes) -> Ranges:
    """Returns the byte ranges of an ``ask``; raises ``FrameError`` if the bytes end in the middle of one."""
    if len(data) % RANGE_BYTES:
        raise FrameError(f"{len(data)} bytes of ranges; each has {RANGE_BYTES}")
    return np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 2)
