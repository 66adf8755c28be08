"""Embeddings in memory that a scheduler shares with its workers, and the loads that it asks of them.

The memory has no name in a file system, so a process that is killed leaves nothing behind. Behind the rows lies one
number for each rank: the latest load that the rank has completed. From these numbers the scheduler knows when no rank
is about to map the memory any more, whether or not the runner reports anything about its steps.

A load is repeated in every step until each rank has completed it, because a step may have no effect: vLLM's V1 runner
returns before any hook when a step has no tokens. With overlapping schedules a rank therefore sees a load several
times; its number tells the rank that it is the same load.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterable

import msgspec
import numpy as np
import numpy.typing as npt

from .coordinates import Shape

ByteRows = npt.NDArray[np.uint8]
"""uint8 [tokens, bytes per token]"""

NUMBER_BYTES = 8
_load_numbers = itertools.count(1)


class RowsHandle(msgspec.Struct, frozen=True):
    """Names the memory for another process: a file descriptor of the process that holds it, and the sizes."""

    pid: int
    fd: int
    shape: Shape
    ranks: int

    @property
    def completed_at(self) -> int:
        """Offset of the ranks' numbers, bytes."""
        return -(-self.shape.nbytes // NUMBER_BYTES) * NUMBER_BYTES

    @property
    def size(self) -> int:
        return self.completed_at + self.ranks * NUMBER_BYTES


class SharedRows:
    """The memory, in a process that holds it. The kernel frees it when no process holds or maps it any more.

    Attributes:
        rows: uint8 [tokens, bytes per token]
        completed: uint64 [ranks], the number of the latest load that each rank has completed.
    """

    def __init__(self, fd: int, shape: Shape, ranks: int) -> None:
        self._fd = fd
        self.handle = RowsHandle(os.getpid(), fd, shape, ranks)
        memory = mmap.mmap(fd, self.handle.size)
        self.rows: ByteRows = np.frombuffer(memory, np.uint8, shape.nbytes).reshape(shape.tokens, shape.token_bytes)
        self.completed = np.frombuffer(memory, np.uint64, ranks, self.handle.completed_at)
        self._latest_load = 0

    @classmethod
    def make(cls, shape: Shape, ranks: int) -> SharedRows:
        """Allocates new memory, zeroed. Raises LayoutMismatch for a shape that cannot be transferred."""
        size = RowsHandle(0, 0, shape, ranks).size
        fd = os.memfd_create("embferry-embedding", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return cls(fd, shape, ranks)

    @classmethod
    def open(cls, handle: RowsHandle) -> SharedRows:
        """Holds memory that another process made. Raises OSError if that process has ended or closed it."""
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
        return cls(fd, handle.shape, handle.ranks)

    def begin_load(self) -> int:
        """Returns the number that each rank writes once it has copied the rows. It is unique in this process."""
        self._latest_load = next(_load_numbers)
        return self._latest_load

    @property
    def is_loading(self) -> bool:
        """Whether some rank has not completed the latest load and may be about to map the memory."""
        return bool((self.completed < self._latest_load).any())

    @property
    def is_open(self) -> bool:
        """Whether other processes can map the memory."""
        return self._fd >= 0

    def close(self) -> None:
        """Lets no other process map the memory from now on. Existing arrays stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PendingLoad(msgspec.Struct, frozen=True):
    """One embedding that workers are to copy into their encoder caches.

    Attributes:
        number: The number to write into the memory when the load is complete.
        wanted: Whether the rows are still to be copied. If not, the rank only writes the number.
    """

    mm_hash: str
    handle: RowsHandle
    number: int
    wanted: bool = True


class PendingLoads:
    """The scheduler's list of loads that some rank has not completed."""

    def __init__(self) -> None:
        self._loads: dict[str, tuple[SharedRows, PendingLoad]] = {}

    def add(self, mm_hash: str, shared: SharedRows) -> None:
        """Asks every rank to load an embedding for which vLLM has reserved room."""
        self._loads[mm_hash] = (shared, PendingLoad(mm_hash, shared.handle, shared.begin_load()))

    def for_step(self, freed: Iterable[str]) -> tuple[PendingLoad, ...]:
        """Returns the loads for the next step. Those that vLLM has evicted must not be copied into its cache again."""
        for mm_hash in self._loads.keys() & set(freed):
            shared, load = self._loads[mm_hash]
            self._loads[mm_hash] = (shared, msgspec.structs.replace(load, wanted=False))
        self._loads = {mm_hash: pair for mm_hash, pair in self._loads.items() if pair[0].is_loading}
        return tuple(load for _, load in self._loads.values())
