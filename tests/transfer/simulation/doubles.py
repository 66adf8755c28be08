"""Foreign code of the simulation: sinks, sources, transports and callbacks that raise or are slow when told to."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embferry import ChunkSink, DeviceSink, GatherSink, Sink
from embferry.protocol.commands import Deliver, Verify
from embferry.testing.virtual import VirtualExecutor, VirtualWorld
from embferry.testing.virtual_transport import VirtualTransport
from embferry.transfer.fields import Array
from embferry.transports.contract import Event, Piece, Window, Written

if TYPE_CHECKING:
    from .rooms import Room
    from .simulation import Simulation

KINDS = 6
"""Number of kinds of fault: five exceptions, and slowness."""


@dataclass
class Fault:
    """Something that a call of foreign code does once.

    Attributes:
        kind: Which exception, or that it takes its time.
        marker: A word that its text contains.
        late: Whether it happens after the call has had its effect.
    """

    kind: int
    marker: str
    late: bool = False

    @property
    def is_slow(self) -> bool:
        return self.kind % KINDS == 5

    def error(self) -> Exception:
        """Returns the exception."""
        return (
            RuntimeError(self.marker),
            MemoryError(self.marker),
            OSError(errno.EMFILE, self.marker),
            OSError(errno.ENOMEM, self.marker),
            RuntimeError(f"Event loop is closed {self.marker}"),
        )[self.kind % KINDS]


class Breakable:
    """A place where faults are armed, by the name of a method.

    Args:
        world: Whose clock moves on when a call is slow.
        fired: Called when one raises.
    """

    def __init__(self, world: VirtualWorld, fired: Callable[[Fault], None]) -> None:
        self.world, self.fired = world, fired
        self.armed: dict[str, Fault] = {}
        self.busy = 0

    def call(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Makes a call, with the fault that is armed for it."""
        fault = self.armed.pop(name, None)
        if fault is None:
            return call(*arguments)
        if fault.is_slow:
            self.sleep(0.7)
            return call(*arguments)
        if fault.late:
            call(*arguments)
        self.fired(fault)
        raise fault.error()

    def sleep(self, seconds: float) -> None:
        """Lets the others go on while this call takes its time."""
        self.busy += 1
        try:
            self.world.run(seconds)
        finally:
            self.busy -= 1


class ProbedSink(Sink):
    """Checks on each call which locks are held, and raises or is slow when told to."""

    room: Room

    def granted(self, epoch: int, start: int, blocks: tuple[int, ...]) -> None:
        self._probe("granted", super().granted, epoch, start, blocks)

    def needs_preparation(self, chunk: Verify) -> bool:
        return bool(self._probe("needs_preparation", super().needs_preparation, chunk))

    def prepare(self, chunk: Verify, total_tokens: int) -> None:
        self._probe("prepare", super().prepare, chunk, total_tokens)

    def verify(self, chunk: Verify, total_tokens: int) -> Generator[None, None, bool]:
        self.check_locks("verify")
        for _ in range(self.room.passes):
            yield
        self._probe("verify", lambda: None)
        return (yield from super().verify(chunk, total_tokens))

    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        self._probe("deliver", super().deliver, chunk, total_tokens)  # type: ignore[safe-super]

    def restart(self) -> None:
        self._probe("restart", super().restart)  # type: ignore[safe-super]

    @property
    def is_complete(self) -> bool:
        return bool(self._probe("is_complete", lambda: super(ProbedSink, self).is_complete))

    def _probe(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        self.check_locks(name)
        if self.room.sink_has_raised and not self.room.is_cleared:
            self.room.simulation.violated(f"the sink's {name}() was called although the sink had raised")
        try:
            return self.room.breakable.call(name, call, *arguments)
        except Exception:
            self.room.sink_has_raised = True
            raise

    def check_locks(self, name: str) -> None:
        """Notes if the lock of the sink is not held, or that of a manager is."""
        self.room.simulation.check_no_lock(f"the sink's {name}()")
        if not self.owner.lock._is_owned():  # type: ignore[attr-defined]
            self.room.simulation.violated(f"the sink's {name}() was called without the sink's lock")


class ProbedGatherSink(ProbedSink, GatherSink):
    """A probed :class:`GatherSink`."""


class ProbedChunkSink(ProbedSink, ChunkSink):
    """A probed :class:`ChunkSink`."""


class ProbedDeviceSink(ProbedSink, DeviceSink):
    """A probed :class:`DeviceSink`; its copying thread is virtual."""


class HostTarget:
    """Device memory that is host memory."""

    def __init__(self, room: Room, tokens: int, token_bytes: int) -> None:
        self.room = room
        self.rows = np.zeros((tokens, token_bytes), np.uint8)

    def copy_in(self, start: int, rows: Array) -> None:
        self.room.simulation.check_no_lock("copy_in()")
        self.room.breakable.call("copy_in", self.rows.__setitem__, slice(start, start + len(rows)), rows)


class HostRows:
    """Rows in device memory that is host memory."""

    def __init__(self, simulation: Simulation, breakable: Breakable, rows: Array) -> None:
        self.simulation, self.breakable, self.rows = simulation, breakable, rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape

    def copy_out(self, start: int, stop: int, into: Array) -> None:
        self.simulation.check_no_lock("copy_out()")
        self.breakable.call("copy_out", into.__setitem__, slice(None), self.rows[start:stop])


class BrokenChecksums:
    """Checksums that cannot be taken: the memory of the embedding cannot be read."""

    def __init__(self, breakable: Breakable) -> None:
        self.breakable = breakable

    def of(self, offset: int, length: int) -> bytes | None:
        self.breakable.call("checksum", lambda: None)
        return None


class PatientExecutor(VirtualExecutor):
    """The thread of a :class:`DeviceSink`: it waits for the sink's lock while a call of the sink takes its time."""

    is_busy: Callable[[], bool] = staticmethod(lambda: False)

    def _next(self) -> None:
        if self.is_busy():
            self._world.later(0.05, self._next)
        else:
            super()._next()


class FaultyTransport(VirtualTransport):
    """A transport of which any method raises once when told to."""

    breakable: Breakable
    arrived: Callable[[bytes, int, tuple[int, ...]], None]

    def _arrive(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        super()._arrive(handle, epoch, blocks, pieces, ticket)
        last = self._outbox._events[-1]
        if isinstance(last, Written) and last.error is None:
            self.arrived(handle, epoch, blocks)

    def connect_to_sender(self, address: bytes) -> None:
        self.breakable.call("connect_to_sender", super().connect_to_sender, address)

    def admit(self, window: Window) -> None:
        self.breakable.call("admit", super().admit, window)

    def close_blocks(self, epoch: int, blocks: tuple[int, ...]) -> None:
        self.breakable.call("close_blocks", super().close_blocks, epoch, blocks)

    def revoke(self, epoch: int) -> None:
        self.breakable.call("revoke", super().revoke, epoch)

    def connect(self, handle: bytes) -> None:
        self.breakable.call("connect", super().connect, handle)

    def write(self, handle: bytes, epoch: int, blocks: tuple[int, ...], pieces: Sequence[Piece], ticket: int) -> None:
        self.trusts_sources |= "write" in self.breakable.armed  # it may raise although it has begun to write
        self.breakable.call("write", super().write, handle, epoch, blocks, pieces, ticket)

    def poll(self) -> list[Event]:
        return self.breakable.call("poll", super().poll)  # type: ignore[no-any-return]

    def close(self) -> None:
        self.trusts_sources |= "close" in self.breakable.armed  # its writes may go on, although they have been given up
        self.breakable.call("close", super().close)

    def really_close(self) -> None:
        """Closes it, also if a fault is armed."""
        super().close()


class FirstTransport(FaultyTransport):
    """The preferred one."""

    name = "first"


class SecondTransport(FaultyTransport):
    """The other one."""

    name = "second"
