"""Documents of the servers that are measured: lists of models, metrics, what a router tells of its workers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx

MAX_BYTES = 16 << 20
"""Bytes of the largest document. The metrics of a server have a few hundred kilobytes."""


def read(url: str, seconds: float, headers: Mapping[str, str] | None = None) -> bytes:
    """Returns the body of a GET request that is answered with status 200.

    Args:
        url: The address; redirects are followed.
        seconds: For everything, however slowly it comes.
        headers: Of the request.

    Raises:
        OSError: there is no such answer within the time, or a longer one.
    """
    return asyncio.run(_read(url, seconds, headers))


async def _read(url: str, seconds: float, headers: Mapping[str, str] | None) -> bytes:
    body = bytearray()
    try:
        async with (
            asyncio.timeout(seconds),
            httpx.AsyncClient(timeout=None, trust_env=False, follow_redirects=True) as client,
            client.stream("GET", url, headers=dict(headers or {})) as response,
        ):
            response.raise_for_status()
            async for data in response.aiter_bytes():
                body += data
                if len(body) > MAX_BYTES:
                    raise OSError(f"{url} sends more than {MAX_BYTES:,} bytes")
    except TimeoutError:
        raise OSError(f"{url} has not answered within {seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise OSError(str(error) or type(error).__name__) from error
    return bytes(body)
