"""Bounds on what the peers of a control plane can make this process hold, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from embferry.protocol.messages import MAX_FRAME_BYTES
from embferry.transports.net.listener import check_positive


@dataclass(frozen=True, slots=True)
class ControlLimits:
    """Bounds of one control plane. Times are seconds.

    Raises:
        LocalProtocolError: A number is not greater than 0.
    """

    frame_bytes: int = MAX_FRAME_BYTES
    """Longest frame, in either direction."""
    unsent_bytes_per_peer: int = 4 << 20
    """Bytes queued for one peer."""
    unsent_bytes: int = 64 << 20
    """Bytes queued for all peers together."""
    incomplete_bytes: int = 32 << 20
    """Bytes of frames that have begun to arrive, over all connections; beyond it, the frame that began first goes."""
    received_bytes: int = 16 << 20
    """Bytes received and not yet polled; beyond it nothing is read, so that TCP slows the peers down."""
    connections: int = 1024
    """Accepted connections. The listener lowers this bound, and the next three, if the process may open few files."""
    connections_per_address: int = 256
    """Accepted connections of one IPv4 address, or of one IPv6 network of 64 bits, which one host can have.

    One host, or the gateway of a cluster, can have many workers behind its address; a quarter of all leaves room for
    other hosts in any case.
    """
    handshakes: int = 512
    """Accepted connections whose hello has not come."""
    handshakes_per_address: int = 256
    """Such connections of one IPv4 address, or of one IPv6 network of 64 bits."""
    idle_connections: int = 32
    """Dialled connections kept for a later transfer."""
    idle_time: float = 10.0
    """Time since an accepted connection has served a transfer, after which it may have to make room.

    A transfer's end speaks every second. A connection that has served none may have to make room at any time.
    """
    hello_timeout: float = 5.0
    """Longest wait for a connection's hello."""
    frame_timeout: float = 10.0
    """Longest time between the first and the last byte of a frame."""
    send_timeout: float = 10.0
    """Longest time in which a peer takes nothing of what is queued for it."""
    connect_timeout: float = 5.0
    """Longest time for which a peer that cannot be reached is dialled again."""

    def __post_init__(self) -> None:
        check_positive(self)


DEFAULTS = ControlLimits()
