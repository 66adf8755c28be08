"""Checks that pictures and videos share: the format, by the first bytes, and limits on bytes, width and height."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError


@dataclass(frozen=True, slots=True)
class Format:
    """A format. ``reader`` is the only decoder to use, named as in PIL (pictures) or FFmpeg (videos)."""

    kind: Literal["image", "video"]
    name: str
    reader: str


# (offset, bytes) pairs that must all match, and the format.
_SIGNATURES: tuple[tuple[tuple[tuple[int, bytes], ...], Format], ...] = (
    (((0, b"\x89PNG\r\n\x1a\n"),), Format("image", "PNG", "PNG")),
    (((0, b"\xff\xd8\xff"),), Format("image", "JPEG", "JPEG")),
    (((0, b"RIFF"), (8, b"WEBP")), Format("image", "WebP", "WEBP")),
    (((0, b"GIF87a"),), Format("image", "GIF", "GIF")),
    (((0, b"GIF89a"),), Format("image", "GIF", "GIF")),
    (((0, b"BM"), (6, b"\0\0\0\0")), Format("image", "BMP", "BMP")),
    (((0, b"II*\0"),), Format("image", "TIFF", "TIFF")),
    (((0, b"MM\0*"),), Format("image", "TIFF", "TIFF")),
    (((4, b"ftypavif"),), Format("image", "AVIF", "")),
    (((4, b"ftypheic"),), Format("image", "HEIC", "")),
    (((4, b"ftyp"),), Format("video", "MP4", "mov")),
    (((0, b"\x1aE\xdf\xa3"),), Format("video", "Matroska/WebM", "matroska")),
    (((0, b"RIFF"), (8, b"AVI ")), Format("video", "AVI", "avi")),
)
_GIF_AS_VIDEO = Format("video", "GIF", "gif")
_READ = {"image": "PNG, JPEG, WebP, GIF, BMP and TIFF pictures", "video": "MP4/MOV, WebM/Matroska, AVI and GIF videos"}


def sniff(data: bytes, wanted: Literal["image", "video"]) -> Format:
    """Detects the format of ``data`` by its first bytes; content types and file names are not trusted.

    Raises:
        ServeError: media_empty, unsupported_media_type, wrong_media_kind.
    """
    if not data:
        raise ServeError("media_empty", f"the {_word(wanted)} is empty")
    found = next((f for signs, f in _SIGNATURES if all(data[at : at + len(s)] == s for at, s in signs)), None)
    if found is None or not found.reader:
        problem = f"{found.name} is not supported" if found else _guess(data)
        raise ServeError("unsupported_media_type", f"{problem}; supported are {_READ[wanted]}")
    if wanted == "video" and found.reader == "GIF":
        return _GIF_AS_VIDEO
    if found.kind != wanted:
        why = f"the file is a {found.name} {_word(found.kind)}; this part takes a {_word(wanted)}"
        raise ServeError("wrong_media_kind", why)
    return found


def _word(kind: str) -> str:
    return "picture" if kind == "image" else "video"


def _guess(data: bytes) -> str:
    """Returns a description of bytes without a known signature."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096].lower():
        return "SVG is not supported (it can load other files)"
    if start.startswith((b"<!doctype", b"<html")):
        return "the file is a web page"
    return "the format of the bytes is unknown"


def exhausted(what: str, error: Exception) -> ServeError:
    """Returns the error of a file that could not be decoded for lack of memory or descriptors."""
    why = f"there was no memory or open file left to decode the {what}: {error!r}; try again later"
    return ServeError("capacity_exhausted", why, status=503, retryable=True)


def check_bytes(data: bytes, limits: MediaSettings) -> None:
    """Raises ServeError (media_too_large) for a file above the limit."""
    if len(data) > limits.max_bytes:
        why = f"the file has {len(data):,} bytes; the limit is {limits.max_bytes:,} (media.max_bytes)"
        raise ServeError("media_too_large", why)


def check_size(width: int, height: int, limits: MediaSettings) -> None:
    """Checks width and height, in pixels.

    Raises:
        ServeError: media_zero_size, media_side_too_long, media_aspect_ratio, media_too_many_pixels.
    """
    size = f"{width:,} × {height:,} pixels"
    if min(width, height) < 1:
        raise ServeError("media_zero_size", f"the size is {size}; both sides need at least 1")
    if max(width, height) > limits.max_side:
        limit = f"{limits.max_side:,} (media.max_side)"
        raise ServeError("media_side_too_long", f"the size is {size}; the limit for a side is {limit}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        limit = f"{limits.max_aspect_ratio:g} times the other (media.max_aspect_ratio)"
        raise ServeError("media_aspect_ratio", f"the size is {size}; one side may be at most {limit}")
    if width * height > limits.max_pixels:
        limit = f"{limits.max_pixels:,} in total (media.max_pixels)"
        raise ServeError("media_too_many_pixels", f"the size is {size}; the limit is {limit}")
