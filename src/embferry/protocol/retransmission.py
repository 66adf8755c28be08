"""What a receiver asks, and asks again until it is answered. All of it can be repeated without harm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import guards
from .messages import VERSIONS, Abort, Body, Confirm, Drain, Open, Progress
from .states import TERMINAL

if TYPE_CHECKING:
    from .receiver import Receiver


def opening(r: Receiver) -> Open:
    return Open(
        r.room, r.opening, VERSIONS, r.geometry, r.endpoint, r.transports, r.transferred_tokens, r.settings.verify
    )


def progress(r: Receiver) -> Progress:
    return Progress(r.room, r.transferred_tokens, r.ledger.floor)


def last_word(r: Receiver) -> Confirm | Abort:
    """How it ended."""
    if r.error is None:
        return Confirm(r.room, r.total_tokens)
    return Abort.because_of(r.error, r.room)


def unanswered(r: Receiver) -> list[Body]:
    """Everything that an answer is outstanding to; at least a sign of life."""
    asked: list[Body] = []
    draining = tuple(grant.epoch for grant in r.ledger if grant.draining and guards.is_the_writer(r.peer, grant.writer))
    if draining:
        asked.append(Drain(r.room, draining))
    if r.phase in TERMINAL:
        return asked if r.peer_knows else [*asked, last_word(r)]
    if r.failover.lost is not None:
        return asked  # there is nobody to ask
    if not r.offered:
        asked.append(opening(r))
    asked += [grant.message(r.room, r.ledger.floor) for grant in r.ledger.active]
    return asked if r.ledger.active else [*asked, progress(r)]


def is_asking(r: Receiver) -> bool:
    """Whether an answer is outstanding, or the peer expects a sign of life."""
    if r.phase in TERMINAL:
        return bool(r.ledger.grants) or not (r.peer_knows or has_lingered(r, r.retry_policy.retry_at))
    return True


def has_lingered(r: Receiver, now: float) -> bool:
    """Whether an end that has finished has answered long enough."""
    return now >= r.ended_at + r.settings.linger
