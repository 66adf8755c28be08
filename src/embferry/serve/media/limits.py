"""The limits on the media of a request that both routers keep: how many items, how many fetches at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, Protocol, TypeVar

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError

MAX_FETCHES = 4
"""Files of one request that are fetched at the same time."""

_COUNTED = (
    ("image", "max_images", "too_many_images", "pictures"),
    ("video", "max_videos", "too_many_videos", "videos"),
    ("audio", "max_images", "too_many_sounds", "sounds"),
)
"""Kind of items, the setting that limits their number, the error, and the word for them."""


class Part(Protocol):
    """A part of a request. ``param``: its place, for errors."""

    @property
    def param(self) -> str: ...


P = TypeVar("P", bound=Part)
T = TypeVar("T")


def check_counts(kinds: Sequence[Literal["image", "video", "audio"]], limits: MediaSettings) -> None:
    """Checks the number of items of each kind.

    Raises:
        ServeError: too_many_images, too_many_videos, too_many_sounds.
    """
    for kind, setting, code, word in _COUNTED:
        most = getattr(limits, setting)
        if (count := sum(found == kind for found in kinds)) > most:
            why = f"the request has {count} {word}; at most {most} are taken (media.{setting})"
            raise ServeError(code, why, param="messages")


async def fetch_all(parts: Sequence[P], fetch: Callable[[P], Awaitable[T]]) -> list[T]:
    """Calls ``fetch`` for every part, for ``MAX_FETCHES`` of them at a time.

    Raises:
        ServeError: the error of the first part that failed, with its place in ``param``.
    """
    slots = asyncio.Semaphore(MAX_FETCHES)

    async def one(part: P) -> T:
        try:
            async with slots:
                return await fetch(part)
        except ServeError as error:
            error.at(part.param)
            raise

    outcomes = await asyncio.gather(*map(one, parts), return_exceptions=True)
    if failures := [outcome for outcome in outcomes if isinstance(outcome, BaseException)]:
        raise failures[0]
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
