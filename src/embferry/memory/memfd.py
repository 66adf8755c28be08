"""Anonymous shared memory that cannot shrink under its users and cannot outlive them."""

from __future__ import annotations

import fcntl
import os

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def sealed_memfd(name: str, size: int) -> int:
    """A memfd of ``size`` zero bytes, the caller's to close. Its size is sealed.

    A peer that truncated the file would make every other user of a mapping die of SIGBUS; the seals forbid it. The
    memory has no name in the file system, so it is gone with its last user, whatever killed that.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def size_is_sealed(fd: int) -> bool:
    """Whether nobody can change the size of the memfd ``fd`` any more.

    :raises OSError: it is not a memfd.
    """
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
