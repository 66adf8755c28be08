"""The pictures and videos of a request: fetched, counted, and named by what they are."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher
from embferry.serve.vllm.split import Kind, Place

_AT_ONCE = 4
"""Files of a request fetched at the same time."""
_ENCODING = ("model", "mm_processor_kwargs", "media_io_kwargs")
"""Fields of a request that change what an encoder makes of a picture."""
_MEDIA_TYPES: dict[Kind, str] = {"image": "image/png", "video": "video/mp4"}
"""Of a file that was fetched. vLLM goes by the bytes, but for ``video/jpeg``: a list of frames."""


@dataclass(frozen=True, slots=True)
class Item:
    """One picture or video. Two of the same content are equal.

    Attributes:
        uuid: sha256 over the content and over all that changes its encoding, in hex: what vLLM's caches call it. Never
            a client's: it could name somebody else's picture.
        url: a ``data:`` URL.
    """

    kind: Kind
    uuid: str
    url: str

    def part(self) -> dict[str, Any]:
        """As a part of a message: what an encoder gets."""
        name = f"{self.kind}_url"
        return {"type": name, name: {"url": self.url}, "uuid": self.uuid}


async def take_in(
    places: Sequence[Place], request: dict[str, Any], fetcher: Fetcher, limits: MediaSettings
) -> list[Item]:
    """Returns:
        An item for each place.

    Raises:
        ServeError: too many items or bytes; anything ``Fetcher.fetch`` refuses, with the part of the request in
            ``param``.
    """
    for kind, most, word in (("image", limits.max_images, "pictures"), ("video", limits.max_videos, "videos")):
        count = sum(place.kind == kind for place in places)
        if count > most:
            why = f"the request has {count} {word}; at most {most} are taken (media.max_{kind}s)"
            raise ServeError(f"too_many_{kind}s", why, param="messages")
    slots = asyncio.Semaphore(_AT_ONCE)

    async def url_of(place: Place) -> str | ServeError:
        try:
            async with slots:
                return await _inlined(place, fetcher, limits)
        except ServeError as error:
            return error.at(place.param)

    urls = await asyncio.gather(*(url_of(place) for place in places))
    for outcome in urls:
        if isinstance(outcome, ServeError):
            raise outcome
    inlined = [url for url in urls if isinstance(url, str)]
    if sum(map(_size, inlined)) > limits.max_total_bytes:
        most_bytes = f"{limits.max_total_bytes:,} bytes (media.max_total_bytes)"
        raise ServeError("media_too_large", f"the files of the request have more than {most_bytes}", param="messages")
    settings = json.dumps([request.get(name) for name in _ENCODING], sort_keys=True).encode()
    named = zip(places, inlined, strict=True)
    # Off the event loop: megabytes take milliseconds.
    return await asyncio.to_thread(lambda: [Item(p.kind, _digest(p.kind, url, settings), url) for p, url in named])


async def _inlined(place: Place, fetcher: Fetcher, limits: MediaSettings) -> str:
    if place.url[:5].lower() != "data:":
        data = await fetcher.fetch(place.url)
        return f"data:{_MEDIA_TYPES[place.kind]};base64,{base64.b64encode(data).decode('ascii')}"
    head, comma, _ = place.url.partition(",")
    if not comma or not head.lower().rstrip().endswith(";base64"):
        raise ServeError("invalid_url", "a data: URL of a picture or video is base64: data:image/png;base64,…")
    if _size(place.url) > limits.max_bytes:
        raise ServeError("media_too_large", f"the file is larger than {limits.max_bytes:,} bytes (media.max_bytes)")
    return place.url


def _size(url: str) -> int:
    """Bytes behind a base64 ``data:`` URL, to within three."""
    return (len(url) - url.index(",") - 1) // 4 * 3


def _digest(kind: Kind, url: str, settings: bytes) -> str:
    head, _, payload = url.partition(",")
    media_type = head.lower() if kind == "video" else ""  # a picture's is not looked at
    state = hashlib.sha256(f"{kind}\0{media_type}\0".encode() + settings + b"\0")
    state.update(payload.encode())
    return state.hexdigest()
