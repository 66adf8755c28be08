"""The sounds of a request, which go to the language instance: a file that a URL names is fetched here."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.fetch import Fetcher, Grow
from embferry.serve.media.limits import fetch_all
from embferry.serve.off_loop import off_loop
from embferry.serve.vllm.media_parts import SoundPart


async def load_sounds(
    parts: Sequence[SoundPart], fetcher: Fetcher, limits: MediaSettings, grow: Grow
) -> list[tuple[SoundPart, str]]:
    """Returns each sound with a ``data:`` URL. ``grow`` is called as :meth:`Fetcher.fetch` does.

    Raises:
        ServeError: unsupported_value for too many; media_too_large; those of ``Fetcher.fetch``.
    """
    if len(parts) > limits.max_images:
        why = f"the request has {len(parts)} sounds; at most {limits.max_images} are taken (media.max_images)"
        raise ServeError("unsupported_value", why, param="messages")

    async def data_url(part: SoundPart) -> str:
        if part.url[:5].lower() == "data:":  # vLLM takes no other URL for one of data
            if len(part.url) // 4 * 3 > limits.max_bytes + 100:
                raise ServeError(
                    "media_too_large", f"the file has more than {limits.max_bytes:,} bytes (media.max_bytes)"
                )
            return part.url
        data = await fetcher.fetch(part.url, grow)
        return await off_loop(len(data), lambda: f"data:audio/wav;base64,{base64.b64encode(data).decode('ascii')}")

    urls = await fetch_all(parts, data_url)
    if sum(map(len, urls)) // 4 * 3 > limits.max_total_bytes + 100 * len(urls):
        most = f"{limits.max_total_bytes:,} bytes (media.max_total_bytes)"
        raise ServeError("media_too_large", f"the sounds of the request have more than {most}", param="messages")
    return list(zip(parts, urls, strict=True))
