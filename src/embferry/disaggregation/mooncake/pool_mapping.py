"""The pool, the memory that peers write to, and how it is taken back from peers that cannot be asked to stop.

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
from collections import deque

import numpy as np

from embferry.memory.blocks import ReqToMetadataBlockAllocator
from embferry.memory.buffers import AUX_WIDTH, MultimodalDataBuffers
from embferry.memory.memfd import sealed_memfd
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.protocol.layout import Geometry
from embferry.transports.leased.mooncake.alias import Alias
from embferry.transports.leased.mooncake.engine import Engine

from .buffer_layout import AUX_BYTES, AUX_POINTER
from .session_engines import OpenEngine

MAX_CLOSED_MAPPINGS = 64  # whose addresses are not used again yet


class PoolMapping:
    """An engine and a second mapping of the pool, through which peers write.

    Args:
        geometry: The pool.
        memory: File descriptor and size of the region of the fields, then of ``aux_datas``.
        open_engine: Makes the engine.

    Attributes:
        pointers: Base addresses of the buffers in this mapping, in the order of a registration.
        rooms: Rooms that have announced the mapping to a peer and are not over.
        quarantined: ``(room, blocks)`` that are freed when the mapping is closed. The peer of the room may still be
            writing to them, so new rooms must not use a mapping that has any.

    Raises:
        TransportError: The memory cannot be mapped again, or the engine cannot start or register it.
    """

    def __init__(self, geometry: Geometry, memory: list[tuple[int, int]], open_engine: OpenEngine) -> None:
        self.rooms: set[int] = set()
        self.quarantined: list[tuple[int, tuple[int, ...]]] = []
        self._engine: Engine = open_engine()
        self._aliases: list[Alias] = []
        try:
            for fd, size in memory:
                self._aliases.append(Alias(fd, size, populate=True))
                self._engine.register(self._aliases[-1].address, size)
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


class Pool:
    """Blocks, memory and mappings. The manager's lock is held during every call.

    Attributes:
        data: The fields, and ``aux_datas`` (int32 [num_blocks, 16]) in memory that can be mapped twice.
        current: The mapping for new rooms, if there is one.
    """

    def __init__(self, geometry: Geometry, open_engine: OpenEngine) -> None:
        self.allocator = ReqToMetadataBlockAllocator(geometry.num_blocks, geometry.block_size)
        self.data = MultimodalDataBuffers(geometry, shared=True)
        self.current: PoolMapping | None = None
        self._open_engine = open_engine
        self._tainted: list[PoolMapping] = []
        self._closed: deque[PoolMapping] = deque()
        size = AUX_BYTES * geometry.num_blocks
        try:
            self._aux_fd = sealed_memfd("embferry-aux", size)
        except OSError:
            self.data.close()
            raise
        assert self.data.fd is not None
        self._memory = [(self.data.fd, geometry.region_bytes), (self._aux_fd, size)]
        self.data.aux_datas = np.frombuffer(mmap.mmap(self._aux_fd, size), np.int32).reshape(-1, AUX_WIDTH)

    def mapping(self) -> PoolMapping:
        """Returns the mapping for new rooms, made anew if the last one is tainted."""
        if self.current is None:
            self.current = PoolMapping(self.data.geometry, self._memory, self._open_engine)
        return self.current

    def held(self, room: int) -> list[int]:
        """Returns the blocks of a room without the quarantined ones."""
        blocks = self.allocator.holders().get(room, ())
        return [block for block in blocks if not self.allocator.is_quarantined(block)]

    def leave(self, room: int, mapping: PoolMapping | None, unreported: tuple[int, ...]) -> None:
        """Frees the blocks of a room that is over, as soon as the writer of the ``unreported`` ones cannot write."""
        if mapping is not None:
            mapping.rooms.discard(room)
            if unreported:
                mapping.quarantined.append((room, unreported))
                self.allocator.quarantine(unreported, room)
            if mapping.quarantined and mapping is self.current:
                self.current = None
                self._tainted.append(mapping)
        self.allocator.free(self.held(room), room)
        for unused in [tainted for tainted in self._tainted if not tainted.rooms]:
            self._tainted.remove(unused)
            unused.close()
            for owner, blocks in unused.quarantined:
                self.allocator.release_quarantined(blocks, owner)
            self._closed.append(unused)
            if len(self._closed) > MAX_CLOSED_MAPPINGS:
                self._closed.popleft().release()

    def close(self) -> None:
        """Cuts every mapping off from the memory and ends its engine."""
        mappings = [*self._tainted, *([self.current] if self.current else [])]
        self._tainted, self.current = [], None
        for mapping in mappings:
            mapping.close()
        self._closed.extend(mappings)

    def free(self) -> None:
        """Frees the memory and the addresses of its mappings."""
        for mapping in self._closed:
            mapping.release()
        os.close(self._aux_fd)
        self.data.close()
