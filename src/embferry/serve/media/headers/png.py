"""PNG pictures (W3C PNG, third edition): the chunks that pixels need, without texts, profiles and other metadata.

A decoder unpacks compressed texts and colour profiles, and gives the whole picture up when one is large or damaged, or
when the chunk of transparency is. It compares a transparent colour of few bits with pixels that it has spread to 8.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from embferry.serve.media.headers.claims import ClaimError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 1_000_000
MAX_FRAMES = 10_000
MAX_ORIENTATION = 1 << 16
"""Bytes of a chunk that may hold the orientation; a longer one is left out like other metadata."""
MAX_UNPACKED = 1 << 18
"""Bytes of a compressed one, unpacked."""
_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_ANIMATION = frozenset((b"acTL", b"fcTL", b"fdAT"))
DEPTH = 24
"""Place of the number of bits in the header of a file, whose colour type is behind it."""
KEEP, CLEAR, RESTORE = range(3)
"""Ways to dispose of the part of the picture that a frame covers, after it (11.3.6.2)."""
_CONTROL = struct.Struct(">IIIIIHHBB")
_GREY, _RGB, _PALETTE = 0, 2, 3
"""Colour types (11.2.1) of pictures that may have a chunk of transparency."""
_RAW_EXIF = b"Raw profile type exif\0"
"""The keyword of a text chunk in which older tools store EXIF."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of an animation.

    Attributes:
        picture: its pixels, as a PNG of its own.
        left: where they belong in the picture.
        top: likewise.
        disposal: ``KEEP``, ``CLEAR`` or ``RESTORE``.
        is_over: its transparent pixels show what is there, instead of taking its place.
    """

    picture: bytes
    left: int
    top: int
    disposal: int
    is_over: bool


def reduced(data: bytes, *, animated: bool = False) -> bytes:
    """Returns the picture with the chunks that its pixels need, and EXIF for the orientation, if that can be read.

    A transparent colour has as many bits as Pillow gives the pixels: 8, or 16.

    Args:
        data: the file.
        animated: keep the chunks of an animation too. Without them a decoder reads its first picture.

    Raises:
        ClaimError: the first chunk is not the header, or there are more than ``MAX_CHUNKS`` chunks.
    """
    if len(data) >= 16 and data[12:16] != b"IHDR":
        raise ClaimError("it does not begin with the header of a PNG (IHDR)")
    kept = _PIXELS | _ANIMATION if animated else _PIXELS
    parts, begun = [data[:8]], -1  # neighbours are copied together
    has_orientation = has_transparency = has_pixels = False
    colours = 0
    for name, at, end in _chunks(data):
        is_unknown = name[:1].isupper()  # and critical: the decoder decides
        is_kept = name in kept or is_unknown
        transparency = b""
        if name == b"PLTE":
            colours = min((end - at - 12) // 3, 1 << min(data[24], 8))
        elif name == b"IDAT":
            has_pixels = True
        elif name == b"tRNS" and end <= len(data):
            is_kept = False
            if not (has_transparency or has_pixels):  # it comes once, and before the pixels
                transparency = _transparency(data, at, end, colours)
                has_transparency = bool(transparency)
        elif not is_kept and not has_orientation:  # one of them, because a decoder bounds all texts together
            is_kept = has_orientation = _is_orientation(data, name, at, end)
        if is_kept and begun < 0:
            begun = at
        elif not is_kept and begun >= 0:
            parts.append(data[begun:at])
            begun = -1
        if transparency:
            parts.append(_chunk(b"tRNS", transparency))
    if begun >= 0:
        parts.append(data[begun:])
    return b"".join(parts)


def delays(data: bytes) -> tuple[list[float], bool]:
    """Returns the seconds that each frame of an animation is shown, and whether its first picture is no frame of it.

    No frames: the picture is none.

    Raises:
        ClaimError: there are more than ``MAX_FRAMES`` frames.
    """
    found: list[float] = []
    is_animation = is_apart = False
    for name, at, _ in _chunks(data):
        if name == b"acTL":
            is_animation = True
        elif name == b"IDAT":
            is_apart |= not found
            if not is_animation:
                break
        elif name == b"fcTL":
            if len(found) >= MAX_FRAMES:
                raise ClaimError(f"it has more than {MAX_FRAMES:,} frames")
            above, below = (int.from_bytes(data[at + 8 + field : at + 10 + field]) for field in (20, 22))
            found.append(above / (below or 100))
    return (found, is_apart) if is_animation else ([], False)


def frames(data: bytes) -> Iterator[Frame]:
    """Yields the frames of an animation whose chunks :func:`reduced` has looked at.

    Raises:
        ClaimError: a frame is damaged, does not fit into the picture, or the file ends in it.
    """
    width, height = struct.unpack_from(">II", data, 16)
    shared, control, number = b"", None, 0
    pixels: list[bytes] = []
    for name, at, end in _chunks(data):
        if name in (b"PLTE", b"tRNS"):
            shared += data[at:end]
        elif name in (b"fcTL", b"IEND"):
            if control is not None and pixels:
                yield _frame(data, control, shared, pixels)
            pixels = []
        if name not in (b"fcTL", b"IDAT", b"fdAT"):
            continue
        if not _is_sound(data, at, end):
            raise ClaimError("the pixels of a frame are damaged or cut off", truncated=end > len(data))
        content = data[at + 8 : end - 4]
        if name == b"IDAT":
            pixels += [content] if control is not None else []
            continue
        if content[:4] != number.to_bytes(4):
            raise ClaimError("its frames are not in order")
        number += 1
        if name == b"fdAT":
            pixels.append(content[4:])
            continue
        if len(content) != _CONTROL.size:
            raise ClaimError("the header of a frame has another length")
        control = _CONTROL.unpack(content)
        _, across, down, left, top, *_ = control
        if not (across and down and left + across <= width and top + down <= height):
            raise ClaimError("a frame does not fit into the picture")


def _frame(data: bytes, control: tuple[int, ...], shared: bytes, pixels: list[bytes]) -> Frame:
    _, width, height, left, top, _, _, disposal, blending = control
    header = _chunk(b"IHDR", struct.pack(">II", width, height) + data[DEPTH:29])
    picture = b"".join((data[:8], header, shared, _chunk(b"IDAT", b"".join(pixels)), _chunk(b"IEND", b"")))
    return Frame(picture, left, top, disposal, blending == 1)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, beginning and end of each chunk; the last may be cut off."""
    at = 8
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return
        end = at + 12 + int.from_bytes(data[at : at + 4])
        name = data[at + 4 : at + 8]
        yield name, at, end
        if name == b"IEND":
            return
        at = end
    raise ClaimError(f"it has more than {MAX_CHUNKS:,} chunks")


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _is_sound(data: bytes, at: int, end: int) -> bool:
    """Returns whether a chunk is there to its end, with the right checksum."""
    return end <= len(data) and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])


def _transparency(data: bytes, at: int, end: int, colours: int) -> bytes:
    """Returns the content of a chunk of transparency for Pillow; nothing if it is damaged, as libpng passes over it.

    Args:
        data: the file.
        at: where the chunk begins.
        end: where it ends.
        colours: of the palette; 0 if there is none before it.
    """
    content, depth, kind = data[at + 8 : end - 4], data[24], data[25]
    if not _is_sound(data, at, end):
        return b""
    if kind == _PALETTE:
        return content if len(content) <= colours else b""
    if kind not in (_GREY, _RGB) or len(content) != (2 if kind == _GREY else 6):
        return b""
    if depth == 16:
        return content
    if depth not in (1, 2, 4, 8):
        return b""
    most = (1 << depth) - 1
    samples = struct.unpack(f">{len(content) // 2}H", content)
    return struct.pack(f">{len(samples)}H", *((sample & most) * 255 // most for sample in samples))


def _is_orientation(data: bytes, name: bytes, at: int, end: int) -> bool:
    """Returns whether a chunk may hold the orientation, and is one that a decoder reads: undamaged and of some size."""
    if name not in (b"eXIf", b"tEXt", b"zTXt") or end - at > MAX_ORIENTATION:
        return False
    content = data[at + 8 : end - 4]
    if name != b"eXIf" and not content.startswith(_RAW_EXIF):
        return False
    if not _is_sound(data, at, end):
        return False
    return name != b"zTXt" or _is_small(content[len(_RAW_EXIF) :])


def _is_small(packed: bytes) -> bool:
    """Returns whether a compressed text can be unpacked, and is not longer than ``MAX_UNPACKED``."""
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(packed[1:], MAX_UNPACKED)
    except zlib.error:
        return False
    return packed[:1] == b"\0" and unpacker.eof
