"""The receiving end of one transfer: everything that affects its state is here.

It drives. It opens, grants blocks, verifies what arrives, asks again for what is bad or missing, and repeats every
question until it is answered or out of time. Blocks are never its own: they are granted to it by the pool and go back
through :class:`~.commands.Release`, each exactly once.
"""

from __future__ import annotations

from . import guards
from .commands import Admit, CloseBlocks, Deliver, ReceiverCommand, Release, Restart, Revoke, Send, Verify
from .deadlines import deadlines, lost_too_often, next_time
from .errors import Aborted, EmbeddingTransferError, IntegrityError, LocalProtocolError, RemoteProtocolError
from .failover import Failover
from .layout import Geometry, merged
from .ledger import Check, Ledger, OutstandingGrant
from .messages import (
    MAX_RUNS,
    Abort,
    Body,
    Closed,
    Drain,
    Drained,
    Offer,
    Open,
    TransportAddress,
    Unknown,
    WriteFailed,
    Written,
)
from .retransmission import has_lingered, is_asking, last_word, opening, progress, unanswered
from .retry_policy import RetryPolicy
from .settings import TransferSettings
from .states import POLL, RECEIVER, TERMINAL, KVPoll, Phase, Trigger, step
from .validation import MAX_OUTSTANDING, check_chunk, check_offer, goes_on


class Receiver:
    """:param room: the ``bootstrap_room``.
    :param session: of this end; never 0, never used before.
    :param geometry: of the region that will be written into.
    :param endpoint: where this end takes messages.
    :param transports: the transports by which the region can be reached.
    :param failover_timeout: how long another peer may be named after a loss; None: the loss is the end.
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
    ) -> None:
        self.room, self.session, self.settings = room, session, settings
        self.geometry, self.endpoint, self.transports = geometry, endpoint, transports
        self.phase = Phase.BOOTSTRAPPING
        self.error: EmbeddingTransferError | None = None
        self.peer = 0  # the sender session whose offer was taken up; 0: none
        self.transport, self.address = "", b""  # the one in use, and where the sender's end of it is
        self.total_tokens = -1
        self.content_digest: bytes | None = None
        self.aux: tuple[int, ...] = ()
        self.ledger = Ledger()
        self.committed = False  # set by the driver: tokens were used in a way that cannot be undone
        self.opening = self.transfers = 0  # grants made: the first is the initial transfer, the others are resumed
        self.offered = False  # the peer has said what it has
        self.retry_policy = RetryPolicy(settings, now)
        self.failover = Failover(failover_timeout)
        self.asked_at = self.heard_at = self.progress_at = self.ended_at = now
        self.peer_knows = False  # how it ended
        self._commands: list[ReceiverCommand] = []
        self._open(now)

    # What the pool and the driver know

    @property
    def transferred_tokens(self) -> int:
        """Tokens from 0 on that are verified without a gap. Never decreases while the content is the same."""
        return self.ledger.verified.prefix

    def wanted(self, now: float) -> tuple[int, int] | None:
        """The next tokens that need blocks, as (offset, length), or None: nothing can be granted now."""
        if self.phase in TERMINAL or not self.peer or len(self.ledger.grants) >= MAX_OUTSTANDING:
            return None
        if self.retry_policy.pauses(now):
            return None
        if self.total_tokens >= 0:
            return self.ledger.missing(self.total_tokens) if guards.content_is_known(self.offered) else None
        return (0, self.settings.default_allocate_tokens) if self.ledger.untouched() else None  # one, of unknown length

    def grant(self, blocks: tuple[int, ...], epoch: int, now: float) -> int:
        """Blocks for the next wanted tokens, under a new ``epoch`` (ascending). Answers the tokens granted.

        :raises LocalProtocolError: nothing is wanted, or more blocks than that takes: ask :meth:`wanted` first; or in
            more than ``MAX_RUNS`` runs.
        """
        wanted = self.wanted(now)
        size = self.geometry.block_size
        if wanted is None or not 0 < len(blocks) <= -(-wanted[1] // size) or epoch < self.ledger.next_epoch:
            raise LocalProtocolError(f"{len(blocks)} blocks for {wanted} under epoch {epoch}", room=self.room)
        if sum(1 for _ in merged(blocks)) > MAX_RUNS:
            raise LocalProtocolError(f"more than {MAX_RUNS} runs of blocks in one grant", room=self.room)
        tokens = min(wanted[1], len(blocks) * size)
        if not self.ledger.active and not self.ledger.checking:
            self.progress_at = self.asked_at = now  # it was starved until now, which is nobody's fault
        grant = OutstandingGrant(epoch, self.peer, wanted[0], tokens, blocks, size, self.transport)
        self.ledger.open(grant)
        self.transfers += 1
        self._commands.append(Admit(epoch, blocks, self.transport, self.address))
        self._send(grant.message(self.room, self.ledger.floor))
        self.retry_policy.asked(now)
        return tokens

    def verified_chunk(self, epoch: int, offset: int, *, matches: bool, now: float) -> None:
        """The answer to a :class:`~.commands.Verify` command: whether the bytes have the announced checksum."""
        check = self.ledger.checking.pop((epoch, offset))
        stop = offset + check.length
        outdated = self.phase in TERMINAL or check.outdated
        if outdated or not guards.may_count(matches):
            self._commands.append(Release(check.blocks))
            if not outdated:
                self._bad(IntegrityError(f"tokens [{offset}, {stop}) arrived damaged", room=self.room), now)
            return
        self.ledger.verified.add(offset, stop)
        self.ledger.held[epoch, offset] = check.blocks
        self._commands.append(Deliver(epoch, offset, check.length, check.blocks))
        self.progress_at = now
        self.retry_policy.good()
        if self.retry_policy.may_acknowledge(now):
            self._send(progress(self))
        self.phase = step(RECEIVER, self.phase, Trigger.DELIVERED)
        self._complete(now)

    def consumed(self, epoch: int, offset: int) -> None:
        """The delivered chunk's blocks are no longer read."""
        blocks = self.ledger.held.pop((epoch, offset), None)
        if blocks:
            self._commands.append(Release(blocks))

    def revoked(self, epoch: int) -> None:
        """The peer's access under ``epoch`` is gone for good."""
        grant = self.ledger.grants.get(epoch)
        if grant is not None:
            grant.revoked = True
            self._close(grant)

    def peer_lost(self, now: float) -> None:
        """The peer is dead, unreachable or to be replaced: take its access away and look for whoever goes on.

        Also before it was found: what those who were asked so far may still answer does not count any more."""
        if self.phase in TERMINAL:
            for grant in self.ledger:
                self._revoke(grant)
        elif not self.peer:
            self._open(now)
        else:
            self._part()
            if self.retry_policy.lost():
                self._open(now)
            else:
                self._lost(lost_too_often(self), now, tell=False)

    def redirected(self, now: float) -> None:
        """Another peer is named: what went wrong with the last one is over."""
        self.failover.lost = None
        self.retry_policy.peer_changed()
        self.peer_lost(now)

    def abort(self, error: EmbeddingTransferError, now: float) -> None:
        """Ends the transfer; the sender is told why. Does nothing when it has ended already."""
        self._fail(error, now, tell=True)

    def clear(self, now: float) -> None:
        """The caller is through with it: what it holds goes back, what is in flight is drained first."""
        self._fail(Aborted("cleared by the language side", room=self.room), now, tell=True)
        self._let_go()

    def _let_go(self) -> None:
        for epoch, offset in list(self.ledger.held):
            self.consumed(epoch, offset)

    # What the peer says

    def receive(self, source: int, target: int, body: Body, now: float) -> None:
        """Takes a message in. Stale, repeated and misdirected ones do no harm.

        A peer that breaks the protocol ends the transfer with :class:`RemoteProtocolError`."""
        if not guards.meant_for_this_session(target, self.session):
            return
        try:
            self._heard(source, body, now)
        except (RemoteProtocolError, IntegrityError) as error:
            error.room, self.peer = self.room, source
            self._fail(error, now, tell=True)

    def _heard(self, source: int, body: Body, now: float) -> None:
        if isinstance(body, Offer):
            self._offered(source, body, now)
            return
        if isinstance(body, Unknown):
            if self.peer and body.missing == self.peer:
                self.peer_knows = self.phase in TERMINAL
                self.peer_lost(now)
            return
        if isinstance(body, Abort) and not self.peer:
            if guards.answers_latest_opening(body.opening, self.opening):
                self._lost(body.error, now, tell=False)
            return
        if not guards.from_current_peer(source, self.peer):
            return
        self.heard_at = now
        match body:
            case Written():
                self._written(body)
            case WriteFailed():
                self._write_failed(body, now)
            case Drained():
                self._drained(source, body)
            case Closed():
                self.peer_knows = self.phase in TERMINAL
            case Abort():
                self._lost(body.error, now, tell=False)
            case _:
                pass  # Pending is a sign of life, no more; what a receiver asks is not for a receiver

    def _offered(self, source: int, offer: Offer, now: float) -> None:
        if not guards.answers_latest_opening(offer.opening, self.opening):
            return
        if self.peer and not guards.from_current_peer(source, self.peer):
            return
        if self.phase in TERMINAL:
            self._late_offer(source, offer)
            return
        self.heard_at = now
        check_offer(offer, self.transports)
        if offer.total_tokens >= 0 and not goes_on(offer, self.total_tokens, self.content_digest):
            self._start_over(now)
        if not self.peer or (offer.total_tokens >= 0 and self.total_tokens < 0):
            self.progress_at = now
        if offer.transport != self.transport:
            self.retry_policy.transport_changed()
        self.peer, self.transport, self.address = source, offer.transport, offer.address
        self.phase = step(RECEIVER, self.phase, Trigger.OFFERED)
        if offer.total_tokens >= 0:
            self.offered = True
            self.total_tokens, self.content_digest, self.aux = offer.total_tokens, offer.content_digest, offer.aux
            for epoch, spare in self.ledger.trim(self.total_tokens):
                self._commands += [CloseBlocks(epoch, spare), Release(spare)]
            self._complete(now)

    def _late_offer(self, source: int, offer: Offer) -> None:
        """Who found no peer before its end tells whoever comes too late."""
        if not self.peer and (self.phase is Phase.FAILED or offer.content_digest == self.content_digest):
            self.peer, self.peer_knows = source, False
            self._send(last_word(self))

    def _start_over(self, now: float) -> None:
        if self.committed:
            why = "the encode side now offers another content for this room, and the first has been used; ask again"
            raise IntegrityError(why, retryable=True)
        self._commands.append(Restart())
        self._let_go()
        self.ledger.start_over()
        for grant in self.ledger.active:
            self._drain(grant, now)

    def _written(self, body: Written) -> None:
        for chunk in body.chunks:
            check_chunk(chunk, verify=self.settings.verify)
            blocks = self._take(body.epoch, chunk.offset, chunk.length)
            if blocks:
                self.ledger.checking[body.epoch, chunk.offset] = Check(chunk.length, blocks)
                self._commands.append(Verify(body.epoch, chunk.offset, chunk.length, blocks, chunk.checksum))

    def _write_failed(self, body: WriteFailed, now: float) -> None:
        grant = self.ledger.grants.get(body.epoch)
        blocks = self._take(body.epoch, body.offset, body.length)
        if grant and blocks:
            self._commands.append(Release(blocks))
            if grant.transport == self.transport:  # a transport that was given up is nobody's setback
                self._bad(body.error, now)

    def _take(self, epoch: int, offset: int, length: int) -> tuple[int, ...] | None:
        """The blocks of a reported chunk, closed to their writer before anybody looks at them."""
        if self.phase in TERMINAL or not guards.content_is_known(self.offered):
            return None  # without the length, where the last chunk ends is not known; it will be reported again
        blocks = self.ledger.take_chunk(epoch, offset, offset + length)
        if blocks:
            self._commands.append(CloseBlocks(epoch, blocks))
        return blocks

    def _bad(self, error: EmbeddingTransferError, now: float) -> None:
        """A chunk is bad; it alone is asked for again, unless that has happened too often or cannot help."""
        if not self.retry_policy.bad(now) or not (error.retryable or isinstance(error, IntegrityError)):
            self._lost(error, now, tell=True)

    def _complete(self, now: float) -> None:
        if self.total_tokens < 0 or self.transferred_tokens < self.total_tokens or self.phase in TERMINAL:
            return
        self.phase = step(RECEIVER, self.phase, Trigger.COMPLETED)
        self.ended_at = now
        for grant in self.ledger:
            self._drain(grant, now)
        self._send(last_word(self))
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
        blocks = self.ledger.close(grant)
        if blocks:
            self._commands += [CloseBlocks(grant.epoch, blocks), Release(blocks)]

    # Time

    def next_timeout(self) -> float | None:
        """When :meth:`expire` has something to do, or None."""
        return next_time(self)

    def expire(self, now: float) -> None:
        """Time has passed: repeat what was not answered, revoke what was not drained, give up what is overdue."""
        self.retry_policy.passed(now)
        for grant in self.ledger:
            if grant.draining and now >= grant.drain_deadline:
                self._revoke(grant)
        for deadline, why in deadlines(self) if self.phase not in TERMINAL else []:
            if now >= deadline:
                self._lost(why(self), now, tell=True)
                break
        if is_asking(self) and now >= self.retry_policy.retry_at:
            self.retry_policy.asked_again(now)
            for body in unanswered(self):
                self._send(body)

    # What comes out

    def take_commands(self) -> list[ReceiverCommand]:
        """What is to be done since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    def poll(self) -> KVPoll:
        """The state as the queues know it."""
        return POLL[self.phase]

    def settled(self, now: float) -> bool:
        """Whether nothing depends on this end any more: no block is out, nobody waits for its answer."""
        out = self.ledger.grants or self.ledger.checking or self.ledger.held
        return self.phase in TERMINAL and not out and (not is_asking(self) or has_lingered(self, now))

    def _open(self, now: float) -> None:
        self.opening += 1
        self.asked_at = now
        self._send(opening(self))
        self.retry_policy.asked(now)

    def _part(self) -> None:
        """With the peer: what it may still write to is taken from it."""
        self.phase = step(RECEIVER, self.phase, Trigger.PEER_LOST)
        self.peer, self.offered = 0, False
        for grant in self.ledger:
            grant.draining = True
            self._revoke(grant)

    def _lost(self, error: EmbeddingTransferError, now: float, *, tell: bool) -> None:
        """The peer is of no use: the end, unless another one may be named."""
        if self.phase in TERMINAL or not self.failover.awaits(error, now):
            self._fail(error, now, tell=tell)
        else:
            self.opening += 1  # nothing counts that is still said to the last one
            if self.peer:
                self._part()

    def _fail(self, error: EmbeddingTransferError, now: float, *, tell: bool) -> None:
        if self.phase in TERMINAL:
            return
        self.phase = step(RECEIVER, self.phase, Trigger.FAILED)
        self.error = error
        self.ended_at = now
        self.peer_knows = not tell
        for grant in self.ledger:
            self._drain(grant, now)
        if tell:
            self._send(last_word(self))
        self.retry_policy.asked(now)

    def _send(self, body: Body) -> None:
        if self.peer or isinstance(body, Open):
            self._commands.append(Send(body, self.peer))
