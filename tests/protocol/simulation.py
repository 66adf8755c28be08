"""A simulation of one language worker, its pool, its rooms and their encode workers. Every event is a call."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count

import xxhash

from embferry.memory.admission import PoolAdmission
from embferry.memory.blocks import ReqToMetadataBlockAllocator
from embferry.protocol.commands import (
    Admit,
    CloseBlocks,
    Connect,
    Deliver,
    ReceiverCommand,
    Release,
    ReleaseSource,
    Restart,
    Revoke,
    Send,
    SenderCommand,
    Verify,
    Write,
)
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.protocol.kept import KeptTokens
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import Body, Frame, Open, Pending, TransportAddress, Unknown, decode, encode
from embferry.protocol.ranges import RangeSet
from embferry.protocol.receiver import Receiver
from embferry.protocol.sender import Sender
from embferry.protocol.settings import TransferSettings
from embferry.testing.network import InFlightWrite, SimulatedMemory, SimulatedNetwork

from .ends import LAYOUT, TOKEN_BYTES, Content, EncodeEnd, InvariantError, LanguageEnd, must
from .invariants import check, check_bytes, check_delivery, check_peer, check_write

LANGUAGE = "language"
TRANSPORTS = ("first transport", "second transport")


class Simulation:
    """A language worker and its encode workers. Every method that plays an event checks all invariants at its end."""

    def __init__(
        self,
        num_blocks: int = 4,
        block_size: int = 2,
        *,
        checks_windows: bool = False,
        chunk_blocks: int = 1,
        writes_in_flight: int = 2,
        default_tokens: int = 5,
        eager: bool = False,
        progress_rate: float = math.inf,
    ) -> None:
        self.eager = eager  # verify a chunk as soon as the command is taken
        self.now = 0.0
        self.steps = 0
        self.settings = TransferSettings(
            chunk_bytes=chunk_blocks * block_size * TOKEN_BYTES,
            writes_in_flight=writes_in_flight,
            default_allocate_tokens=default_tokens,
            progress_rate=progress_rate,
        )
        self.geometry = Geometry(LAYOUT, num_blocks, block_size)
        self.network = SimulatedNetwork()
        check_written = partial(check_write, self)
        self.memory = SimulatedMemory(
            num_blocks, block_size, TOKEN_BYTES, checks_windows=checks_windows, before_write=check_written
        )
        self.allocator = ReqToMetadataBlockAllocator(num_blocks, block_size)
        self.admission = PoolAdmission(self.allocator)
        self.encoders: list[EncodeEnd] = []
        self.receivers: list[LanguageEnd] = []
        self.hosts: dict[str, EncodeEnd | None] = {}  # by address; None: the worker runs, but without the room
        self.parked: dict[str, Frame] = {}
        self.epochs: dict[int, LanguageEnd] = {}
        self.transport_of: dict[int, str] = {}
        self.broken: set[str] = set()  # names of broken transports
        self.lost_here: set[str] = set()  # names of transports that the language worker has lost
        self.lost_there: set[str] = set()  # names of transports that the encode workers have lost
        self.block_epoch: dict[int, int] = {}
        self.closed: set[int] = set()  # blocks that their writer has reported as written
        self.orphans: dict[int, tuple[int, tuple[int, ...]]] = {}  # epoch: (room, blocks) of receivers that died
        self.passed_over: dict[LanguageEnd, Counter[LanguageEnd]] = {}  # turns of others while a transfer waited
        self.unrecoverable: set[int] = set()  # rooms with a write that failed for good
        self.before_command: Callable[[LanguageEnd, ReceiverCommand], None] = lambda end, command: None
        self._sessions = count(1)

    # Ends

    def living_encoders(self) -> list[EncodeEnd]:
        return [end for end in self.encoders if end.alive]

    def living_receivers(self) -> list[LanguageEnd]:
        return [end for end in self.receivers if end.alive]

    def start_encoder(self, room: int, content: Content, address: str = "") -> EncodeEnd:
        """Starts a sender for ``room``. Any earlier sender at the address ends."""
        address = address or f"encode {room}"
        self._vacate(address)
        machine = Sender(
            room,
            next(self._sessions),
            LAYOUT,
            tuple(TransportAddress(name, b"") for name in TRANSPORTS if name not in self.lost_there),
            self.settings,
            self.now,
        )
        end = EncodeEnd(room, address, content, machine)
        self.encoders.append(end)
        self.hosts[address] = end
        if parked := self.parked.pop(address, None):
            machine.receive(parked.source, parked.target, parked.body, self.now)
        self.run()
        return end

    def start_receiver(self, room: int, endpoint: str = "", kept: KeptTokens | None = None) -> LanguageEnd:
        transports = tuple(TransportAddress(n, n.encode()) for n in TRANSPORTS if n not in self.lost_here)
        common = self.geometry, LANGUAGE, transports, self.settings, self.now
        machine = Receiver(room, next(self._sessions), *common, kept=kept)
        end = LanguageEnd(room, endpoint or f"encode {room}", machine)
        if kept is not None:
            end.kept, end.delivered, end.consumed = kept.content_digest, kept.verified(), kept.verified()
        self.receivers.append(end)
        self.admission.register(machine)
        self.run()
        return end

    def kill_encoder(self, end: EncodeEnd, *, silent: bool = False) -> None:
        """Ends a sender; if ``silent``, with its worker. Its writes may still land until they are revoked."""
        self._vacate(end.address)
        if not silent:
            self.hosts[end.address] = None
        self.run()

    def kill_receiver(self, end: LanguageEnd) -> None:
        """Ends a receiver. Its process continues, so the region stays and its grants are revoked."""
        end.alive = False
        self.admission.unregister(end.machine)
        for grant in end.machine.ledger:
            if not grant.revoking:
                self.memory.revoke(grant.epoch)
            if blocks := grant.open_blocks():
                self.allocator.quarantine(blocks, end.room)
                self.orphans[grant.epoch] = (end.room, blocks)
        kept = [block for block in end.blocks() if block not in {b for _, bs in self.orphans.values() for b in bs}]
        self._give_back(tuple(kept), end)
        self.run()

    def redirect(self, end: LanguageEnd, address: str) -> None:
        """Tells the receiver to continue with another encode worker, whether or not its peer is lost."""
        end.endpoint = address
        end.machine.peer_lost(self.now)
        self.run()

    def remove_settled(self) -> None:
        for receiver in self.living_receivers():
            if receiver.machine.settled(self.now):
                must(not receiver.blocks() and not receiver.queue, "a settled receiver still holds blocks")
                receiver.alive = False
                self.admission.unregister(receiver.machine)
        for encoder in self.living_encoders():
            if encoder.machine.settled(self.now):
                must(encoder.released, "a settled sender still holds the embedding")
                self.kill_encoder(encoder)

    def _vacate(self, address: str) -> None:
        end = self.hosts.pop(address, None)
        if end is not None:
            end.alive = False
            end.died_at = self.steps

    # Events between the ends

    def deliver(self, index: int = 0) -> None:
        packet = self.network.deliver(index)
        frame = decode(packet.data)
        if packet.target == LANGUAGE:
            ends = [end for end in self.living_receivers() if end.room == frame.body.room]
            named = [end for end in ends if end.machine.session == frame.target]
            for end in (named or ends)[-1:]:
                end.machine.receive(frame.source, frame.target, frame.body, self.now)
                check_peer(self, end)
        elif packet.target in self.hosts:
            host = self.hosts[packet.target]
            if host is not None:
                host.machine.receive(frame.source, frame.target, frame.body, self.now)
            elif isinstance(frame.body, Open):
                self.parked[packet.target] = frame
                self._send(packet.target, LANGUAGE, 0, frame.source, Pending(frame.body.room, 0))
            else:
                self._send(packet.target, LANGUAGE, 0, frame.source, Unknown(frame.body.room, frame.target))
        self.run()

    def land(self, write: InFlightWrite, count: int) -> None:
        self.memory.land(write, count)
        self.run()

    def complete(self, write: InFlightWrite) -> None:
        """Lands the rest of a write and reports the end to its writer, if it lives."""
        whole = self.memory.finish(write)
        must(whole or write.epoch in self.memory.revoked, "a granted write was refused")
        end, command = self.writer_of(write)
        if end.alive and whole:
            end.machine.write_done(command.target, command.epoch, command.offset, command.length, write.checksum)
        elif end.alive:
            refused = TransportError("no open window covers the write", retryable=False)
            end.machine.write_failed(command.target, command.epoch, command.offset, command.length, refused)
        self.run()

    def fail(self, write: InFlightWrite, *, retryable: bool = True) -> None:
        """Ends a write without writing the rest and reports the error to its writer, if it lives."""
        self.fail_write(write, retryable=retryable)
        self.run()

    def fail_write(self, write: InFlightWrite, *, retryable: bool) -> None:
        self.memory.drop(write)
        end, command = self.writer_of(write)
        if end.alive:
            if not retryable and len(end.machine.destinations[command.target].transports.usable) == 1:
                self.unrecoverable.add(end.room)
            error = TransportError("the link broke", retryable=retryable)
            end.machine.write_failed(command.target, command.epoch, command.offset, command.length, error)

    def revoke(self, index: int = 0) -> None:
        """Puts a revocation into effect."""
        epoch = self.memory.complete_revocation(index)
        if self.epochs[epoch].alive:
            self.epochs[epoch].machine.revoked(epoch)
        elif epoch in self.orphans:
            room, blocks = self.orphans.pop(epoch)
            self.allocator.release_quarantined(blocks, room)
            self._forget_blocks(blocks)
        self.run()

    def verify(self, end: LanguageEnd, index: int = 0) -> None:
        self._verify(end, index)
        self.run()

    def _verify(self, end: LanguageEnd, index: int) -> None:
        check = end.checks.pop(index)
        seen = xxhash.xxh3_64_digest(self.memory.read(check.blocks, check.length))
        matches = check.checksum in (None, seen)
        end.machine.verified_chunk(check.epoch, check.offset, matches=matches, now=self.now)

    def consume(self, end: LanguageEnd, index: int = 0) -> None:
        """Consumes a chunk, which commits the receiver to its content, and releases its blocks."""
        chunk = end.queue.pop(index)
        check_bytes(self, end, chunk)
        end.machine.committed = True
        end.consumed.add(chunk.offset, chunk.offset + chunk.length)
        end.machine.consumed(chunk.epoch, chunk.offset)
        self.run()

    def tick(self, seconds: float) -> None:
        self.now += seconds
        for end in [*self.living_receivers(), *self.living_encoders()]:
            end.machine.expire(self.now)
            due = end.machine.next_timeout()
            must(due is None or due > self.now, f"the timer of {end} stays at {due}, which has passed")
        self.run()
        self.remove_settled()

    # Execution of commands

    def run(self) -> None:
        """Executes commands and allocates blocks until nothing is left to do, then checks the invariants."""
        self.steps += 1
        while self._execute_all() or self._allocate():
            pass
        check(self)

    def _execute_all(self) -> bool:
        busy = False
        for encoder in self.living_encoders():
            for command in encoder.machine.take_commands():
                busy = True
                self._execute_sender(encoder, command)
        for receiver in self.living_receivers():
            for received in receiver.machine.take_commands():
                busy = True
                self.before_command(receiver, received)
                self._execute_receiver(receiver, received)
        return busy

    def _execute_sender(self, end: EncodeEnd, command: SenderCommand) -> None:
        match command:
            case Send(body, target):
                self._send(end.address, LANGUAGE, end.machine.session, target, body)
            case Write(target, epoch, offset, length, blocks, transport, _):
                must(
                    transport.name == self.transport_of.get(epoch, transport.name),
                    f"epoch {epoch} is written over a transport that it was not granted on",
                )
                grants = end.machine.destinations[target].grants.values()
                again = [other.epoch for other in grants if other.start <= offset < other.stop and other.epoch > epoch]
                must(transport.name not in self.lost_there, f"{transport.name} is used although it was lost")
                must(
                    not again,
                    f"token {offset} is sent under epoch {epoch}, although it was granted again under {again}",
                )
                tokens = range(offset, offset + length)
                digest = xxhash.xxh3_64_digest(b"".join(end.read(token) for token in tokens))
                write = InFlightWrite((end, command), epoch, blocks, tokens, end.read, digest)
                self.memory.start(write)
                if transport.name in self.broken:
                    self.fail_write(write, retryable=False)
            case Connect(target, transport):
                if transport.name in self.broken:
                    end.machine.transport_failed(target, transport.name)
            case ReleaseSource():
                end.released = True

    def _execute_receiver(self, end: LanguageEnd, command: ReceiverCommand) -> None:
        match command:
            case Send(body, target):
                if isinstance(body, Open) and body.generation != end.generation:
                    end.generation, end.opened_at = body.generation, self.steps
                self._send(LANGUAGE, end.endpoint, end.machine.session, target, body)
            case Admit(epoch, blocks, transport):
                must(transport not in self.lost_here, f"blocks are opened over {transport}, which was lost")
                self.epochs[epoch], self.transport_of[epoch] = end, transport
                for block in blocks:
                    must(block not in self.block_epoch, f"block {block} is admitted under two epochs")
                    self.block_epoch[block] = epoch
                self.memory.admit(epoch, blocks)
            case CloseBlocks(epoch, blocks):
                self.closed.update(blocks)
                self.memory.close_blocks(epoch, blocks)
            case Revoke(epoch):
                self.memory.revoke(epoch)
            case Verify():
                end.checks.append(command)
                if self.eager:
                    self._verify(end, 0)
            case Deliver():
                check_delivery(self, end, command)
                end.queue.append(command)
            case Release(blocks):
                self._give_back(blocks, end)
            case Restart():
                must(not end.machine.committed, "tokens that were used are discarded")
                end.queue.clear()
                end.kept, end.delivered, end.consumed = None, RangeSet(), RangeSet()

    def _allocate(self) -> bool:
        waiting = [e for e in self.living_receivers() if e.machine.wanted(self.now) is not None]
        for end in self.living_receivers():
            self.admission.update(end.machine, self.now)
        served = {machine.session for machine, _ in self.admission.allocate(self.now)}
        granted = [end for end in waiting if end.machine.session in served]
        self.passed_over = {end: self.passed_over.get(end, Counter()) for end in waiting}
        for end in granted:
            self.passed_over[end].clear()
            for other in waiting:
                if other not in granted:
                    self.passed_over[other][end] += 1
                    must(
                        self.passed_over[other][end] <= 2,
                        f"room {other.room} waits while another room is granted blocks three times",
                    )
        for end in waiting:
            starved = end.machine.wanted(self.now) is not None and self.allocator.available
            must(not starved, f"room {end.room} waits for a block while one is free")
        return bool(granted)

    def _send(self, source: str, target: str, session: int, to: int, body: Body) -> None:
        self.network.send(source, target, encode(Frame(1, session, to, body)))

    def writer_of(self, write: InFlightWrite) -> tuple[EncodeEnd, Write]:
        end, command = write.writer  # type: ignore[misc]  # set by _execute_sender
        taken = end.machine.destinations[command.target].grants.get(command.epoch)
        unfinished = not end.alive or (taken is not None and command.offset in taken.in_flight)
        must(unfinished, f"token {command.offset} was written twice under epoch {command.epoch}")
        return end, command

    def _give_back(self, blocks: tuple[int, ...], end: LanguageEnd) -> None:
        for block in blocks:
            owner = self.epochs.get(self.block_epoch.get(block, 0))
            must(owner is end, f"room {end.room} releases block {block}, which belongs to another transfer")
        self._forget_blocks(blocks)
        if blocks:
            try:
                self.allocator.free(blocks, end.room)
            except LocalProtocolError as error:
                raise InvariantError(str(error)) from error

    def _forget_blocks(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            del self.block_epoch[block]
            self.closed.discard(block)
