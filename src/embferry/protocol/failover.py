"""Failover: the wait for another sender after the peer was lost.

With a failover time-out, a loss that the retry policy cannot mend does not end the transfer: the receiver keeps what
has arrived, asks no peer, and gives its caller that long to name another endpoint. Without one, such a loss ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import (
    Aborted,
    CapacityError,
    EmbeddingTransferError,
    IntegrityError,
    LeaseExpired,
    PeerGone,
    TransportError,
)

CAUSED_BY_PEER = (Aborted, CapacityError, IntegrityError, LeaseExpired, PeerGone, TransportError)
"""Errors that another peer with the same content may not have. Every other error lies in the request or in this end."""


@dataclass(slots=True)
class Failover:
    """State of the wait.

    Attributes:
        timeout: Seconds for which another peer may be named after a loss; None: a loss ends the transfer.
        lost: Why the last peer is of no use. None: there is a peer, or one is being asked.
        until: When the wait ends.
    """

    timeout: float | None
    lost: EmbeddingTransferError | None = None
    until: float = 0.0

    def begins(self, error: EmbeddingTransferError, now: float) -> bool:
        """Returns whether ``error`` begins a wait instead of ending the transfer. An error during a wait ends it."""
        if self.timeout is None or self.lost is not None or not isinstance(error, CAUSED_BY_PEER):
            return False
        self.lost, self.until = error, now + self.timeout
        return True
