"""The revocation table, by which a receiver revokes blocks that another process can write to at any moment.

Nothing stops a process that has mapped memory from storing into it, so the writers of this transport follow a protocol.
Its shared state is a table ``epochs[block]`` with the epoch that may write each block (0: none), and the kernel's
byte-range locks on the table's file, one byte for each block.

*A writer*, for each write, opens the table anew; takes a **shared** lock on the bytes of the blocks it will touch;
checks that ``epochs[block]`` is its epoch for all of them, or else gives up; copies; closes the file, which drops the
lock.

*The receiver*, to revoke, stores 0 into the table; then tries to take an **exclusive** lock on the same bytes, without
waiting, until it gets it; drops it. From then on no write under the old epoch changes a byte:

- A writer whose lock came before the receiver's has dropped it by then, so its copy has ended.
- A writer whose lock comes after the receiver's sees the 0. Taking and dropping a lock are system calls that take the
  kernel's lock of that file's list: a full barrier on each side, on x86 and on ARM. The receiver's store comes before
  its lock, that before the writer's lock, and that before the writer's load. The entries are aligned 64-bit words,
  which neither architecture tears.
- A writer that is killed, even by SIGKILL, loses its lock: the kernel drops locks when the last reference to the open
  file goes, which happens only after every thread of the process has stopped running in user mode. A writer that is
  stopped (SIGSTOP) keeps its lock, which is right: it will continue its copy. Revocation waits for it.

The locks are open-file-description locks (``F_OFD_SETLK``, fcntl(2)), not process locks: those would not exclude two
threads of one process, and would be dropped when any descriptor of the file is closed. Each write needs a description
of its own, because two writes that shared one would drop each other's locks. Shared locks let two writes of one grant
proceed in the same block; the receiver's exclusive lock excludes both.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from embferry.memory.memfd import sealed_memfd
from embferry.protocol.errors import TransportStalled
from embferry.protocol.layout import merged

from ..windows import allows

log = logging.getLogger(__name__)

ENTRY_BYTES = 8
RETRY_S = 0.0005

_FLOCK = struct.Struct("hh4xqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid (0 for OFD locks)


def create(num_blocks: int) -> tuple[int, npt.NDArray[np.uint64]]:
    """Returns a new table that lets no epoch write: a memfd, which the caller closes, and uint64 ``[num_blocks]``.

    Raises:
        OSError: No descriptor or no memory is left.
    """
    fd = sealed_memfd("embferry-revocation-table", num_blocks * ENTRY_BYTES)
    try:
        return fd, np.frombuffer(mmap.mmap(fd, num_blocks * ENTRY_BYTES), np.uint64)
    except BaseException:
        os.close(fd)
        raise


def map_readonly(fd: int, num_blocks: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(mmap.mmap(fd, num_blocks * ENTRY_BYTES, prot=mmap.PROT_READ), np.uint64)


class Busy(Exception):  # noqa: N818  (a state, and no error)
    """The blocks cannot be locked without waiting."""


def has_no_writers(fd: int, first: int, count: int) -> bool:
    """Whether ``count`` revoked blocks from ``first`` on have no writer; then they will have none. For the receiver.

    ``fd`` is the descriptor that :func:`create` returned; each write has its own. False too if the kernel has no memory
    for a lock: the caller tries again.
    """
    try:
        if not _lock(fd, fcntl.F_WRLCK, first, count):
            return False
        _lock(fd, fcntl.F_UNLCK, 0, 0)  # to the end of the file: unlike a part of a lock, this needs no memory
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOMEM, errno.EINTR):
            raise
        log.warning("the revocation table cannot be locked, trying again: %s", error)
        return False
    return True


@contextmanager
def locked_for_write(
    fd: int,
    epochs: npt.NDArray[np.uint64],
    epoch: int,
    touched: npt.NDArray[np.intp],
    stop: threading.Event | None,
    timeout_s: float = math.inf,
) -> Iterator[bool]:
    """Locks blocks for a write and yields whether it is allowed. For the writer.

    While the body runs, the receiver cannot complete a revocation of these blocks.

    Args:
        fd: A descriptor of the table's file.
        epochs: The table, uint64 ``[num_blocks]``.
        epoch: The epoch of the write.
        touched: The blocks to be written, ascending.
        stop: Ends the wait for a lock; None: does not wait.
        timeout_s: Longest wait for a lock: a receiver that is stopped may hold it.

    Raises:
        Busy: The receiver is probing, and ``stop`` is None.
        TransportStalled: The receiver has held the lock for ``timeout_s``.
        OSError: The table cannot be opened or locked.
    """
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield allows(epochs, epoch, touched) and _lock_blocks(own, epochs, epoch, touched, stop, timeout_s)
    finally:
        os.close(own)


def _lock_blocks(
    own: int,
    epochs: npt.NDArray[np.uint64],
    epoch: int,
    touched: npt.NDArray[np.intp],
    stop: threading.Event | None,
    timeout_s: float,
) -> bool:
    deadline = time.monotonic() + timeout_s
    for first, count in merged(tuple(touched.tolist())):
        while not _lock(own, fcntl.F_RDLCK, first, count):
            # The receiver is probing revoked blocks; waiting makes sense if they are not those of this write.
            if stop is None:
                raise Busy
            if stop.wait(RETRY_S) or not allows(epochs, epoch, touched):
                return False
            if time.monotonic() >= deadline:
                raise TransportStalled(f"the receiver has held the lock of the blocks for {timeout_s:g} s")
    return allows(epochs, epoch, touched)


def _lock(fd: int, kind: int, first: int, count: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, first, count, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
