"""The encode side's manager and senders: executes what the sender machines command."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import zmq

from ..base.conn_multimodal import KVPoll, LinkLost, Revoked, Transport, Written
from ..buffers import source_pieces
from ..protocol.commands import Connect, ReleaseSource, Send, Write
from ..protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError, TransportError
from ..protocol.layout import Layout
from ..protocol.messages import Frame, Open, Road, Unknown
from ..protocol.sender import Sender
from ..protocol.settings import TransferSettings
from .checksums import Checksums, chunk_checksum
from .pump import Pump, bind
from .rows import Rows

log = logging.getLogger(__name__)

MAX_PARKED = 4096  # openings for rooms that are not here yet


@dataclass(slots=True)
class _Writing:
    sender: EmbeddingSender
    command: Write
    checksum: bytes | None


class EmbeddingSendManager(Pump):
    """Serves every room of one encode worker.

    :param layout: what a token of this worker's embeddings is made of.
    :param transports: roads this worker can write over, the preferred one first; owned and closed by the manager.
    :param host: the address to listen on; ``advertise`` is what others are told, if it differs.
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
    ) -> None:
        layout.validate()
        super().__init__("embferry-send")
        self.layout = layout
        self.settings = settings or TransferSettings()
        self.transports = {transport.name: transport for transport in transports}
        for transport in transports:
            transport.wake = self.wake
        self._router = self.socket(zmq.ROUTER)
        endpoint = bind(self._router, host, port)
        self.endpoint = f"tcp://{advertise}:{endpoint.rpartition(':')[2]}" if advertise else endpoint
        self._rooms: dict[int, EmbeddingSender] = {}
        self._parked: OrderedDict[int, tuple[object, Frame]] = OrderedDict()
        self._writing: dict[int, _Writing] = {}
        self._next_ticket = 1
        self.start()

    def open(self, room: int) -> EmbeddingSender:
        """The sending end of ``room``; a receiver may have asked for it already.

        :raises LocalProtocolError: the room is in use; rooms are drawn at random and used once.
        """
        with self.lock:
            self.check()
            if room in self._rooms:
                raise LocalProtocolError("the room is in use; draw another", room=room)
            roads = tuple(Road(transport.name, transport.address) for transport in self.transports.values())
            machine = Sender(room, secrets.randbits(62) + 1, self.layout, roads, self.settings, self.now())
            sender = self._rooms[room] = EmbeddingSender(self, machine)
            parked = self._parked.pop(room, None)
            if parked is not None:
                self.take(*parked, self.now())
        self.wake()
        return sender

    def close(self) -> None:
        """Aborts what is open, waits until no write reads from anybody's memory, and frees everything."""
        with self.lock:
            for sender in self._rooms.values():
                sender.machine.abort(Aborted("the encode worker is shutting down", retryable=True), self.now())
        self.wake()
        with ExitStack() as closing:  # each is closed, whatever another one raises
            closing.callback(self._ended)
            for transport in self.transports.values():
                closing.callback(transport.close)

    def _ended(self) -> None:
        self.stop()
        with self.lock:
            self.advance(self.now())  # takes the last writes in
            for sender in self._rooms.values():
                sender.release()

    # The pump's side

    def collapsed(self) -> None:
        for sender in self._rooms.values():
            sender.notify(force=True)

    def take(self, peer: object, frame: Frame, now: float) -> None:
        sender = self._rooms.get(frame.body.room)
        if sender is not None:
            sender.peers[frame.source] = peer
            sender.machine.receive(frame.source, frame.target, frame.body, now)
            self._execute(sender)
            if frame.source not in sender.machine.destinations:
                del sender.peers[frame.source]  # answered, and not believed: nothing is kept of it
        elif isinstance(frame.body, Open):
            self._parked[frame.body.room] = (peer, frame)
            self._parked.move_to_end(frame.body.room)
            if len(self._parked) > MAX_PARKED:
                self._parked.popitem(last=False)
        else:
            self.send(peer, 0, frame.source, Unknown(frame.body.room, frame.target))

    def advance(self, now: float) -> float | None:
        for transport in self.transports.values():
            for event in transport.poll():
                self._happened(event)
        due: list[float] = []
        for sender in list(self._rooms.values()):
            sender.machine.expire(now)
            self._execute(sender)
            if sender.machine.settled(now):
                del self._rooms[sender.room]
                continue
            timeout = sender.machine.next_timeout()
            due.append(now + self.settings.linger if timeout is None else timeout)
        return min(due, default=None)

    def _happened(self, event: Written | Revoked | LinkLost) -> None:
        if isinstance(event, LinkLost):
            log.info("a data connection ended: %s", event.error)
        if not isinstance(event, Written):
            return
        writing = self._writing.pop(event.ticket)
        c = writing.command
        machine = writing.sender.machine
        if event.error is None:
            machine.write_done(c.target, c.epoch, c.offset, c.length, writing.checksum)
        else:
            log.warning(
                "room %d: tokens [%d, %d) not written: %s", machine.room, c.offset, c.offset + c.length, event.error
            )
            machine.write_failed(c.target, c.epoch, c.offset, c.length, event.error)

    def _execute(self, sender: EmbeddingSender) -> None:
        while commands := sender.machine.take_commands():
            for command in commands:
                match command:
                    case Send(body, target):
                        peer = sender.peers.get(target)
                        if peer is not None:
                            self.send(peer, sender.machine.session, target, body)
                    case Write():
                        self._write(sender, command)
                    case Connect(target, road):
                        self._connect(sender, target, road)
                    case ReleaseSource():
                        sender.release()
        sender.notify()

    def _connect(self, sender: EmbeddingSender, target: int, road: Road) -> None:
        """Ahead of the first write, which then does not wait for it."""
        try:
            self.transports[road.transport].connect(road.handle)
        except TransportError as error:
            log.info("room %d: %s does not lead there: %s", sender.room, road.transport, error)
            if not error.retryable:
                sender.machine.road_failed(target, road.transport)

    def _write(self, sender: EmbeddingSender, command: Write) -> None:
        geometry, road = sender.machine.destinations[command.target].opened.geometry, command.road
        transport = self.transports[road.transport]
        pieces = source_pieces(geometry, sender.rows, command.offset, command.length, command.blocks, 0)
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        try:
            transport.connect(road.handle)
        except TransportError as error:
            sender.machine.write_failed(command.target, command.epoch, command.offset, command.length, error)
            return
        transport.write(road.handle, command.epoch, command.blocks, pieces, ticket)
        self._writing[ticket] = _Writing(sender, command, self._checksum(sender, command))  # while it is being written
        sender.sent_bytes += command.length * self.layout.token_bytes

    def _checksum(self, sender: EmbeddingSender, command: Write) -> bytes | None:
        if not command.checksum:
            return None
        known = sender.checksums.of(command.offset, command.length) if sender.checksums else None
        return known or chunk_checksum(self.layout, sender.rows, command.offset, command.length)

    def _sockets(self) -> list[zmq.Socket[bytes]]:
        return [self._router]

    def _receive_from(self, socket: zmq.Socket[bytes]) -> tuple[object, bytes]:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        return frames[0], frames[-1] if len(frames) == 2 else b""

    def _send_to(self, peer: object, data: bytes) -> None:
        if isinstance(peer, bytes):
            self._router.send_multipart([peer, data], zmq.NOBLOCK)


class EmbeddingSender:
    """The sending end of one room. Made by :meth:`EmbeddingSendManager.open`. Every method returns at once."""

    def __init__(self, manager: EmbeddingSendManager, machine: Sender) -> None:
        self.manager = manager
        self.machine = machine
        self.room = machine.room
        self.peers: dict[int, object] = {}
        self.rows: Rows = {}
        self.checksums: Checksums | None = None
        self.sent_bytes = 0
        self._on_change: list[Callable[[], object]] = []
        self._reported = (KVPoll.Bootstrapping, False)

    def init(self, total_tokens: int, content_digest: bytes, aux: tuple[int, ...] = ()) -> None:
        """Announces the length and the content, as soon as they are known: before the encoder runs.

        :param content_digest: 1 to 64 bytes; equal digests promise equal bytes.
        :param aux: up to 16 int32 for the language side's ``aux_datas``.
        """
        if not 1 <= len(content_digest) <= 64:
            raise LocalProtocolError("a content digest has 1 to 64 bytes", room=self.room)
        with self.manager.lock:
            self.machine.announce(total_tokens, content_digest, aux)
        self.manager.wake()

    def send_embedding(
        self, rows: Rows, ready_tokens: int | None = None, *, checksums: Checksums | None = None
    ) -> None:
        """The embedding itself, read in place: do not change it before ``source_released``.

        :param rows: every field of the layout, uint8 [total_tokens, bytes a token]; rows contiguous.
        :param ready_tokens: how many are produced so far (all, if None); call again with the same arrays for more.
        :param checksums: of these rows, as far as they have been taken already; the rest are taken as chunks leave.
        :raises LocalProtocolError: an array is missing or does not fit what was announced.
        """
        with self.manager.lock:
            total = self.machine.total_tokens
            for field in self.manager.layout.fields:
                array = rows.get(field.name)
                if array is None or array.shape != (total, field.token_bytes) or array.dtype != np.uint8:
                    have = "missing" if array is None else f"{array.dtype} {array.shape}"
                    need = f"uint8 ({total}, {field.token_bytes})"
                    raise LocalProtocolError(f"field {field.name} is {have}, announced was {need}", room=self.room)
                if not array.flags.c_contiguous:
                    raise LocalProtocolError(f"field {field.name} is not contiguous", room=self.room)
            if not self.machine.source_released:
                self.rows, self.checksums = rows, checksums or self.checksums
                self.machine.produce(total if ready_tokens is None else ready_tokens)
        self.manager.wake()

    def poll(self) -> KVPoll:
        """Where the transfer stands."""
        with self.manager.lock:
            self.manager.check()
            return self.machine.poll()

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer; the receiver is told why. Does nothing when it has ended already."""
        with self.manager.lock:
            self.machine.abort(error or Aborted("aborted by the encode side", room=self.room), self.manager.now())
        self.manager.wake()

    def clear(self) -> None:
        """The caller is through with it. The room goes when nobody can ask for it any more."""
        self.abort()

    def failure_exception(self) -> EmbeddingTransferError:
        """Why it failed.

        :raises LocalProtocolError: it has not failed.
        """
        with self.manager.lock:
            if self.machine.error is None:
                raise LocalProtocolError(f"the transfer has not failed: {self.machine.phase.value}", room=self.room)
            return self.machine.error

    @property
    def source_released(self) -> bool:
        """Whether the arrays given to :meth:`send_embedding` are no longer read from."""
        return self.machine.source_released

    def on_change(self, callback: Callable[[], object]) -> None:
        """``callback`` is called, from the manager's thread, when ``poll()`` or ``source_released`` has changed."""
        self._on_change.append(callback)

    def notify(self, *, force: bool = False) -> None:
        state = (self.machine.poll(), self.machine.source_released)
        if force or state != self._reported:
            self._reported = state
            for callback in self._on_change:
                callback()

    def release(self) -> None:
        self.rows, self.checksums = {}, None
