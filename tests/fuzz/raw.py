"""Mutations of encoded inputs: of the bytes of one piece, and of the pieces."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Protocol

Pieces = list[bytes]
"""An input as it arrives: the frames of a message, the arrivals on a stream, or a single document."""

BYTES = b"\0\1\x7f\x80\xff \t\r\n\"'\\,:;[]{}%/0-9aZ"
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
TEXTS = (
    b"9" * 30,
    b"-1",
    b"1e999",
    b"NaN",
    b"%00",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\r\n\r\n",
    b"\xef\xbb\xbf",
)
MANY = 16 << 10
"""Bytes up to which a mutation makes an input grow."""
Nesting = tuple[bytes, bytes]
"""The opening and the closing of one level of the format."""


class Syntax(Protocol):
    """The part of a format that a mutation knows."""

    @property
    def nesting(self) -> Nesting | None: ...
    @property
    def texts(self) -> tuple[bytes, ...]: ...


def mutate(pieces: Pieces, chance: Random, other: Callable[[], Pieces], syntax: Syntax) -> Pieces:
    """Returns the pieces with one change. Pieces are rearranged only if there are several."""
    if len(pieces) > 1 and chance.random() < 0.25:
        return chance.choice(OF_PIECES)(pieces, chance, other)
    at = chance.randrange(len(pieces)) if pieces else 0
    piece = bytearray(pieces[at]) if pieces else bytearray()
    if syntax.nesting is not None and chance.random() < 0.05:
        changed = _nested(bytes(piece), chance, syntax.nesting)
    elif chance.random() < 0.1:
        start = chance.randrange(len(piece) + 1)
        changed = bytes(piece[:start]) + chance.choice(syntax.texts) + bytes(piece[start:])
    else:
        spliced = other()
        chance.choice(OF_BYTES)(piece, chance, chance.choice(spliced) if spliced else b"")
        changed = bytes(piece)
    return [*pieces[:at], changed, *pieces[at + 1 :]]


# Of the bytes of one piece, in place


def _flip(data: bytearray, chance: Random, other: bytes) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(data: bytearray, chance: Random, other: bytes) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice(BYTES)


def _truncate(data: bytearray, chance: Random, other: bytes) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _remove(data: bytearray, chance: Random, other: bytes) -> None:
    start, stop = _span(data, chance)
    del data[start:stop]


def _repeat(data: bytearray, chance: Random, other: bytes) -> None:
    start, stop = _span(data, chance)
    times = chance.choice((1, 1, 2, 5, 40)) if chance.random() < 0.99 else MANY // max(stop - start, 1)
    data[start:start] = data[start:stop] * min(times, MANY // max(stop - start, 1))


def _insert(data: bytearray, chance: Random, other: bytes) -> None:
    at = chance.randrange(len(data) + 1)
    data[at:at] = chance.randbytes(chance.randrange(1, 9))


def _number(data: bytearray, chance: Random, other: bytes) -> None:
    """Overwrites some bytes with a number at a bound: often a length, which then lies."""
    width = chance.choice((1, 2, 4, 8))
    if len(data) >= width:
        at = chance.randrange(len(data) - width + 1)
        value = chance.choice(NUMBERS) & ((1 << 8 * width) - 1)
        data[at : at + width] = value.to_bytes(width, chance.choice(("big", "little")))


def _splice(data: bytearray, chance: Random, other: bytes) -> None:
    """Goes over into another input, or takes a part of it."""
    start, stop = _span(bytearray(other), chance)
    at = chance.randrange(len(data) + 1)
    if chance.random() < 0.5:
        data[at:] = other[start:]
    else:
        data[at:at] = other[start:stop]


def _nested(data: bytes, chance: Random, nesting: Nesting) -> bytes:
    """Returns the data with thousands of levels around a part of it."""
    start, stop = _span(bytearray(data), chance)
    depth = chance.choice((3, 200, 2000, 6000))
    opening, closing = (part * depth for part in nesting)
    return data[:start] + opening + data[start:stop] + closing + data[stop:]


def _span(data: bytearray, chance: Random) -> tuple[int, int]:
    """Returns start and stop of a part, often a short one."""
    start = chance.randrange(len(data) + 1)
    longest = len(data) - start
    return start, start + chance.randrange((longest if chance.random() < 0.3 else min(longest, 8)) + 1)


OF_BYTES = (_flip, _flip, _set, _truncate, _remove, _repeat, _insert, _number, _splice)


# Of the pieces


def _drop_piece(pieces: Pieces, chance: Random, other: Callable[[], Pieces]) -> Pieces:
    at = chance.randrange(len(pieces))
    return pieces[:at] + pieces[at + 1 :]


def _repeat_piece(pieces: Pieces, chance: Random, other: Callable[[], Pieces]) -> Pieces:
    at = chance.randrange(len(pieces))
    return pieces[:at] + pieces[at : at + 1] * chance.choice((1, 1, 2, 20)) + pieces[at:]


def _swap_pieces(pieces: Pieces, chance: Random, other: Callable[[], Pieces]) -> Pieces:
    swapped = pieces.copy()
    a, b = chance.randrange(len(pieces)), chance.randrange(len(pieces))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return swapped


def _splice_pieces(pieces: Pieces, chance: Random, other: Callable[[], Pieces]) -> Pieces:
    cut, more = chance.randrange(len(pieces) + 1), other()
    return pieces[:cut] + more[chance.randrange(len(more) + 1) :]


def _end_early(pieces: Pieces, chance: Random, other: Callable[[], Pieces]) -> Pieces:
    return pieces[: chance.randrange(len(pieces) + 1)]


OF_PIECES = (_drop_piece, _repeat_piece, _swap_pieces, _splice_pieces, _end_early)
