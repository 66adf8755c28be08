"""Heads of requests that two programs may read differently. Pure.

A proxy in front of a server may take another end of the body, or another secret, than the server does. So requests
could be smuggled past it.
"""

from __future__ import annotations

from collections.abc import Iterable


def ambiguity_of(names: Iterable[bytes]) -> str | None:
    """Returns why a head is ambiguous, or None if it is not.

    Args:
        names: Of its header fields, in lower case; h11 has refused other faults of heads.
    """
    found = list(names)
    if b"content-length" in found and b"transfer-encoding" in found:
        return "a request has Content-Length or Transfer-Encoding, not both"
    if found.count(b"authorization") > 1:
        return "a request has one Authorization header"
    return None
