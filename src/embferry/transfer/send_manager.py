"""The encode side's manager: executes the commands of the sender machines."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Hashable, Sequence

from embferry.protocol.arguments import as_integer, as_text
from embferry.protocol.commands import Connect, ReleaseSource, Send, Write
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Layout
from embferry.protocol.messages import (
    MAX_ENDPOINT,
    MAX_ID,
    Abort,
    Closed,
    Frame,
    Open,
    Pending,
    TransportAddress,
    Unknown,
)
from embferry.protocol.sender import Sender
from embferry.protocol.settings import TransferSettings
from embferry.transports.contract import Event, Transport, Written
from embferry.transports.net.loop import Loop
from embferry.trust import Trust

from .control.contract import Unreachable
from .control.sockets import SocketControl
from .failures import attempt
from .guarded_transport import GuardedTransport
from .handle import ENDED
from .manager import Manager
from .parked import ParkedRequests
from .runtime import Runtime, ThreadRuntime
from .send_handle import EmbeddingSender
from .send_record import SendRecord
from .sink_calls import MAX_PASSES, PASSES_A_TURN
from .staging import Allocate, pageable
from .writer import Writer

log = logging.getLogger(__name__)


class SendManager(Manager[SendRecord]):
    """Serves every room of one encode worker.

    Args:
        layout: The fields of a token of this worker's embeddings.
        transports: The transports this worker can write over, the preferred one first. The manager closes them.
        host: The IP address to listen on for control messages.
        port: The TCP port to listen on; 0 for any free one.
        advertise: The address that receivers connect to, if it differs from ``host``.
        settings: Time-outs, retries and sizes.
        allocate: Makes the host buffers that embeddings in device memory pass through; pinned ones are fastest. Called
            on the staging thread, without locks.
        runtime: What the manager runs on; None: a thread of its own, and sockets at ``host`` and ``port``.
        trust: The keys that peers must know on those, and whether strangers may be let in; None: what the environment
            says. Transports have their own.

    Attributes:
        endpoint: The address of this manager for control messages: ``tcp://host:port``.

    Raises:
        TransportError: The port cannot be bound.
        LayoutMismatch: The layout is out of bounds.
        LocalProtocolError: Another argument is, or strangers can reach ``host`` and there is no key.
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
        runtime: Runtime | None = None,
        trust: Trust | None = None,
    ) -> None:

        def listen(loop: Loop) -> SocketControl:
            address = as_text("host", host, MAX_ENDPOINT), as_integer("port", port, 0, 65535)
            known = None if advertise is None else as_text("advertise", advertise, MAX_ENDPOINT)
            return SocketControl(loop, *address, known, trust=trust)

        self._is_beginning = False  # begin() runs, and takes the events of the transports at its end
        super().__init__(lambda: runtime or ThreadRuntime("embferry-send", listen), transports, settings)
        self.layout = layout
        self.endpoint = self._runtime.control.endpoint
        self.writer = Writer(
            layout, self.transports, self.settings, self.wake, allocate, self.ready_queue.touch, self._write_ended
        )
        self._rooms: dict[int, SendRecord] = {}
        self.parked = ParkedRequests(self.settings)
        self._on_request: Callable[[int, str], object] | None = None
        self._reported: set[int] = set()  # rooms of which the callback has not been called yet
        try:
            layout.validate()
            self._runtime.start(self.turn)
        except BaseException:
            self.close()
            raise

    def open(self, room: int) -> EmbeddingSender:
        """Opens the sending end of ``room``. A receiver may have asked for it already.

        Draw rooms at random. A room whose transfer has ended may be opened again, for a receiver that still waits.

        Raises:
            LocalProtocolError: The room is in use, or the manager is closed.
            TransportError: Every transport has failed.
        """
        room = as_integer("room", room, 0, MAX_ID)
        with self.lock:
            self.check()
            last = self._rooms.get(room)
            if last is not None:
                self.guard(last, self._run_commands, last)
                if not last.is_released:
                    raise LocalProtocolError("the room is in use; draw another", room=room)
                self.ready_queue.forget(last)
            working = [(t, t.address) for t in self.transports.values() if t.lost is None]
            self.check()
            addresses = tuple(TransportAddress(t.name, address) for t, address in working if t.lost is None)
            machine = Sender(room, secrets.randbits(62) + 1, self.layout, addresses, self.settings, self.now())
            record = self._rooms[room] = SendRecord(room, machine)
            if last is not None:
                record.ended.extend(last.ended)
            sender = EmbeddingSender(self, record)
            parked = self.parked.take(room)
            if parked is not None:
                self._take(*parked, self.now())
                self.touch(record)
            else:
                self.schedule(record, self.now() + self.settings.bootstrap_timeout)
        if last is not None:
            last.end.notify()
        return sender

    def on_request(self, callback: Callable[[int, str], object]) -> None:
        """Calls ``callback(room, name)`` when a receiver asks for a room that is not open, or not any more.

        ``name`` is that of the receiver. The callback may open the room, which then serves this receiver. It runs on
        the callback thread without locks, and again when the receiver repeats its request. It may not block.
        """
        with self.lock:
            self._on_request = callback

    # Called by handles

    def begin(self, record: SendRecord) -> None:
        """Starts the writes of newly ready tokens on the caller's thread, which saves waking another. Lock held."""
        self.check()
        self._is_beginning = True
        try:
            self.guard(record, self._run_commands, record)
        finally:
            self._is_beginning = False
        self._take_transport_events()
        if self._messages.is_queued or not self.ready_queue.is_clear:
            self.wake()

    def _on_events(self) -> None:
        if not self._is_beginning:  # otherwise its events are taken in a moment: a copy that has been made at once
            self.wake()

    # The driver thread

    def _advance(self, record: SendRecord, now: float) -> None:
        if self._rooms.get(record.room) is record:  # otherwise it has ended, and was touched once more
            if self.ready_queue.is_due(record, now):
                record.machine.expire(now)
            self._run_commands(record)

    def _has_work(self, record: SendRecord) -> bool:
        return self.writer.has_checksums(record)

    def _work(self, record: SendRecord, now: float) -> None:
        """Goes on with one checksum at most: meanwhile a write may have ended, so that the next one can start."""
        with self.lock:
            writing = self.writer.next_checksum(record)
        if writing is None:
            return
        passes = MAX_PASSES if len(self._rooms) == 1 else PASSES_A_TURN
        error = attempt(writing.advance_checksum, passes)
        if error is not None or writing.checksum is not None:
            with self.lock:
                self.writer.checksum_taken(writing, error)
        del error  # its traceback refers to the embedding, and to this frame

    def _settle(self, record: SendRecord, now: float) -> None:
        if self._rooms.get(record.room) is not record:
            return
        if self._has_work(record):
            self.ready_queue.touch(record)
        machine = record.machine
        for session in [session for session in record.peers if session not in machine.destinations]:
            del record.peers[session]  # it was refused: nothing is kept of it
        if machine.settled(now):
            self._forget(record)
        else:
            time = machine.next_timeout()
            self.ready_queue.schedule(record, now + self.settings.linger if time is None else time)

    def _serve_waiting(self, now: float) -> list[SendRecord]:
        self.parked.expire(now)
        return []

    def _next_due(self) -> float | None:
        timer, expiry = super()._next_due(), self.parked.next_expiry
        if timer is None or expiry is None:
            return expiry if timer is None else timer
        return min(timer, expiry)

    def _run_commands(self, record: SendRecord) -> None:
        machine = record.machine
        while commands := machine.take_commands():
            for command in commands:
                match command:
                    case Send(body, target):
                        peer = record.peers.get(target)
                        if peer is not None:
                            self.send(peer, machine.session, target, body)
                    case Write():
                        self.writer.write(record, command)
                    case Connect(target, transport):
                        error = self.writer.connect(transport)
                        if error is not None:
                            text, extra = "room %d: cannot connect over %s: %s", {"room": record.room}
                            log.info(text, record.room, transport.name, error, extra=extra)
                            if not error.retryable:
                                machine.transport_failed(target, transport.name)
                    case ReleaseSource():
                        record.release()

    def _write_ended(
        self, record: SendRecord, c: Write, checksum: bytes | None, error: EmbeddingTransferError | None
    ) -> None:
        machine = record.machine
        if error is None:
            self.guard(record, machine.write_done, c.target, c.epoch, c.offset, c.length, checksum)
        else:
            if record.failure is error:
                self.guard(record, machine.abort, error, self.now())
            self.guard(record, machine.write_failed, c.target, c.epoch, c.offset, c.length, error)
        self.ready_queue.touch(record)

    def _take(self, peer: Hashable, frame: Frame, now: float) -> bool:
        record = self._rooms.get(frame.body.room)
        if record is not None and not self._asks_again(record, frame):
            if not frame.target and frame.source in record.ended:  # late: the transfer of now is not meant
                if isinstance(frame.body, Abort):
                    self.send(peer, record.machine.session, frame.source, Closed(record.room))
                return True
            if isinstance(frame.body, Abort):
                record.ended.append(frame.source)
            if record.is_broken:
                self.refuse(record, peer, record.machine.session, frame)
                return False
            record.peers[frame.source] = peer
            self.guard(record, record.machine.receive, frame.source, frame.target, frame.body, now)
            self.ready_queue.touch(record)
            return frame.source in record.machine.destinations
        if isinstance(frame.body, Open):
            self.parked.add(peer, frame, now)
            self.send(peer, 0, frame.source, Pending(frame.body.room, 0))
            self._report(frame.body)
        else:
            self.send(peer, 0, frame.source, Unknown(frame.body.room, frame.target))
        return False

    def _asks_again(self, record: SendRecord, frame: Frame) -> bool:
        """Returns whether a receiver asks for a room whose transfer has ended, so that it can be opened again for it.

        A repeated request is none: it is answered by the transfer that has ended.
        """
        if self._on_request is None or not isinstance(frame.body, Open) or frame.source in record.ended:
            return False
        known = record.machine.destinations.get(frame.source)
        is_new = known is None or frame.body.generation > known.opened.generation
        return is_new and record.poll() in ENDED and record.is_released

    def _report(self, request: Open) -> None:
        """Has the callback for requests called, at most once at a time for a room. The lock is held."""
        room, callback = request.room, self._on_request
        if callback is None or room in self._reported or len(self._reported) >= self.settings.parked_requests:
            return

        def call() -> None:
            with self.lock:
                self._reported.discard(room)
            callback(room, request.endpoint)

        self._reported.add(room)
        if attempt(self.run_callback, call) is not None:  # no thread can be started: the receiver asks again
            self._reported.discard(room)

    def _unreachable(self, event: Unreachable, now: float) -> None:
        self.parked.drop(event.peer)  # receivers repeat their requests over the next connection

    def _transport_event(self, event: Event) -> None:
        if isinstance(event, Written):
            self.writer.written(event)

    def _take_transport_events(self) -> None:
        super()._take_transport_events()
        self.writer.advance()

    def _transport_lost(self, transport: GuardedTransport, now: float) -> None:
        for record in self._records():
            self.guard(record, record.machine.transport_lost, transport.name, transport.lost, now)
            self.ready_queue.touch(record)

    def _forget(self, record: SendRecord) -> None:
        del self._rooms[record.room]
        self.forget(record)

    # Ends

    def _records(self) -> list[SendRecord]:
        return list(self._rooms.values())

    def _abort(self, record: SendRecord, error: EmbeddingTransferError) -> None:
        record.machine.abort(error, self.now())

    def _shutting_down(self) -> EmbeddingTransferError:
        return Aborted("the encode worker is shutting down", retryable=True)

    def _tear_down(self, record: SendRecord, now: float) -> None:
        for session, peer in record.peers.items():
            if record.failure is not None:
                destination = record.machine.destinations.get(session)
                generation = 0 if destination is None else destination.opened.generation
                body = Abort.because_of(record.failure, record.room, generation)
                self.send(peer, record.machine.session, session, body)
        record.peers.clear()
        if record.writes == 0:
            record.release()
            if self._rooms.get(record.room) is record and not self.lingers(record, now):
                self._forget(record)

    def _finish(self, record: SendRecord) -> None:
        if record.error is None and not (record.poll() in ENDED and record.is_released):
            record.failure = self._shutting_down()
        if record.writes == 0:
            record.release()

    def _release(self) -> None:
        self.writer.close()
        with self.lock:
            self.writer.advance()
            for record in self._records():
                record.release()
