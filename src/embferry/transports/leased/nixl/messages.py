"""What sender and receiver say to each other beside the engine: length-prefixed MessagePack over one TCP connection.

A frame is a big-endian length of 4 bytes and a message, an array whose first item is its tag.

========= ============= ================================================================================
sender    ``hello``     once, first: the token of the handle, and which host this is
receiver  ``welcome``   the metadata of the agent that serves this sender alone, and where the region lies
sender    ``ask``       leave for the write ``serial``: epoch and byte ranges (little-endian pairs of 64 bits)
receiver  ``verdict``   go, or refused
receiver  ``stop``      the window of the write has closed: begin no more of it, say ``done`` soon
sender    ``done``      no byte of the write is on its way any more
sender    ``broken``    the engine failed, bytes may be on their way: destroy the agent, then hang up
========= ============= ================================================================================

Whoever breaks the format loses the connection.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
import numpy as np

from ...handles import Token
from ...windows import Ranges

MAX_RANGES = 1 << 16
RANGE_BYTES = 16
MAX_METADATA = 1 << 20
"""Bytes. It grows with the network devices of the host and exceeds the 1 KiB of a handle: hence the ``welcome``."""
MAX_HELLO_FRAME = 256
MAX_FRAME = (1 << 20) + 256
LENGTH = struct.Struct("!I")

Natural = Annotated[int, msgspec.Meta(ge=0)]  # MessagePack has no integer beyond 64 bits


class FrameError(ValueError):
    """The peer broke the format; the text says how."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello", forbid_unknown_fields=True):
    token: Token
    boot_id: Annotated[str, msgspec.Meta(max_length=64)]


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome", forbid_unknown_fields=True):
    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_METADATA)]
    base: Natural


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask", forbid_unknown_fields=True):
    serial: Natural
    epoch: Natural
    ranges: Annotated[bytes, msgspec.Meta(min_length=RANGE_BYTES, max_length=RANGE_BYTES * MAX_RANGES)]


class Verdict(msgspec.Struct, frozen=True, array_like=True, tag="verdict", forbid_unknown_fields=True):
    serial: Natural
    go: bool


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop", forbid_unknown_fields=True):
    serial: Natural


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done", forbid_unknown_fields=True):
    serial: Natural


class Broken(msgspec.Struct, frozen=True, array_like=True, tag="broken", forbid_unknown_fields=True):
    pass


Message = Hello | Welcome | Ask | Verdict | Stop | Done | Broken

_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def decode(frame: bytes) -> Message:
    """:raises FrameError: it is none of ours."""
    try:
        return _decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"a malformed message ({error})") from error


def encode(message: Message) -> bytes:
    return msgspec.msgpack.encode(message)


def pack_ranges(ranges: Ranges) -> bytes:
    return ranges.astype("<u8").tobytes()


def unpack_ranges(data: bytes) -> Ranges:
    """:raises FrameError: half a range."""
    if len(data) % RANGE_BYTES:
        raise FrameError(f"{len(data)} bytes of ranges; each has {RANGE_BYTES}")
    return np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 2)
