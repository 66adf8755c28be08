"""ASF and WMV files (Advanced Systems Format, revision 01.20.06): the objects of the header must fit into it.

A demuxer reserves memory by the lengths in the objects for metadata, and loops by their counts. Pictures need none of
them, so they are turned into padding.
"""

from __future__ import annotations

import struct

from embferry.serve.media.headers.claims import ClaimError

MAX_OBJECTS = 10_000
MAX_STREAMS = 64
_HEAD_BYTES, _OBJECT_BYTES = 30, 24
_EXTENSION_BYTES = 46
"""The head of the header extension, whose objects follow as if they stood beside it."""
_STREAM_BYTES, _SIZES_AT, _BITMAP_AT = 78, 64, 89
"""The head of an object that describes a stream; where the lengths of its parts are, and that of a bitmap's header."""


def _guid(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


DATA = _guid("3626B275 8E66CF11 A6D900AA 0062CE6C")
STREAM = _guid("9107DCB7 B7A9CF11 8EE600C0 0C205365")
EXTENSION = _guid("B503BF5F 2EA9CF11 8EE300C0 0C205365")
PADDING = _guid("74D40618 DFCA0945 A4BA9AAB CB96AAE8")
_KEPT = (
    STREAM,
    _guid("A1DCAB8C 47A9CF11 8EE400C0 0C205365"),  # the file's properties
    _guid("CBA5E614 72C63243 8399A969 52065B5A"),  # more of a stream's
)


def reduced(data: bytes) -> bytes:
    """Returns the file with those objects of its header turned into padding that pictures do not need.

    Raises:
        ClaimError: an object reaches beyond the file, or there are more objects or streams than are read.
    """
    found = bytearray(data)
    at, streams = _HEAD_BYTES, 0
    for _ in range(MAX_OBJECTS):
        if at + _OBJECT_BYTES > len(data):
            return bytes(found)  # cut off: the decoder says so
        name, size = data[at : at + 16], int.from_bytes(data[at + 16 : at + 24], "little")
        if name == DATA or size < _OBJECT_BYTES:
            return bytes(found)  # the decoder stops here too
        if name == EXTENSION:
            at += _EXTENSION_BYTES
            continue
        if size > len(data) - at:
            why = f"an object of its header claims {size:,} bytes, and the file has {len(data):,}"
            raise ClaimError(why, truncated=True)
        if name == STREAM:
            streams += 1
            if streams > MAX_STREAMS:
                raise ClaimError(f"it has more than {MAX_STREAMS} streams")
            _check_stream(data[at : at + size])
        elif name not in _KEPT:
            found[at : at + 16] = PADDING
        at += size
    raise ClaimError(f"its header has more than {MAX_OBJECTS:,} objects")


def _check_stream(body: bytes) -> None:
    if len(body) < _STREAM_BYTES:
        return  # cut off: the decoder says so
    own, correction = struct.unpack_from("<II", body, _SIZES_AT)
    if own + correction > len(body) - _STREAM_BYTES:
        raise ClaimError(f"a stream's description claims {own + correction:,} bytes and has {len(body):,}")
    bitmap = int.from_bytes(body[_BITMAP_AT : _BITMAP_AT + 4], "little")
    if own > _BITMAP_AT - _STREAM_BYTES and bitmap > len(body) and _is_video(body):
        raise ClaimError(f"a stream's bitmap header claims {bitmap:,} bytes, and its description has {len(body):,}")


def _is_video(body: bytes) -> bool:
    return body[24:40] == _guid("C0EF19BC 4D5BCF11 A8FD0080 5F5C442B")
