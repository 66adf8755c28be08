"""Stalls: how a transport tells a peer or a link that does nothing any more from one that is slow.

A sender cannot tell by itself: its kernel, or a relay, takes megabytes that never arrive. So the receiver reports
its progress while bytes come in, several times within the time-out, and the sender gives the link up when it has heard
nothing for the time-out although something is under way.
"""

from __future__ import annotations

from embferry.protocol.errors import LocalProtocolError

STALL_TIMEOUT_S = 5.0
RECEIVING_BYTES = 64 << 10
"""Bytes for which a receiver's own side is told that a write goes on. Fewer would let a peer that sends a byte a second
hold blocks for good."""
REPORTS = 5  # within a time-out, so that a lost or late one does no harm


def check_stall_timeout(seconds: float) -> float:
    """Returns ``seconds``.

    Raises:
        LocalProtocolError: It is not greater than 0.
    """
    if not seconds > 0:
        raise LocalProtocolError(f"stall_timeout_s must be greater than 0, not {seconds}")
    return seconds


def progress_interval(stall_timeout_s: float) -> float:
    """Returns the seconds between two reports on progress."""
    return min(1.0, stall_timeout_s / REPORTS)
