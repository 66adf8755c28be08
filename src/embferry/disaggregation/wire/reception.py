"""One receiver's side of a room: what it asks for, and what it makes of the statuses it hears. Pure.

A status says too little: it names no round, so one that was repeated or is late looks like the next. What tells them
apart is progress, which the blocks themselves show; the caller looks (:class:`Evidence`). A status that the blocks do
not bear out is refused and changes nothing. So is every other that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from embferry.protocol.errors import (
    EmbeddingTransferError,
    LeaseExpired,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
)
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

from .frames import OriginWire

UNKNOWN_LENGTH = -1


class Evidence(Protocol):
    """What the blocks of a round show."""

    def total_tokens(self) -> int | None:
        """``aux_datas[0]`` of the first block, once it has been written; asked in the first round only."""
        ...

    def written(self, tokens: int) -> bool:
        """Whether the round's first ``tokens`` tokens show in its blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """What was asked for: tokens from ``sent_tokens`` on, into ``blocks``."""

    blocks: tuple[int, ...]
    sent_tokens: int
    allocated_tokens: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """``tokens`` tokens of the round are in its blocks, and nothing of it is on its way."""

    round: Round
    tokens: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A status that was refused; nothing has changed."""

    reason: str


class Reception:
    """``now`` is any clock that does not go back, in seconds.

    :param settings: ``bootstrap_timeout`` until the encode side is found, ``waiting_timeout`` until the initial request
        is answered, ``transfer_timeout`` until the rest is asked for, and for each answer about it. Waiting for
        the first blocks of one's own pool has none: the pool is fair.
    :param max_total_tokens: a longer embedding is refused.
    """

    def __init__(
        self, room: int, wire: OriginWire, settings: TransferSettings, max_total_tokens: int, now: float
    ) -> None:
        self.room, self.wire, self.settings = room, wire, settings
        self.max_total_tokens = max_total_tokens
        self.total_tokens = UNKNOWN_LENGTH
        self.transferred_tokens = 0
        self.round: Round | None = None
        """What is being waited for."""
        self.rounds = 0
        self.status = KVPoll.Bootstrapping
        self.error: EmbeddingTransferError | None = None
        self.deadline: float | None = now + settings.bootstrap_timeout

    @property
    def over(self) -> bool:
        return self.status in (KVPoll.Success, KVPoll.Failed)

    @property
    def needs_resume(self) -> bool:
        """Whether tokens remain that nobody has been asked for."""
        return self.status is KVPoll.Transferring and self.round is None

    def found(self) -> None:
        """It is known whom to ask."""
        if not self.rounds:
            self.deadline = None

    def ask(self, blocks: tuple[int, ...], now: float) -> Round:
        """The next request, with blocks that nobody else uses: the initial one, or a resume from where it stands.

        :raises LocalProtocolError: one is being waited for, or nothing remains.
        """
        if self.over or self.round is not None:
            raise LocalProtocolError("nothing remains to be asked for now", room=self.room)
        initial = self.rounds == 0
        self.round = Round(blocks, self.transferred_tokens, len(blocks) * self.wire.block_size)
        self.rounds += 1
        self.status = KVPoll.WaitingForInput if initial else KVPoll.Transferring
        self.deadline = now + (self.settings.waiting_timeout if initial else self.settings.transfer_timeout)
        return self.round

    def heard(self, status: KVPoll, evidence: Evidence | None, now: float) -> Arrived | Dropped | None:
        """The sender said ``status``. None: the room has failed, or nothing was said that matters.

        :param evidence: of :attr:`round`; None if there is none.
        """
        if self.over:
            return Dropped("the room is over")
        if status is KVPoll.Failed:
            self.fail(PeerGone("the encode side reported a failure; its log says why", room=self.room))
            return None
        if status not in (KVPoll.Transferring, KVPoll.Success):
            return None
        if self.round is None or evidence is None:
            return Dropped(f"{status.name}, but nothing was asked for: it was said before")
        total = self.total_tokens if self.total_tokens != UNKNOWN_LENGTH else evidence.total_tokens()
        if total is None:
            return Dropped(f"{status.name}, but aux_datas, which has the length, was not written")
        if not 0 <= total <= self.max_total_tokens:
            self.fail(RemoteProtocolError(f"aux_datas says {total} tokens; at most {self.max_total_tokens} are taken"))
            return None
        tokens = min(total - self.transferred_tokens, self.round.allocated_tokens)
        if not evidence.written(tokens):
            return Dropped(
                f"{status.name}, but its blocks do not have {tokens} new tokens: it was said before, or early"
            )
        return self._arrived(status, self.round, total, tokens, now)

    def fail(self, error: EmbeddingTransferError) -> None:
        """Ends it, unless it is over."""
        if not self.over:
            error.room = self.room
            self.status, self.error, self.deadline = KVPoll.Failed, error, None

    def tick(self, now: float) -> None:
        """Fails if it has waited for too long."""
        if self.deadline is not None and self.deadline <= now:
            self.fail(self._overdue())

    def _arrived(self, status: KVPoll, round: Round, total: int, tokens: int, now: float) -> Arrived | Dropped | None:
        rest = total - self.transferred_tokens - tokens
        if status is KVPoll.Success and rest:
            self.fail(RemoteProtocolError(f"the encode side reported success with {rest} of {total} tokens to go"))
            return None
        if status is KVPoll.Transferring and not rest:
            return Dropped("Transferring, but every token is here: an earlier one, said again; Success must follow")
        self.total_tokens = total
        self.transferred_tokens += tokens
        self.round = None
        self.deadline = now + self.settings.transfer_timeout if rest else None
        self.status = status
        return Arrived(round, tokens)

    def _overdue(self) -> EmbeddingTransferError:
        if not self.rounds:
            return PeerGone(f"no encode side was found within {self.settings.bootstrap_timeout:g} s")
        if self.round is None:
            return LeaseExpired(
                f"the rest, from token {self.transferred_tokens} on, was not asked for within "
                f"{self.settings.transfer_timeout:g} s: no blocks were free"
            )
        if self.rounds == 1:
            return LeaseExpired(f"the encode side has sent nothing for {self.settings.waiting_timeout:g} s")
        return LeaseExpired(
            f"no word for {self.settings.transfer_timeout:g} s about the rest, from token {self.transferred_tokens} on"
        )
