"""The language side's manager: executes the commands of the receiver machines."""

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
"""Steps of a verification before the next transfer's turn: 4 MiB, or the whole chunk if there is no other transfer."""
MAX_PEERS = 32
"""Control connections kept to encode workers, unless more are in use."""


class ReceiveManager(Driver):
    """Owns one pool of blocks and every transfer into it, for one language worker.

    Args:
        geometry: Layout, number of blocks and block size of the pool.
        transports: The transports by which the pool can be reached. The manager closes them.
        name: The name of this worker in the logs of encode workers.
        settings: Time-outs, retries and sizes.

    Attributes:
        buffers: The memory of the pool.
        allocator: Its blocks, for callers that allocate themselves.
        addresses: The address of the pool on every transport.
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
        """Opens the receiving end of ``room``, which the encode worker at ``endpoint`` serves. Call ``init()`` next.

        Args:
            room: The ``bootstrap_room``.
            endpoint: The encode worker's :attr:`~.send_manager.SendManager.endpoint`.
            sink: Where the data goes; None gathers it into arrays.
            failover_timeout: Seconds for which :meth:`EmbeddingReceiver.redirect` may be called after the encode
                worker was lost (:attr:`EmbeddingReceiver.lost`); None: the transfer then fails at once.

        Raises:
            LocalProtocolError: ``endpoint`` is malformed, or the manager is closed.
        """
        with self.lock:
            self.check()
            return EmbeddingReceiver(self, room, check_endpoint(endpoint), sink or GatherSink(), failover_timeout)

    def close(self) -> None:
        """Aborts open transfers, closes the transports and frees the pool. No byte is written to it afterwards."""
        with self.lock:
            for receiver in self._receivers.values():
                receiver.machine.abort(Aborted("the language worker is shutting down", retryable=True), self.now())
                self.ready_queue.touch(receiver)
            self.advance(self.now())
        self.stop()
        with ExitStack() as closing:  # each is closed, even if another one raises
            closing.callback(self.buffers.close)
            for transport in self.transports.values():
                closing.callback(transport.close)

    def collapsed(self) -> None:
        for receiver in self._receivers.values():
            receiver.notify(force=True)

    def touch(self, receiver: EmbeddingReceiver) -> None:
        """Queues the receiver to be processed by the driver thread. Any thread."""
        with self.lock:
            self.ready_queue.touch(receiver)
        self.wake()

    def begin(self, receiver: EmbeddingReceiver) -> Receiver:
        """Makes and registers the state machine of a receiver. The lock is held."""
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

    # Called by the driver thread

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
            if receiver.machine.session in self._receivers:  # otherwise it has ended, and was touched once more
                receiver.machine.expire(now)
                self._execute(receiver, now)
        while served := self.admission.allocate(now):
            for machine, epoch in served:
                receiver = self._receivers[machine.session]
                receiver.granted(epoch)
                self._execute(receiver, now)
        return self.ready_queue.next() if self.ready_queue.is_clear else now

    def _execute(self, receiver: EmbeddingReceiver, now: float) -> None:
        machine = receiver.machine
        self._run_commands(receiver)
        if receiver.checks:
            self._verify(receiver, now)
            self._run_commands(receiver)
            self.ready_queue.touch(receiver)
        self.admission.update(machine, now)
        self.admission.update_quarantine(machine)
        if machine.phase in TERMINAL:
            self.admission.unregister(machine)
        receiver.notify()
        if machine.settled(now):
            self._forget(receiver)
        else:
            time = machine.next_timeout()
            self.ready_queue.schedule(receiver, now + self.settings.linger if time is None else time)

    def _verify(self, receiver: EmbeddingReceiver, now: float) -> None:
        """Verifies a chunk, or a part of it, then yields to other transfers and their messages."""
        check = receiver.checks[0]
        if receiver.verification is None:
            receiver.verification = receiver.sink.verify(check, receiver.machine.total_tokens)
        passes = PASSES_A_TURN if len(self._receivers) > 1 else MAX_PASSES
        try:
            for _ in range(passes):
                next(receiver.verification)
        except StopIteration as end:
            receiver.checks.popleft()
            receiver.verification = None
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
            self._drop_unused_peers()
            socket = self._peers[endpoint] = self.socket(zmq.DEALER)
            socket.connect(endpoint)
        socket.send(data, zmq.NOBLOCK)

    def _drop_unused_peers(self) -> None:
        """Closes the oldest unused connections: ZeroMQ would try to reach an ended worker for ever."""
        needed = {receiver.endpoint for receiver in list(self._receivers.values())}
        spare = [endpoint for endpoint in self._peers if endpoint not in needed]
        for endpoint in spare[: max(0, len(self._peers) + 1 - MAX_PEERS)]:
            self.drop_socket(self._peers.pop(endpoint))
