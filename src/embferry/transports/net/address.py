"""Validation of IP addresses: of the own host, and in handles from the wire."""

from __future__ import annotations

import ipaddress

from embferry.protocol.errors import LocalProtocolError, TransportError


def own(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns the address of the own host.

    Raises:
        LocalProtocolError: It is not an IP address.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError as error:
        raise LocalProtocolError(f"{host} is not an IP address; host names are not resolved here") from error


def advertised(host: str) -> str:
    """Returns ``host`` if peers can connect to it.

    Raises:
        LocalProtocolError: It is not an IP address, or stands for all addresses.
    """
    if own(host).is_unspecified:
        raise LocalProtocolError(f"peers cannot connect to {host}; advertise this host's address")
    return host


def reachable(host: str) -> str:
    """Returns the address that a handle names. A zone (``fe80::1%eth0``) has a meaning on the receiver's host only.

    Raises:
        TransportError: No host can have this address (not retryable).
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise TransportError(f"the handle's host is not an IP address: {error}", retryable=False) from error
    if "%" in host or address.is_unspecified or address.is_multicast:
        raise TransportError(f"{host!r} cannot be connected to; advertise another address", retryable=False)
    return str(address)


def network_of(address: str) -> str:
    """Returns the IPv4 address, or the IPv6 network of 64 bits, whose connections are counted together.

    One host can have every address of such a network.
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address
