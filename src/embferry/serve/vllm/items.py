"""The content of a request's pictures, videos and sounds: fetched, counted, and named by a digest."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher, Grow, is_frame_list
from embferry.serve.media.formats import format_of, other_than_media, with_article
from embferry.serve.media.limits import check_counts, fetch_all
from embferry.serve.off_loop import off_loop
from embferry.serve.vllm import sound_files, video_files
from embferry.serve.vllm.media_parts import Kind, MediaPart

_ENCODE_OPTIONS = ("model", "mm_processor_kwargs", "media_io_kwargs")
"""Fields of a request that change the embedding of a picture."""
_MEDIA_TYPES: dict[Kind, str] = {"image": "image/png", "video": "video/mp4", "audio": "audio/wav"}
"""For fetched files. vLLM goes by the bytes; only ``video/jpeg`` matters to it, which is a list of frames."""


_HEAD = 1 << 16
"""Characters in which the head of a ``data:`` URL must end."""
_SNIFFED = 4096
"""Characters of base64 that are looked at for what is no picture; a multiple of four."""
_NOT_PLAIN = "-_% \t\r\n"


@dataclass(frozen=True, slots=True)
class Item:
    """One picture, video or sound. Two with the same content are equal.

    Attributes:
        uuid: sha256, in hex, over the content and all that changes its embedding; vLLM's caches use it as the name. A
            client's own uuid is never used: it could name another client's picture.
        url: a ``data:`` URL.
        is_named: instances get the uuid as the item's name. Otherwise they name it themselves, by its content.
    """

    kind: Kind
    uuid: str
    url: str
    is_named: bool = True

    def part(self) -> dict[str, Any]:
        """Returns the item as a part of a message, as encoders get it."""
        name = f"{self.kind}_url"
        return {"type": name, name: {"url": self.url}} | ({"uuid": self.uuid} if self.is_named else {})


async def load_items(
    parts: Sequence[MediaPart],
    request: dict[str, Any],
    fetcher: Fetcher,
    limits: MediaSettings,
    grow: Grow,
    *,
    are_named: bool = True,
) -> list[Item]:
    """Returns the item of each media part. ``grow`` is called as :meth:`Fetcher.fetch` does.

    Raises:
        ServeError: too many items or bytes, or an error of ``Fetcher.fetch``, with the part in ``param``.
    """
    check_counts([part.kind for part in parts], limits)
    urls = await fetch_all(parts, lambda part: _data_url(part, fetcher, limits, grow))
    if sum(map(_size, urls)) > limits.max_total_bytes:
        most = f"{limits.max_total_bytes:,} bytes (media.max_total_bytes)"
        raise ServeError("media_too_large", f"the files of the request have more than {most}", param="messages")
    options = json.dumps([*(request.get(name) for name in _ENCODE_OPTIONS), are_named], sort_keys=True).encode()

    def named() -> list[Item]:
        pairs = zip(parts, urls, strict=True)
        return [Item(part.kind, _digest(part.kind, url, options), url, are_named) for part, url in pairs]

    return await asyncio.to_thread(named)  # megabytes take milliseconds


async def _data_url(part: MediaPart, fetcher: Fetcher, limits: MediaSettings, grow: Grow) -> str:
    url = part.url.strip()
    if part.kind == "video" and is_frame_list(url):
        return await off_loop(len(url), _frame_list, url, fetcher, limits)
    if await off_loop(len(url), _is_plain, url):
        if _size(url) > limits.max_bytes:
            raise ServeError("media_too_large", f"the file is larger than {limits.max_bytes:,} bytes (media.max_bytes)")
        if part.kind != "image":
            grow(_size(url))
            return await off_loop(len(url), _checked_url, part.kind, url)
        _check_picture(_decoded(url, _SNIFFED))
        return url
    data = await fetcher.fetch(url, grow)  # or decoded, to be written as vLLM reads it
    return await off_loop(len(data), _allowed_url, part.kind, data)


def head_of(url: str, nbytes: int) -> bytes:
    """Returns the first bytes of the file in a ``data:`` URL; none if they cannot be read."""
    comma = url.find(",") + 1
    try:
        return binascii.a2b_base64(url[comma : comma + nbytes // 3 * 4])
    except ValueError:
        return b""


def _checked_url(kind: Kind, url: str) -> str:
    """Returns the URL of a file that may go to an instance."""
    data = _decoded(url)
    allowed = _CHECKS[kind](data)
    return url if allowed is data else _inlined(kind, allowed)


def _allowed_url(kind: Kind, data: bytes) -> str:
    return _inlined(kind, _CHECKS[kind](data))


def _check_picture(data: bytes) -> bytes:
    """Refuses what is no picture by its first bytes. Formats that are unknown here are left to the instance."""
    if known := other_than_media(data):
        raise ServeError("unsupported_media_type", known)
    found = format_of(data)
    if found is not None and found.kind == "video":
        raise ServeError("wrong_media_kind", f"the file is {with_article(found.name)} video; this part takes a picture")
    return data


_CHECKS: dict[Kind, Callable[[bytes], bytes]] = {
    "image": _check_picture,
    "video": video_files.checked,
    "audio": sound_files.checked,
}
"""Return the bytes that an instance may get of a file, which may be others than were sent."""


def _decoded(url: str, characters: int | None = None) -> bytes:
    """Returns the bytes of plain base64 in a ``data:`` URL, or those of its first characters."""
    comma = url.index(",") + 1
    try:
        return binascii.a2b_base64(url[comma : None if characters is None else comma + characters], strict_mode=True)
    except ValueError as error:
        raise ServeError("invalid_url", f"the data: URL is not base64: {error}") from error


def _is_plain(url: str) -> bool:
    """Returns whether a URL is base64 without escapes, white space and the characters of the other alphabet."""
    head, comma, _ = url[:_HEAD].partition(",")
    if url[:5].lower() != "data:" or not comma or not head.lower().rstrip().endswith(";base64"):
        return False
    at = len(head) + 1
    is_whole = url.isascii() and (len(url) - at) % 4 == 0 and not url.endswith("===")
    return is_whole and all(url.find(other, at) < 0 for other in _NOT_PLAIN)


def _frame_list(url: str, fetcher: Fetcher, limits: MediaSettings) -> str:
    """Returns a list of frames as vLLM reads it."""
    if _size(url) > limits.max_bytes:
        raise ServeError("media_too_large", f"the file is larger than {limits.max_bytes:,} bytes (media.max_bytes)")
    frames = ",".join(base64.b64encode(frame).decode("ascii") for frame in fetcher.inline_frames(url))
    return f"data:video/jpeg;base64,{frames}"


def _inlined(kind: Kind, data: bytes) -> str:
    return f"data:{_MEDIA_TYPES[kind]};base64,{base64.b64encode(data).decode('ascii')}"


def _size(url: str) -> int:
    """Returns the number of bytes in a base64 ``data:`` URL, give or take two."""
    return (len(url) - url.index(",") - 1) // 4 * 3


def _digest(kind: Kind, url: str, options: bytes) -> str:
    head, _, payload = url.partition(",")
    media_type = head.lower() if kind == "video" else ""  # vLLM ignores others
    state = hashlib.sha256(f"{kind}\0{media_type}\0".encode() + options + b"\0")
    state.update(payload.encode())
    return state.hexdigest()
