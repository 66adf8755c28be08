"""The language side's manager: executes the commands of the receiver machines."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Hashable, Sequence
from functools import partial

from embferry.memory.admission import PoolAdmission
from embferry.memory.blocks import MetadataAllocation, ReqToMetadataBlockAllocator, blocks_needed
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.commands import Admit, CloseBlocks, Deliver, Release, Restart, Revoke, Send, Verify
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import Abort, Frame, Offer, TransportAddress
from embferry.protocol.receiver import Receiver
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import TERMINAL, KVPoll
from embferry.transports.contract import Event, Receiving, Revoked, Transport, Window
from embferry.trust import Trust

from .control.contract import Unreachable
from .control.sockets import SocketControl
from .failures import as_transfer_error, attempt
from .guarded_transport import GuardedTransport
from .handle import ENDED
from .manager import Manager
from .receive_handle import EmbeddingReceiver
from .receive_record import Granted, ReceiveRecord
from .runtime import Runtime, ThreadRuntime
from .sink_calls import SinkCalls
from .sinks import Sink
from .unclosed_blocks import UnclosedBlocks

log = logging.getLogger(__name__)


class ReceiveManager(Manager[ReceiveRecord]):
    """Owns one pool of blocks and every transfer into it, for one language worker.

    Args:
        geometry: Layout, number of blocks and block size of the pool.
        transports: The transports by which the pool can be reached. The manager closes them.
        name: The name of this worker in the logs of encode workers.
        settings: Time-outs, retries and sizes.
        runtime: What the manager runs on; None: a thread of its own, and sockets that only dial.
        trust: As of :class:`~.send_manager.SendManager`.

    Attributes:
        buffers: The memory of the pool.
        allocator: Its blocks, for callers that allocate themselves.
        addresses: The address of the pool on every transport that works.

    Raises:
        TransportError: A transport cannot start here.
        LocalProtocolError: The geometry is out of bounds.
    """

    def __init__(
        self,
        geometry: Geometry,
        transports: Sequence[Transport],
        *,
        name: str = "language",
        settings: TransferSettings | None = None,
        runtime: Runtime | None = None,
        trust: Trust | None = None,
    ) -> None:
        control = partial(SocketControl, trust=trust)
        super().__init__(lambda: runtime or ThreadRuntime("embferry-receive", control), transports, settings)
        self.geometry, self.name = geometry, name
        self._records_by_session: dict[int, ReceiveRecord] = {}
        self._by_epoch: dict[int, tuple[ReceiveRecord, GuardedTransport]] = {}
        self._sink_calls = SinkCalls(self)
        self._buffers: MultimodalDataBuffers | None = None
        try:
            shared = any(transport.capabilities.maps_region for transport in transports)
            self.buffers = self._buffers = MultimodalDataBuffers(geometry, shared=shared)
            self.allocator = ReqToMetadataBlockAllocator(geometry.num_blocks, geometry.block_size)
            self._unclosed = UnclosedBlocks(self.allocator)
            self.admission = PoolAdmission(self.allocator)
            self.addresses = tuple(TransportAddress(t.name, t.register(self.buffers)) for t in self.transports.values())
            self._runtime.start(self.turn)
        except BaseException:
            self.close()
            raise

    def open(
        self,
        room: int,
        endpoint: str,
        sink: Sink | None = None,
        *,
        failover_timeout: float | None = None,
        max_tokens: int | None = None,
        name: str | None = None,
        offer_timeout: float | None = None,
    ) -> EmbeddingReceiver:
        """Opens the receiving end of ``room``, which the encode worker at ``endpoint`` serves. Call ``init()`` next.

        Args:
            room: The ``bootstrap_room``, 0 to 2**63 - 1.
            endpoint: The encode worker's :attr:`~.send_manager.SendManager.endpoint`.
            sink: Where the data goes; None gathers it into arrays. A sink serves one transfer.
            failover_timeout: Seconds for which :meth:`EmbeddingReceiver.redirect` may be called after a loss of the
                encode worker (:attr:`EmbeddingReceiver.lost`); None: the transfer then fails at once.
            max_tokens: The most tokens there is room for; a longer embedding is refused before memory is asked for.
            name: The name under which this end introduces itself; None: the manager's.
            offer_timeout: Seconds for which an encode worker that answers may take to open the room; None: the
                settings' ``bootstrap_timeout``, which also counts after a loss or :meth:`EmbeddingReceiver.redirect`.

        Raises:
            LocalProtocolError: An argument is malformed, or the manager is closed.
            TransportError: Every transport has failed.
        """
        name = self.name if name is None else name
        record = ReceiveRecord.checked(room, endpoint, sink, failover_timeout, max_tokens, name, offer_timeout)
        with self.lock:
            self.check()
        return EmbeddingReceiver(self, record)

    # Called by handles

    def check_allocation(self, record: ReceiveRecord, allocation: MetadataAllocation) -> None:
        """Raises LocalProtocolError if the room does not hold a caller's blocks, or they are in use. Lock held."""
        self.allocator.check_held(allocation, record.room)
        if any(not other.blocks().isdisjoint(allocation.blocks) for other in self._records()):
            raise LocalProtocolError("a transfer uses some of these blocks already", room=record.room)

    def begin(self, record: ReceiveRecord, allocation: MetadataAllocation | None) -> None:
        """Makes the state machine of a record, which asks for the embedding. The lock is held.

        Raises:
            LocalProtocolError: That was done before, or the manager is closed.
        """
        self.check()
        if record.failure is not None:
            raise record.failure.copied()
        if record.machine is not None:
            raise LocalProtocolError("init() is called once; open the room again instead", room=record.room)
        session, settings = secrets.randbits(62) + 1, (self.settings, self.now(), record.failover_timeout)
        record.machine = Receiver(
            *(record.room, session, self.geometry, record.name, self.addresses, *settings),
            max_tokens=record.max_tokens,
            offer_timeout=record.offer_timeout,
            kept=record.kept,
        )
        record.allocation = allocation
        self._records_by_session[session] = record
        if allocation is None:
            self.admission.register(record.machine)

    def machine_of(self, record: ReceiveRecord) -> Receiver:
        """Returns the state machine of a record.

        Raises:
            LocalProtocolError: The embedding has not been asked for.
        """
        if record.machine is None:
            raise LocalProtocolError("call init() first", room=record.room)
        return record.machine

    def grant(self, record: ReceiveRecord, allocation: MetadataAllocation) -> int:
        """Grants the caller's blocks. Blocks beyond what remains return to the pool at once. The lock is held.

        Returns:
            The number of tokens granted.

        Raises:
            LocalProtocolError: Nothing remains to be granted now.
        """
        machine, now = self.machine_of(record), self.now()
        wanted = machine.wanted(now)
        if wanted is None:
            raise LocalProtocolError("nothing remains to be granted now", room=record.room)
        needed = blocks_needed(wanted[1], allocation.block_size)
        self.allocator.free(allocation.blocks[needed:], record.room)
        fitting = MetadataAllocation(allocation.blocks[:needed], allocation.block_size)
        tokens = self.admission.grant(machine, fitting, now)
        self._granted(record, machine.ledger.next_epoch - 1)
        return tokens

    def consumed(self, record: ReceiveRecord, epoch: int, offset: int) -> None:
        """The blocks of a delivered chunk are no longer read. Any thread."""
        with self.lock:
            record.delivered.discard((epoch, offset))
            if record.machine is not None:
                self.guard(record, record.machine.consumed, epoch, offset)
        self.touch(record)

    def left(self, endpoint: str) -> None:
        """A transfer does not need an endpoint any more. The lock is held."""
        if all(record.endpoint != endpoint for record in self._records()):
            self._messages.forget(endpoint)

    # The driver thread

    def run_commands(self, record: ReceiveRecord, now: float) -> None:
        """Executes the commands of a machine. The lock is held."""
        machine = self.machine_of(record)
        while commands := machine.take_commands():
            for command in commands:
                match command:
                    case Send(body, target):
                        self.send(record.endpoint, machine.session, target, body)
                    case Admit():
                        self._admit(record, machine, command, now)
                    case CloseBlocks(epoch, blocks):
                        self._unclosed.close(self._by_epoch[epoch][1], epoch, blocks)
                    case Revoke(epoch):
                        self._by_epoch[epoch][1].revoke(epoch)
                    case Release(blocks):
                        self.admission.release(machine, self._unclosed.keep(blocks, record.room))
                    case Verify():
                        record.calls.append(command)
                    case Deliver(epoch, offset):
                        record.delivered.add((epoch, offset))
                        record.calls.append(command)
                    case Restart():
                        record.restarts += 1
                        record.delivered.clear()  # the machine has released their blocks
                        record.calls.append(command)

    def _advance(self, record: ReceiveRecord, now: float) -> None:
        machine = self.machine_of(record)
        if self.ready_queue.is_due(record, now):
            machine.expire(now)
        if record.allocation is not None and machine.wanted(now) is not None:
            allocation, record.allocation = record.allocation, None
            self.grant(record, allocation)
        self.run_commands(record, now)

    def _has_work(self, record: ReceiveRecord) -> bool:
        return record.has_calls or not record.is_sink_complete

    def _work(self, record: ReceiveRecord, now: float) -> None:
        self._sink_calls.make(record, now, alone=len(self._records_by_session) == 1)

    def _settle(self, record: ReceiveRecord, now: float) -> None:
        machine, state = self.machine_of(record), record.poll()
        if state is KVPoll.Success:
            record.log.completed(machine)
        self.admission.update(machine, now)
        self.admission.update_quarantine(machine)
        if machine.phase in TERMINAL:
            self.admission.unregister(machine)
            if record.allocation is not None:
                self.allocator.free(record.allocation.blocks, record.room)
                record.allocation = None
        if record.has_calls:
            if not record.is_preparing:
                self.ready_queue.touch(record)
        elif machine.settled(now) and state in ENDED:
            self._forget(record)
            return
        time = machine.next_timeout()
        self.ready_queue.schedule(record, now + self.settings.linger if time is None else time)

    def _serve_waiting(self, now: float) -> list[ReceiveRecord]:
        self._unclosed.free()
        records = []
        for machine, epoch in self.admission.allocate(now, self._could_not_grant):
            record = self._records_by_session[machine.session]
            self.guard(record, self._granted, record, epoch)
            records.append(record)
        return records

    def _could_not_grant(self, machine: Receiver, error: Exception) -> None:
        if not (record := self._records_by_session[machine.session]).is_broken:
            self._broke(record, error)

    def _take(self, peer: Hashable, frame: Frame, now: float) -> bool:
        if (record := self._records_by_session.get(frame.target)) is None or record.room != frame.body.room:
            return False
        record.source = frame.source or record.source
        if record.is_broken:
            self.refuse(record, record.endpoint, frame.target, frame)
        else:
            self.guard(record, self.machine_of(record).receive, frame.source, frame.target, frame.body, now)
            if isinstance(frame.body, Offer):  # so that blocks are granted before the record is advanced
                self.guard(record, self.admission.update, self.machine_of(record), now)
            self.ready_queue.touch(record)
        return True

    def _unreachable(self, event: Unreachable, now: float) -> None:
        for record in self._records():
            if record.endpoint == event.peer:
                self.guard(record, self.machine_of(record).peer_unreachable, event.error, now)
                self.ready_queue.touch(record)

    def _transport_event(self, event: Event) -> None:
        if not isinstance(event, Receiving | Revoked) or (entry := self._by_epoch.get(event.epoch)) is None:
            return
        record = entry[0]
        if isinstance(event, Receiving):
            self.guard(record, self.machine_of(record).receiving, event.epoch, self.now())
        elif record.is_broken:
            (record.revoking or set()).discard(event.epoch)
        else:
            self.guard(record, self.machine_of(record).revoked, event.epoch)
        self.ready_queue.touch(record)

    def _transport_lost(self, transport: GuardedTransport, now: float) -> None:
        self.addresses = tuple(address for address in self.addresses if address.name != transport.name)
        for record in self._records():
            self.guard(record, self.machine_of(record).transport_lost, transport.name, transport.lost, now)
            self.ready_queue.touch(record)

    def _admit(self, record: ReceiveRecord, machine: Receiver, command: Admit, now: float) -> None:
        transport = self.transports[command.transport]
        self._by_epoch[command.epoch] = (record, transport)
        record.epochs.append(command.epoch)
        if transport.lost is not None:
            return  # the machine is about to be told, and asks for another transport
        caught = attempt(transport.connect_to_sender, command.address)
        caught = caught or attempt(transport.admit, Window(command.epoch, command.blocks))
        if isinstance(caught, LocalProtocolError):
            raise caught  # the window was impossible: a bug here
        if caught is not None:
            error = as_transfer_error(f"admit of the {transport.name} transport", caught, record.room)
            text, extra = "room %d: %s is of no use to this transfer: %s", {"room": record.room}
            log.warning(text, record.room, transport.name, error, extra=extra)
            machine.transport_lost(transport.name, error, now)  # which revokes the epoch

    def _granted(self, record: ReceiveRecord, epoch: int) -> None:
        """Takes note of the grant that the machine has just made."""
        grant = self.machine_of(record).ledger.grants[epoch]
        record.latest = MetadataAllocation(grant.blocks, grant.block_size)
        record.calls.append(Granted(grant.epoch, grant.start, grant.blocks))
        record.log.granted(self.machine_of(record), grant.start, grant.tokens, len(grant.blocks))

    def _forget(self, record: ReceiveRecord) -> None:
        self._records_by_session.pop(self.machine_of(record).session, None)
        for epoch in record.epochs:
            self._by_epoch.pop(epoch, None)
        self.forget(record)
        self.left(record.endpoint)

    # Ends

    def _records(self) -> list[ReceiveRecord]:
        return list(self._records_by_session.values())

    def _abort(self, record: ReceiveRecord, error: EmbeddingTransferError) -> None:
        self.machine_of(record).abort(error, self.now())

    def _shutting_down(self) -> EmbeddingTransferError:
        return Aborted("the language worker is shutting down", retryable=True)

    def _tear_down(self, record: ReceiveRecord, now: float) -> None:
        machine = self.machine_of(record)
        if (is_unheard := not (machine.peer or record.source)) or record.revoking is None:
            self._tell_peer(record)
        if record.revoking is None:  # the first time
            record.revoking = {epoch for epoch in record.epochs if epoch in self._by_epoch}
            record.discard_calls()
            record.verification = None
            self.admission.unregister(machine)
            for epoch in list(record.revoking):
                self._by_epoch[epoch][1].revoke(epoch)
        if record.revoking or record.delivered or record.is_preparing:
            return
        if not record.kept_until:  # once: later the room may have been opened again
            others = self._blocks_of_others(record, now)
            self.admission.release(machine, tuple(set(self.allocator.holders().get(record.room, ())) - others))
        if not self.lingers(record, now):
            self._forget(record)
        elif is_unheard:
            self.ready_queue.schedule(record, min(record.kept_until, now + self.settings.retry_limit))

    def _tell_peer(self, record: ReceiveRecord) -> None:
        """Tells the peer of a broken record why it has ended, also if it was never heard."""
        machine = self.machine_of(record)
        if record.failure is not None:
            body = Abort.because_of(record.failure, record.room)
            self.send(record.endpoint, machine.session, machine.peer or record.source, body)

    def _blocks_of_others(self, record: ReceiveRecord, now: float) -> set[int]:
        """Returns the blocks of other transfers of the same room, which has been opened again."""
        found: set[int] = set()
        for other in self._records():
            if other.room == record.room and other is not record and not other.kept_until:
                self.guard(other, self.run_commands, other, now)  # what it releases is free, not its own
                found |= other.blocks()
        return found | {block for block in self.allocator.holders().get(record.room, ()) if block in self._unclosed}

    def _finish(self, record: ReceiveRecord) -> None:
        if record.poll() not in ENDED:
            record.failure = self._shutting_down()

    def _release(self) -> None:
        if self._buffers is None:
            return
        if all(transport.is_closed for transport in self.transports.values()):
            self._buffers.close()
        else:
            log.critical("the region stays mapped: a transport that could not be closed may still write into it")
