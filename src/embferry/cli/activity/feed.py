"""Reads the activity of a router: once, or as it changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from embferry.cli.activity.routers import Router
from embferry.cli.activity.told import NotActivityError, Told, read
from embferry.cli.ask_failures import about_key, no_router, reason, sentence
from embferry.protocol.text import printable
from embferry.serve.http.watching import ACTIVITY, STREAM

if TYPE_CHECKING:
    import httpx

MAX_EVENT_BYTES = 16 << 20
"""Longest event of a stream. One of the longest journal has less than 1 MiB."""


class NoAnswerError(Exception):
    """A router does not tell of its activity; the text says why and what to do, on one line."""

    def __init__(self, why: str) -> None:
        super().__init__(printable(why))


async def look(router: Router) -> Told:
    """Returns everything that a router tells now.

    Raises:
        NoAnswerError: it tells of nothing.
    """
    async with _asking(router) as client:
        response = await client.send(router.request(client, ACTIVITY))
        await _check(response, router)
        return _read(response.content, router)


async def follow(router: Router) -> AsyncGenerator[Told, None]:
    """Yields everything, then what changes, until the router ends the stream.

    Raises:
        NoAnswerError: there is no stream, or it broke.
    """
    from embferry.trust.bounded_answers import STREAMED

    async with _asking(router) as client:
        request = router.request(client, STREAM)
        request.extensions[STREAMED] = True
        response = await client.send(request, stream=True)
        try:
            await _check(response, router)
            events = Events()
            async for piece in response.aiter_bytes():
                for event in events.take(piece):
                    yield _read(event, router)
        except NotActivityError as error:
            raise NoAnswerError(_of_another_version(router, error)) from error
        finally:
            await response.aclose()


class Events:
    """Takes a stream of server-sent events apart, however it arrives."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._rest = bytearray()
        self._size = 0

    def take(self, piece: bytes) -> list[bytes]:
        """Returns the data of the events that a piece completes.

        Raises:
            NotActivityError: an event is too long.
        """
        found = []
        searched = len(self._rest)
        self._rest += piece
        while (end := self._rest.find(b"\n", searched)) >= 0:
            line = bytes(self._rest[:end]).removesuffix(b"\r")
            del self._rest[: end + 1]
            searched = 0
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
                self._size += len(line)
            elif not line and self._lines:
                found.append(b"\n".join(self._lines))
                self._lines, self._size = [], 0
        if self._size + len(self._rest) > MAX_EVENT_BYTES:
            raise NotActivityError(f"an event has more than {MAX_EVENT_BYTES:,} bytes")
        return found


@asynccontextmanager
async def _asking(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    """Yields a client whose failures are raised as NoAnswerError."""
    import httpx

    try:
        async with router.client() as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        # It may have to ask the server whether it speaks TLS.
        raise NoAnswerError(await asyncio.to_thread(reason, router.shown_url, error, router.ca)) from error


async def _check(response: httpx.Response, router: Router) -> None:
    """Raises a NoAnswerError unless the status is 200."""
    if response.status_code == 200:
        return
    await response.aread()
    if response.status_code == 401:
        raise NoAnswerError(about_key(is_given=bool(router.api_key)))
    told = None
    with suppress(ValueError):
        told = response.json()
    raise NoAnswerError(sentence(told, ()) or f"{no_router(response)}, or one of an older version")


def _read(data: bytes, router: Router) -> Told:
    try:
        return read(data)
    except NotActivityError as error:
        raise NoAnswerError(_of_another_version(router, error)) from error


def _of_another_version(router: Router, error: NotActivityError) -> str:
    return f"the server at {router.shown_url} is no router, or one of another version: {error}"
