"""The receiving end of one transfer: everything that affects its state is here.

It drives. It opens, grants blocks, verifies what arrives, asks again for what is bad or missing, and repeats every
question until it is answered or out of time. Blocks are never its own: they are granted to it by the pool and go back
through :class:`~.commands.Release`, each exactly once.
"""

from __future__ import annotations

from . import guards
from .commands import Admit, CloseBlocks, Deliver, ReceiverCommand, Release, Restart, Revoke, Send, Verify
from .deadlines import deadlines
from .errors import (
    Aborted,
    EmbeddingTransferError,
    IntegrityError,
    LocalProtocolError,
    RemoteProtocolError,
    from_code,
)
from .layout import Geometry
from .ledger import Ledger, OutstandingGrant
from .messages import (
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
    Road,
    Unknown,
    WriteFailed,
    Written,
)
from .ranges import RangeSet
from .settings import TransferSettings
from .states import POLL, RECEIVER, TERMINAL, KVPoll, Phase, Trigger, step


class Receiver:
    """:param room: the ``bootstrap_room``.
    :param session: of this end; never 0, never used before.
    :param geometry: of the region that will be written into.
    :param endpoint: where this end takes messages.
    :param roads: the transports by which the region can be reached.
    """

    def __init__(
        self,
        room: int,
        session: int,
        geometry: Geometry,
        endpoint: str,
        roads: tuple[Road, ...],
        settings: TransferSettings,
        now: float,
    ) -> None:
        self.room = room
        self.session = session
        self.geometry = geometry
        self.endpoint = endpoint
        self.roads = roads
        self.settings = settings
        self.phase = Phase.BOOTSTRAPPING
        self.error: EmbeddingTransferError | None = None
        self.peer = 0  # the sender session whose offer was taken up; 0: none
        self.road = ""
        self.total_tokens = -1
        self.content_digest: bytes | None = None
        self.aux: tuple[int, ...] = ()
        self.verified = RangeSet()
        self.ledger = Ledger()
        self.held: dict[tuple[int, int], tuple[int, ...]] = {}  # (epoch, offset): verified blocks a consumer reads
        self.checking: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}  # (epoch, offset): (length, blocks)
        self.committed = False  # set by the driver: tokens were used in a way that cannot be undone
        self.transfers = 0  # grants made: the first is the initial transfer, the others are resumed
        self.bad_chunks = 0
        self._bad_in_a_row = 0
        self._pause_until = now
        self._outdated: set[tuple[int, int]] = set()  # being checked, of a content that has been replaced
        self._opening = 0
        self._confirmed = False
        self.asked_at = self.heard_at = self.progress_at = self._ended_at = now
        self._retry_interval = settings.retry_interval
        self._retry_at = now
        self._commands: list[ReceiverCommand] = []
        self._open(now)

    # What the pool and the driver know

    @property
    def transferred_tokens(self) -> int:
        """Tokens from 0 on that are verified without a gap. Never decreases while the content is the same."""
        return self.verified.prefix

    def wanted(self, now: float) -> tuple[int, int] | None:
        """The next tokens that need blocks, as (offset, length), or None: nothing can be granted now."""
        if self.phase in TERMINAL or not self.peer or now < self._pause_until:
            return None
        spoken_for = self.ledger.claimed()
        for start, stop in self.verified:
            spoken_for.add(start, stop)
        for (_, offset), (length, _) in self.checking.items():
            spoken_for.add(offset, offset + length)
        if self.total_tokens >= 0:
            gap = spoken_for.first_gap(0, self.total_tokens)
        else:  # the length is not known yet: one default allocation, no more
            gap = None if spoken_for else (0, self.settings.default_allocate_tokens)
        return None if gap is None else (gap[0], gap[1] - gap[0])

    def grant(self, blocks: tuple[int, ...], epoch: int, now: float) -> int:
        """Blocks for the next wanted tokens, from the pool, under a new ``epoch`` (ascending). Answers the tokens granted.

        :raises LocalProtocolError: nothing is wanted, or more blocks than that takes: ask :meth:`wanted` first.
        """
        wanted = self.wanted(now)
        size = self.geometry.block_size
        if wanted is None or not 0 < len(blocks) <= -(-wanted[1] // size) or epoch < self.ledger.next_epoch:
            raise LocalProtocolError(f"{len(blocks)} blocks for {wanted} under epoch {epoch}", room=self.room)
        tokens = min(wanted[1], len(blocks) * size)
        if not self.ledger.active and not self.checking:
            self.progress_at = self.asked_at = now  # it was starved until now, which is nobody's fault
        grant = OutstandingGrant(epoch, wanted[0], tokens, blocks, size)
        self.ledger.open(grant)
        self.transfers += 1
        self._commands.append(Admit(epoch, blocks))
        self._send(grant.message(self.room, self.ledger.floor))
        self._repeat_soon(now)
        return tokens

    def verified_chunk(self, epoch: int, offset: int, *, matches: bool, now: float) -> None:
        """The answer to a :class:`~.commands.Verify` command: whether the bytes have the announced checksum."""
        length, blocks = self.checking.pop((epoch, offset))
        outdated = (epoch, offset) in self._outdated
        self._outdated.discard((epoch, offset))
        if self.phase in TERMINAL or outdated or not guards.may_count(matches):
            self._commands.append(Release(blocks))
            if self.phase not in TERMINAL and not outdated:
                self._bad(IntegrityError(f"tokens [{offset}, {offset + length}) arrived damaged", room=self.room), now)
            return
        self.verified.add(offset, offset + length)
        self.held[epoch, offset] = blocks
        self._commands.append(Deliver(epoch, offset, length, blocks))
        self.progress_at = now
        self._bad_in_a_row = 0
        self._send(Progress(self.room, self.transferred_tokens, self.ledger.floor))
        self.phase = step(RECEIVER, self.phase, Trigger.DELIVERED) if self.phase in _DELIVERS else self.phase
        self._complete(now)

    def consumed(self, epoch: int, offset: int) -> None:
        """The delivered chunk's blocks are no longer read."""
        blocks = self.held.pop((epoch, offset), None)
        if blocks:
            self._commands.append(Release(blocks))

    def revoked(self, epoch: int) -> None:
        """The peer's access under ``epoch`` is gone for good."""
        self._close(epoch, revoked=True)

    def peer_lost(self, now: float) -> None:
        """The connection broke, or the peer is known to be dead: take its access away and look for whoever goes on."""
        if self.phase in TERMINAL:
            for grant in self.ledger:
                self._revoke(grant)
            return
        if not self.peer:
            return
        self.phase = step(RECEIVER, self.phase, Trigger.PEER_LOST)
        self.peer = 0
        for grant in self.ledger:
            grant.draining = True
            self._revoke(grant)
        self._open(now)

    def abort(self, error: EmbeddingTransferError, now: float) -> None:
        """Ends the transfer; the sender is told why. Does nothing when it has ended already."""
        self._fail(error, now, tell=True)

    def clear(self, now: float) -> None:
        """The caller is through with it: whatever it still holds goes back, what is in flight is drained first."""
        self._fail(Aborted("cleared by the language side", room=self.room), now, tell=True)
        for epoch, offset in list(self.held):
            self.consumed(epoch, offset)

    # What the peer says

    def receive(self, source: int, target: int, body: Body, now: float) -> None:
        """Takes a message in. Stale, repeated and misdirected ones do no harm.

        A peer that breaks the protocol ends the transfer with :class:`RemoteProtocolError`."""
        if not guards.meant_for_this_session(target, self.session):
            return
        if isinstance(body, Offer):
            self._offered(source, body, now)
            return
        if isinstance(body, Abort) and (not self.peer or source == self.peer):
            self._fail(from_code(body.code, body.detail, room=self.room), now, tell=False)
            return
        if isinstance(body, Unknown):
            if body.missing == self.peer:
                self.peer_lost(now)
            return
        if not guards.from_current_peer(source, self.peer):
            return
        self.heard_at = now
        match body:
            case Pending():
                self._taken_up(body.epoch)
            case Written():
                self._written(body, now)
            case WriteFailed():
                self._write_failed(body, now)
            case Drained():
                for epoch in body.epochs:
                    self._close(epoch, drained=True)
            case Closed():
                self._confirmed = self.phase is Phase.SUCCESS or self._confirmed
            case _:
                pass  # a sender's question sent to a receiver

    def _offered(self, source: int, offer: Offer, now: float) -> None:
        if self.phase in TERMINAL or not guards.answers_latest_opening(offer.opening, self._opening):
            return
        if self.peer and not guards.from_current_peer(source, self.peer):
            return
        self.heard_at = now
        if offer.total_tokens >= 0 and not self._content(offer, now):
            return
        if not self.peer or (offer.total_tokens >= 0 and self.total_tokens < 0):
            self.progress_at = now
        self.peer, self.road = source, offer.road
        self.phase = step(RECEIVER, self.phase, Trigger.OFFERED)
        if offer.total_tokens >= 0:
            self.total_tokens, self.content_digest, self.aux = offer.total_tokens, offer.content_digest, offer.aux
            for epoch, spare in self.ledger.trim(self.total_tokens):
                self._commands += [CloseBlocks(epoch, spare), Release(spare)]
            self._complete(now)

    def _content(self, offer: Offer, now: float) -> bool:
        """Whether what is offered can go on from what is here: the same content, or a fresh start."""
        same_length = self.total_tokens in (-1, offer.total_tokens)
        if same_length and guards.same_content(self.content_digest, offer.content_digest):
            return True
        if self.committed:
            why = "the encode side now offers another content for this room, and the first has been used; ask again"
            self._fail(IntegrityError(why, room=self.room, retryable=True), now, tell=True)
            return False
        for epoch, offset in list(self.held):
            self.consumed(epoch, offset)
        self.verified = RangeSet()
        self._outdated.update(self.checking)
        for grant in self.ledger.active:
            self._drain(grant, now)
        self._commands.append(Restart())
        return True

    def _taken_up(self, epoch: int) -> None:
        grant = self.ledger.grants.get(epoch)
        if grant is not None:
            grant.taken_up = True

    def _written(self, body: Written, now: float) -> None:
        self._taken_up(body.epoch)
        for chunk in body.chunks:
            blocks = self._take(body.epoch, chunk.offset, chunk.length, now)
            if blocks:
                self.checking[body.epoch, chunk.offset] = (chunk.length, blocks)
                self._commands.append(Verify(body.epoch, chunk.offset, chunk.length, blocks, chunk.checksum))

    def _write_failed(self, body: WriteFailed, now: float) -> None:
        blocks = self._take(body.epoch, body.offset, body.length, now)
        if blocks:
            self._commands.append(Release(blocks))
            error = from_code(body.code, body.detail, room=self.room)
            error.retryable = body.retryable
            self._bad(error, now)

    def _take(self, epoch: int, offset: int, length: int, now: float) -> tuple[int, ...] | None:
        """The blocks of a reported chunk, closed to their writer before anybody looks at them."""
        grant = self.ledger.grants.get(epoch)
        if grant is None or self.phase in TERMINAL or self.total_tokens < 0:
            return None  # without the length, where the last chunk ends is not known; it will be reported again
        if not grant.is_whole_blocks(offset, offset + length):
            why = f"the encode side reported tokens [{offset}, {offset + length}) of [{grant.start}, {grant.stop})"
            self._fail(
                RemoteProtocolError(f"{why}, which are not whole blocks of the grant", room=self.room), now, tell=True
            )
            return None
        blocks = self.ledger.take_chunk(epoch, offset, offset + length)
        if blocks:
            self._commands.append(CloseBlocks(epoch, blocks))
        return blocks

    def _bad(self, error: EmbeddingTransferError, now: float) -> None:
        """A chunk is bad; it alone is asked for again, unless that has happened too often or cannot help."""
        self.bad_chunks += 1
        self._bad_in_a_row += 1
        hopeless = not error.retryable and not isinstance(error, IntegrityError)
        if hopeless or self._bad_in_a_row > self.settings.max_bad_chunks:
            self._fail(error, now, tell=True)
        elif self._bad_in_a_row > 1:  # once is chance; more often, whatever is broken gets time to mend
            pause = self.settings.retry_interval * 2 ** (self._bad_in_a_row - 2)
            self._pause_until = now + min(pause, self.settings.retry_limit)

    def _complete(self, now: float) -> None:
        if self.total_tokens < 0 or self.transferred_tokens < self.total_tokens or self.phase in TERMINAL:
            return
        self.phase = step(RECEIVER, self.phase, Trigger.COMPLETED)
        self._ended_at = now
        for grant in self.ledger:
            self._drain(grant, now)
        self._send(Confirm(self.room, self.total_tokens))
        self._repeat_soon(now)

    # Quarantine

    def _drain(self, grant: OutstandingGrant, now: float) -> None:
        if not grant.draining:
            grant.draining = True
            grant.drain_deadline = now + self.settings.drain_timeout
            self._send(Drain(self.room, (grant.epoch,)))

    def _revoke(self, grant: OutstandingGrant) -> None:
        if not grant.revoking:
            grant.revoking = True
            self._commands.append(Revoke(grant.epoch))

    def _close(self, epoch: int, *, drained: bool = False, revoked: bool = False) -> None:
        blocks = self.ledger.close(epoch, drained=drained, revoked=revoked)
        if blocks:
            self._commands += [CloseBlocks(epoch, blocks), Release(blocks)]

    # Time

    def next_timeout(self) -> float | None:
        """When :meth:`expire` has something to do, or None."""
        times = [grant.drain_deadline for grant in self.ledger if grant.draining and not grant.revoking]
        if self._is_asking():
            times.append(self._retry_at)
        if self.phase not in TERMINAL:
            if self._bad_in_a_row > 1:
                times.append(self._pause_until)
            times += [deadline for deadline, _ in deadlines(self)]
        return min(times, default=None)

    def expire(self, now: float) -> None:
        """Time has passed: repeat what was not answered, revoke what was not drained, give up what is overdue."""
        for grant in self.ledger:
            if grant.draining and now >= grant.drain_deadline:
                self._revoke(grant)
        for deadline, error in deadlines(self) if self.phase not in TERMINAL else []:
            if now >= deadline:
                self._fail(error, now, tell=True)
                break
        if self._is_asking() and now >= self._retry_at:
            self._ask_again(now)

    def _is_asking(self) -> bool:
        """Whether an answer is outstanding, or the peer expects a sign of life."""
        if self.phase is Phase.SUCCESS:
            return bool(self.ledger.grants) or not (self._confirmed or self._lingered(self._retry_at))
        if self.phase is Phase.FAILED:
            return bool(self.ledger.grants)
        return True

    def _ask_again(self, now: float) -> None:
        self._retry_interval = min(2 * self._retry_interval, self.settings.retry_limit)
        self._retry_at = now + self._retry_interval
        draining = tuple(grant.epoch for grant in self.ledger if grant.draining)
        if draining and self.peer:
            self._send(Drain(self.room, draining))
        if self.phase is Phase.SUCCESS and not self._confirmed:
            self._send(Confirm(self.room, self.total_tokens))
        if self.phase in TERMINAL:
            return
        if not self.peer or self.total_tokens < 0:
            self._send_open()
        for grant in self.ledger.active if self.peer else []:
            self._send(grant.message(self.room, self.ledger.floor))
        if self.peer and not self.ledger.active:
            self._send(Progress(self.room, self.transferred_tokens, self.ledger.floor))

    def _repeat_soon(self, now: float) -> None:
        self._retry_interval = self.settings.retry_interval
        self._retry_at = now + self._retry_interval

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
        out = self.ledger.grants or self.checking or self.held
        return self.phase in TERMINAL and not out and (not self._is_asking() or self._lingered(now))

    def _lingered(self, now: float) -> bool:
        return now >= self._ended_at + self.settings.linger

    def _open(self, now: float) -> None:
        self._opening += 1
        self.asked_at = now
        self._send_open()
        self._repeat_soon(now)

    def _send_open(self) -> None:
        geometry, roads = self.geometry, self.roads
        opening = Open(self.room, self._opening, VERSIONS, geometry, self.endpoint, roads, self.transferred_tokens)
        self._commands.append(Send(opening, self.peer))

    def _fail(self, error: EmbeddingTransferError, now: float, *, tell: bool) -> None:
        if self.phase in TERMINAL:
            return
        self.phase = step(RECEIVER, self.phase, Trigger.FAILED)
        self.error = error
        self._ended_at = now
        if tell and self.peer:
            self._send(Abort(self.room, error.code, error.detail[:1024]))
        for grant in self.ledger:
            self._drain(grant, now)
        self._repeat_soon(now)

    def _send(self, body: Body) -> None:
        self._commands.append(Send(body, self.peer))


_DELIVERS = {phase for phase, trigger in RECEIVER if trigger is Trigger.DELIVERED}
