"""GIF pictures (GIF89a): size and colour of the screen, where encoders and decoders differ, and whether they move."""

from __future__ import annotations

import struct

MAX_BLOCKS = 100_000
_IMAGE, _EXTENSION = 0x2C, 0x21
_WHITE = b"\xff\xff\xff"


def with_screen(data: bytes) -> bytes:
    """Returns the picture with a screen as large as its first frame where the header says zero, as browsers do."""
    if len(data) < 13 or all(struct.unpack_from("<HH", data, 6)):
        return data
    at = 13 + _table_bytes(data[10])
    for _ in range(MAX_BLOCKS):
        kind = data[at] if at < len(data) else 0
        if kind == _IMAGE and at + 9 <= len(data):
            left, top, width, height = struct.unpack_from("<4H", data, at + 1)
            size = (left + width, top + height)
            return data[:6] + struct.pack("<HH", *size) + data[10:] if max(size) < 1 << 16 else data
        if kind == _EXTENSION:
            at += 2
        elif kind or at >= len(data):
            at += 1 + kind  # a block of an extension: its length, and its bytes
        else:
            at += 1  # the end of an extension
        if at >= len(data):
            return data
    return data


def on_white(data: bytes) -> bytes:
    """Returns the picture with white as the colour of its background, because FFmpeg shows it and browsers do not.

    White is added to the table of colours if it has none and is not full; of a full one, the lightest is taken.
    """
    if len(data) < 13:
        return data
    flags = data[10]
    table = data[13 : 13 + _table_bytes(flags)]
    colours = [table[at : at + 3] for at in range(0, len(table), 3)]
    if flags & 0x80 and (_WHITE in colours or len(colours) == 256):
        lightest = max(range(len(colours)), key=lambda index: sum(colours[index]))
        return data[:11] + bytes((lightest,)) + data[12:]
    bits = (flags & 7) + 2 if flags & 0x80 else 1
    added = _WHITE * ((1 << bits) - len(colours))
    flags = flags & 0x78 | 0x80 | (bits - 1)
    return data[:10] + bytes((flags, len(colours))) + data[12:13] + table + added + data[13 + len(table) :]


def is_animated(data: bytes) -> bool:
    """Returns whether a second frame begins in the file."""
    at, frames = 13 + _table_bytes(data[10]) if len(data) > 10 else len(data), 0
    while at + 9 < len(data) and data[at] in (_IMAGE, _EXTENSION):
        if data[at] == _IMAGE:
            frames += 1
            if frames == 2:
                return True
            at += 10 + _table_bytes(data[at + 9]) + 1  # and the byte before the pixels
        else:
            at += 2
        while at < len(data) and (length := data[at]):
            at += 1 + length
        at += 1
    return False


def _table_bytes(flags: int) -> int:
    """Returns the length of the table of colours that follows a header with these flags."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0
