"""A simulation of two language workers and two encode workers: whole managers on one thread, in virtual time."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from embferry import EmbeddingTransferError, ReceiveManager, SendManager
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.protocol.validation import MAX_RECEIVERS
from embferry.testing.virtual import VirtualRuntime, VirtualWorld
from embferry.transfer.fields import Array
from embferry.transfer.handle import ENDED
from embferry.transfer.manager import Manager

from . import faults, moves, peers  # noqa: F401  (they register their moves)
from .doubles import (
    Breakable,
    BrokenChecksums,
    Fault,
    FaultyTransport,
    FirstTransport,
    HostRows,
    SecondTransport,
)
from .rooms import LAYOUT, InvariantError, Room, Sending, must
from .story import Story
from .surroundings import surroundings

BLOCK_SIZE = 4
TOKEN_BYTES = LAYOUT.token_bytes
LONGEST = 600.0  # seconds of virtual time within which every transfer must have ended
STEP = 0.25

PATIENT: dict[str, Any] = {
    "answer_timeout": 40,
    "peer_timeout": 40,
    "bootstrap_timeout": 60,
    "transfer_timeout": 90,
    "lease_timeout": 90,
    "waiting_timeout": 120,
}
"""Time-outs that no weather of a story exceeds. An impatient worker has the default ones, or shorter."""
IMPATIENT: dict[str, Any] = {"answer_timeout": 2, "peer_timeout": 1.5, "bootstrap_timeout": 6, "lease_timeout": 8}


@dataclass(eq=False)
class Worker:
    """One process with a manager.

    Attributes:
        is_closed: Whether its manager has been closed.
        has_no_threads: Whether a callback of it could not be run.
    """

    name: str
    runtime: VirtualRuntime
    manager: Any
    transports: list[FaultyTransport]
    is_closed: bool = False
    has_no_threads: bool = False

    @property
    def is_there(self) -> bool:
        return not self.runtime.killed and not self.is_closed


class Simulation:
    """Plays one story.

    Attributes:
        floating: Markers of faults that end one transfer, whichever it is, with an error that contains them.
        unlucky: Parts of the texts with which every transfer may fail: the weather was worse than its time-outs.
    """

    def __init__(self, story: Story) -> None:
        self.story = story
        self.world = VirtualWorld(story.seed, most_events=100_000)
        setup = story.setup
        self.is_patient = setup % 4 != 0
        self.settings = TransferSettings(
            chunk_bytes=(1 + setup // 4 % 2) * BLOCK_SIZE * TOKEN_BYTES,
            writes_in_flight=1 + setup // 8 % 3,
            default_allocate_tokens=8,
            max_embedding_bytes=100 * TOKEN_BYTES,
            parked_requests=6,
            parked_bytes=1500,
            **(PATIENT if self.is_patient else IMPATIENT),
        )
        self.max_tokens = 100
        self.geometry = Geometry(LAYOUT, (3, 8, 17, 40)[setup // 16 % 4], BLOCK_SIZE)
        self.rooms: list[Room] = []
        self.gone: list[Room] = []  # rooms whose number was opened again
        self.floating: dict[str, Room | None] = {}
        self.faulty_transport = ""
        self.unclosed: set[Worker] = set()  # a transport of theirs could not be closed
        self.unlucky = () if self.is_patient else moves.UNLUCKY
        self._markers = iter(range(1, 1 << 30))
        self._names = iter(range(1, 1 << 30))
        self._violations: list[str] = []
        self.everyone: list[Worker] = []
        self.language = [self.start_language(), self.start_language()]
        self.encode = [self.start_encode(), self.start_encode()]

    # Workers

    def start_language(self) -> Worker:
        runtime = self.world.runtime(name=f"language {next(self._names)}")
        transports = self._transports(runtime)
        manager = ReceiveManager(self.geometry, transports, settings=self.settings, runtime=runtime)
        return self._started(runtime, manager, transports)

    def start_encode(self, endpoint: str = "") -> Worker:
        name = f"encode {next(self._names)}"
        runtime = self.world.runtime(listens=True, name=name, endpoint=endpoint)
        transports = self._transports(runtime)
        manager = SendManager(LAYOUT, transports, settings=self.settings, runtime=runtime)
        return self._started(runtime, manager, transports)

    def _transports(self, runtime: VirtualRuntime) -> list[FaultyTransport]:
        transports: list[FaultyTransport] = [FirstTransport(runtime), SecondTransport(runtime)]
        for transport in transports:
            transport.breakable = Breakable(self.world, lambda fault: None)  # it costs no transfer: there is another
            transport.arrived = self._arrived
        return transports

    def _started(self, runtime: VirtualRuntime, manager: Manager[Any], transports: list[FaultyTransport]) -> Worker:
        worker = Worker(runtime.name, runtime, manager, transports)
        manager._survive = partial(self._note, manager._survive)  # type: ignore[method-assign]
        self.everyone.append(worker)
        return worker

    def _note(self, survive: Callable[..., None], what: str, call: Callable[..., object], *arguments: object) -> None:
        """Notes what a part of a turn raises: the driver survives it, but nothing of it is expected."""

        def noted() -> None:
            try:
                call(*arguments)
            except Exception as error:
                if what != "reading control messages":
                    self.world.faults.append(error)
                raise

        survive(what, noted)

    def _arrived(self, handle: bytes, epoch: int, blocks: tuple[int, ...]) -> None:
        """Checks that a write has landed in blocks that are still granted to its writer."""
        worker = next(w for w in self.everyone if w.name == self.world.processes[handle])
        if not worker.is_there:
            return
        if all(block in worker.manager._unclosed for block in blocks):
            return  # they are in quarantine
        found = worker.manager._by_epoch.get(epoch)
        holders = worker.manager.allocator.holders()
        if found is None or not set(blocks) <= set(holders.get(found[0].room, ())):
            self.violated(f"a write under epoch {epoch} has landed in blocks {blocks}, which are not its own")
        for record in worker.manager._records():
            for grant in () if record.kept_until else record.machine.ledger:
                if grant.epoch != epoch and set(blocks) & set(grant.open_blocks()):
                    self.violated(f"a write under epoch {epoch} has landed in blocks of epoch {grant.epoch}")

    def kill(self, worker: Worker) -> None:
        """Ends a process at once. The kernel closes what it had open."""
        worker.runtime.kill()
        for transport in worker.transports:
            transport.really_close()
        for room in self.every_room():
            for sending in room.senders:
                if sending.worker is worker:
                    sending.excuses.add("")
            if room.language is worker or room.endpoint == worker.runtime.endpoint:
                room.excuses.add("")

    def close(self, worker: Worker) -> None:
        """Closes a manager; it may be in any state."""
        worker.is_closed = True
        refused = [t for t in worker.transports if "close" in t.breakable.armed]
        try:
            worker.manager.close()
        except ExceptionGroup as error:
            must(bool(refused), f"close() of {worker.name} raised {error.exceptions}")
        for transport in worker.transports:
            must(transport.is_closed or transport in refused, f"{worker.name} did not close {transport.name}")
            transport.really_close()
        must(worker.runtime.control.is_closed, f"{worker.name} did not close its control plane")
        ends = [room.receiver for room in self.every_room() if room.language is worker and room.receiver is not None]
        ends_of_senders = [s.end for room in self.every_room() for s in room.senders if s.worker is worker]
        for end in [*ends, *ends_of_senders]:
            must(end._record.poll() in ENDED, f"room {end.room} has not ended, although its manager was closed")
        for room in self.every_room():
            if room.language is worker or room.endpoint == worker.runtime.endpoint:
                room.excuses.add("")
            for sending in room.senders:
                if sending.worker is worker:
                    sending.excuses.add("")
                    must(sending.end.source_released, f"{room}: the embedding is read after close()")

    # Rooms

    def every_room(self) -> list[Room]:
        return [*self.rooms, *self.gone]

    def device_rows(self, breakable: Breakable, rows: dict[str, Array]) -> dict[str, object]:
        return {name: HostRows(self, breakable, array) for name, array in rows.items()}

    def break_source(self, sending: Sending, breakable: Breakable, *, device: bool) -> None:
        """The embedding cannot be read, once."""
        fault = self.fault(next(self._markers) % 5)
        breakable.armed["copy_out" if device else "checksum"] = fault
        if not device:
            sending.checksums = BrokenChecksums(breakable)

    def fault(self, kind: int) -> Fault:
        """Returns a fault with a marker of its own."""
        return Fault(kind, f"fault-{next(self._markers)}-")

    def takes_floating(self, room: Room, detail: str) -> bool:
        """Returns whether the room is the one that a fault may end."""
        for marker, taken in self.floating.items():
            if marker in detail and taken in (None, room):
                self.floating[marker] = room
                room.excuses.add(marker)
                for sending in room.senders:
                    sending.excuses.add(marker)
                return True
        return False

    # Invariants

    def violated(self, text: str) -> None:
        """Notes a broken invariant in code that may not raise."""
        self._violations.append(text)

    def check_no_lock(self, what: str) -> None:
        """Notes if foreign code is called while the lock of a manager is held."""
        if any(worker.manager.lock._is_owned() for worker in self.everyone):
            self.violated(f"{what} was called with the lock of a manager held")

    def check(self) -> None:
        """Checks what holds at any time."""
        must(not self._violations, "; ".join(self._violations[:3]))
        if self.world.faults:
            error = self.world.faults[0]
            trace = "".join(traceback.format_exception(error)[-4:])
            raise InvariantError(f"a turn or a callback raised, or the world saw a fault: {trace}") from error
        for worker in self.everyone:
            manager = worker.manager
            if isinstance(manager, ReceiveManager):
                manager.allocator.check_integrity()
            else:
                parked = manager.parked
                must(len(parked) <= self.settings.parked_requests, f"{len(parked)} requests are parked")
                must(parked.nbytes <= self.settings.parked_bytes, f"{parked.nbytes} bytes of requests are parked")
                for record in manager._rooms.values():
                    peers = len(record.peers)
                    must(peers <= MAX_RECEIVERS + 1, f"room {record.room} keeps {peers} peers")
        for room in self.every_room():
            room.check_ended()

    # The story

    def play(self) -> None:
        """Plays the story to its end.

        Raises:
            InvariantError: An invariant is broken.
        """
        with surroundings(self.world, TOKEN_BYTES, BLOCK_SIZE):
            for delay, kind, a, b, c in self.story.moves:
                self.world.run(delay)
                with suppress(EmbeddingTransferError):
                    moves.MOVES[kind](self, a, b, c)
                self.check()
            self.calm()
            self.quiesce()
            self.check_nothing_left()
            for worker in self.everyone:
                if worker.is_there:
                    self.close(worker)
            self.check()

    def calm(self) -> None:
        """The weather becomes fine, and everybody does what they should."""
        self.world.weather.loss = self.world.weather.repeat = 0.0
        self.world.weather.delay, self.world.weather.latency = 0.01, 0.001
        self.world.cut.clear()
        for worker in self.everyone:
            if worker.runtime.stopped and worker.is_there:
                worker.runtime.resume()
        for room in self.rooms:
            moves.complete(self, room)
        for room in self.gone:  # a receiver of a room of that number may have been sent there
            moves.produce_all(room)

    def quiesce(self) -> None:
        """Lets time pass until every transfer has ended; users take what arrives and clear what has ended."""
        until, step = self.world.now + LONGEST, STEP
        while self.world.now < until:
            self.world.run(step)
            step *= 1.1
            self.check()
            for room in self.every_room():
                if room.is_there and not room.language.is_closed:
                    room.use_up()
            if not self.waiting():
                return
        raise InvariantError(f"after {LONGEST:g} s these have not ended: {self.waiting()}")

    def waiting(self) -> list[str]:
        """Returns the ends that have not ended."""
        found = []
        for room in self.every_room():
            if room.is_there and not room.has_ended and not room.language.is_closed and room.receiver is not None:
                machine = room.receiver._record.machine
                found.append(f"receiver of {room}, {machine.phase.name if machine else 'no machine'}")
            for sending in room.senders:
                if sending.is_there and not sending.has_ended and not sending.worker.is_closed:
                    found.append(f"sender of {room}, {sending.end.machine.phase.name}")
        return found

    def check_nothing_left(self) -> None:
        """Clears everything, lets the ends linger, and checks that nothing is kept."""
        self.world.run(STEP)  # what has just ended is reported
        for room in self.every_room():
            for stop in room.stops:
                stop()
            for sending in room.senders:
                if sending.is_there and not sending.worker.is_closed:
                    sending.end.clear()
        self.world.run(self.settings.linger + self.settings.bootstrap_timeout + 5)
        self.check()
        for worker in self.everyone:
            manager, name = worker.manager, worker.name
            if isinstance(manager, SendManager) and not worker.runtime.killed:  # also after its close
                must(not manager.writer._checksums_due, f"{name} keeps checksums that are to be taken")
            if not worker.is_there:
                continue
            kept = [r for r in manager._records() if worker not in self.unclosed]
            must(not kept, f"{name} keeps the records of rooms {[record.room for record in kept]}")
            if isinstance(manager, ReceiveManager):
                if worker not in self.unclosed:  # otherwise a writer may still have access
                    must(not manager.allocator.holders(), f"{name}: {manager.allocator.holders()} still hold blocks")
                    must(not manager._by_epoch, f"{name} keeps epochs")
                    must(not manager.admission._waiting, f"{name}: a room still waits for blocks")
            else:
                must(len(manager.parked) == 0, f"{name} keeps parked requests")
                must(not manager.writer._writing, f"{name} keeps writes")
            must(worker in self.unclosed or not manager.ready_queue._times, f"{name} keeps timers")
        for room in self.every_room():
            room.check_seen()
            ends = [room.receiver, *(sending.end for sending in room.senders)]
            for end in ends:
                left = end is not None and (end._notifier._waiters or end._notifier._callbacks)
                must(not left, f"{room} keeps callbacks")
            for sending in room.senders:
                if sending.is_there and sending.has_ended:
                    must(sending.is_collected(), f"{room}: the embedding is still referenced")


def play(story: Story) -> Simulation:
    """Plays a story to its end.

    Raises:
        InvariantError: An invariant is broken.
    """
    simulation = Simulation(story)
    simulation.play()
    return simulation


def failure(story: Story) -> Exception | None:
    """Returns what breaks when a story is played, or None."""
    try:
        play(story)
    except Exception as error:  # noqa: BLE001  (any exception is a finding)
        return error
    return None
