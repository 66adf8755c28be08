"""The words of ``embferry ask``: the router's address, the files, and standard input."""

from __future__ import annotations

import base64
import mimetypes
import os
import sys
from pathlib import Path
from typing import Any

from embferry.cli.options import fail

STDIN = "-"
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv", ".asf",
    ".ogv", ".3gp",
})  # fmt: skip
_URLS = ("http://", "https://", "data:", "file:")
_ENDPOINTS = ("/v1/chat/completions", "/v1")
_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
"""The brands of ISO files (``ftyp``) that are pictures: AVIF and HEIF."""
_VIDEO_STARTS = (b"\x1aE\xdf\xa3", b"GIF8", b"FLV", b"OggS", b"\x00\x00\x01\xba", b"\x30\x26\xb2\x75", b"\x47\x40")
"""The first bytes of Matroska, GIF, FLV, Ogg, MPEG-PS, ASF and MPEG-TS."""


def base_url(url: str, scheme: str) -> str:
    """Returns the router's base URL, also if ``url`` has no scheme or is that of an OpenAI client, with ``/v1``."""
    full = url.strip() if "://" in url else f"{scheme}://{url.strip()}"
    full = full.rstrip("/")
    return next((full.removesuffix(end) for end in _ENDPOINTS if full.endswith(end)), full)


def content(words: list[str]) -> list[dict[str, Any]]:
    """Returns the parts of the message. Ends the process if a file cannot be read, or there is no question."""
    *media, question = words
    if words.count(STDIN) > 1:
        fail(f"{STDIN} stands for standard input, which can be read once")
    if question == STDIN:
        question = _question_from_stdin()
    elif is_media(question):
        fail(f'no question: add one after {question}, in quotes, such as "what is there?"')
    return [*map(part, media), {"type": "text", "text": question}]


def is_media(word: str) -> bool:
    """Returns whether a word is a file or URL and not a question: by its name, or because the file exists."""
    if os.path.isfile(word):
        return True
    kind, _ = mimetypes.guess_type(word.partition("?")[0])
    is_named_so = word.lower().startswith(_URLS) or (kind or "").startswith(("image/", "video/"))
    return is_named_so and len(word.split()) == 1


def part(word: str) -> dict[str, Any]:
    """Returns the part of a message for a file or URL, a picture or video by its name; for ``-``, by its bytes.

    Ends the process if the file cannot be read.
    """
    if word == STDIN:
        data = _stdin("a picture or video")
        return _part(_is_video(data), _as_url(data))
    is_video = Path(word.partition("?")[0]).suffix.lower() in VIDEO_SUFFIXES or word.lower().startswith("data:video/")
    if word.lower().startswith(_URLS):
        return _part(is_video, word)
    try:
        return _part(is_video, _as_url(Path(word).expanduser().read_bytes()))
    except OSError as error:
        fail(f"{word}: {error.strerror or error} (the question comes last, in quotes)")


def _part(is_video: bool, url: str) -> dict[str, Any]:
    kind = "video_url" if is_video else "image_url"
    return {"type": kind, kind: {"url": url}}


def _as_url(data: bytes) -> str:
    # The router detects the format in the bytes, so the content type does not matter.
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def _is_video(data: bytes) -> bool:
    if data[4:8] == b"ftyp":
        return data[8:12] not in _PICTURE_BRANDS
    return data.startswith(_VIDEO_STARTS) or data[8:12] == b"AVI "


def _question_from_stdin() -> str:
    try:
        return _stdin("a question").decode().strip() or fail("standard input has no question")
    except UnicodeDecodeError:
        fail(f"no question: standard input is no text; add the question after {STDIN}, in quotes")


def _stdin(what: str) -> bytes:
    if sys.stdin.isatty():
        fail(f"{STDIN} reads {what} from standard input, which is a terminal; pipe it in")
    return sys.stdin.buffer.read() or fail(f"standard input is empty; {STDIN} reads {what} from it")
