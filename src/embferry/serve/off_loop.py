"""Large pieces of work, such as parsing a body, on threads beside the event loop."""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LARGE_BYTES = 256 << 10
"""From this size on, work leaves the event loop; smaller work takes less time than the change of threads."""
JOBS = 2
"""Jobs that run at the same time; further ones wait."""
PIECE_BYTES = 1 << 20
"""Base64 is decoded in pieces of this size: within one, no other thread can run Python code."""

_THREADS = ThreadPoolExecutor(JOBS, thread_name_prefix="codec")


async def off_loop(nbytes: int, work: Callable[..., T], *arguments: object) -> T:
    """Returns the result of ``work(*arguments)``, which handles ``nbytes``; on a thread if they are many."""
    if nbytes < LARGE_BYTES:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)


def decode_base64(text: str, start: int = 0) -> bytes:
    """Decodes the base64 in ``text`` from ``start`` on. White space is ignored.

    Raises:
        ValueError: it is not base64.
    """
    decoded, rest, is_over = [], "", False
    for at in range(start, len(text), PIECE_BYTES):
        piece = rest + "".join(text[at : at + PIECE_BYTES].split())
        end = len(piece) if at + PIECE_BYTES >= len(text) else len(piece) // 4 * 4
        piece, rest = piece[:end], piece[end:]
        if piece and is_over:
            raise ValueError("there is more after its end")
        if piece:
            decoded.append(binascii.a2b_base64(piece, strict_mode=True))
            is_over = piece.endswith("=")
    return b"".join(decoded)
