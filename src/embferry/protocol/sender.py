"""The sending end of one transfer: everything that affects its state is here.

The sender only reacts. The receiver decides what is written where and repeats its requests until they are answered, so
progress depends on the receiver alone. The sender keeps two promises: it writes a grant at most once, and it never
touches again what it has reported as written or drained.
"""

from __future__ import annotations

from collections.abc import Iterable

from . import guards
from .arguments import as_addresses, as_bytes, as_error, as_integer, as_integers
from .chunks import next_chunk
from .commands import Connect, ReleaseSource, Send, SenderCommand, Write
from .destination import Destination, TakenGrant
from .errors import (
    Aborted,
    CapacityError,
    EmbeddingTransferError,
    LeaseExpired,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
    TransportStalled,
)
from .history import History
from .layout import Layout
from .messages import (
    MAX_AUX,
    MAX_CHUNKS,
    MAX_DIGEST,
    MAX_ID,
    MAX_TOKENS,
    Abort,
    Body,
    Chunk,
    Closed,
    Confirm,
    Drain,
    Drained,
    Grant,
    Offer,
    Open,
    Pending,
    Progress,
    TransportAddress,
    Unknown,
    WriteFailed,
    Written,
    words,
)
from .settings import TransferSettings
from .states import POLL, SENDER, TERMINAL, KVPoll, Phase, Trigger, step
from .validation import check_grant, check_open

MAX_OWN_TRANSPORTS = 64
"""Transports of one sender. A receiver may name fewer."""


class Sender:
    """State machine of a sending end. No sockets, no threads, no clock: ``now`` is an argument, in seconds.

    Args:
        room: The ``bootstrap_room``.
        session: The number of this end. Never 0, never used before.
        layout: Of the embedding that will be sent.
        transports: The transports this end can write over, the preferred one first, with its own address of each.
        settings: Time-outs, retries and sizes.
        now: The time at which the transfer begins.

    Raises:
        LocalProtocolError: The room, the session or a transport is out of bounds.

    Attributes:
        ready_tokens: Tokens ``[0, ready_tokens)`` of the embedding can be read.
        destinations: Every receiver that has opened the room, by session.
        current: The receiver that is served: the last that opened the room.
        source_released: Whether the embedding is no longer read.
        history: The last events, to be logged if a method of this machine raises an error that is a bug.
    """

    def __init__(
        self,
        room: int,
        session: int,
        layout: Layout,
        transports: tuple[TransportAddress, ...],
        settings: TransferSettings,
        now: float,
    ) -> None:
        self.room = as_integer("room", room, 0, MAX_ID)
        self.session = as_integer("session", session, 1, MAX_ID, room=self.room)
        self.layout = layout
        self.transports = {transport.name: transport for transport in as_addresses(transports, MAX_OWN_TRANSPORTS)}
        self.settings = settings
        self.phase = Phase.BOOTSTRAPPING
        self.error: EmbeddingTransferError | None = None
        self.total_tokens = -1
        self.content_digest = b""
        self.aux: tuple[int, ...] = ()
        self.ready_tokens = 0
        self.destinations: dict[int, Destination] = {}
        self.current: Destination | None = None
        self.writes_in_flight = 0
        self.writes_started = 0
        self.source_released = False
        self._heard_at = now
        self._ended_at = 0.0
        self.history = History()
        self._commands: list[SenderCommand] = []

    # Calls from the encode worker and the driver

    def announce(self, total_tokens: int, content_digest: bytes, aux: Iterable[int] = ()) -> None:
        """Announces the length. The receiver is told at once, before the tokens are ready.

        Args:
            total_tokens: Tokens of the whole embedding.
            content_digest: 1 to 64 bytes. Equal digests promise equal bytes.
            aux: Up to 16 int32 that travel with the announcement.

        Raises:
            LocalProtocolError: Announced differently before, out of bounds or of a wrong type.
        """
        total_tokens = as_integer("total_tokens", total_tokens, 0, MAX_TOKENS, room=self.room)
        as_bytes("content_digest", content_digest, 1, MAX_DIGEST, room=self.room)
        values = as_integers("aux", aux, -(1 << 31), (1 << 31) - 1, room=self.room)
        if len(values) > MAX_AUX:
            raise LocalProtocolError(f"aux has {len(values)} values; it may have {MAX_AUX}", room=self.room)
        if self.total_tokens >= 0 and (total_tokens, content_digest) != (self.total_tokens, self.content_digest):
            raise LocalProtocolError("an embedding is announced once; open another room for another", room=self.room)
        if self.total_tokens < 0:
            self.history.called("announce", total_tokens)
            self.total_tokens, self.content_digest, self.aux = total_tokens, content_digest, values
            self._offer()

    def produce(self, ready_tokens: int) -> None:
        """Says that tokens ``[0, ready_tokens)`` can be read now.

        Raises:
            LocalProtocolError: Fewer than before, more than announced, or no integer.
        """
        ready_tokens = as_integer("ready_tokens", ready_tokens, 0, MAX_TOKENS, room=self.room)
        if not self.ready_tokens <= ready_tokens <= max(self.total_tokens, 0):
            raise LocalProtocolError(
                f"{ready_tokens} tokens ready after {self.ready_tokens}, of {self.total_tokens} announced",
                room=self.room,
            )
        self.history.called("produce", ready_tokens)
        self.ready_tokens = ready_tokens
        self._write_on()

    def write_done(self, target: int, epoch: int, offset: int, length: int, checksum: bytes | None) -> None:
        """The write of a :class:`~.commands.Write` command is complete at the receiver."""
        self.history.called("write_done", epoch, offset, length)
        destination = self.destinations[target]
        destination.transports.worked(destination.grants[epoch].transport)
        self._write_ended(target, epoch, Chunk(offset, length, checksum))

    def write_failed(self, target: int, epoch: int, offset: int, length: int, error: EmbeddingTransferError) -> None:
        """The write has failed. The receiver decides whether to request its tokens again."""
        self.history.called("write_failed", epoch, offset, length, error.code)
        destination = self.destinations[target]
        taken = destination.grants[epoch]
        transport, started, limit = taken.transport, taken.in_flight[offset], self.settings.transport_failures
        if not taken.cancelled:  # a write under a cancelled grant may be rejected: that is no fault of the transport
            failed = destination.transports.failed(transport, started=started, latest=self.writes_started, limit=limit)
            if failed or not error.retryable or isinstance(error, TransportStalled):
                self.transport_failed(target, transport)
        again = error.retryable or taken.cancelled or destination.transports.is_given_up(transport)
        self._write_ended(target, epoch, WriteFailed(self.room, epoch, offset, length, *words(error), again))

    def transport_failed(self, target: int, transport: str) -> None:
        """Switches session ``target`` from ``transport``, which does not reach it, to the next shared one, if any."""
        self.history.called("transport_failed", target, transport)
        destination = self.destinations[target]
        if destination.transports.give_up(transport):
            self._switched(destination)

    def _switched(self, destination: Destination) -> None:
        self._commands.append(Connect(destination.session, destination.transports.current))
        if destination is self.current:
            self._offer()  # first: then the receiver does not count further failures of the old transport
            self._write_on()

    def transport_lost(self, name: str, error: EmbeddingTransferError, now: float) -> None:
        """This end has no transport ``name`` any more. Every receiver that is reached over it is switched to another.

        Fails with ``error`` if the current receiver, or a later one, could not be reached over any other. Writes in
        flight over the transport are still to be reported as failed.
        """
        self.history.called("transport_lost", name, now)
        as_error(error, room=self.room)
        if self.transports.pop(name, None) is None or self.phase in TERMINAL:
            return
        for destination in self.destinations.values():
            used = destination.transports.usable[:1]
            left = destination.transports.lose({name})
            if left and destination.transports.usable[:1] != used:
                self._switched(destination)
            elif not left and destination is self.current:
                self._fail(error, now, tell=True)
        if not self.transports:
            self._fail(error, now, tell=True)

    def abort(self, error: EmbeddingTransferError, now: float) -> None:
        """Ends the transfer with ``error`` and tells the receiver. Does nothing if it has ended already."""
        self._fail(as_error(error, room=self.room), now, tell=True)

    # Messages from the peer

    def receive(self, source: int, target: int, body: Body, now: float) -> None:
        """Handles a message. Stale, repeated and misdirected messages do no harm; decoding rejects malformed ones."""
        self.history.received(body, now)
        if isinstance(body, Open):
            self._opened(source, body, now)
            return
        if isinstance(body, Abort) and not target:
            self._abandoned(source, body, now)
            return
        destination = self.destinations.get(source)
        if destination is None or not guards.meant_for_this_session(target, self.session):
            self._send(Unknown(self.room, missing=target), source)
            return
        if destination is not self.current and not isinstance(body, Drain):
            self._send(Unknown(self.room, missing=target), source)
            return
        self._heard_at = now
        match body:
            case Drain():
                self._drain(destination, body)
            case Grant():
                self._granted(destination, body, now)
            case Progress():
                destination.forget_below(body.floor)
            case Confirm():
                self._confirmed(destination, body, now)
            case Abort():
                self._fail(body.error, now, tell=False)
                self._send(Closed(self.room), source)
            case _:
                pass  # messages from senders to receivers do not concern this end

    def _opened(self, source: int, body: Open, now: float) -> None:
        destination = self.destinations.get(source)
        if self.phase in TERMINAL:
            if self.phase is Phase.FAILED or destination is not self.current:
                self._send_abort(source, body.generation)
            return  # a receiver that has confirmed does not open again: this is a late copy
        try:
            if destination is None:
                own, known = tuple(self.transports.values()), len(self.destinations)
                destination = Destination(source, body, *check_open(self.layout, own, body, known))
                self.destinations[source] = destination
                self._commands.append(Connect(source, destination.transports.current))
            elif body.generation < destination.opened.generation + (destination is not self.current):
                return  # a late copy: of an earlier generation, or of a receiver that was replaced since
            else:
                used = destination.transports.usable[:1]
                destination.reopen(body)
                if destination.transports.usable[:1] != used:
                    self._commands.append(Connect(source, destination.transports.current))
        except EmbeddingTransferError as error:
            self._send(Abort.because_of(error, self.room, body.generation), source)
            return
        self._heard_at = now
        if destination is not self.current:
            if self.current is not None:
                self.phase = step(SENDER, self.phase, Trigger.PEER_LOST)
                self.current.forget_all()
            self.current = destination
        self.phase = step(SENDER, self.phase, Trigger.OPENED)
        self._offer_to(destination)

    def _abandoned(self, source: int, body: Abort, now: float) -> None:
        """A receiver that has no sender has ended. It concerns this end if no other receiver is served."""
        if self.current is None or source == self.current.session:
            self._fail(body.error, now, tell=False)
        self._send(Closed(self.room), source)

    def _granted(self, destination: Destination, grant: Grant, now: float) -> None:
        if self.phase in TERMINAL:
            self._send_abort(destination.session, destination.opened.generation)
            return
        destination.forget_below(grant.floor)
        if not destination.can_report(self.writes_in_flight):
            why = f"the language worker closes none of its grants, after {destination.reports} reports of writes"
            self._fail(CapacityError(why, room=self.room, retryable=False), now, tell=True)
            return
        if not guards.may_take_up(grant.epoch, destination.floor, destination.refused):
            return
        if not guards.is_new(grant.epoch, destination.grants):
            self._repeat(destination, destination.grants[grant.epoch])
            return
        if not destination.can_take(grant):
            return  # unanswered: the receiver asks again, and by then others may be finished
        try:
            runs = check_grant(grant, destination.opened.geometry, destination.transports.names)
        except RemoteProtocolError as error:
            self._send(Abort.because_of(error, self.room, destination.opened.generation), destination.session)
            return
        self.phase = step(SENDER, self.phase, Trigger.GRANTED)
        taken = destination.take(grant, runs)
        for overtaken in destination.overtaken_by(taken):
            destination.cancel(overtaken)
        if destination.transports.is_given_up(grant.transport):
            self._offer_to(destination)  # the receiver does not know yet which transport replaces it
        self._write_on()  # its reports answer the grant; a grant without one is repeated, and answered then

    def _repeat(self, destination: Destination, taken: TakenGrant) -> None:
        """Repeats every report on a grant."""
        epoch = taken.epoch
        for at in range(0, len(taken.written), MAX_CHUNKS):
            chunks = tuple(taken.written[at : at + MAX_CHUNKS])
            self._send(Written(self.room, epoch, chunks), destination.session)
        for failed in taken.failed:
            self._send(failed, destination.session)
        if not taken.reports:
            self._send(Pending(self.room, epoch), destination.session)

    def _drain(self, destination: Destination, body: Drain) -> None:
        done = []
        for epoch in body.epochs:
            if not destination.refuse(epoch):
                continue  # unanswered: the receiver asks again, or revokes the epoch
            taken = destination.grants.get(epoch)
            if taken is not None:
                destination.cancel(taken)
            if guards.may_report_drained(len(taken.in_flight) if taken else 0):
                done.append(epoch)
            else:
                destination.draining.add(epoch)
        if done:
            self._send(Drained(self.room, tuple(done)), destination.session)
        self._write_on()

    def _confirmed(self, destination: Destination, body: Confirm, now: float) -> None:
        if self.phase not in TERMINAL:
            if body.transferred_tokens != self.total_tokens:
                return  # it confirms another announcement; the offer that replaces it is on its way
            self.phase = step(SENDER, self.phase, Trigger.CONFIRMED)
            self._ended(now)
        self._send(Closed(self.room), destination.session)

    # Writing

    def _write_on(self) -> None:
        """Starts every write that can start: oldest grant first, whole blocks, only ready tokens."""
        destination = self.current
        if destination is None or self.phase in TERMINAL or self.total_tokens < 0:
            return
        geometry, chunk_bytes = destination.opened.geometry, self.settings.chunk_bytes
        for taken in list(destination.unfinished.values()):
            if destination.transports.is_given_up(taken.transport):
                self._abandon(destination, taken)
            end = min(taken.stop, self.total_tokens)
            while self.writes_in_flight < self.settings.writes_in_flight and destination.can_report(
                self.writes_in_flight
            ):
                chunk = next_chunk(taken, end, self.ready_tokens, geometry, chunk_bytes)
                if chunk is None:
                    break
                start, stop = chunk
                taken.cursor = stop
                blocks = taken.blocks_of(start, stop, destination.block_size)
                self.writes_in_flight += 1
                self.writes_started += 1
                taken.in_flight[start] = self.writes_started
                transport, verify = destination.transports.current, destination.opened.verify
                length, epoch = stop - start, taken.epoch
                self._commands.append(Write(destination.session, epoch, start, length, blocks, transport, verify))
            if taken.cursor >= end:
                destination.finish(taken)

    def _abandon(self, destination: Destination, taken: TakenGrant) -> None:
        """Reports the unwritten tokens of a grant whose transport was given up; the receiver grants them again."""
        start, stop = taken.cursor, min(taken.stop, self.total_tokens)
        destination.cancel(taken)
        if start < stop:
            error = TransportError(f"{taken.transport} was given up in favour of {destination.transports.current.name}")
            failed = WriteFailed(self.room, taken.epoch, start, stop - start, *words(error), True)
            destination.report(taken, failed)
            self._send(failed, destination.session)

    def _write_ended(self, target: int, epoch: int, report: Chunk | WriteFailed) -> None:
        """A write has ended, completed or failed."""
        self.writes_in_flight -= 1
        destination = self.destinations[target]
        taken = destination.grants[epoch]
        del taken.in_flight[report.offset]
        if epoch in destination.draining:
            if guards.may_report_drained(len(taken.in_flight)):
                destination.draining.discard(epoch)
                self._send(Drained(self.room, (epoch,)), target)
        elif epoch >= destination.floor:
            destination.report(taken, report)
            self._send(Written(self.room, epoch, (report,)) if isinstance(report, Chunk) else report, target)
        destination.forget_if_over(taken)
        self._release_source()
        self._write_on()

    # Time

    def next_timeout(self) -> float | None:
        """Returns when :meth:`expire` has something to do, or None."""
        if self.phase in TERMINAL:
            return None
        limit = self.settings.bootstrap_timeout if self.current is None else self.settings.lease_timeout
        return self._heard_at + limit

    def expire(self, now: float) -> None:
        """Ends a transfer whose receiver has been silent for too long."""
        due = self.next_timeout()
        if due is None or now < due:
            return
        if self.current is None:
            why = f"no language worker has opened the transfer for {self.settings.bootstrap_timeout:g} s"
        else:
            why = f"the language worker has been silent for {self.settings.lease_timeout:g} s"
        self._fail(LeaseExpired(why, room=self.room), now, tell=True)

    # Output

    def take_commands(self) -> list[SenderCommand]:
        """Returns the commands issued since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    def poll(self) -> KVPoll:
        """Returns the state as the queues know it."""
        return POLL[self.phase]

    def settled(self, now: float) -> bool:
        """Returns whether this end can be forgotten: no write is in flight, and it has lingered for its peer."""
        return self.phase in TERMINAL and self.writes_in_flight == 0 and now >= self._ended_at + self.settings.linger

    def _offer(self) -> None:
        if self.current is not None and self.phase not in TERMINAL:
            self._offer_to(self.current)

    def _offer_to(self, destination: Destination) -> None:
        offer = Offer(
            self.room,
            destination.opened.generation,
            destination.version,
            destination.transports.current.name,
            self.total_tokens,
            self.content_digest,
            self.aux,
            self.transports[destination.transports.current.name].handle,
        )
        self._send(offer, destination.session)

    def _fail(self, error: EmbeddingTransferError, now: float, *, tell: bool) -> None:
        if self.phase in TERMINAL:
            return
        self.history.called("fail", error.code, now)
        self.phase = step(SENDER, self.phase, Trigger.FAILED)
        self.error = error
        if tell and self.current is not None:
            self._send_abort(self.current.session, self.current.opened.generation)
        self._ended(now)

    def _ended(self, now: float) -> None:
        self._ended_at = now
        self._release_source()

    def _release_source(self) -> None:
        done = self.phase in TERMINAL and guards.may_release_source(self.writes_in_flight)
        if done and not self.source_released:
            self.source_released = True
            self._commands.append(ReleaseSource())

    def _send_abort(self, target: int, generation: int) -> None:
        error = self.error or Aborted("the transfer has already been completed; open another room")
        self._send(Abort.because_of(error, self.room, generation), target)

    def _send(self, body: Body, target: int) -> None:
        if isinstance(body, Written):
            body = self._coalesced(body, target)
        self.history.sent(body, target)
        self._commands.append(Send(body, target))

    def _coalesced(self, report: Written, target: int) -> Written:
        """Merges ``report`` with an unsent report on the same epoch, which leaves the commands.

        Messages between the two do not depend on their order: an epoch that is reported on is not being drained.
        """
        for at, command in enumerate(self._commands):
            match command:
                case Send(Written(epoch=epoch, chunks=chunks), to) if (to, epoch) == (target, report.epoch):
                    if len(chunks) + len(report.chunks) <= MAX_CHUNKS:
                        del self._commands[at]
                        return Written(report.room, epoch, (*chunks, *report.chunks))
        return report
