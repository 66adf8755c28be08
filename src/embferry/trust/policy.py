"""The loopback rule: a part without a cluster key listens on a loopback address only, unless told otherwise."""

from __future__ import annotations

import ipaddress
import logging

from embferry.protocol.errors import LocalProtocolError

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Returns whether only this host can reach ``host``: a loopback address, with or without brackets, or its name."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_listening(host: str, what: str, *, has_key: bool, insecure: bool) -> None:
    """Checks that ``what`` may listen on ``host``.

    Args:
        host: The address.
        what: What listens, for the text: "the control port".
        has_key: Whether peers must prove that they know the cluster key.
        insecure: Whether strangers may be let in.

    Raises:
        LocalProtocolError: Strangers could reach it, and nothing keeps them out.
    """
    if has_key or is_loopback(host):
        return
    if not insecure:
        raise LocalProtocolError(
            f"{what} would listen on {host}, where strangers can reach it, without a cluster key; make one with"
            " `embferry keys new FILE` and set EMBFERRY_CLUSTER_KEY_FILE, or allow strangers with EMBFERRY_INSECURE=1"
            " (--insecure)"
        )
    log.warning(
        "%s listens on %s without a cluster key: strangers that reach it can read, replace and end all transfers",
        what, host,
    )  # fmt: skip
