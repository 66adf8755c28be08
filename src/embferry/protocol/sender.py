"""The sending end of one transfer: everything that affects its state is here.

It only ever reacts. The receiver decides what is written where, repeats itself until it is answered, and so carries
the whole of the liveness; the sender keeps two promises: it writes a grant at most once, and what it reports as
written or drained is never touched by it again.
"""

from __future__ import annotations

from . import guards
from .chunks import next_chunk
from .coalescing import with_earlier_reports
from .commands import Connect, ReleaseSource, Send, SenderCommand, Write
from .errors import (
    Aborted,
    EmbeddingTransferError,
    LeaseExpired,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from .layout import Layout
from .messages import (
    MAX_CHUNKS,
    MAX_TEXT,
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
)
from .settings import TransferSettings
from .states import POLL, SENDER, TERMINAL, KVPoll, Phase, Trigger, step
from .validation import MAX_GRANTS, Destination, TakenGrant, accept, check_grant


class Sender:
    """:param room: the ``bootstrap_room``.
    :param session: of this end; never 0, never used before.
    :param layout: of the embedding that will be sent.
    :param transports: the transports this end can write over, the preferred one first, and its end of each.
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
        self.room = room
        self.session = session
        self.layout = layout
        self.transports = {transport.name: transport for transport in transports}
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
        self._commands: list[SenderCommand] = []

    # What the caller knows

    def announce(self, total_tokens: int, content_digest: bytes, aux: tuple[int, ...] = ()) -> None:
        """The length is known: the receiver is told at once, long before the tokens are ready.

        :param content_digest: 1 to 64 bytes; equal digests promise equal bytes.
        :param aux: up to 16 int32.
        :raises LocalProtocolError: announced differently before, or not possible.
        """
        if self.total_tokens >= 0 and (total_tokens, content_digest) != (self.total_tokens, self.content_digest):
            raise LocalProtocolError("an embedding is announced once; open another room for another", room=self.room)
        if not 0 <= total_tokens <= MAX_TOKENS:
            raise LocalProtocolError(f"an embedding cannot have {total_tokens} tokens", room=self.room)
        if not 1 <= len(content_digest) <= 64 or len(aux) > 16 or any(x.bit_length() > 31 for x in aux):
            raise LocalProtocolError("a content digest has 1 to 64 bytes, aux up to 16 int32", room=self.room)
        if self.total_tokens < 0:
            self.total_tokens, self.content_digest, self.aux = total_tokens, content_digest, aux
            self._offer()

    def produce(self, ready_tokens: int) -> None:
        """Tokens ``[0, ready_tokens)`` can be read now. Grows, up to what was announced."""
        if not self.ready_tokens <= ready_tokens <= max(self.total_tokens, 0):
            raise LocalProtocolError(
                f"{ready_tokens} tokens ready after {self.ready_tokens}, of {self.total_tokens} announced",
                room=self.room,
            )
        self.ready_tokens = ready_tokens
        self._write_on()

    def write_done(self, target: int, epoch: int, offset: int, length: int, checksum: bytes | None) -> None:
        """The write that a :class:`Write` command asked for is complete at the receiver."""
        destination = self.destinations[target]
        destination.transports.worked(destination.grants[epoch].message.transport)
        self._over(target, epoch, Chunk(offset, length, checksum))

    def write_failed(self, target: int, epoch: int, offset: int, length: int, error: EmbeddingTransferError) -> None:
        """The write is over without having been completed; the receiver decides whether to ask again."""
        destination = self.destinations[target]
        taken = destination.grants[epoch]
        transport, started, limit = taken.message.transport, taken.in_flight[offset], self.settings.transport_failures
        if not taken.cancelled:  # else it says nothing of the transport
            failed = destination.transports.failed(transport, started=started, latest=self.writes_started, limit=limit)
            if failed or not error.retryable:
                self.transport_failed(target, transport)
        again = error.retryable or taken.cancelled or destination.transports.is_given_up(transport)
        self._over(target, epoch, WriteFailed(self.room, epoch, offset, length, *_words(error), again))

    def transport_failed(self, target: int, transport: str) -> None:
        """Session ``target`` cannot be reached over ``transport``: the next one that both know is taken, if there is one."""
        destination = self.destinations[target]
        if destination.transports.give_up(transport):
            self._commands.append(Connect(target, destination.transports.current))
            if destination is self.current:
                self._offer()  # first of all: what then fails over the old transport is no setback
                self._write_on()

    def abort(self, error: EmbeddingTransferError, now: float) -> None:
        """Ends the transfer; the receiver is told why. Does nothing when it has ended already."""
        self._fail(error, now, tell=True)

    # What the peer says

    def receive(self, source: int, target: int, body: Body, now: float) -> None:
        """Takes a message in. Stale, repeated and misdirected ones do no harm; malformed ones never come this far."""
        if isinstance(body, Open):
            self._opened(source, body, now)
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
                self._granted(destination, body)
            case Progress():
                destination.acknowledged = max(destination.acknowledged, body.transferred_tokens)
                destination.forget_below(body.floor)
            case Confirm():
                self._confirmed(destination, body, now)
            case Abort():
                self._fail(body.error, now, tell=False)
                self._send(Closed(self.room), source)
            case _:
                pass  # a receiver's answer sent to a sender: nothing here waits for it

    def _opened(self, source: int, body: Open, now: float) -> None:
        destination = self.destinations.get(source)
        if self.phase in TERMINAL:
            if self.phase is Phase.FAILED or destination is not self.current:
                self._send_abort(source, body.opening)
            return  # who has confirmed does not open again: this is a late copy
        try:
            if destination is None:
                destination = accept(self.layout, tuple(self.transports.values()), source, body, len(self.destinations))
                self.destinations[source] = destination
                self._commands.append(Connect(source, destination.transports.current))
            elif body.opening < destination.opened.opening + (destination is not self.current):
                return  # a late copy: of an earlier opening, or of a receiver that was replaced since
            else:
                destination.reopen(body)
        except EmbeddingTransferError as error:
            self._send(Abort.because_of(error, self.room, body.opening), source)
            return
        self._heard_at = now
        if destination is not self.current:
            if self.current is not None:
                self.phase = step(SENDER, self.phase, Trigger.PEER_LOST)
            self.current = destination
        self.phase = step(SENDER, self.phase, Trigger.OPENED)
        self._offer_to(destination)

    def _granted(self, destination: Destination, grant: Grant) -> None:
        if self.phase in TERMINAL:
            self._send_abort(destination.session, destination.opened.opening)
            return
        destination.forget_below(grant.floor)
        if not guards.may_take_up(grant.epoch, destination.floor, destination.refused):
            return
        if not guards.is_new(grant.epoch, destination.grants):
            self._repeat(destination, destination.grants[grant.epoch])
            return
        if len(destination.grants) >= MAX_GRANTS:
            return
        try:
            check_grant(grant, destination)
        except RemoteProtocolError as error:
            self._send(Abort.because_of(error, self.room, destination.opened.opening), destination.session)
            return
        self.phase = step(SENDER, self.phase, Trigger.GRANTED)
        taken = destination.grants[grant.epoch] = TakenGrant(grant, grant.sent_tokens)
        if destination.transports.is_given_up(grant.transport):
            self._offer_to(destination)  # the receiver has not heard of it yet
        self._write_on()
        if not taken.in_flight:
            self._send(Pending(self.room, grant.epoch), destination.session)

    def _repeat(self, destination: Destination, taken: TakenGrant) -> None:
        """All that was reported on a grant, again."""
        epoch = taken.message.epoch
        for at in range(0, len(taken.written), MAX_CHUNKS):
            chunks = tuple(taken.written[at : at + MAX_CHUNKS])
            self._send(Written(self.room, epoch, chunks), destination.session)
        for failed in taken.failed:
            self._send(failed, destination.session)
        if not taken.reported:
            self._send(Pending(self.room, epoch), destination.session)

    def _drain(self, destination: Destination, body: Drain) -> None:
        done = []
        for epoch in body.epochs:
            if not destination.refuse(epoch):
                continue  # not answered now: the receiver asks again, or takes the access away
            taken = destination.grants.get(epoch)
            if taken is not None:
                taken.cancel()
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
                return  # of another announcement; the receiver will learn of it
            self.phase = step(SENDER, self.phase, Trigger.CONFIRMED)
            self._ended(now)
        self._send(Closed(self.room), destination.session)

    # Writing

    def _write_on(self) -> None:
        """Starts the writes that can be started: oldest grant first, whole blocks, only what is ready."""
        destination = self.current
        if destination is None or self.phase in TERMINAL or self.total_tokens < 0:
            return
        geometry, chunk_bytes = destination.opened.geometry, self.settings.chunk_bytes
        for taken in destination.grants.values():
            if not guards.still_needed(taken.cursor, destination.acknowledged):
                taken.cancel()
            if destination.transports.is_given_up(taken.message.transport):
                self._abandon(destination, taken)
            while self.writes_in_flight < self.settings.writes_in_flight:
                end = min(taken.stop, self.total_tokens)
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
                epoch = taken.message.epoch
                self._commands.append(Write(destination.session, epoch, start, stop - start, blocks, transport, verify))

    def _abandon(self, destination: Destination, taken: TakenGrant) -> None:
        """What has not been started of a grant whose transport was given up: the receiver grants it over another one."""
        start, stop = taken.cursor, min(taken.stop, self.total_tokens)
        taken.cancel()
        if start < stop:
            error = TransportError(
                f"{taken.message.transport} was given up, {destination.transports.current.name} is used"
            )
            failed = WriteFailed(self.room, taken.message.epoch, start, stop - start, *_words(error), True)
            taken.failed.append(failed)
            self._send(failed, destination.session)

    def _over(self, target: int, epoch: int, report: Chunk | WriteFailed) -> None:
        """A write has ended, one way or the other."""
        self.writes_in_flight -= 1
        destination = self.destinations[target]
        taken = destination.grants[epoch]
        del taken.in_flight[report.offset]
        if epoch in destination.draining:
            if guards.may_report_drained(len(taken.in_flight)):
                destination.draining.discard(epoch)
                self._send(Drained(self.room, (epoch,)), target)
        elif isinstance(report, Chunk):
            taken.written.append(report)
            self._send(Written(self.room, epoch, (report,)), target)
        else:
            taken.failed.append(report)
            self._send(report, target)
        self._release_source()
        self._write_on()

    # Time

    def next_timeout(self) -> float | None:
        """When :meth:`expire` has something to do, or None."""
        if self.phase is Phase.SUCCESS or self.phase is Phase.FAILED:
            return None
        limit = self.settings.bootstrap_timeout if self.current is None else self.settings.lease_timeout
        return self._heard_at + limit

    def expire(self, now: float) -> None:
        """Time has passed."""
        due = self.next_timeout()
        if due is None or now < due:
            return
        if self.current is None:
            why = f"no language worker has opened the transfer for {self.settings.bootstrap_timeout:g} s"
        else:
            why = f"the language worker has not spoken for {self.settings.lease_timeout:g} s"
        self._fail(LeaseExpired(why, room=self.room), now, tell=True)

    # What comes out

    def take_commands(self) -> list[SenderCommand]:
        """What is to be done since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    def poll(self) -> KVPoll:
        """The state as the queues know it."""
        return POLL[self.phase]

    def settled(self, now: float) -> bool:
        """Whether nothing depends on this end any more: the peer has had time to ask its last questions."""
        return self.phase in TERMINAL and self.writes_in_flight == 0 and now >= self._ended_at + self.settings.linger

    def _offer(self) -> None:
        if self.current is not None and self.phase not in TERMINAL:
            self._offer_to(self.current)

    def _offer_to(self, destination: Destination) -> None:
        offer = Offer(
            self.room,
            destination.opened.opening,
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
        self.phase = step(SENDER, self.phase, Trigger.FAILED)
        self.error = error
        if tell and self.current is not None:
            self._send_abort(self.current.session, self.current.opened.opening)
        self._ended(now)

    def _ended(self, now: float) -> None:
        self._ended_at = now
        self._release_source()

    def _release_source(self) -> None:
        done = self.phase in TERMINAL and guards.may_release_source(self.writes_in_flight)
        if done and not self.source_released:
            self.source_released = True
            self._commands.append(ReleaseSource())

    def _send_abort(self, target: int, opening: int) -> None:
        error = self.error or Aborted("the transfer has already been completed; open another room")
        self._send(Abort.because_of(error, self.room, opening), target)

    def _send(self, body: Body, target: int) -> None:
        if isinstance(body, Written):
            self._commands, body = with_earlier_reports(self._commands, body, target)
        self._commands.append(Send(body, target))


def _words(error: EmbeddingTransferError) -> tuple[str, str]:
    """Code and detail, for a message."""
    return error.code, error.detail[:MAX_TEXT]
