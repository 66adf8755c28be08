"""Embeddings in memory that a scheduler shares with its workers.

The memory has no name in a file system, so a process that is killed leaves nothing behind. Its size is sealed, so no
process can cut it short under another one. Behind the rows lies one number for each rank: the latest load that the rank
has completed. From these numbers the scheduler knows when no rank is about to read the memory any more, whether or not
the engine reports anything about its steps.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from embferry import RemoteProtocolError
from embferry.memory.memfd import sealed_memfd, size_is_sealed

from .shape import Shape

ByteRows = npt.NDArray[np.uint8]
"""uint8 [tokens, bytes per token]"""

NUMBER_BYTES = 8
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value
_load_numbers = itertools.count(1)
_keys = itertools.count(1)


class SharedRows:
    """The memory, in a process that holds it. The kernel frees it when no process holds or maps it any more.

    Attributes:
        key: Identifies the memory among those of this process.
        shape: The shape of the embedding.
        rows: uint8 [tokens, bytes per token]
        completed: uint64 [ranks], the number of the latest load that each rank has completed.
        on_close: Called once when the memory is closed, by the thread that closes it.
    """

    def __init__(self, fd: int, shape: Shape, ranks: int) -> None:
        """Maps the memory behind ``fd`` and owns that descriptor, also if this raises OSError."""
        self._fd = fd
        self._lock = threading.Lock()  # guards the descriptor
        self.key = next(_keys)
        self.shape = shape
        self.on_close: Callable[[], object] = lambda: None
        completed_at, size = _sizes(shape, ranks)
        try:
            memory = _mapped(fd, size)
        except BaseException:
            os.close(fd)
            raise
        self.rows: ByteRows = memory[: shape.nbytes].reshape(shape.tokens, shape.token_bytes)
        self.completed = memory[completed_at:].view(np.uint64)
        self._latest_load = 0

    @classmethod
    def make(cls, shape: Shape, ranks: int) -> SharedRows:
        """Allocates new memory, zeroed.

        Raises:
            LayoutMismatch: The shape cannot be transferred.
            OSError: There is no memory, or no descriptor.
        """
        _, size = _sizes(shape, ranks)
        return cls(sealed_memfd("embferry-embedding", size), shape, ranks)

    @classmethod
    def adopt(cls, fd: int, shape: Shape, ranks: int) -> SharedRows:
        """Maps memory that another process made, and owns ``fd`` from now on, also if it raises.

        Raises:
            LayoutMismatch: The shape cannot be transferred.
            RemoteProtocolError: ``fd`` is not such memory of this size.
            OSError: It cannot be mapped.
        """
        try:
            _check_memory(fd, _sizes(shape, ranks)[1])
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, shape, ranks)

    def begin_load(self) -> int:
        """Returns the number that each rank writes once it has copied the rows. It is unique in this process."""
        self._latest_load = next(_load_numbers)
        return self._latest_load

    @property
    def latest_load(self) -> int:
        """The number of the latest load; 0: none has begun."""
        return self._latest_load

    @property
    def is_loading(self) -> bool:
        """Whether some rank has not completed the latest load and may be about to read the memory."""
        return bool((self.completed < self._latest_load).any())

    @property
    def is_open(self) -> bool:
        """Whether other processes can be given the memory."""
        return self._fd >= 0

    @property
    def fd(self) -> int:
        """The descriptor of the memory; -1 once it is closed."""
        return self._fd

    def duplicate(self) -> int:
        """Returns a new descriptor of the memory, which the caller closes.

        Raises:
            OSError: The memory is closed, or no descriptor is left.
        """
        with self._lock:
            return os.dup(self._fd)

    def close(self) -> None:
        """Gives the memory to no other process from now on. Existing arrays stay valid. Any thread; idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self.on_close()


def _sizes(shape: Shape, ranks: int) -> tuple[int, int]:
    """Returns the offset of the ranks' numbers, and the size of the memory, in bytes."""
    completed_at = -(-shape.nbytes // NUMBER_BYTES) * NUMBER_BYTES
    return completed_at, completed_at + ranks * NUMBER_BYTES


def _mapped(fd: int, size: int) -> npt.NDArray[np.uint8]:
    """Maps a file; Python's own mmap would keep a second descriptor as long. Raises OSError."""
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, size).atexit = False  # with the last array
    return np.frombuffer(memoryview(memory), np.uint8)


def _check_memory(fd: int, size: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != size:
        raise RemoteProtocolError(f"the descriptor is not memory of {size} bytes: {status.st_size} bytes")
    try:
        is_sealed = size_is_sealed(fd)
    except OSError as error:
        raise RemoteProtocolError("the descriptor is a file, not memory without a name") from error
    if not is_sealed:
        raise RemoteProtocolError("the memory could be cut short while it is read; seal its size")
