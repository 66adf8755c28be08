"""The encode side's manager and senders: executes what the sender machines command."""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import zmq

from embferry.protocol.commands import Connect, ReleaseSource, Send, Write
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Layout
from embferry.protocol.messages import Frame, Open, Unknown
from embferry.protocol.sender import Sender
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from embferry.transports.contract import Transport

from .checksums import Checksums
from .driver import Driver, bind
from .ready_queue import ReadyQueue
from .staging import Allocate, Source, pageable
from .writer import Writer

log = logging.getLogger(__name__)

MAX_PARKED = 4096  # openings for rooms that are not here yet


class SendManager(Driver):
    """Serves every room of one encode worker.

    :param layout: what a token of this worker's embeddings is made of.
    :param transports: transports this worker can write over, the preferred one first; owned and closed by the manager.
    :param host: the address to listen on; ``advertise`` is what others are told, if it differs.
    :param allocate: makes the host buffers through which embeddings in device memory go: pinned ones, best.
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
        """The sending end of ``room``; a receiver may have asked for it already.

        A room is drawn at random. One whose transfer has ended may be opened again, for a receiver that still waits.

        :raises LocalProtocolError: the room is in use.
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
        """Aborts what is open, waits until no write reads from anybody's memory, and frees everything."""
        with self.lock:
            for sender in self._rooms.values():
                sender.machine.abort(Aborted("the encode worker is shutting down", retryable=True), self.now())
                self.ready_queue.touch(sender)
        self.wake()
        with ExitStack() as closing:  # each is closed, whatever another one raises
            closing.callback(self._ended)
            closing.callback(self.writer.close)

    def _ended(self) -> None:
        self.stop()
        with self.lock:
            self.advance(self.now())  # takes the last writes in
            for sender in self._rooms.values():
                sender.release()

    # The driver's side

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
        else:
            self.send(peer, 0, frame.source, Unknown(frame.body.room, frame.target))

    def advance(self, now: float) -> float | None:
        for sender in self.writer.advance():
            self.ready_queue.touch(sender)
        for sender in self.ready_queue.due(now):
            if self._rooms.get(sender.room) is sender:  # else it is over, and was touched once more
                sender.machine.expire(now)
                self._execute(sender, now)
        return self.ready_queue.next() if self.ready_queue.is_clear else now

    def begin(self, sender: EmbeddingSender) -> None:
        """Begins to write what has just become ready, on the caller's thread: nobody has to be woken for it."""
        self._run_commands(sender)
        for changed in self.writer.advance():
            self.ready_queue.touch(changed)
        self.touch(sender)

    def _execute(self, sender: EmbeddingSender, now: float) -> None:
        self._run_commands(sender)
        for session in [session for session in sender.peers if session not in sender.machine.destinations]:
            del sender.peers[session]  # answered, and not believed: nothing is kept of it
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
        """Something has happened to it: its turn is now. Any thread."""
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


class EmbeddingSender:
    """The sending end of one room. Made by :meth:`SendManager.open`. Every method returns at once."""

    def __init__(self, manager: SendManager, machine: Sender) -> None:
        self.manager = manager
        self.machine = machine
        self.room = machine.room
        self.peers: dict[int, object] = {}
        self.source: Source = {}
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
        self.manager.touch(self)

    def send_embedding(
        self, rows: Source, ready_tokens: int | None = None, *, checksums: Checksums | None = None
    ) -> None:
        """The embedding itself, read in place: do not change it before ``source_released``.

        :param rows: every field of the layout, uint8 [total_tokens, bytes a token]: contiguous, or in device memory.
        :param ready_tokens: how many are produced so far (all, if None); call again with the same arrays for more.
        :param checksums: of these rows, as far as they have been taken already; the rest are taken as chunks leave.
        :raises LocalProtocolError: an array is missing or does not fit what was announced.
        """
        with self.manager.lock:
            total = self.machine.total_tokens
            for field in self.manager.layout.fields:
                array = rows.get(field.name)
                dtype = array.dtype if isinstance(array, np.ndarray) else np.dtype(np.uint8)
                if array is None or array.shape != (total, field.token_bytes) or dtype != np.uint8:
                    have = "missing" if array is None else f"{dtype} {array.shape}"
                    need = f"uint8 ({total}, {field.token_bytes})"
                    raise LocalProtocolError(f"field {field.name} is {have}, announced was {need}", room=self.room)
                if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
                    raise LocalProtocolError(f"field {field.name} is not contiguous", room=self.room)
            if not self.machine.source_released:
                self.source, self.checksums = rows, checksums or self.checksums
                self.machine.produce(total if ready_tokens is None else ready_tokens)
                self.manager.begin(self)

    def poll(self) -> KVPoll:
        """Where the transfer stands."""
        with self.manager.lock:
            self.manager.check()
            return self.machine.poll()

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer; the receiver is told why. Does nothing when it has ended already."""
        with self.manager.lock:
            self.machine.abort(error or Aborted("aborted by the encode side", room=self.room), self.manager.now())
        self.manager.touch(self)

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
        self.source, self.checksums = {}, None
