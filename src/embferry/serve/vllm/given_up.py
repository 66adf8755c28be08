"""The end of an answer that an instance gives up: vLLM writes a reason for it that no client has asked for."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from embferry.serve.errors import ServeError
from embferry.serve.vllm.instance import Instance

REASONS = ("error", "abort")
"""vLLM's finish reasons of such answers."""
_MARK = re.compile(rb'"finish_reason": ?"(?:%s)"' % "|".join(REASONS).encode())
"""In JSON, a text has a backslash before each quotation mark, so none can look like this."""
_LONGEST = 64


async def unless_given_up(instance: Instance, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the pieces of a stream of events.

    Raises:
        ServeError: worker_failed, in place of the piece that says that the instance has given up.
    """
    tail = b""
    async for piece in pieces:
        check_not_given_up(instance, tail + piece)
        tail = (tail + piece)[-_LONGEST:]
        yield piece


def check_not_given_up(instance: Instance, answer: bytes) -> None:
    """Raises ServeError worker_failed if an answer, or a part of one, says that the instance has given up."""
    if _MARK.search(answer):
        raise ServeError("worker_failed", f"{instance!r} has given the answer up: it may be ending")
