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
from .room import UNKNOWN_LENGTH, OriginRoom


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


class ReceiverRoom(OriginRoom):
    """State of a room at the receiver. ``now`` is in seconds on a clock that never goes back.

    The time-outs: ``bootstrap_timeout`` until the encode side is found, ``waiting_timeout`` until the initial request
    is answered, ``transfer_timeout`` until the rest is requested and until each answer to that. The wait for the first
    blocks of the own pool has no time-out, because the pool is fair.

    Attributes:
        transferred_tokens: Number of leading tokens that have arrived.
        round: The request that is not answered.
        rounds: Number of requests so far.
    """

    def __init__(self, room: int, wire: OriginWire, settings: TransferSettings, max_total_tokens: int) -> None:
        super().__init__(room)
        self.wire, self.settings, self.max_total_tokens = wire, settings, max_total_tokens
        self.transferred_tokens = self.rounds = 0
        self.round: Round | None = None

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

    def receive(self, status: KVPoll, evidence: Evidence | None, now: float) -> tuple[Round, int] | None:
        """Processes a status of the sender. ``evidence`` is that in the blocks of :attr:`round`, if there is one.

        Returns:
            The round that has ended and the number of its tokens, which are in its blocks, and no write to them is in
            flight. None if the room has failed or the status is of no importance.

        Raises:
            RemoteProtocolError: The status was refused and had no effect.
        """
        if self.over:
            raise RemoteProtocolError("the room is over", room=self.room)
        if status is KVPoll.Failed:
            self.fail(PeerGone("the encode side reported a failure; its log says why"))
            return None
        if status not in (KVPoll.Transferring, KVPoll.Success):
            return None
        asked = self.round
        if asked is None or evidence is None:
            raise self._refusal(status, "nothing was requested: it is repeated or late")
        total = self.total_tokens if self.total_tokens != UNKNOWN_LENGTH else evidence.total_tokens()
        if total is None:
            raise self._refusal(status, "aux_datas, which holds the length, was not written")
        if not 0 <= total <= self.max_total_tokens:
            why = f"aux_datas states {total} tokens; max_total_tokens is {self.max_total_tokens}"
            self.fail(RemoteProtocolError(why))
            return None
        tokens = min(total - self.transferred_tokens, asked.allocated_tokens)
        if not evidence.written(tokens):
            raise self._refusal(status, f"its blocks do not hold {tokens} new tokens: it is repeated or early")
        rest = total - self.transferred_tokens - tokens
        if status is KVPoll.Success and rest:
            why = f"the encode side reported success, but {rest} of {total} tokens are missing"
            self.fail(RemoteProtocolError(why))
            return None
        if status is KVPoll.Transferring and not rest:
            raise self._refusal(status, "every token has arrived: an earlier one is repeated; Success must follow")
        self.total_tokens, self.status, self.round = total, status, None
        self.transferred_tokens += tokens
        self.deadline = now + self.settings.transfer_timeout if rest else None
        return asked, tokens

    def tick(self, now: float) -> None:
        """Fails the room if its deadline has passed."""
        if self.deadline is not None and self.deadline <= now:
            self.fail(self._overdue())

    def _refusal(self, status: KVPoll, why: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"{status.name}, but {why}", room=self.room)

    def _overdue(self) -> EmbeddingTransferError:
        s, rest = self.settings, f"from token {self.transferred_tokens} on"
        if not self.rounds:
            return PeerGone(f"no encode side was found within {s.bootstrap_timeout:g} s")
        if self.round is None:
            why = f"the rest, {rest}, was not requested within {s.transfer_timeout:g} s: no blocks were free"
        elif self.rounds == 1:
            why = f"the encode side has sent nothing for {s.waiting_timeout:g} s"
        else:
            why = f"the encode side has reported nothing for {s.transfer_timeout:g} s about the rest, {rest}"
        return LeaseExpired(why)
