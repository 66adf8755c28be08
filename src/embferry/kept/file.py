"""One file: made for an embedding that is about to arrive, or taken over from a process that has died.

It is open and locked as long as it is in use. Its rows are mapped; its records are written one by one.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable

import numpy as np

from embferry.protocol.kept import KeptTokens
from embferry.protocol.ranges import RangeSet

from .form import HEAD_BYTES, Head, Record, read_records, record_at

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV}
"""Errors of opening a symbolic link, a socket, a folder or a device."""


class Unusable(Exception):  # noqa: N818  (it says what the file is)
    """A file holds nothing that can be used."""


class KeptFile:
    """A file in use. Not thread-safe: the lock of its sink guards it.

    Args:
        fd: Open for reading and writing, of the size that the head says, every byte of it allocated.
        head: The embedding.
        records: Those that it has already.
        forget: Removes its name.

    Attributes:
        arrays: Each field, uint8 [total tokens, bytes a token]: the mapping. Valid also after :meth:`discard`.
        ranges: The tokens that it holds.
    """

    def __init__(self, fd: int, head: Head, forget: Callable[[], None], records: tuple[Record, ...] = ()) -> None:
        self.head = head
        self.arrays = head.arrays(np.frombuffer(mmap.mmap(fd, head.fields_at[-1], offset=head.rows_at), np.uint8))
        self.ranges = RangeSet(*((record.offset, record.stop) for record in records))
        self._fd, self._forget, self._count = fd, forget, len(records)
        self._is_discarded = False

    @property
    def kept(self) -> KeptTokens:
        """The tokens that it holds."""
        return KeptTokens(self.head.total_tokens, self.head.content_digest, tuple(self.ranges))

    def add(self, record: Record) -> None:
        """Says that a chunk is here. Its rows must be in :attr:`arrays` already.

        Raises:
            OSError: It cannot be written.
        """
        os.pwrite(self._fd, record.encoded(self._count), record_at(self._count))
        self._count += 1
        self.ranges.add(record.offset, record.stop)

    def discard(self) -> None:
        """Removes the file. Its memory is freed once :attr:`arrays` are no longer used. Idempotent."""
        if not self._is_discarded:
            self._is_discarded = True
            self._forget()
            os.close(self._fd)


def allocate(fd: int, size: int) -> None:
    """Gives the file memory for every byte: a mapped byte that could not be had would kill the process.

    Raises:
        OSError: There is not so much.
    """
    os.posix_fallocate(fd, 0, size)


def records_in(fd: int, head: Head) -> bytes:
    """Returns the bytes of an open file in which its records stand. Raises OSError."""
    found, stop = bytearray(), head.records_bytes
    while len(found) < stop and (piece := os.pread(fd, stop - len(found), HEAD_BYTES + len(found))):
        found += piece
    return bytes(found)


def claim(folder: int, name: str) -> int | None:
    """Opens and locks a file.

    Args:
        folder: Descriptor of its folder.
        name: Its name in there.

    Returns:
        Its descriptor; None if its process lives, or it is gone.

    Raises:
        Unusable: It is no regular file of this user alone.
        OSError: It cannot be opened.
    """
    try:
        fd = os.open(name, _OPEN, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise Unusable(f"it is no regular file: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
            raise Unusable("it is no file of this user alone")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(found, os.stat(name, dir_fd=folder, follow_symlinks=False)):
            if found.st_nlink != 1:
                raise Unusable("it has another name")
            return fd
    except (BlockingIOError, FileNotFoundError):  # it is locked; it was removed before it could be
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def describe(fd: int, head: Head) -> tuple[Record, ...]:
    """Returns the records of a file that was claimed.

    Raises:
        Unusable: It is of another embedding, another layout or another version, or has another size.
        OSError: It cannot be read.
    """
    if os.fstat(fd).st_size != head.size or os.pread(fd, HEAD_BYTES, 0) != head.encoded:
        raise Unusable("it is not of this embedding")
    return tuple(read_records(records_in(fd, head), head.total_tokens))
