"""Waiting for a transfer: with a thread, or in an asyncio loop. The ends themselves never block."""

from __future__ import annotations

import asyncio
import threading

from embferry.protocol.errors import LeaseExpired
from embferry.protocol.states import KVPoll

from .receive_handle import EmbeddingReceiver
from .send_manager import EmbeddingSender

End = EmbeddingReceiver | EmbeddingSender
ENDED = (KVPoll.Success, KVPoll.Failed)


def _over(end: End) -> bool:
    """Whether nothing more will change. A sender is over when its arrays are the caller's again."""
    status = end.poll()
    return status in ENDED and (isinstance(end, EmbeddingReceiver) or end.source_released)


def _result(end: End) -> None:
    if end.poll() is KVPoll.Failed:
        raise end.failure_exception()


def wait(end: End, timeout: float) -> None:
    """Blocks the calling thread until the transfer has succeeded; for a sender, until its arrays are no longer read.

    :param timeout: seconds.
    :raises EmbeddingTransferError: the transfer failed; this is why.
    :raises LeaseExpired: ``timeout`` has passed; the transfer goes on.
    """
    changed = threading.Event()
    end.on_change(changed.set)
    deadline = end.manager.now() + timeout
    while not _over(end):
        if not changed.wait(max(0.0, deadline - end.manager.now())):
            raise LeaseExpired(f"not transferred within {timeout:g} s; it is still going on", room=end.room)
        changed.clear()
    _result(end)


async def transferred(end: End) -> None:
    """Awaits what :func:`wait` waits for, without a thread. Put it under ``asyncio.timeout`` to bound it.

    :raises EmbeddingTransferError: the transfer failed; this is why.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    end.on_change(lambda: loop.call_soon_threadsafe(changed.set))
    while not _over(end):
        await changed.wait()
        changed.clear()
    _result(end)
