"""An embedding in memory that other processes of this host can map: between a scheduler and its workers.

It has no name in a file system, so nothing is left behind by a process that is killed. Behind the rows lies a number
for each rank: of the last loan on which it has copied them. So whoever holds the memory knows when nobody
is about to map it any more, whatever the runner tells the scheduler of a step, and whether a step came to nothing.
"""

from __future__ import annotations

import itertools
import mmap
import os
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Fields = npt.NDArray[np.uint8]
Marks = npt.NDArray[np.uint64]

MARK_BYTES = 8
_loans = itertools.count(1)


class Place(msgspec.Struct, frozen=True):
    """Where another process finds it: a descriptor of the process that holds it. uint8 [tokens, token_bytes], and
    uint64 [ranks]."""

    pid: int
    fd: int
    tokens: int
    token_bytes: int
    ranks: int = 1

    @property
    def marks_at(self) -> int:
        return -(-self.tokens * self.token_bytes // MARK_BYTES) * MARK_BYTES


class Mapped(NamedTuple):
    """The memory of a place, in this process."""

    rows: Fields
    marks: Marks


class SharedRows:
    """The memory itself, in a process that holds it. Given up when nobody has an array of it any more."""

    def __init__(self, fd: int, tokens: int, token_bytes: int, ranks: int) -> None:
        self._fd = fd
        self.place = Place(os.getpid(), fd, tokens, token_bytes, ranks)
        self.rows, self._marks = _map(fd, self.place)
        self._loan = 0

    @classmethod
    def make(cls, tokens: int, token_bytes: int, ranks: int = 1) -> SharedRows:
        """New memory, zeroed."""
        fd = os.memfd_create("embferry-embedding", os.MFD_CLOEXEC)
        os.ftruncate(fd, Place(0, fd, tokens, token_bytes, ranks).marks_at + ranks * MARK_BYTES)
        return cls(fd, tokens, token_bytes, ranks)

    @classmethod
    def take(cls, place: Place) -> SharedRows:
        """Memory that another process made: from now on this one holds it too.

        :raises OSError: the process that held it has ended, or has closed it.
        """
        return cls(_open(place), place.tokens, place.token_bytes, place.ranks)

    def lend(self) -> int:
        """The number that every rank marks when it has copied the rows; of this process, it is given once."""
        self._loan = next(_loans)
        return self._loan

    @property
    def is_lent(self) -> bool:
        """Whether a rank may still be about to map it."""
        return bool((self._marks < self._loan).any())

    @property
    def is_open(self) -> bool:
        """Whether others can map it."""
        return self._fd >= 0

    def close(self) -> None:
        """Nobody else can map it from now on; arrays that are there stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def attach(place: Place) -> Mapped:
    """The memory at ``place``, mapped here for as long as its arrays are used.

    :raises OSError: the process that held it has ended, or has closed it.
    """
    fd = _open(place)
    try:
        return Mapped(*_map(fd, place))
    finally:
        os.close(fd)


def _open(place: Place) -> int:
    return os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDWR | os.O_CLOEXEC)


def _map(fd: int, place: Place) -> tuple[Fields, Marks]:
    memory = mmap.mmap(fd, place.marks_at + place.ranks * MARK_BYTES)
    rows = np.frombuffer(memory, np.uint8, place.tokens * place.token_bytes)
    marks = np.frombuffer(memory, np.uint64, place.ranks, place.marks_at)
    return rows.reshape(place.tokens, place.token_bytes), marks
