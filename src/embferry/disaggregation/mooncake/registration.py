"""The memory that peers write to, and how it is taken back from peers that cannot be asked.

The origin's wire has no revocation: who has been told a block may write to it until it says that it is done, and a
write that failed, or whose sender fell silent, may land at any later time. So the pool is reached through a
**landing**: one engine and one alias of the memory (:mod:`embferry.transports.leased.mooncake.alias`). When a room ends
without the word that its writes are over, its blocks are quarantined and the landing is *tainted*: new rooms go to a
new one, with a session id and addresses of its own. The tainted one is closed when its other rooms are over: its alias
is cut off from the memory, its engine ends, and only then are the quarantined blocks given to somebody else. Nothing
that was told to anybody through it can change a byte after that, whatever the peer does.

A room that waits for blocks may be one of those that keep a tainted landing open, and so keep them from itself; its
time-out ends that. A room that has not asked yet is in no landing.
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

from .manager import OpenEngine
from .rows import AUX_BYTES, AUX_POINTER


class OriginBuffers:
    """The pool's memory: :class:`MultimodalDataBuffers`, and ``aux_datas`` where peers can write it, too."""

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
        """Idempotent."""
        if self.aux_fd >= 0:
            os.close(self.aux_fd)
            self.aux_fd = -1
        self.data.close()


class Landing:
    """
    :raises TransportError: the engine cannot start or register the memory, or that cannot be mapped again.
    """

    def __init__(self, buffers: OriginBuffers, open_engine: OpenEngine) -> None:
        self.rooms: set[int] = set()
        """Those that have been told of it and are not over."""
        self.tainted = False
        self.quarantined: list[tuple[int, tuple[int, ...]]] = []
        """(room, blocks) that are given back when it is closed."""
        self._engine: Engine = open_engine()
        self._aliases: list[Alias] = []
        try:
            assert buffers.data.fd is not None
            for fd, size in (
                (buffers.data.fd, buffers.data.geometry.region_bytes),
                (buffers.aux_fd, buffers.aux_bytes),
            ):
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
        pointers = [data + offset for offset in buffers.data.geometry.field_offsets]
        pointers.insert(AUX_POINTER, aux)
        self.pointers = tuple(pointers)

    def quarantine(self, room: int, blocks: tuple[int, ...]) -> None:
        """Nobody knows whether these are still being written to."""
        self.tainted = True
        self.quarantined.append((room, blocks))

    def close(self) -> None:
        """Cuts the memory off and ends the engine: some milliseconds. No byte lands through it any more.

        :raises LocalProtocolError: the kernel would not cut it off; the memory must not be used again."""
        try:
            for alias in self._aliases:
                alias.sever()
        except OSError as error:
            raise LocalProtocolError(f"the pool's memory cannot be cut off from its peers: {error}") from error
        finally:
            self._engine.close()

    def release(self) -> None:
        """Gives the addresses back, which cost no memory. While they are taken no later landing can have them, so a
        late write cannot mean one, even if a new engine should come to have the port of the old."""
        for alias in self._aliases:
            alias.release()
