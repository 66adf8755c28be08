"""The receiving end of one transfer: everything that affects its state is here.

The receiver drives the transfer. It opens the room, grants blocks, verifies what arrives, asks again for what is bad
or missing, and repeats every request until it is answered or out of time. The pool owns the blocks: it hands them to
the receiver with a grant, and each comes back through one :class:`~.commands.Release`, exactly once.

Time-outs are computed from the state (:meth:`Receiver.next_timeout`), never stored, so none can be forgotten.
"""

from __future__ import annotations

from . import guards
from .announcements import Announcements
from .arguments import as_addresses, as_error, as_integer, as_integers, as_text
from .commands import Admit, CloseBlocks, Deliver, ReceiverCommand, Release, Restart, Revoke, Send, Verify
from .deadlines import Deadline, with_peer, without_peer
from .errors import (
    Aborted,
    CapacityError,
    EmbeddingTransferError,
    IntegrityError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
    WrongKey,
    reason_of,
)
from .failover import Failover
from .history import History
from .kept import KeptTokens
from .layout import Geometry, merged
from .ledger import Check, Ledger, OutstandingGrant
from .messages import (
    MAX_ENDPOINT,
    MAX_ID,
    MAX_RUNS,
    MAX_TRANSPORTS,
    VERSIONS,
    Abort,
    Body,
    Closed,
    Confirm,
    Drain,
    Drained,
    Offer,
    Open,
    Pending,
    Progress,
    TransportAddress,
    Unknown,
    WriteFailed,
    Written,
)
from .retry_policy import RetryPolicy
from .settings import TransferSettings
from .states import POLL, RECEIVER, TERMINAL, KVPoll, Phase, Trigger, step
from .validation import MAX_OPEN_RUNS, MAX_OUTSTANDING, check_chunk, check_offer, continues


class Receiver:
    """State machine of a receiving end. No sockets, no threads, no clock: ``now`` is an argument, in seconds.

    Args:
        room: The ``bootstrap_room``.
        session: The number of this end. Never 0, never used before.
        geometry: Of the region that the peer will write into.
        endpoint: Address at which this end receives control messages.
        transports: The transports by which the region can be reached, with their handles.
        settings: Time-outs, retries and sizes.
        now: The time at which the transfer begins.
        failover_timeout: Seconds for which another peer may be named after a loss. None: the first loss that the
            retry policy cannot mend ends the transfer.
        max_tokens: Tokens that the caller has room for. A longer embedding fails the transfer with
            :class:`~.errors.CapacityError` before anything is granted. None: ``max_embedding_bytes`` alone limits it.
        offer_timeout: Seconds that the first peer, if it answers, may take to offer. None: ``bootstrap_timeout``.
        kept: Tokens that are here already. They count only if the content that is offered is the same.

    Raises:
        LocalProtocolError: The room, the session, the endpoint, a transport or ``max_tokens`` is out of bounds.
        LayoutMismatch: The geometry is out of bounds.

    Attributes:
        peer: Session of the sender whose offer was accepted; 0: none yet.
        transports: The transports that this end has; fewer after :meth:`transport_lost`.
        transport: Name of the transport in use. ``address`` is the sender's end of it.
        total_tokens: Length of the embedding; -1: not known yet.
        committed: Set by the driver when tokens were used in a way that cannot be undone.
        generation: Counts this receiver's ``open`` messages that asked for a new offer. The answer repeats it.
        transfers: Grants made. The first is the initial transfer, every later one a resumed transfer.
        offered: Whether the peer has said what it has.
        announcements: What each sender has announced so far.
        peer_knows: Whether the peer has confirmed that it knows how the transfer ended.
        history: The last events, to be logged if a method of this machine raises an error that is a bug.
    """

    def __init__(
        self,
        room: int,
        session: int,
        geometry: Geometry,
        endpoint: str,
        transports: tuple[TransportAddress, ...],
        settings: TransferSettings,
        now: float,
        failover_timeout: float | None = None,
        *,
        max_tokens: int | None = None,
        offer_timeout: float | None = None,
        kept: KeptTokens | None = None,
    ) -> None:
        self.room = as_integer("room", room, 0, MAX_ID)
        self.session = as_integer("session", session, 1, MAX_ID, room=self.room)
        geometry.validate()
        self.geometry, self.settings = geometry, settings
        self.endpoint = as_text("endpoint", endpoint, MAX_ENDPOINT, room=self.room)
        self.transports = as_addresses(transports, MAX_TRANSPORTS)
        self.phase = Phase.BOOTSTRAPPING
        self.error: EmbeddingTransferError | None = None
        self.peer, self.transport, self.address = 0, "", b""
        self.total_tokens = -1 if kept is None else kept.total_tokens
        self.content_digest = None if kept is None else kept.content_digest
        self.aux: tuple[int, ...] = ()
        self.announcements, self.ledger, self.history = Announcements(), Ledger(kept), History()
        self.committed = self.offered = self.peer_knows = False
        self.generation = self.transfers = 0
        self.retry_policy = RetryPolicy(settings, now)
        self.failover = Failover(failover_timeout)
        self.max_tokens = None if max_tokens is None else as_integer("max_tokens", max_tokens, 0, MAX_ID, room=room)
        self._offer_timeout = settings.bootstrap_timeout if offer_timeout is None else offer_timeout
        self.asked_at = self.heard_at = self.progress_at = self.ended_at = now
        self._transport_error: EmbeddingTransferError | None = None  # why a transport was lost
        self._commands: list[ReceiverCommand] = []
        self._open(now)

    # Calls from the pool and the driver

    @property
    def transferred_tokens(self) -> int:
        """Verified tokens from token 0 on without a gap. Never decreases while the content is the same."""
        return self.ledger.verified.prefix

    def wanted(self, now: float) -> tuple[int, int] | None:
        """Returns the next tokens that need blocks, as (offset, length). None: nothing can be granted now."""
        if self.phase in TERMINAL or not self.peer or self.retry_policy.is_paused(now):
            return None
        if len(self.ledger.grants) >= MAX_OUTSTANDING or self.ledger.open_runs > MAX_OPEN_RUNS - MAX_RUNS:
            return None  # the sender would not take up another grant
        if self.total_tokens >= 0:
            return self.ledger.missing(self.total_tokens) if guards.content_is_known(self.offered) else None
        # While the length is unknown there is one grant, of the default size.
        return (0, self.settings.default_allocate_tokens) if self.ledger.is_untouched() else None

    def grant(self, blocks: tuple[int, ...], epoch: int, now: float) -> int:
        """Grants ``blocks`` for the next wanted tokens.

        Args:
            blocks: At most as many blocks as :meth:`wanted` needs, in at most ``MAX_RUNS`` runs.
            epoch: The number of this grant; epochs ascend.
            now: Seconds.

        Returns:
            The number of tokens granted.

        Raises:
            LocalProtocolError: Nothing is wanted, a block does not exist, or they are too many or in too many runs.
        """
        epoch = as_integer("epoch", epoch, 0, MAX_ID, room=self.room)
        blocks = as_integers("blocks", blocks, 0, self.geometry.num_blocks - 1, room=self.room)
        wanted = self.wanted(now)
        size = self.geometry.block_size
        if wanted is None or not 0 < len(blocks) <= -(-wanted[1] // size) or epoch < self.ledger.next_epoch:
            raise LocalProtocolError(f"{len(blocks)} blocks for {wanted} under epoch {epoch}", room=self.room)
        if (runs := sum(1 for _ in merged(blocks))) > MAX_RUNS:
            raise LocalProtocolError(f"more than {MAX_RUNS} runs of blocks in one grant", room=self.room)
        tokens = min(wanted[1], len(blocks) * size)
        self.history.called("grant", epoch, wanted[0], tokens, now)
        if not self.ledger.active and not self.ledger.checking:
            self.progress_at = self.asked_at = now  # until now the transfer had no blocks: the peer is not late
        grant = OutstandingGrant(epoch, self.peer, wanted[0], tokens, blocks, size, self.transport, runs)
        self.ledger.open(grant)
        self.transfers += 1
        self._commands.append(Admit(epoch, blocks, self.transport, self.address))
        self._send(grant.message(self.room, self.ledger.floor))
        self.retry_policy.asked(now)
        return tokens

    def verified_chunk(self, epoch: int, offset: int, *, matches: bool, now: float) -> None:
        """Takes the result of a :class:`~.commands.Verify` command: whether the bytes have the announced checksum."""
        self.history.called("verified_chunk", epoch, offset, matches, now)
        check = self.ledger.checking.pop((epoch, offset))
        stop = offset + check.length
        outdated = self.phase in TERMINAL or check.outdated
        if outdated or not guards.may_count(matches):
            self._commands.append(Release(check.blocks))
            if not outdated:
                self._bad_chunk(IntegrityError(f"tokens [{offset}, {stop}) arrived damaged", room=self.room), now)
            return
        self.ledger.verified.add(offset, stop)
        self.ledger.held[epoch, offset] = check.blocks
        self._commands.append(Deliver(epoch, offset, check.length, check.blocks))
        self.progress_at = now
        self.retry_policy.good()
        self.phase = step(RECEIVER, self.phase, Trigger.DELIVERED)
        self._complete(now)
        if self.phase not in TERMINAL and self.retry_policy.may_acknowledge(now):
            self._send(self._progress())

    def consumed(self, epoch: int, offset: int) -> None:
        """The consumer no longer reads the blocks of the delivered chunk."""
        self.history.called("consumed", epoch, offset)
        if blocks := self.ledger.held.pop((epoch, offset), None):
            self._commands.append(Release(blocks))

    def receiving(self, epoch: int, now: float) -> None:
        """Bytes are coming in under ``epoch``: the peer is slow, and not stuck."""
        if (grant := self.ledger.grants.get(epoch)) and not grant.draining and self.phase not in TERMINAL:
            self.progress_at = now

    def revoked(self, epoch: int) -> None:
        """The transport has revoked the peer's access under ``epoch`` for good."""
        self.history.called("revoked", epoch)
        if (grant := self.ledger.grants.get(epoch)) is not None:
            grant.revoked = True
            self._close(grant)

    def peer_lost(self, now: float) -> None:
        """The peer is dead, unreachable or about to be replaced: revokes its access and opens the room again.

        Before an offer was accepted, this invalidates the offers that earlier ``open`` messages may still bring.
        """
        self.history.called("peer_lost", self.peer, now)
        if self.phase in TERMINAL:
            for grant in self.ledger:
                self._revoke(grant)
        elif not self.peer:
            self._open(now)
        else:
            self._leave_peer()
            if self.retry_policy.peer_lost():
                self._open(now)
            else:
                times = self.retry_policy.lost_in_a_row
                why = f"the encode worker was lost {times} times in a row at token {self.transferred_tokens}"
                self._peer_failed(PeerGone(why, room=self.room), now, tell=False)

    def redirected(self, now: float) -> None:
        """The caller has named another peer: setbacks of the last one no longer count."""
        self.history.called("redirected", now)
        self._offer_timeout = self.settings.bootstrap_timeout
        self.failover.lost = None
        self.retry_policy.peer_changed()
        self.peer_lost(now)

    def transport_lost(self, name: str, error: EmbeddingTransferError, now: float) -> None:
        """This end has no transport ``name`` any more, or cannot use it here: opens the room again with the rest.

        Revokes every grant, and fails with ``error`` if the ends share no other. A grant over the lost transport still
        needs :meth:`revoked`.
        """
        self.history.called("transport_lost", name, now)
        as_error(error, room=self.room)
        left = tuple(address for address in self.transports if address.name != name)
        if len(left) == len(self.transports):
            return
        self._transport_error = error
        self.transports = left or self.transports
        if not left:
            self._fail(error, now, tell=True)
        if self.phase in TERMINAL:
            for grant in self.ledger:
                if grant.transport == name:
                    self._revoke(grant)
        elif self.failover.lost is not None:
            self.generation += 1  # no peer is named: the next one is told
        else:
            if self.peer:
                self._leave_peer()
            self._open(now)

    def peer_unreachable(self, error: Exception, now: float) -> None:
        """The control plane has given up on the endpoint: its name does not resolve, or it refuses connections.

        A peer that was accepted is lost. Otherwise the transfer fails, or waits: ``PeerGone`` or ``WrongKey``.
        """
        self.history.called("peer_unreachable", now)
        if self.phase in TERMINAL or self.peer:
            self.peer_knows |= self.phase in TERMINAL  # it cannot be told
            self.peer_lost(now)
        elif self.failover.lost is None:  # otherwise no peer is named
            kind = WrongKey if isinstance(error, WrongKey) else PeerGone
            gone = kind(f"the encode worker cannot be reached: {reason_of(error)}", room=self.room)
            self._peer_failed(gone, now, tell=False)

    def abort(self, error: EmbeddingTransferError, now: float) -> None:
        """Ends the transfer with ``error`` and tells the sender. Does nothing if it has ended already."""
        self._fail(as_error(error, room=self.room), now, tell=True)

    def clear(self, now: float) -> None:
        """The caller needs the transfer no longer: drains what is in flight, then releases everything it holds."""
        if self.phase not in TERMINAL:
            self._fail(Aborted("cleared by the language side", room=self.room), now, tell=True)
        self._release_held()

    # Messages from the peer

    def receive(self, source: int, target: int, body: Body, now: float) -> None:
        """Handles a message. Stale, repeated and misdirected messages do no harm.

        A peer that breaks the protocol ends the transfer with :class:`~.errors.RemoteProtocolError`, an embedding
        that is too long ends it with :class:`~.errors.CapacityError`.
        """
        is_unnamed = self.failover.lost is not None and self.phase not in TERMINAL  # the next peer is not known yet
        if is_unnamed or not guards.meant_for_this_session(target, self.session):
            return
        self.history.received(body, now)
        try:
            self._dispatch(source, body, now)
        except (RemoteProtocolError, IntegrityError, CapacityError) as error:
            error.room, self.peer = self.room, source
            self._fail(error.with_traceback(None), now, tell=True)  # which would keep the frames of the driver

    def _dispatch(self, source: int, body: Body, now: float) -> None:
        if isinstance(body, Offer):
            self._offered(source, body, now)
            return
        if isinstance(body, Unknown):
            if self.peer and body.missing == self.peer:
                self.peer_knows = self.phase in TERMINAL
                self.peer_lost(now)
            return
        if not self.peer:
            if isinstance(body, Pending) and body.epoch == 0:  # the worker waits for its own sender; others are late
                self.heard_at = now
            elif isinstance(body, Closed):
                self.peer_knows = self.phase in TERMINAL
            elif isinstance(body, Abort) and guards.answers_current_generation(body.generation, self.generation):
                own = self._transport_error if isinstance(body.error, TransportError) else None  # none left is shared
                self._peer_failed(own or body.error, now, tell=own is not None)
            return
        if not guards.from_current_peer(source, self.peer):
            return
        self.heard_at = now
        match body:  # Pending is only a sign of life; messages from receivers to senders do not concern this end
            case Written():
                self._written(body)
            case WriteFailed():
                self._write_failed(body, now)
            case Drained():
                self._drained(source, body)
            case Closed():
                self.peer_knows = self.phase in TERMINAL
            case Abort():
                self._peer_failed(body.error, now, tell=False)

    def _offered(self, source: int, offer: Offer, now: float) -> None:
        is_foreign = self.peer and not guards.from_current_peer(source, self.peer)
        if is_foreign or not source or not guards.answers_current_generation(offer.generation, self.generation):
            return  # session 0 has no room to offer
        if self.phase in TERMINAL:
            self._offered_after_end(source, offer)
            return
        self.heard_at = now
        self.announcements.add(source, offer)
        token_bytes, limit = self.geometry.layout.token_bytes, self.settings.max_embedding_bytes
        check_offer(offer, self.transports, token_bytes, limit, self.max_tokens)
        if offer.total_tokens >= 0 and not continues(offer, self.total_tokens, self.content_digest):
            self._start_over()
        if not self.peer or (offer.total_tokens >= 0 and self.total_tokens < 0):
            self.progress_at = now
        if offer.transport != self.transport:
            self.retry_policy.transport_changed()
        self.peer, self.transport, self.address = source, offer.transport, offer.address
        self.phase = step(RECEIVER, self.phase, Trigger.OFFERED)
        if offer.total_tokens >= 0:
            self.offered = True
            self._offer_timeout = self.settings.bootstrap_timeout
            self.total_tokens, self.content_digest, self.aux = offer.total_tokens, offer.content_digest, offer.aux
            for epoch, spare in self.ledger.trim(self.total_tokens):
                self._commands += [CloseBlocks(epoch, spare), Release(spare)]
            self._complete(now)

    def _offered_after_end(self, source: int, offer: Offer) -> None:
        """A sender that answers after this receiver has ended without a peer is told how it ended."""
        if not self.peer and (self.phase is Phase.FAILED or offer.content_digest == self.content_digest):
            self.peer, self.peer_knows = source, False
            self._send(self._outcome())

    def _start_over(self) -> None:
        """Another sender has another content. Every grant of the last one has been revoked."""
        if self.committed:
            why = "the encode side now offers another content for this room, and the first has been used; ask again"
            raise IntegrityError(why, retryable=True)
        self._commands.append(Restart())
        self._release_held()
        self.ledger.start_over()

    def _written(self, body: Written) -> None:
        for chunk in body.chunks:
            check_chunk(chunk, verify=self.settings.verify)
            if blocks := self._take_chunk(body.epoch, chunk.offset, chunk.length):
                self.ledger.checking[body.epoch, chunk.offset] = Check(chunk.length, blocks)
                self._commands.append(Verify(body.epoch, chunk.offset, chunk.length, blocks, chunk.checksum))

    def _write_failed(self, body: WriteFailed, now: float) -> None:
        grant = self.ledger.grants.get(body.epoch)
        blocks = self._take_chunk(body.epoch, body.offset, body.length)
        if grant and blocks:
            self._commands.append(Release(blocks))
            if grant.transport == self.transport:  # failures of a transport that was given up no longer count
                self._bad_chunk(body.error, now)

    def _take_chunk(self, epoch: int, offset: int, length: int) -> tuple[int, ...] | None:
        """Returns the blocks of a reported chunk, closed to their writer before anything reads them."""
        if self.phase in TERMINAL or not guards.content_is_known(self.offered):
            return None  # without the length, the end of the last chunk is unknown; the sender will report it again
        blocks = self.ledger.take_chunk(epoch, offset, offset + length)
        if blocks:
            self._commands.append(CloseBlocks(epoch, blocks))
        return blocks

    def _bad_chunk(self, error: EmbeddingTransferError, now: float) -> None:
        """Requests a bad chunk again, alone, unless that has happened too often or cannot help."""
        if not self.retry_policy.bad_chunk(now) or not (error.retryable or isinstance(error, IntegrityError)):
            self._peer_failed(error, now, tell=True)

    def _complete(self, now: float) -> None:
        if self.total_tokens < 0 or self.transferred_tokens < self.total_tokens or self.phase in TERMINAL:
            return
        self.phase = step(RECEIVER, self.phase, Trigger.COMPLETED)
        self.ended_at = now
        for grant in self.ledger:
            self._drain(grant, now)
        self._send(self._outcome())
        self.retry_policy.asked(now)

    # Quarantine

    def _drain(self, grant: OutstandingGrant, now: float) -> None:
        if not grant.draining:
            grant.draining = True
            grant.drain_deadline = now + self.settings.drain_timeout
            self._send(Drain(self.room, (grant.epoch,)))
            self._close(grant)

    def _drained(self, source: int, body: Drained) -> None:
        for epoch in body.epochs:
            grant = self.ledger.grants.get(epoch)
            if grant is not None and grant.draining and guards.is_the_writer(source, grant.writer):
                grant.drained = True
                self._close(grant)

    def _revoke(self, grant: OutstandingGrant) -> None:
        if not grant.revoking:
            grant.revoking = True
            self._commands.append(Revoke(grant.epoch))
            self._close(grant)

    def _close(self, grant: OutstandingGrant) -> None:
        if blocks := self.ledger.close(grant):
            self._commands += [CloseBlocks(grant.epoch, blocks), Release(blocks)]

    # Time

    def next_timeout(self) -> float | None:
        """Returns when :meth:`expire` has something to do, or None."""
        times = [g.drain_deadline for g in self.ledger.grants.values() if g.draining and not g.revoking]
        if self._awaits_answer():
            times.append(self.retry_policy.retry_at)
        if self.phase not in TERMINAL:
            if self.retry_policy.pause_until is not None:
                times.append(self.retry_policy.pause_until)
            times += [time for time, _ in self.deadlines()]
        return min(times, default=None)

    def expire(self, now: float) -> None:
        """Repeats what was not answered, revokes what was not drained, ends what is overdue."""
        self.retry_policy.advance(now)
        for grant in self.ledger:
            if grant.draining and now >= grant.drain_deadline:
                self._revoke(grant)
        for deadline, error in self.deadlines() if self.phase not in TERMINAL else []:
            if now >= deadline:
                self._peer_failed(error(), now, tell=True)
                break
        if self._awaits_answer() and now >= self.retry_policy.retry_at:
            self.retry_policy.asked_again(now)
            for body in self._unanswered():
                self._send(body)

    def deadlines(self) -> list[Deadline]:
        """Returns the deadlines of everything that the transfer waits for from the peer.

        A receiver that waits for blocks of its own pool has none: the pool is fair, and the peer is not late.
        """
        if (lost := self.failover.lost) is not None:
            return [(self.failover.until, lambda: lost)]
        heard_at = max(self.heard_at, self.asked_at)
        if not self.peer:
            resumes_at = None if self.phase is Phase.BOOTSTRAPPING else self.transferred_tokens
            return without_peer(self.settings, self.room, heard_at, self.asked_at, resumes_at, self._offer_timeout)
        if not self.ledger.is_active and self.offered:
            return []
        tokens = None if self.phase is Phase.WAITING_FOR_INPUT else self.transferred_tokens
        return with_peer(self.settings, self.room, heard_at, self.progress_at, tokens)

    # Requests, repeated until they are answered

    def _unanswered(self) -> list[Body]:
        """Returns every request that has no answer yet; at least a sign of life. Repeating them does no harm."""
        draining = [g.epoch for g in self.ledger if g.draining and guards.is_the_writer(self.peer, g.writer)]
        requests: list[Body] = [Drain(self.room, tuple(draining))] if draining else []
        if self.phase in TERMINAL:
            return requests if self.peer_knows else [*requests, self._outcome()]
        if self.failover.lost is not None:
            return requests  # no peer is named
        if not self.offered:
            requests.append(self._open_message())
        requests += [grant.message(self.room, self.ledger.floor) for grant in self.ledger.active]
        return requests if self.ledger.active else [*requests, self._progress()]

    def _awaits_answer(self) -> bool:
        """Whether an answer is outstanding, or the peer expects a sign of life."""
        over = self.peer_knows or self._has_lingered(self.retry_policy.retry_at)
        return self.phase not in TERMINAL or bool(self.ledger.grants) or not over

    def _has_lingered(self, now: float) -> bool:
        return now >= self.ended_at + self.settings.linger

    def _open_message(self) -> Open:
        region = self.geometry, self.endpoint, self.transports
        return Open(self.room, self.generation, VERSIONS, *region, self.transferred_tokens, self.settings.verify)

    def _progress(self) -> Progress:
        tokens = self.transferred_tokens if guards.content_is_known(self.offered) else 0  # the peer may have another
        return Progress(self.room, tokens, self.ledger.floor)

    def _outcome(self) -> Confirm | Abort:
        """Returns the message that tells the sender how the transfer ended."""
        return Confirm(self.room, self.total_tokens) if self.error is None else Abort.because_of(self.error, self.room)

    # Output

    def take_commands(self) -> list[ReceiverCommand]:
        """Returns the commands issued since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    def poll(self) -> KVPoll:
        """Returns the state as the queues know it."""
        return POLL[self.phase]

    def settled(self, now: float) -> bool:
        """Returns whether this end can be forgotten: no block is out, and no peer waits for its answer."""
        out = self.ledger.grants or self.ledger.checking or self.ledger.held
        return self.phase in TERMINAL and not out and (not self._awaits_answer() or self._has_lingered(now))

    def _open(self, now: float) -> None:
        self.generation += 1
        self.asked_at = now
        self._send(self._open_message())
        self.retry_policy.asked(now)

    def _leave_peer(self) -> None:
        """Forgets the peer and revokes every grant that it may still write under."""
        self.phase = step(RECEIVER, self.phase, Trigger.PEER_LOST)
        self.peer, self.offered = 0, False
        for grant in self.ledger:
            grant.draining = True
            self._revoke(grant)

    def _peer_failed(self, error: EmbeddingTransferError, now: float, *, tell: bool) -> None:
        """Ends the transfer, unless the caller may still name another peer."""
        if self.phase in TERMINAL or not self.failover.begins(error, now):
            self._fail(error, now, tell=tell)
        else:
            self.generation += 1  # invalidates what the last peer may still say
            if self.peer:
                self._leave_peer()

    def _fail(self, error: EmbeddingTransferError, now: float, *, tell: bool) -> None:
        if self.phase in TERMINAL:
            return
        self.history.called("fail", error.code, now)
        self.phase = step(RECEIVER, self.phase, Trigger.FAILED)
        self.error, self.ended_at, self.peer_knows = error, now, not tell
        for grant in self.ledger:
            self._drain(grant, now)
        if tell:
            self._send(self._outcome())
        self.retry_policy.asked(now)

    def _release_held(self) -> None:
        for epoch, offset in list(self.ledger.held):
            self.consumed(epoch, offset)

    def _send(self, body: Body) -> None:
        if self.peer or isinstance(body, Open | Abort):  # to the sender of the room, whichever it is
            self.history.sent(body, self.peer)
            self._commands.append(Send(body, self.peer))
