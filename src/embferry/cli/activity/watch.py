"""Follows the activity of a router through its restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import NoReturn

from embferry.cli.activity.feed import NoAnswerError, follow
from embferry.cli.activity.routers import Router
from embferry.cli.activity.told import Told

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds until a router that is gone is asked again; they double each time."""
ENDED = "the router has ended"


async def watch(router: Router, hear: Callable[[Told], None], lose: Callable[[str, float], None]) -> NoReturn:
    """Follows a router until it is cancelled.

    Args:
        router: the router.
        hear: takes each message.
        lose: takes the reason why nothing is heard any more, and the seconds until the router is asked again.
    """
    pause = FIRST_PAUSE
    while True:
        why = ENDED
        try:
            async with aclosing(follow(router)) as messages:
                async for told in messages:
                    pause = FIRST_PAUSE
                    hear(told)
        except NoAnswerError as error:
            why = str(error)
        lose(why, pause)
        await asyncio.sleep(pause)
        pause = min(LONGEST_PAUSE, 2 * pause)
