"""The gate: how a receiver takes back blocks that another process can write to at any moment.

Nothing stops a process that has mapped memory from storing into it, so writers of this transport keep to a protocol
whose only shared state is a table ``gate[block]`` = the epoch that may write the block (0: nobody) and the kernel's
byte-range locks on the table's file, one byte a block.

*A writer*, for each write: opens the table anew; takes a **shared** lock on the bytes of the blocks it will touch; sees
that ``gate[b]`` is its epoch for all of them, else gives up; copies; closes the file, which drops the lock.

*The receiver*, to revoke: stores 0 into the gates; then takes an **exclusive** lock on the same bytes, without waiting,
again and again until it is had; drops it. From then on no write under the old epoch changes a byte:

- A writer whose lock came before the receiver's has dropped it by then, so its copy is over.
- A writer whose lock comes after the receiver's sees the 0. Taking and dropping a lock are system calls that take the
  kernel's lock of that file's list: a full barrier on each side, on x86 as on ARM. The receiver's store comes before
  its lock, and that before the writer's lock, and that before the writer's load. Gates are aligned 64-bit words, which
  neither architecture tears.
- A writer that is killed, even by SIGKILL, takes its lock with it: the kernel drops locks when the last reference to
  the open file goes, which happens only after every thread of the process has ceased to run in user mode. A writer
  that is stopped (SIGSTOP) keeps its lock, and rightly: it will go on with its copy. Revocation waits for it.

The locks are open-file-description locks (``F_OFD_SETLK``, fcntl(2)), not process locks: those would not exclude two
threads of one process, and would be dropped when any descriptor of the file is closed. Each write needs a description
of its own, for two writes that shared one would drop each other's locks. Shared locks let two writes of one grant
proceed in the same block; the receiver's exclusive lock still excludes both.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from embferry.memory.memfd import sealed_memfd
from embferry.protocol.layout import merged

from ..windows import allows

GATE_BYTES = 8
RETRY_S = 0.0005

_FLOCK = struct.Struct("hh4xqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid (0 for OFD locks)


def create(num_blocks: int) -> tuple[int, npt.NDArray[np.uint64]]:
    """A new table with every gate closed: its memfd, the caller's to close, and the gates, uint64 ``[num_blocks]``."""
    fd = sealed_memfd("embferry-gate", num_blocks * GATE_BYTES)
    return fd, np.frombuffer(mmap.mmap(fd, num_blocks * GATE_BYTES), np.uint64)


def map_readonly(fd: int, num_blocks: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(mmap.mmap(fd, num_blocks * GATE_BYTES, prot=mmap.PROT_READ), np.uint64)


class Busy(Exception):  # noqa: N818  (a state, and no error)
    """The gate cannot be entered without waiting."""


def writers_are_out(fd: int, first: int, count: int) -> bool:
    """The receiver's probe of ``count`` closed blocks from ``first`` on: no writer is in them, and none will be.

    :param fd: the descriptor :func:`create` returned; writers have their own."""
    if not _lock(fd, fcntl.F_WRLCK, first, count):
        return False
    _lock(fd, fcntl.F_UNLCK, first, count)
    return True


@contextmanager
def entered(
    fd: int,
    gates: npt.NDArray[np.uint64],
    epoch: int,
    touched: npt.NDArray[np.intp],
    stop: threading.Event | None,
) -> Iterator[bool]:
    """The writer's side: yields whether the gates of ``touched`` (ascending) are open to ``epoch``.

    While the body runs, the receiver cannot complete a revocation of these blocks. ``stop`` ends a wait.

    :raises Busy: the receiver is probing, and ``stop`` is None: who may not wait does not.
    :raises OSError: the table cannot be opened or locked.
    """
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield allows(gates, epoch, touched) and _enter(own, gates, epoch, touched, stop)
    finally:
        os.close(own)


def _enter(
    own: int, gates: npt.NDArray[np.uint64], epoch: int, touched: npt.NDArray[np.intp], stop: threading.Event | None
) -> bool:
    for first, count in merged(tuple(touched.tolist())):
        while not _lock(own, fcntl.F_RDLCK, first, count):
            # The receiver is probing. It probes closed blocks, so waiting is pointless unless it was about others.
            if stop is None:
                raise Busy
            if stop.wait(RETRY_S) or not allows(gates, epoch, touched):
                return False
    return allows(gates, epoch, touched)


def _lock(fd: int, kind: int, first: int, count: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, first, count, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
