"""The end of a request: its client leaves, or has the whole response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Message, Receive, Send

T = TypeVar("T")


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def before_end(send: Send, what: Callable[[], object]) -> Send:
    """Returns ``send``, with a call before the last part of the response goes out.

    A client may ask its next request as soon as it has that part, which is before the code behind this ``send`` goes
    on. What a request holds, and what is noted at its end, must be settled by then.

    Args:
        send: the request's.
        what: called in the event loop; again if more is sent after the last part.
    """

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            what()
        await send(message)

    return sending


async def run_until_disconnect(
    work: Coroutine[Any, Any, T],
    receive: Receive,
    on_disconnect: Callable[[], None] = lambda: None,
    has_all: Callable[[], bool] = lambda: False,
) -> T | None:
    """Runs ``work`` to its end and returns its result, or cancels it as soon as the client leaves and returns None.

    Args:
        work: its exceptions are raised from here.
        receive: the request's; nothing else may read from it meanwhile.
        on_disconnect: called in the event loop before ``work`` is cancelled.
        has_all: returns whether the response has been sent to its end. A server says then, too, that the client has
            left; ``work`` is not cancelled.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and has_all():
            await asyncio.wait({working})
        elif not working.done():
            on_disconnect()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait({working, leaving})
    return None if working.cancelled() else working.result()
