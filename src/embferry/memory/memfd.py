"""Anonymous shared memory that cannot shrink under its users and cannot outlive them."""

from __future__ import annotations

import fcntl
import os

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def sealed_memfd(name: str, size: int) -> int:
    """Makes a memfd of ``size`` zero bytes whose size is sealed. The caller closes it.

    The seals matter: a peer that truncated the file would kill every other user of a mapping by SIGBUS. The memory has
    no name in the file system, so it vanishes with its last user, even after SIGKILL.

    Raises:
        OSError: The memory cannot be had.
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
    """Returns whether the size of the memfd ``fd`` can no longer change.

    Raises:
        OSError: It is not a memfd.
    """
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
