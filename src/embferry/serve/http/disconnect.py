"""Cancels work when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(
    work: Coroutine[Any, Any, T], receive: Receive, on_disconnect: Callable[[], None] = lambda: None
) -> T | None:
    """Runs ``work`` to its end and returns its result, or cancels it as soon as the client leaves and returns None.

    Args:
        work: its exceptions are raised from here.
        receive: the request's; nothing else may read from it meanwhile.
        on_disconnect: called in the event loop before ``work`` is cancelled.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            on_disconnect()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})
    return None if working.cancelled() else working.result()
