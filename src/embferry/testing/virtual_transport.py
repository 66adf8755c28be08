"""A transport for a :class:`~.virtual.VirtualWorld`: writes and revocations take virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from embferry.protocol.errors import TransportError
from embferry.transports.contract import Piece, Region, Written
from embferry.transports.in_memory.transport import InMemoryTransport

from .virtual import VirtualRuntime

STALLED_SECONDS = 3.0
"""A write to a process that cannot be reached fails after this time."""


class VirtualTransport(InMemoryTransport):
    """The ``memory`` transport with delays. A window stays open until its revocation has taken effect.

    A write of a process that is stopped lands when it continues. One whose source changes before it has ended is a
    fault of the world: the embedding was released too early.

    Args:
        runtime: The process that it belongs to.

    Attributes:
        trusts_sources: Whether a source may change while it is written, without being a fault.
    """

    def __init__(self, runtime: VirtualRuntime) -> None:
        super().__init__()
        self.runtime = runtime
        self.is_closed = self.trusts_sources = False

    def register(self, region: Region) -> bytes:
        handle = super().register(region)
        self.runtime.world.processes[handle] = self.runtime.name
        return handle

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        before = [bytes(piece.source) for piece in pieces]
        until = self.runtime.world.now + STALLED_SECONDS
        write = partial(self._arrive, handle, epoch, blocks, pieces, ticket)
        self._later(partial(self._land, handle, ticket, write, before, pieces, until))

    def _arrive(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        """The bytes reach the receiver's region, or are refused there."""
        super().write(handle, epoch, blocks, pieces, ticket)

    def _land(
        self,
        handle: bytes,
        ticket: int,
        write: Callable[[], None],
        before: list[bytes],
        pieces: Sequence[Piece],
        until: float,
    ) -> None:
        world = self.runtime.world
        if self.is_closed or self.runtime.killed:
            return
        if self.runtime.stopped or (self._is_cut(handle) and world.now < until):
            world.later(0.1, partial(self._land, handle, ticket, write, before, pieces, until))
        elif self._is_cut(handle):
            self._outbox.post(Written(ticket, TransportError("the link carries nothing")))
        else:
            if not self.trusts_sources and before != [bytes(piece.source) for piece in pieces]:
                world.faults.append(AssertionError("an embedding changed while it was written: released too early"))
            write()

    def revoke(self, epoch: int) -> None:
        self._later(lambda: super(VirtualTransport, self).revoke(epoch))

    def close(self) -> None:
        self.is_closed = True
        super().close()

    def _later(self, call: Callable[[], None]) -> None:
        world = self.runtime.world
        world.later(world.random.uniform(0, world.weather.delay), call)

    def _is_cut(self, handle: bytes) -> bool:
        world = self.runtime.world
        return world.are_cut(self.runtime.name, world.processes.get(handle, ""))
