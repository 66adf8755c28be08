"""When a receiver gives up, and what it says then. Every state has a deadline; none of them is infinite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import EmbeddingTransferError, LeaseExpired, PeerGone
from .states import Phase

if TYPE_CHECKING:
    from .receiver import Receiver

Deadline = tuple[float, EmbeddingTransferError]


def deadlines(receiver: Receiver) -> list[Deadline]:
    """(time, error) for everything that the transfer is waiting for. A receiver that waits for blocks of its own pool
    has none: that is nobody's fault, and the pool is fair."""
    r, limits = receiver, receiver.settings
    if not r.peer:
        return [_nobody(r)]
    found: list[Deadline] = []
    waits = bool(r.ledger.active) or not r.offered
    if waits and r.phase is Phase.WAITING_FOR_INPUT:
        why = f"the encode worker has produced nothing for {limits.waiting_timeout:g} s"
        found.append((r.progress_at + limits.waiting_timeout, LeaseExpired(why, room=r.room)))
    elif waits:
        why = f"no token has arrived for {limits.transfer_timeout:g} s after the first {r.transferred_tokens}"
        found.append((r.progress_at + limits.transfer_timeout, LeaseExpired(why, room=r.room)))
    if waits:
        why = f"the encode worker has been silent for {limits.peer_timeout:g} s at token {r.transferred_tokens}"
        found.append((max(r.heard_at, r.asked_at) + limits.peer_timeout, PeerGone(why, room=r.room)))
    return found


def _nobody(r: Receiver) -> Deadline:
    if r.phase is Phase.BOOTSTRAPPING:
        seconds = r.settings.bootstrap_timeout
        why = f"no encode worker has answered for {seconds:g} s; is the one named running?"
        return r.asked_at + seconds, PeerGone(why, room=r.room)
    seconds = r.settings.peer_timeout
    why = f"the encode worker was lost at token {r.transferred_tokens} and nobody went on for {seconds:g} s"
    return r.asked_at + seconds, PeerGone(why, room=r.room)
