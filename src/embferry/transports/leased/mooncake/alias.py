"""A second mapping of the receiver's region, which the engine writes through and which can be cut off.

The engine checks where a write goes when the write begins, and never again: memory that is unregistered while a write
is under way is written to the end, however long the writer takes. So the engine is given addresses of its own for the
region, an alias. To cut it off, its pages are replaced by pages that cannot be accessed, in one call of mmap(2) with
``MAP_FIXED``:

- When that call returns, no processor has the old pages in its translation cache, so no store through these addresses
  reaches the region any more. The engine receives by recv(2) on ordinary sockets, whose copy goes through the
  same page tables: it gets EFAULT, closes that connection, and the sender sees its write fail. No loss goes unnoticed.
- The addresses stay taken, so no other mapping can come to lie there, until the engine has ended.
- An RDMA device does not go through page tables; there it is the engine's unregistration, ``ibv_dereg_mr``, that ends
  access, and comes first.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from ..jobs import address_of

# mmap(2) on x86-64 and arm64, the machines the engine is built for; Python's mmap has no MAP_FIXED.
_PROT_NONE, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0, 0x02, 0x10, 0x20, 0x4000
_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]


class Alias:
    """``size`` bytes of the memfd ``fd``, from ``address`` on; ``populate`` maps every page before the first write."""

    def __init__(self, fd: int, size: int, *, populate: bool) -> None:
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        self._map = mmap.mmap(fd, size, flags=flags)
        self.size = size
        self.address: int = address_of(memoryview(self._map))

    def sever(self) -> None:
        """Cuts the alias off: no store through :attr:`address` changes the region any more. Idempotent.

        Raises:
            OSError: The kernel would not; the alias is as it was.
        """
        flags = _MAP_PRIVATE | _MAP_FIXED | _MAP_ANONYMOUS | _MAP_NORESERVE
        if _mmap(self.address, self.size, _PROT_NONE, flags, -1, 0) != self.address:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def release(self) -> None:
        """Gives the addresses back. Only when the engine that knew them has ended."""
        self._map.close()
