"""One room of a receiver: a state machine of its requests and of the statuses that it hears.

A status names no round, so a repeated or late one looks like the next. The blocks of the round tell them apart: the
caller compares them with what they held before (:class:`Evidence`). A status is refused and changes nothing if the
blocks do not show the tokens that it reports, or if it does not fit the state.
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

from .messages import OriginWire

UNKNOWN_LENGTH = -1


class Evidence(Protocol):
    """Evidence in the blocks of a round that they have been written."""

    def total_tokens(self) -> int | None:
        """Returns ``aux_datas[0]`` of the first block, or None if it is not written. Called in the first round only."""
        ...

    def written(self, tokens: int) -> bool:
        """Returns whether the round's first ``tokens`` tokens are in its blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """A request for tokens from ``sent_tokens`` on, into ``blocks``."""

    blocks: tuple[int, ...]
    sent_tokens: int
    allocated_tokens: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """``tokens`` tokens of the round are in its blocks, and no write to them is in flight."""

    round: Round
    tokens: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A status was refused and had no effect."""

    reason: str


class ReceiverRoom:
    """State of a room at the receiver. ``now`` is in seconds on a clock that never goes back.

    The time-outs: ``bootstrap_timeout`` until the encode side is found, ``waiting_timeout`` until the initial request
    is answered, ``transfer_timeout`` until the rest is requested and until each answer to that. The wait for the first
    blocks of the own pool has no time-out, because the pool is fair.
    """

    def __init__(self, room: int, wire: OriginWire, settings: TransferSettings, max_total_tokens: int) -> None:
        self.room, self.wire, self.settings = room, wire, settings
        self.max_total_tokens = max_total_tokens
        self.total_tokens = UNKNOWN_LENGTH
        self.transferred_tokens = 0
        self.round: Round | None = None  # the request that is not answered
        self.rounds = 0  # requests so far
        self.status = KVPoll.Bootstrapping
        self.error: EmbeddingTransferError | None = None
        self.deadline: float | None = None  # the room may wait

    @property
    def over(self) -> bool:
        """Whether nothing changes any more."""
        return self.status in (KVPoll.Success, KVPoll.Failed)

    @property
    def needs_resume(self) -> bool:
        """Whether tokens remain that have not been requested."""
        return self.status is KVPoll.Transferring and self.round is None

    def begin(self, now: float) -> None:
        """Begins the look-up of the encode side."""
        self.deadline = now + self.settings.bootstrap_timeout

    def found(self) -> None:
        """Records that the encode side is found. Waiting for blocks has no time-out."""
        if not self.rounds:
            self.deadline = None

    def ask(self, blocks: tuple[int, ...], now: float) -> Round:
        """Returns the next request, the initial one or a resume, into blocks that belong to this room alone."""
        if self.over or self.round is not None:
            raise LocalProtocolError("nothing remains to be requested now", room=self.room)
        initial = self.rounds == 0
        self.round = Round(blocks, self.transferred_tokens, len(blocks) * self.wire.block_size)
        self.rounds += 1
        self.status = KVPoll.WaitingForInput if initial else KVPoll.Transferring
        self.deadline = now + (self.settings.waiting_timeout if initial else self.settings.transfer_timeout)
        return self.round

    def receive(self, status: KVPoll, evidence: Evidence | None, now: float) -> Arrived | Dropped | None:
        """Processes a status of the sender. ``evidence`` is that in the blocks of :attr:`round`, if there is one.

        Returns the tokens that have arrived, the reason to refuse the status, or None if the room has failed or the
        status is of no importance.
        """
        if self.over:
            return Dropped("the room is over")
        if status is KVPoll.Failed:
            self.fail(PeerGone("the encode side reported a failure; its log says why", room=self.room))
            return None
        if status not in (KVPoll.Transferring, KVPoll.Success):
            return None
        if self.round is None or evidence is None:
            return Dropped(f"{status.name}, but nothing was requested: it is repeated or late")
        total = self.total_tokens if self.total_tokens != UNKNOWN_LENGTH else evidence.total_tokens()
        if total is None:
            return Dropped(f"{status.name}, but aux_datas, which holds the length, was not written")
        if not 0 <= total <= self.max_total_tokens:
            self.fail(
                RemoteProtocolError(f"aux_datas states {total} tokens; max_total_tokens is {self.max_total_tokens}")
            )
            return None
        tokens = min(total - self.transferred_tokens, self.round.allocated_tokens)
        if not evidence.written(tokens):
            return Dropped(f"{status.name}, but its blocks do not hold {tokens} new tokens: it is repeated or early")
        rest = total - self.transferred_tokens - tokens
        if status is KVPoll.Success and rest:
            self.fail(
                RemoteProtocolError(f"the encode side reported success, but {rest} of {total} tokens are missing")
            )
            return None
        if status is KVPoll.Transferring and not rest:
            return Dropped("Transferring, but every token has arrived: an earlier one is repeated; Success must follow")
        arrived = Arrived(self.round, tokens)
        self.total_tokens = total
        self.transferred_tokens += tokens
        self.round = None
        self.deadline = now + self.settings.transfer_timeout if rest else None
        self.status = status
        return arrived

    def fail(self, error: EmbeddingTransferError) -> None:
        """Ends the room with an error, unless it is over."""
        if not self.over:
            error.room = self.room
            self.status, self.error, self.deadline = KVPoll.Failed, error, None

    def tick(self, now: float) -> None:
        """Fails the room if its deadline has passed."""
        if self.deadline is not None and self.deadline <= now:
            self.fail(self._overdue())

    def _overdue(self) -> EmbeddingTransferError:
        if not self.rounds:
            return PeerGone(f"no encode side was found within {self.settings.bootstrap_timeout:g} s")
        if self.round is None:
            return LeaseExpired(
                f"the rest, from token {self.transferred_tokens} on, was not requested within "
                f"{self.settings.transfer_timeout:g} s: no blocks were free"
            )
        if self.rounds == 1:
            return LeaseExpired(f"the encode side has sent nothing for {self.settings.waiting_timeout:g} s")
        return LeaseExpired(
            f"the encode side has reported nothing for {self.settings.transfer_timeout:g} s about the rest, "
            f"from token {self.transferred_tokens} on"
        )
