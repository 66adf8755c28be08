"""Addresses on which a receiver listens, and those that a handle names."""

from __future__ import annotations

import ipaddress

from embferry.protocol.errors import LocalProtocolError, TransportError


def own(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """:raises LocalProtocolError: it is a name, or nonsense."""
    try:
        return ipaddress.ip_address(host)
    except ValueError as error:
        raise LocalProtocolError(f"{host} is not an IP address; names are not looked up here") from error


def advertised(host: str) -> str:
    """``host``, if peers can connect to it.

    :raises LocalProtocolError: as :func:`own`, or it stands for all addresses."""
    if own(host).is_unspecified:
        raise LocalProtocolError(f"peers cannot connect to {host}; advertise this host's address")
    return host


def reachable(host: str) -> str:
    """The address of a handle. One with a zone (``fe80::1%eth0``) means something on the receiver's host only.

    :raises TransportError: nobody can be there; not worth a retry.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise TransportError(f"the handle's host is not an IP address: {error}", retryable=False) from error
    if "%" in host or address.is_unspecified or address.is_multicast:
        raise TransportError(f"nobody can be reached at {host!r}; advertise another address", retryable=False)
    return str(address)
