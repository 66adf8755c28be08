"""The smallest input that fails in the same way, as far as it can be found by leaving parts out."""

from __future__ import annotations

import re
from collections.abc import Callable

from .raw import Pieces

ATTEMPTS = 3000


def kind(error: BaseException) -> str:
    """Returns what an error says and where it was raised, without the numbers in it."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = "" if at is None else at.tb_frame.f_code.co_qualname
    return re.sub(r"\d+", "N", f"{where} {type(error).__name__} {error}"[:80])


def shrink(pieces: Pieces, fails: Callable[[Pieces], bool]) -> Pieces:
    """Returns the smallest input that it finds for which ``fails`` is still true, after a bounded number of tries."""
    left = ATTEMPTS

    def still(candidate: Pieces) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fails(candidate)

    before = None
    while pieces != before and left > 0:
        before = pieces
        pieces = _shorter(pieces, still)
        for at in range(len(pieces)):
            pieces = _smaller_piece(pieces, at, still)
    return pieces


def _shorter(pieces: Pieces, still: Callable[[Pieces], bool]) -> Pieces:
    """Leaves pieces out: half of them at first, then ever fewer."""
    size = len(pieces)
    while size:
        at = 0
        while at < len(pieces):
            without = pieces[:at] + pieces[at + size :]
            if still(without):
                pieces = without
            else:
                at += size
        size //= 2
    return pieces


def _smaller_piece(pieces: Pieces, at: int, still: Callable[[Pieces], bool]) -> Pieces:
    """Leaves bytes of one piece out, then makes the others zero."""

    def with_piece(data: bytes) -> Pieces:
        return [*pieces[:at], data, *pieces[at + 1 :]]

    data = pieces[at]
    size = len(data)
    while size:
        start = 0
        while start < len(data):
            without = data[:start] + data[start + size :]
            if still(with_piece(without)):
                data = without
            else:
                start += size
        size //= 2
    for index in range(len(data)):
        plain = data[:index] + b"0" + data[index + 1 :]
        if data[index] > ord("0") and still(with_piece(plain)):
            data = plain
    return with_piece(data)
