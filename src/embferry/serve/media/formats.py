"""The formats of pictures and videos, detected in the first bytes. Needs no decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embferry.serve.errors import ServeError

Kind = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class Format:
    """A format. ``reader`` is the only decoder to use, named as in PIL (pictures) or FFmpeg (videos)."""

    kind: Kind
    name: str
    reader: str


_AVIF, _HEIC = Format("image", "AVIF", "AVIF"), Format("image", "HEIC", "HEIF")
_MOV, _TGA = Format("video", "MP4", "mov"), Format("image", "TGA", "TGA")
# (offset, bytes) pairs that must all match, and the format.
_SIGNATURES: tuple[tuple[tuple[tuple[int, bytes], ...], Format], ...] = (
    (((0, b"\x89PNG\r\n\x1a\n"),), Format("image", "PNG", "PNG")),
    (((0, b"\xff\xd8\xff"),), Format("image", "JPEG", "JPEG")),
    (((0, b"RIFF"), (8, b"WEBP")), Format("image", "WebP", "WEBP")),
    (((0, b"GIF87a"),), Format("image", "GIF", "GIF")),
    (((0, b"GIF89a"),), Format("image", "GIF", "GIF")),
    *((((0, b"BM"), (14, bytes((size, 0, 0, 0)))), Format("image", "BMP", "BMP"))
      for size in (12, 16, 40, 52, 56, 64, 108, 124)),
    *((((0, start),), Format("image", "TIFF", "TIFF")) for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (((0, b"\0\0\0\x0cjP  \r\n\x87\n"),), Format("image", "JPEG 2000", "JPEG2000")),
    (((0, b"\xff\x4f\xff\x51"),), Format("image", "JPEG 2000", "JPEG2000")),
    (((0, b"\0\0\1\0"), (5, b"\0"), (9, b"\0")), Format("image", "ICO", "ICO")),
    *((((0, b"P%d" % kind), (2, blank)), Format("image", "PPM", "PPM"))
      for kind in range(1, 7) for blank in (b"\n", b" ", b"\r", b"\t")),
    *((((4, name),), Format("video", "QuickTime", "mov"))
      for name in (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),
    (((0, b"\x1aE\xdf\xa3"),), Format("video", "Matroska/WebM", "matroska")),
    (((0, b"RIFF"), (8, b"AVI ")), Format("video", "AVI", "avi")),
    *((((at, b"G"), (at + step, b"G"), (at + 2 * step, b"G")), Format("video", "MPEG-TS", "mpegts"))
      for at, step in ((0, 188), (4, 192), (0, 204))),
    (((0, b"\0\0\1\xba"),), Format("video", "MPEG-PS", "mpeg")),
    (((0, b"FLV\1"),), Format("video", "FLV", "flv")),
    (((0, b"OggS\0"),), Format("video", "Ogg", "ogg")),
    (((0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),), Format("video", "ASF/WMV", "asf")),
)  # fmt: skip
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), _HEIC),
}
"""Brands of pictures in the boxes of MP4 (ISO/IEC 23008-12). Those of any codec (mif1, msf1) list one of these."""
_OF_ANY_CODEC = (b"mif1", b"msf1", b"miaf", b"MiHE", b"MiHB")
_MOVING = {"GIF": "gif", "PNG": "", "WebP": "", "TIFF": ""}
"""Pictures that may have several frames, and FFmpeg's demuxer for them as a video; none: Pillow reads them."""
READ: dict[Kind, str] = {
    "image": "PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, HEIC, JPEG 2000, ICO, PPM and TGA pictures",
    "video": "MP4/QuickTime, WebM/Matroska, AVI, MPEG-TS, MPEG-PS, FLV, ASF/WMV and Ogg videos, and animated GIF, "
    "WebP, PNG and TIFF",
}
_APPLE_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI"
# What is sent instead of a picture or video: the first bytes, what that is, and what to send.
_OTHERS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"%PDF-",), "the file is a PDF document; send its pages as pictures, one each (PNG or JPEG)"),
    ((b"%!PS", b"\xc5\xd0\xd3\xc6"), "the file is PostScript; send it as a picture (PNG or JPEG)"),
    ((b"PK\3\4", b"PK\5\6", b"\xd0\xcf\x11\xe0"),
     "the file is an archive or an office document; send its pages or files as pictures (PNG or JPEG)"),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"),
     "the file is compressed; send the picture or video in it"),
    ((b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9", b"fLaC", b"#!AMR"),
     "the file is a sound; this part takes a picture or a video"),
    ((_APPLE_PNG,),
     "the file is a PNG in Apple's own form (CgBI), as apps for iOS hold it; send it as an ordinary PNG or JPEG"),
    ((b"8BPS",), "the file is a Photoshop document; send it as a picture (PNG or JPEG)"),
    ((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"), "the file is a JPEG XL picture; send it as a PNG or JPEG"),
    ((b"{", b"["), "the file is JSON, such as an error of the host it came from; send a picture or video"),
    ((b"#EXTM3U",), "the file is a playlist; send the video itself"),
    ((b"data:",), "the file is a data: URL in itself; send what it holds"),
)  # fmt: skip
_WITH_AN = ("AVI", "AVIF", "ASF", "FLV", "HEIC", "ICO", "MP4", "MPEG", "Ogg")
_SNIFFED = 4096
"""Bytes that are looked at for text, such as a web page."""


def sniff(data: bytes, wanted: Kind, supported: str | None = None) -> Format:
    """Detects the format of ``data`` by its bytes; content types and file names are not trusted.

    Args:
        data: the file, or its beginning.
        wanted: what the part of the request takes.
        supported: the formats that are read, for the error; None: those of ``READ``.

    Raises:
        ServeError: media_empty, unsupported_media_type, wrong_media_kind.
    """
    if not data:
        raise ServeError("media_empty", f"the {_word(wanted)} is empty")
    found = format_of(data)
    if found is None:
        known = other_than_media(data) or "the format of the bytes is unknown"
        raise ServeError("unsupported_media_type", f"{known}; supported are {supported or READ[wanted]}")
    if wanted == "video" and found.name in _MOVING:
        return Format("video", found.name, _MOVING[found.name])
    if found.kind != wanted:
        why = f"the file is {with_article(found.name)} {_word(found.kind)}; this part takes a {_word(wanted)}"
        raise ServeError("wrong_media_kind", why)
    return found


def still_picture(name: str) -> ServeError:
    """Returns the error of a picture of one frame that is sent as a video."""
    return ServeError("wrong_media_kind", f"the file is {with_article(name)} picture; this part takes a video")


def with_article(name: str) -> str:
    """Returns the name of a format as it is spoken: "an MP4", "a PNG"."""
    # Capitals are spelled out, and the names of these letters begin with a vowel; but GIF, TIFF and the like are words.
    return f"{'an' if name.startswith(_WITH_AN) else 'a'} {name}"


def other_than_media(data: bytes) -> str | None:
    """Returns what a file is that is neither picture nor video, and what to send instead; None if that is unknown."""
    start = data[:_SNIFFED].lstrip(b"\xef\xbb\xbf \t\r\n\0")
    text = start.lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in text:
        return "the file is an SVG drawing, which can load other files; send it as a picture (PNG or JPEG)"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<script")):
        return "the file is a web page; send the URL of the picture or video itself, not of a page that shows it"
    if text.startswith(b"<?xml"):
        return "the file is XML, such as an error of the host it came from; send a picture or video"
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "the file is a sound; this part takes a picture or a video"
    return next((text for starts, text in _OTHERS if start.startswith(starts)), None)


def format_of(data: bytes) -> Format | None:
    """Returns the format by the first bytes of a file; None if it is unknown."""
    if data.startswith(_APPLE_PNG):
        return None
    if data[4:8] == b"ftyp":
        return _by_brands(data)
    found = next((f for signs, f in _SIGNATURES if all(data[at : at + len(s)] == s for at, s in signs)), None)
    return found or (_TGA if _is_tga(data) else None)


def _by_brands(data: bytes) -> Format:
    size = min(int.from_bytes(data[:4]), _SNIFFED, len(data))
    major = data[8:12]
    listed = [data[at : at + 4] for at in range(16, size - 3, 4)]
    names = [major, *listed] if major in _OF_ANY_CODEC else [major]
    return next((_BRANDS[name] for name in names if name in _BRANDS), _MOV)


def _is_tga(data: bytes) -> bool:
    """Returns whether the header is one of TGA, which has no signature: all of its fields have to make sense."""
    if len(data) < 18:
        return False
    has_map, kind, map_bits, bits, flags = data[1], data[2], data[7], data[16], data[17]
    is_mapped = kind in (1, 9)
    return (
        kind in (1, 2, 3, 9, 10, 11)
        and has_map == is_mapped
        and (map_bits in (15, 16, 24, 32) if is_mapped else not any(data[3:8]))
        and bits in {1: (8,), 3: (8, 16)}.get(kind & 7, (15, 16, 24, 32))
        and flags & 0xC0 == 0
        and any(data[12:14])
        and any(data[14:16])
    )


def _word(kind: Kind) -> str:
    return "picture" if kind == "image" else "video"
