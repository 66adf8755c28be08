"""The bytes that are sent, and how to know that they are the ones that came."""

from __future__ import annotations

import numpy as np
import xxhash

from .contract import Bytes

SEED = 20
_STAMPS = 64
_WORD = 8


def make(size: int) -> Bytes:
    """``size`` random bytes, the same in every process; private memory, as an encoder's tensor is."""
    words = np.random.Generator(np.random.SFC64(SEED)).integers(
        0, 1 << 64, -(-size // _WORD), dtype=np.uint64, endpoint=False
    )
    return words.view(np.uint8)[:size]


def stamp(source: Bytes, number: int) -> None:
    """Writes the round's number to places all over ``source``: what a round before brought must not pass for it."""
    for at in _places(len(source)):
        source[at : at + _WORD] = np.frombuffer(number.to_bytes(_WORD), np.uint8)


def is_stamped(arrays: list[Bytes], number: int) -> bool:
    """Whether all places have the round's number."""
    flat = [array.reshape(-1) for array in arrays]
    mark, before = number.to_bytes(_WORD), 0
    places = _places(sum(len(array) for array in flat))
    for array in flat:
        for at in places:
            if before <= at < before + len(array) and array[at - before : at - before + _WORD].tobytes() != mark:
                return False
        before += len(array)
    return True


def digest(arrays: list[Bytes]) -> str:
    """xxh3-128 over the arrays one after another."""
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(array.reshape(-1).data)
    return str(state.hexdigest())


def _places(size: int) -> list[int]:
    last = size // _WORD - 1
    return sorted({last * step // (_STAMPS - 1) * _WORD for step in range(_STAMPS)})
