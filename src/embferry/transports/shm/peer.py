"""Handles of the ``shm`` transport, and how a sender verifies that it opens exactly what a handle names.

A handle names file descriptors of the receiver's process. Before it is used, the process may have ended and its number
may belong to another one, or the handle may come from another host. So the descriptors are opened through
``/proc/<pid>/fd``, and everything about them is compared before a byte is mapped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from embferry.memory.memfd import size_is_sealed
from embferry.protocol.errors import TransportError
from embferry.protocol.layout import MAX_FIELDS

from ..handles import boot_id
from ..net.listener import OUT_OF_RESOURCES
from ..windows import BlockRows
from . import revocation_table

MAX_BYTES = 1 << 46  # more than any machine's memory; keeps every product below 63 bits
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_BYTES)]


class SharedFile(msgspec.Struct, frozen=True, array_like=True):
    """A file descriptor of the receiver's process, and the identity of its file."""

    fd: Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]
    device: int
    inode: int
    size: Size


class ShmHandle(msgspec.Struct, frozen=True, array_like=True, tag="embferry-shm-2"):
    """Handle of a receiver.

    Attributes:
        pid_namespace: The inode of the process's pid namespace: in another one, ``pid`` is another process or none.
        started: When the process started, clock ticks since boot.
        table: The revocation table.
        life: A pipe that becomes readable or hangs up when the receiver closes.
        rows: For each field, the offset of its block 0 in the region and its bytes in a block.
    """

    boot_id: Annotated[str, msgspec.Meta(max_length=64)]
    pid_namespace: int
    pid: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
    started: int
    region: SharedFile
    table: SharedFile
    life: SharedFile
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
    rows: Annotated[tuple[tuple[Size, Size], ...], msgspec.Meta(min_length=1, max_length=MAX_FIELDS)]


def pid_namespace() -> int:
    """Returns the inode of this process's pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino


def start_time(pid: int) -> int:
    """Returns when a process started, in clock ticks since boot (proc_pid_stat(5)); with the pid, it is unique."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def shared_file(fd: int) -> SharedFile:
    status = os.fstat(fd)
    return SharedFile(fd, status.st_dev, status.st_ino, status.st_size)


@dataclass(slots=True)
class Peer:
    """A receiver whose memory has been mapped.

    Attributes:
        region: uint8 ``[region_bytes]``.
        epochs: The revocation table, uint64 ``[num_blocks]``, read-only.
        life_fd: Readable or hung up when the receiver has closed or died.
        pid_fd: Readable when the process has ended.
    """

    rows: BlockRows
    region: npt.NDArray[np.uint8]
    epochs: npt.NDArray[np.uint64]
    table_fd: int
    life_fd: int
    pid_fd: int

    def close(self) -> None:
        """Ends the mappings, each of which holds a descriptor too, and closes the other descriptors."""
        del self.region, self.epochs
        for fd in (self.table_fd, self.life_fd, self.pid_fd):
            os.close(fd)


def open_peer(handle: ShmHandle) -> Peer:
    """Maps the receiver's region and revocation table.

    Raises:
        TransportError: The handle is damaged, or of another host, of another pid namespace or of a process that has
            ended (not retryable); or this process or the machine lacks descriptors or memory (retryable).
    """
    _check_shape(handle)
    with contextlib.ExitStack() as opened:
        try:
            if handle.boot_id != boot_id():
                raise _unreachable("it is on another host; use a transport that crosses hosts")
            if handle.pid_namespace != pid_namespace():
                raise _unreachable(
                    "its process is in another pid namespace; let both containers share one (--pid), or use tcp"
                )
            pid_fd = os.pidfd_open(handle.pid)
            opened.callback(os.close, pid_fd)
            if start_time(handle.pid) != handle.started:
                raise _unreachable("its process has ended")
            region_fd = _open(handle.pid, handle.region, os.O_RDWR, opened)
            table_fd = _open(handle.pid, handle.table, os.O_RDONLY, opened)
            life_fd = _open(handle.pid, handle.life, os.O_RDONLY, opened)
            if not stat.S_ISFIFO(os.fstat(life_fd).st_mode):
                raise _unreachable("its life descriptor is not a pipe")
            for fd in (region_fd, table_fd):
                if not size_is_sealed(fd):
                    raise _unreachable("its memory could be truncated under a writer; seal the memfd's size")
            region = np.frombuffer(mmap.mmap(region_fd, handle.region.size), np.uint8)
            epochs = revocation_table.map_readonly(table_fd, handle.num_blocks)
        except MemoryError as error:
            raise _unreachable("no memory is left for it", retryable=True) from error
        except (OSError, ValueError) as error:
            lacking = isinstance(error, OSError) and error.errno in OUT_OF_RESOURCES
            raise _unreachable(str(error), retryable=lacking) from error
        peer = Peer(BlockRows(handle.rows, handle.num_blocks), region, epochs, table_fd, life_fd, pid_fd)
        opened.pop_all()
    os.close(region_fd)  # the mapping keeps the memory
    return peer


def _check_shape(handle: ShmHandle) -> None:
    """Raises TransportError unless the numbers of the handle agree with each other."""
    end = 0
    for offset, size in handle.rows:
        if size < 1 or offset < end:
            raise _unreachable("its fields overlap or are empty; the handle is damaged")
        end = offset + size * handle.num_blocks
    if end > handle.region.size or handle.table.size != handle.num_blocks * revocation_table.ENTRY_BYTES:
        raise _unreachable("its fields do not fit into its memory; the handle is damaged")


def _open(pid: int, expected: SharedFile, flags: int, opened: contextlib.ExitStack) -> int:
    path = f"/proc/{pid}/fd/{expected.fd}"
    _check_same(os.stat(path), expected)  # before opening: opening the wrong device or pipe could do harm
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    opened.callback(os.close, fd)
    _check_same(os.fstat(fd), expected)
    return fd


def _check_same(status: os.stat_result, expected: SharedFile) -> None:
    if (status.st_dev, status.st_ino, status.st_size) != (expected.device, expected.inode, expected.size):
        raise _unreachable("its descriptor is now another file; the receiver has closed its region")


def _unreachable(reason: str, *, retryable: bool = False) -> TransportError:
    return TransportError(f"the receiver's shared memory cannot be opened: {reason}", retryable=retryable)
