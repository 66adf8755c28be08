"""Waiting for a transfer to end: in a thread, or in an asyncio task."""

from __future__ import annotations

import asyncio
import math
import threading
from functools import partial
from queue import Empty, SimpleQueue

from embferry.protocol.arguments import as_seconds
from embferry.protocol.errors import LeaseExpired
from embferry.protocol.states import KVPoll

from .handle import Handle


def _raise_failure(end: Handle) -> None:
    if end.poll() is KVPoll.Failed:
        raise end.failure_exception().copied()


def wait(end: Handle, timeout: float) -> None:
    """Blocks the calling thread until the transfer has succeeded; for a sender, until its arrays are no longer read.

    Any thread may call it, several at once, and again after a time-out.

    Args:
        end: A receiver or a sender.
        timeout: Seconds; not more than 0: does not block; infinity: no limit.

    Raises:
        EmbeddingTransferError: The transfer has failed; this is the reason.
        LocalProtocolError: ``timeout`` is no number.
        LeaseExpired: ``timeout`` has passed. The transfer goes on.
    """
    timeout = as_seconds("timeout", timeout, -math.inf, room=end.room)
    changed = SimpleQueue[None]()
    stop_waking = end.wake_on_change(partial(changed.put, None))
    try:
        deadline = end.now() + timeout
        while not end.has_ended:
            try:
                changed.get(timeout=min(max(0.0, deadline - end.now()), threading.TIMEOUT_MAX))
            except Empty:
                why = f"not transferred within {timeout:g} s; it is still going on"
                raise LeaseExpired(why, room=end.room) from None
    finally:
        stop_waking()
    _raise_failure(end)


async def transferred(end: Handle) -> None:
    """Waits like :func:`wait`, in an asyncio task and without a thread. ``asyncio.timeout`` bounds it.

    Any task of any event loop may call it, be cancelled, and call it again.

    Raises:
        EmbeddingTransferError: The transfer has failed; this is the reason.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    stop_waking = end.wake_on_change(lambda: loop.call_soon_threadsafe(changed.set))
    try:
        while not end.has_ended:
            await changed.wait()
            changed.clear()
    finally:
        stop_waking()
    _raise_failure(end)
