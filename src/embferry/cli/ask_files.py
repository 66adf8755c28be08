"""The files of ``embferry ask``: read up to a bound, and pictures or videos by their bytes."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO

from embferry.cli.options import fail
from embferry.serve.config import MediaSettings
from embferry.serve.config_load import env_name
from embferry.serve.errors import ServeError
from embferry.serve.media.formats import Kind, sniff
from embferry.serve.media.headers import gif, png, webp
from embferry.serve.media.headers.claims import ClaimError

STDIN = "-"
MAX_BYTES = MediaSettings().max_bytes
MAX_BYTES_ENV = env_name(("media", "max_bytes"))
_MAX_TOTAL_BYTES = MediaSettings().max_total_bytes
_VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv", ".asf",
    ".ogv", ".3gp",
})  # fmt: skip


class Files:
    """Reads files, each up to a bound, and all together up to one.

    Args:
        most: bytes of a file; the router has its own bound.
    """

    def __init__(self, most: int = MAX_BYTES) -> None:
        self._most = most
        self._left = max(most, _MAX_TOTAL_BYTES)

    def read(self, word: str) -> bytes:
        """Returns the bytes of a file; of standard input for ``-``. Ends the process if they cannot be read."""
        data = self._standard_input() if word == STDIN else self._file(word)
        self._left -= len(data)
        if self._left < 0:
            fail(f"{_name(word)}: all files together have more than {max(self._most, _MAX_TOTAL_BYTES):,} bytes")
        return data

    def _file(self, word: str) -> bytes:
        if not word:
            fail("an empty word is no file; write files and URLs first, and the question last, in quotes")
        path = Path(word).expanduser()
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                fail(f"{word} is a folder; name the files in it")
            if not stat.S_ISREG(mode):  # to open a named pipe waits for its other end
                fail(f"{word} is no regular file; give its bytes to standard input: embferry ask - ... < {word}")
            with path.open("rb") as file:
                return self._bounded(file, word, os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            fail(f"{word}: {reason} (the question comes last, in quotes)")

    def _standard_input(self) -> bytes:
        if sys.stdin.isatty():
            fail(f"{STDIN} reads a picture or video from standard input, which is a terminal; pipe it in")
        data = self._bounded(sys.stdin.buffer, STDIN, 0)
        return data or fail(f"standard input is empty; {STDIN} reads a picture or video from it")

    def _bounded(self, file: BinaryIO, word: str, size: int) -> bytes:
        data = b"" if size > self._most else file.read(self._most + 1)
        if max(size, len(data)) > self._most:
            have = f"has {size:,} bytes" if size > self._most else f"has more than {self._most:,} bytes"
            fail(f"{_name(word)} {have}; the limit is {self._most:,} (media.max_bytes of the router, --max-bytes here)")
        return data


def text_from_stdin(most: int) -> str:
    """Returns the question from standard input. Ends the process if there is none, or none of so many bytes."""
    if sys.stdin.isatty():
        fail(f"{STDIN} reads a question from standard input, which is a terminal; pipe it in")
    data = sys.stdin.buffer.read(most + 1)
    if not data:
        fail(f"standard input is empty; {STDIN} reads a question from it")
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        fail(f"no question: standard input is no text; add the question after {STDIN}, in quotes")
    if len(data) > most:
        fail(f"the question on standard input has more than {most:,} bytes")
    return text or fail("standard input has no question")


def kind_of(data: bytes, word: str) -> Kind:
    """Returns whether bytes are sent as a picture or a video; by the file's name if they have no known format."""
    try:
        form = sniff(data, "image").name
    except ServeError as refusal:
        if refusal.code == "wrong_media_kind":
            return "video"
        return kind_by_name(word)  # the router says what is wrong with it
    try:
        is_animated = (
            (form == "GIF" and gif.is_animated(data))
            or (form == "WebP" and len(webp.delays(data)) > 1)
            or (form == "PNG" and len(png.delays(data)[0]) > 1)
        )
        return "video" if is_animated else "image"
    except ClaimError:  # of too many frames
        return "video"


def kind_by_name(word: str) -> Kind:
    """Returns whether a URL or file is a video, by the suffix of its name or the type in a ``data:`` URL."""
    if word.lower().startswith("data:"):
        return "video" if word.lower().startswith("data:video/") else "image"
    path = word.partition("?")[0].partition("#")[0]
    return "video" if Path(path).suffix.lower() in _VIDEO_SUFFIXES else "image"


def _name(word: str) -> str:
    return "standard input" if word == STDIN else word
