"""When a receiver gives up, and what it says then. Every state has a deadline; none of them is infinite."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import EmbeddingTransferError, LeaseExpired, PeerGone
from .retransmission import is_asking
from .states import TERMINAL, Phase

if TYPE_CHECKING:
    from .receiver import Receiver

Why = Callable[["Receiver"], EmbeddingTransferError]


def deadlines(receiver: Receiver) -> list[tuple[float, Why]]:
    """(time, the error then) for everything that the transfer is waiting for. A receiver that waits for blocks of its
    own pool has none: that is nobody's fault, and the pool is fair."""
    r, limits = receiver, receiver.settings
    if (lost := r.failover.lost) is not None:
        return [(r.failover.until, lambda _: lost)]
    if not r.peer and r.phase is Phase.BOOTSTRAPPING:
        return [(r.asked_at + limits.bootstrap_timeout, _nobody_answered)]
    if not r.peer:
        return [(r.asked_at + limits.peer_timeout, _nobody_went_on)]
    if not r.ledger.is_active and r.offered:
        return []
    if r.phase is Phase.WAITING_FOR_INPUT:
        token = (r.progress_at + limits.waiting_timeout, _nothing_produced)
    else:
        token = (r.progress_at + limits.transfer_timeout, _nothing_arrived)
    return [token, (max(r.heard_at, r.asked_at) + limits.peer_timeout, _silent)]


def next_time(r: Receiver) -> float | None:
    """When something is due: a question's repetition, the end of a pause, a revocation, a deadline. None: nothing."""
    times = [grant.drain_deadline for grant in r.ledger if grant.draining and not grant.revoking]
    if is_asking(r):
        times.append(r.retry_policy.retry_at)
    if r.phase not in TERMINAL:
        if r.retry_policy.pause_until is not None:
            times.append(r.retry_policy.pause_until)
        times += [time for time, _ in deadlines(r)]
    return min(times, default=None)


def lost_too_often(r: Receiver) -> EmbeddingTransferError:
    times = r.retry_policy.lost_in_a_row
    why = f"the encode worker was lost {times} times in a row at token {r.transferred_tokens}"
    return PeerGone(why, room=r.room)


def _nobody_answered(r: Receiver) -> EmbeddingTransferError:
    seconds = r.settings.bootstrap_timeout
    return PeerGone(f"no encode worker has answered for {seconds:g} s; is the one named running?", room=r.room)


def _nobody_went_on(r: Receiver) -> EmbeddingTransferError:
    why = f"the encode worker was lost at token {r.transferred_tokens} and nobody went on"
    return PeerGone(f"{why} for {r.settings.peer_timeout:g} s", room=r.room)


def _nothing_produced(r: Receiver) -> EmbeddingTransferError:
    why = f"the encode worker has produced nothing for {r.settings.waiting_timeout:g} s"
    return LeaseExpired(why, room=r.room)


def _nothing_arrived(r: Receiver) -> EmbeddingTransferError:
    why = f"no token has arrived for {r.settings.transfer_timeout:g} s after the first {r.transferred_tokens}"
    return LeaseExpired(why, room=r.room)


def _silent(r: Receiver) -> EmbeddingTransferError:
    why = f"the encode worker has been silent for {r.settings.peer_timeout:g} s at token {r.transferred_tokens}"
    return PeerGone(why, room=r.room)
