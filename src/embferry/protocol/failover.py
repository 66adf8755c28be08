"""What a receiver that may go on with another peer keeps while nobody has been named yet.

A loss then does not end the transfer: what is here stays, nobody is asked, and the caller has a while to name another
endpoint. Without it, the first loss that retry_policy cannot mend is the end.
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

OF_THE_PEER = (Aborted, CapacityError, IntegrityError, LeaseExpired, PeerGone, TransportError)
"""What another peer with the same content may not suffer from. What is left is wrong with the request or with us."""


@dataclass(slots=True)
class Failover:
    """:param timeout: seconds for which another peer may be named after a loss; None: a loss is the end."""

    timeout: float | None
    lost: EmbeddingTransferError | None = None
    """Why the last peer is of no use; None: there is one, or one is being asked."""
    until: float = 0.0

    def awaits(self, error: EmbeddingTransferError, now: float) -> bool:
        """Whether ``error`` is no end but the beginning of a wait. What happens during the wait is one."""
        if self.timeout is None or self.lost is not None or not isinstance(error, OF_THE_PEER):
            return False
        self.lost, self.until = error, now + self.timeout
        return True
