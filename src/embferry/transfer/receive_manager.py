"""The language side's manager: executes what the receiver machines command."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from contextlib import ExitStack

import zmq

from embferry.memory.admission import PoolAdmission
from embferry.memory.blocks import ReqToMetadataBlockAllocator
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.commands import Admit, CloseBlocks, Deliver, Release, Restart, Revoke, Send, Verify
from embferry.protocol.errors import Aborted, TransportError
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import Frame, TransportAddress
from embferry.protocol.receiver import Receiver
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import TERMINAL
from embferry.transports.contract import LinkLost, Revoked, Transport, Window

from .driver import Driver, check_endpoint
from .ready_queue import ReadyQueue
from .receive_handle import EmbeddingReceiver
from .sinks import GatherSink, Sink

log = logging.getLogger(__name__)

PASSES_A_TURN, MAX_PASSES = 4, 1 << 20
"""How far a chunk is examined before the next one's turn: 4 MiB, or to its end where there is nobody else."""
MAX_PEERS = 32
"""Encode workers that connections are kept to, beyond those that are in use."""


class ReceiveManager(Driver):
    """Owns one pool of blocks and every transfer into it, for one language worker.

    :param geometry: layout, number of blocks and block size of the pool.
    :param transports: transports by which the pool can be reached; owned and closed by the manager.
    :param name: what logs of the other side call this worker.
    """

    def __init__(
        self,
        geometry: Geometry,
        transports: Sequence[Transport],
        *,
        name: str = "language",
        settings: TransferSettings | None = None,
    ) -> None:
        super().__init__("embferry-receive")
        self.geometry = geometry
        self.name = name
        self.settings = settings or TransferSettings()
        self.buffers = MultimodalDataBuffers(geometry, shared=any(t.capabilities.maps_region for t in transports))
        self.allocator = ReqToMetadataBlockAllocator(geometry.num_blocks, geometry.block_size)
        self.admission = PoolAdmission(self.allocator)
        self.ready_queue: ReadyQueue[EmbeddingReceiver] = ReadyQueue()
        self.transports = {transport.name: transport for transport in transports}
        for transport in transports:
            transport.wake = self.wake
        self.addresses = tuple(TransportAddress(t.name, t.register(self.buffers)) for t in transports)
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._receivers: dict[int, EmbeddingReceiver] = {}  # by session
        self._by_epoch: dict[int, tuple[EmbeddingReceiver, Transport]] = {}
        self.start()

    def open(
        self, room: int, endpoint: str, sink: Sink | None = None, *, failover_timeout: float | None = None
    ) -> EmbeddingReceiver:
        """The receiving end of ``room``, which the encode worker at ``endpoint`` serves. Call its ``init()`` next.

        :param sink: where the data goes; gathered into arrays if None.
        :param failover_timeout: seconds for which :meth:`EmbeddingReceiver.redirect` may be called after the encode
            worker was lost (:attr:`EmbeddingReceiver.lost`); if None, the transfer then fails at once.
        """
        with self.lock:
            self.check()
            return EmbeddingReceiver(self, room, check_endpoint(endpoint), sink or GatherSink(), failover_timeout)

    def close(self) -> None:
        """Aborts what is open, closes the transports, frees the pool. No byte lands in it afterwards."""
        with self.lock:
            for receiver in self._receivers.values():
                receiver.machine.abort(Aborted("the language worker is shutting down", retryable=True), self.now())
                self.ready_queue.touch(receiver)
            self.advance(self.now())
        self.stop()
        with ExitStack() as closing:  # each is closed, whatever another one raises
            closing.callback(self.buffers.close)
            for transport in self.transports.values():
                closing.callback(transport.close)

    def collapsed(self) -> None:
        for receiver in self._receivers.values():
            receiver.notify(force=True)

    def touch(self, receiver: EmbeddingReceiver) -> None:
        """Something has happened to it: its turn is now. Any thread."""
        with self.lock:
            self.ready_queue.touch(receiver)
        self.wake()

    def begin(self, receiver: EmbeddingReceiver) -> Receiver:
        """Makes and enters the machine of a receiver that begins."""
        session = secrets.randbits(62) + 1
        machine = Receiver(
            receiver.room,
            session,
            self.geometry,
            self.name,
            self.addresses,
            self.settings,
            self.now(),
            receiver.failover_timeout,
        )
        self._receivers[session] = receiver
        return machine

    # The driver's side

    def take(self, peer: object, frame: Frame, now: float) -> None:
        receiver = self._receivers.get(frame.target)
        if receiver is not None and receiver.room == frame.body.room:
            receiver.machine.receive(frame.source, frame.target, frame.body, now)
            self.ready_queue.touch(receiver)

    def advance(self, now: float) -> float | None:
        for transport in self.transports.values():
            for event in transport.poll():
                if isinstance(event, Revoked):
                    entry = self._by_epoch.get(event.epoch)
                    if entry is not None:
                        entry[0].machine.revoked(event.epoch)
                        self.ready_queue.touch(entry[0])
                elif isinstance(event, LinkLost):
                    log.info("a data connection ended: %s", event.error)
        for receiver in self.ready_queue.due(now):
            if receiver.machine.session in self._receivers:  # else it is over, and was touched once more
                receiver.machine.expire(now)
                self._execute(receiver, now)
        while served := self.admission.deal(now):
            for machine, epoch in served:
                receiver = self._receivers[machine.session]
                receiver.granted(epoch)
                self._execute(receiver, now)
        return self.ready_queue.next() if self.ready_queue.is_clear else now

    def _execute(self, receiver: EmbeddingReceiver, now: float) -> None:
        machine = receiver.machine
        self._run_commands(receiver)
        if receiver.checks:
            self._examine(receiver, now)
            self._run_commands(receiver)
            self.ready_queue.touch(receiver)
        self.admission.note(machine, now)
        self.admission.note_quarantine(machine)
        if machine.phase in TERMINAL:
            self.admission.leave(machine)
        receiver.notify()
        if machine.settled(now):
            self._forget(receiver)
        else:
            time = machine.next_timeout()
            self.ready_queue.schedule(receiver, now + self.settings.linger if time is None else time)

    def _examine(self, receiver: EmbeddingReceiver, now: float) -> None:
        """One chunk a turn, or a part of one: others, and what is said to them, have their turns in between."""
        check = receiver.checks[0]
        if receiver.examination is None:
            receiver.examination = receiver.sink.examine(check, receiver.machine.total_tokens)
        passes = PASSES_A_TURN if len(self._receivers) > 1 else MAX_PASSES
        try:
            for _ in range(passes):
                next(receiver.examination)
        except StopIteration as end:
            receiver.checks.popleft()
            receiver.examination = None
            receiver.examined_tokens += check.length
            receiver.machine.verified_chunk(check.epoch, check.offset, matches=bool(end.value), now=now)

    def _run_commands(self, receiver: EmbeddingReceiver) -> None:
        machine = receiver.machine
        while commands := machine.take_commands():
            for command in commands:
                match command:
                    case Send(body, target):
                        self.send(receiver.endpoint, machine.session, target, body)
                    case Admit():
                        self._admit(receiver, command)
                    case CloseBlocks(epoch, blocks):
                        self._by_epoch[epoch][1].close_blocks(epoch, blocks)
                    case Revoke(epoch):
                        self._by_epoch[epoch][1].revoke(epoch)
                    case Verify():
                        receiver.checks.append(command)
                    case Deliver():
                        receiver.deliver(command)
                    case Release(blocks):
                        self.admission.release(machine, blocks)
                    case Restart():
                        receiver.sink.restart()

    def _admit(self, receiver: EmbeddingReceiver, command: Admit) -> None:
        transport = self.transports[command.transport]
        self._by_epoch[command.epoch] = (receiver, transport)
        receiver.epochs.append(command.epoch)
        try:
            transport.connect_to_sender(command.address)
        except TransportError as error:
            receiver.machine.abort(error, self.now())
        transport.admit(Window(command.epoch, command.blocks))

    def _forget(self, receiver: EmbeddingReceiver) -> None:
        del self._receivers[receiver.machine.session]
        for epoch in receiver.epochs:
            del self._by_epoch[epoch]
        self.ready_queue.forget(receiver)

    def _sockets(self) -> list[zmq.Socket[bytes]]:
        return list(self._peers.values())

    def _receive_from(self, socket: zmq.Socket[bytes]) -> tuple[object, bytes]:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        return socket, frames[0] if len(frames) == 1 else b""

    def _send_to(self, peer: object, data: bytes) -> None:
        endpoint = str(peer)
        socket = self._peers.get(endpoint)
        if socket is None:
            self._leave_peers()
            socket = self._peers[endpoint] = self.socket(zmq.DEALER)
            socket.connect(endpoint)
        socket.send(data, zmq.NOBLOCK)

    def _leave_peers(self) -> None:
        """The oldest that nobody needs: one that has ended would be called for ever."""
        needed = {receiver.endpoint for receiver in list(self._receivers.values())}
        spare = [endpoint for endpoint in self._peers if endpoint not in needed]
        for endpoint in spare[: max(0, len(self._peers) + 1 - MAX_PEERS)]:
            self.drop_socket(self._peers.pop(endpoint))
