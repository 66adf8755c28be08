"""The size of a picture before it is encoded, by its header. A model's rule makes a grid of it.

The grid is compared with that of the encode before anything depends on it.
"""

from __future__ import annotations

from typing import Literal

HEAD = 1 << 16
"""Bytes from the beginning of a file in which its size is looked for."""
_ORIENTATION = 0x0112
"""EXIF tag (CIPA DC-008, 4.6.4). Values from 5 on turn the picture by 90 degrees."""
_HAS_EXIF = 0x08
"""Flag of an extended WebP file (RFC 9649, 2.7)."""
_SEGMENTS = 100


def picture_size(head: bytes) -> tuple[int, int] | None:
    """Returns width and height of a PNG, JPEG or WebP picture, upright; None if they are not in its first bytes."""
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(head)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _webp_size(head)
    return None


def _webp_size(head: bytes) -> tuple[int, int] | None:
    kind, body = head[12:16], head[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X" and body[0] & _HAS_EXIF:
        return None  # it stands at the end of the file, and may turn the picture
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    at, is_turned = 2, False
    for _ in range(_SEGMENTS):
        while head[at : at + 2] == b"\xff\xff":
            at += 1
        if at + 9 > len(head) or head[at] != 0xFF:
            return None
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4])
        if marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):
            height, width = int.from_bytes(head[at + 5 : at + 7]), int.from_bytes(head[at + 7 : at + 9])
            return (height, width) if is_turned else (width, height)
        if marker == 0xE1 and head[at + 4 : at + 10] == b"Exif\0\0":
            is_turned = _orientation(head[at + 10 : at + 2 + length]) >= 5
        at += 2 + length
    return None


def _orientation(exif: bytes) -> int:
    """Returns the orientation in an EXIF block; 1 (upright) if it has none."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"
    at = int.from_bytes(exif[4:8], order)
    entries = at + 2, at + 2 + 12 * int.from_bytes(exif[at : at + 2], order)
    for entry in range(*entries, 12):
        if int.from_bytes(exif[entry : entry + 2], order) == _ORIENTATION and entry + 12 <= len(exif):
            return int.from_bytes(exif[entry + 8 : entry + 10], order)
    return 1
