"""Bounds of the bootstrap server on what clients can hold."""

from __future__ import annotations

from dataclasses import dataclass

from embferry.transports.net.listener import check_positive


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds on what clients can hold.

    Raises:
        LocalProtocolError: A number is not greater than 0.
    """

    request_timeout: float = 5.0
    """Seconds for a whole request and its response."""
    connections: int = 1024
    """Connections at once; never more than half of the files that the process may open."""
    connections_per_address: int = 256
    """Connections at once of one IPv4 address, or of one IPv6 network of 64 bits."""
    unproved_requests_per_second: float = 200.0
    """Requests a second of such an address that are answered without a proof of the cluster key."""
    unproved_bytes_per_second: float = 64.0 * (1 << 20)
    """Bytes a second of the bodies of such requests."""

    def __post_init__(self) -> None:
        check_positive(self)
