"""An embedding in memory that another process of this host can map: between a scheduler and its workers.

It has no name in a file system, so nothing is left behind by a process that is killed.
"""

from __future__ import annotations

import mmap
import os

import msgspec
import numpy as np
import numpy.typing as npt


class Place(msgspec.Struct, frozen=True):
    """Where another process finds it: a descriptor of the process that holds it. uint8 [tokens, token_bytes]."""

    pid: int
    fd: int
    tokens: int
    token_bytes: int


class SharedRows:
    """uint8 [tokens, token_bytes], made here. The memory is given up when nobody has an array of it any more."""

    def __init__(self, tokens: int, token_bytes: int) -> None:
        self._fd = os.memfd_create("embferry-embedding", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(1, tokens * token_bytes))
        self.place = Place(os.getpid(), self._fd, tokens, token_bytes)
        self.rows = _map(self._fd, self.place)

    def close(self) -> None:
        """Nobody else can map it from now on; arrays that are there stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def attach(place: Place) -> npt.NDArray[np.uint8]:
    """The rows at ``place``, mapped here.

    :raises OSError: the process that held them has ended, or has closed them.
    """
    fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return _map(fd, place)
    finally:
        os.close(fd)


def _map(fd: int, place: Place) -> npt.NDArray[np.uint8]:
    memory = mmap.mmap(fd, max(1, place.tokens * place.token_bytes))
    return np.frombuffer(memory, np.uint8, place.tokens * place.token_bytes).reshape(place.tokens, place.token_bytes)
