"""Large pieces of work, such as parsing a body, on threads beside the event loop."""

from __future__ import annotations

import binascii
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from embferry.serve.shared_threads import SharedThreads, stop_if_unwanted

T = TypeVar("T")

LARGE_BYTES = 256 << 10
"""From this size on, work leaves the event loop; smaller work takes less time than the change of threads."""
JSON_WEIGHT = 16
"""Reading a JSON text, which may make an object of two bytes, takes as long as other work on so many times more."""
JOBS = 2
"""Jobs that run at the same time; further ones wait."""
PIECE_BYTES = 1 << 20
"""Base64 is decoded in pieces of this size: within one, no other thread can run Python code."""

_THREADS = SharedThreads(JOBS, "codec")


async def off_loop(nbytes: int, work: Callable[..., T], *arguments: object) -> T:
    """Returns the result of ``work(*arguments)``, which handles ``nbytes``; on a thread if they are many.

    Work that has not begun is dropped when the task that waits for it ends.
    """
    if nbytes < LARGE_BYTES:
        return work(*arguments)
    return await _THREADS.run(partial(work, *arguments))


def decode_base64(text: str, start: int = 0) -> bytes:
    """Decodes the base64 in ``text`` from ``start`` on: either alphabet of RFC 4648, with or without padding.

    White space is ignored.

    Raises:
        ValueError: it is not base64.
        UnwantedError: its client has left.
    """
    decoded, rest, is_over = [], "", False
    for at in range(start, len(text), PIECE_BYTES):
        stop_if_unwanted()
        piece = rest + "".join(text[at : at + PIECE_BYTES].split()).replace("-", "+").replace("_", "/")
        if at + PIECE_BYTES >= len(text) and len(piece) % 4 > 1:
            piece += "=" * (-len(piece) % 4)
        end = len(piece) if at + PIECE_BYTES >= len(text) else len(piece) // 4 * 4
        piece, rest = piece[:end], piece[end:]
        if piece and is_over:
            raise ValueError("there is more after its end")
        if piece:
            decoded.append(binascii.a2b_base64(piece, strict_mode=True))
            is_over = piece.endswith("=")
    return b"".join(decoded)
