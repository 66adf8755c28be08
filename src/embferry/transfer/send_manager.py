"""The encode side's manager: executes the commands of the sender machines."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack

import zmq

from embferry.protocol.commands import Connect, ReleaseSource, Send, Write
from embferry.protocol.errors import Aborted, LocalProtocolError
from embferry.protocol.layout import Layout
from embferry.protocol.messages import Frame, Open, Pending, Unknown
from embferry.protocol.sender import Sender
from embferry.protocol.settings import TransferSettings
from embferry.transports.contract import Transport

from .driver import Driver, bind
from .ready_queue import ReadyQueue
from .send_handle import EmbeddingSender
from .staging import Allocate, pageable
from .writer import Writer

log = logging.getLogger(__name__)

MAX_PARKED = 4096
"""``open`` messages kept for rooms that are not open here yet."""


class SendManager(Driver):
    """Serves every room of one encode worker.

    Args:
        layout: The fields of a token of this worker's embeddings.
        transports: The transports this worker can write over, the preferred one first. The manager closes them.
        host: The IP address to listen on for control messages.
        port: The TCP port to listen on; 0 for any free one.
        advertise: The address that receivers connect to, if it differs from ``host``.
        settings: Time-outs, retries and sizes.
        allocate: Makes the host buffers that embeddings in device memory pass through; pinned ones are fastest.

    Attributes:
        endpoint: The address of this manager for control messages: ``tcp://host:port``.

    Raises:
        TransportError: The port cannot be bound.
        LayoutMismatch: The layout is out of bounds.
    """

    def __init__(
        self,
        layout: Layout,
        transports: Sequence[Transport],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        settings: TransferSettings | None = None,
        allocate: Allocate = pageable,
    ) -> None:
        layout.validate()
        super().__init__("embferry-send")
        self.layout = layout
        self.settings = settings or TransferSettings()
        self.writer = Writer(layout, transports, self.settings, self.wake, allocate)
        self._router = self.socket(zmq.ROUTER)
        endpoint = bind(self._router, host, port)
        self.endpoint = f"tcp://{advertise}:{endpoint.rpartition(':')[2]}" if advertise else endpoint
        self._rooms: dict[int, EmbeddingSender] = {}
        self.ready_queue: ReadyQueue[EmbeddingSender] = ReadyQueue()
        self._parked: OrderedDict[int, tuple[object, Frame]] = OrderedDict()
        self.start()

    def open(self, room: int) -> EmbeddingSender:
        """Opens the sending end of ``room``. A receiver may have asked for it already.

        Draw rooms at random. A room whose transfer has ended may be opened again, for a receiver that still waits.

        Raises:
            LocalProtocolError: The room is in use, or the manager is closed.
        """
        with self.lock:
            self.check()
            last = self._rooms.get(room)
            if last is not None:
                self._run_commands(last)
                if not last.source_released:
                    raise LocalProtocolError("the room is in use; draw another", room=room)
                last.notify()
                self.ready_queue.forget(last)
            machine = Sender(
                room, secrets.randbits(62) + 1, self.layout, self.writer.addresses, self.settings, self.now()
            )
            sender = self._rooms[room] = EmbeddingSender(self, machine)
            parked = self._parked.pop(room, None)
            if parked is not None:
                self.take(*parked, self.now())
        self.touch(sender)
        return sender

    def close(self) -> None:
        """Aborts open transfers, waits until no write reads from an embedding, and frees everything."""
        with self.lock:
            for sender in self._rooms.values():
                sender.machine.abort(Aborted("the encode worker is shutting down", retryable=True), self.now())
                self.ready_queue.touch(sender)
        self.wake()
        with ExitStack() as closing:  # each is closed, even if another one raises
            closing.callback(self._ended)
            closing.callback(self.writer.close)

    def _ended(self) -> None:
        self.stop()
        with self.lock:
            self.advance(self.now())  # handles the last completed writes
            for sender in self._rooms.values():
                sender.release()

    # Called by the driver thread

    def collapsed(self) -> None:
        for sender in self._rooms.values():
            sender.notify(force=True)

    def take(self, peer: object, frame: Frame, now: float) -> None:
        sender = self._rooms.get(frame.body.room)
        if sender is not None:
            sender.peers[frame.source] = peer
            sender.machine.receive(frame.source, frame.target, frame.body, now)
            self.ready_queue.touch(sender)
        elif isinstance(frame.body, Open):
            self._parked[frame.body.room] = (peer, frame)
            self._parked.move_to_end(frame.body.room)
            if len(self._parked) > MAX_PARKED:
                self._parked.popitem(last=False)
            self.send(peer, 0, frame.source, Pending(frame.body.room, 0))
        else:
            self.send(peer, 0, frame.source, Unknown(frame.body.room, frame.target))

    def advance(self, now: float) -> float | None:
        for sender in self.writer.advance():
            self.ready_queue.touch(sender)
        for sender in self.ready_queue.due(now):
            if self._rooms.get(sender.room) is sender:  # otherwise it has ended, and was touched once more
                sender.machine.expire(now)
                self._execute(sender, now)
        return self.ready_queue.next() if self.ready_queue.is_clear else now

    def begin(self, sender: EmbeddingSender) -> None:
        """Starts the writes of newly ready tokens on the caller's thread, which saves waking another."""
        self._run_commands(sender)
        for changed in self.writer.advance():
            self.ready_queue.touch(changed)
        self.touch(sender)

    def _execute(self, sender: EmbeddingSender, now: float) -> None:
        self._run_commands(sender)
        for session in [session for session in sender.peers if session not in sender.machine.destinations]:
            del sender.peers[session]  # it was refused: nothing is kept of it
        sender.notify()
        if sender.machine.settled(now):
            del self._rooms[sender.room]
            self.ready_queue.forget(sender)
        else:
            time = sender.machine.next_timeout()
            self.ready_queue.schedule(sender, now + self.settings.linger if time is None else time)

    def _run_commands(self, sender: EmbeddingSender) -> None:
        while commands := sender.machine.take_commands():
            for command in commands:
                match command:
                    case Send(body, target):
                        peer = sender.peers.get(target)
                        if peer is not None:
                            self.send(peer, sender.machine.session, target, body)
                    case Write():
                        self.writer.write(sender, command)
                    case Connect(target, transport):
                        self.writer.connect(sender, target, transport)
                    case ReleaseSource():
                        sender.release()

    def touch(self, sender: EmbeddingSender) -> None:
        """Queues the sender to be processed by the driver thread. Any thread."""
        with self.lock:
            self.ready_queue.touch(sender)
        self.wake()

    def _sockets(self) -> list[zmq.Socket[bytes]]:
        return [self._router]

    def _receive_from(self, socket: zmq.Socket[bytes]) -> tuple[object, bytes]:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        return frames[0], frames[-1] if len(frames) == 2 else b""

    def _send_to(self, peer: object, data: bytes) -> None:
        if isinstance(peer, bytes):
            self._router.send_multipart([peer, data], zmq.NOBLOCK)
