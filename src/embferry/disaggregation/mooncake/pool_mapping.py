"""The memory that peers write to, and how it is taken back from peers that cannot be asked to stop.

The origin's wire has no revocation. A peer that has been told a block may write to it until it reports that it is
done; a write that failed, or whose sender fell silent, may reach the block at any later time. So peers reach the pool
through a :class:`PoolMapping`: one engine and a second mapping of the memory
(:mod:`embferry.transports.leased.mooncake.alias`).

When a room ends without the report that its writes are over, its blocks are quarantined and the mapping is *tainted*:
new rooms use a new mapping, with another session id and other addresses. A tainted mapping is closed when its other
rooms are over. Closing cuts it off from the memory and ends its engine; only then are the quarantined blocks free
again. After that no peer can change a byte through it.

A room that waits for blocks may itself keep a tainted mapping open, and so the blocks it waits for; its time-out ends
that. A room that has requested nothing yet uses no mapping.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

from embferry.memory.buffers import AUX_WIDTH, MultimodalDataBuffers
from embferry.memory.memfd import sealed_memfd
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.protocol.layout import Geometry
from embferry.transports.leased.mooncake.alias import Alias
from embferry.transports.leased.mooncake.engine import Engine

from .buffer_layout import AUX_BYTES, AUX_POINTER
from .session_engines import OpenEngine


class PoolMemory:
    """Memory of the pool: the fields, and ``aux_datas`` (int32 [num_blocks, 16]) in memory that can be mapped twice."""

    def __init__(self, geometry: Geometry) -> None:
        self.data = MultimodalDataBuffers(geometry, shared=True)
        self.aux_bytes = AUX_BYTES * geometry.num_blocks
        try:
            self.aux_fd = sealed_memfd("embferry-aux", self.aux_bytes)
        except OSError:
            self.data.close()
            raise
        aux = np.frombuffer(mmap.mmap(self.aux_fd, self.aux_bytes), np.int32)
        self.aux: npt.NDArray[np.int32] = aux.reshape(geometry.num_blocks, AUX_WIDTH)
        self.data.aux_datas = self.aux

    def close(self) -> None:
        """Frees the memory. Idempotent."""
        if self.aux_fd >= 0:
            os.close(self.aux_fd)
            self.aux_fd = -1
        self.data.close()


class PoolMapping:
    """An engine and a second mapping of the pool, through which peers write.

    Attributes:
        pointers: Base addresses of the buffers in this mapping, in the order of a registration.
        rooms: Rooms that have announced the mapping to a peer and are not over.
        quarantined: ``(room, blocks)`` that are freed when the mapping is closed. The peer of the room may still be
            writing to them, so new rooms must not use a mapping that has any.

    Raises:
        TransportError: The memory cannot be mapped again, or the engine cannot start or register it.
    """

    def __init__(self, memory: PoolMemory, open_engine: OpenEngine) -> None:
        self.rooms: set[int] = set()
        self.quarantined: list[tuple[int, tuple[int, ...]]] = []
        self._engine: Engine = open_engine()
        self._aliases: list[Alias] = []
        geometry = memory.data.geometry
        try:
            assert memory.data.fd is not None
            for fd, size in ((memory.data.fd, geometry.region_bytes), (memory.aux_fd, memory.aux_bytes)):
                alias = Alias(fd, size, populate=True)
                self._aliases.append(alias)
                self._engine.register(alias.address, size)
        except (OSError, TransportError) as error:
            self.close()
            self.release()
            if isinstance(error, OSError):
                raise TransportError(f"the pool's memory cannot be mapped for an engine: {error}") from error
            raise
        self.session_id = self._engine.segment
        data, aux = (alias.address for alias in self._aliases)
        pointers = [data + offset for offset in geometry.field_offsets]
        pointers.insert(AUX_POINTER, aux)
        self.pointers = tuple(pointers)

    def close(self) -> None:
        """Cuts the mapping off from the memory and ends the engine, which takes some milliseconds.

        If the kernel refuses to cut it off (:class:`LocalProtocolError`), the memory must not be used any more.
        """
        try:
            for alias in self._aliases:
                alias.sever()
        except OSError as error:
            raise LocalProtocolError(f"the pool's memory cannot be cut off from its peers: {error}") from error
        finally:
            self._engine.close()

    def release(self) -> None:
        """Frees the addresses, which cost no memory.

        While they are taken no later mapping can have them. So a late write never hits another mapping, even if a new
        engine gets the port of the old one.
        """
        for alias in self._aliases:
            alias.release()
