"""How hosts without the scheduler get embeddings: each keeps claims open at the scheduler's host.

A claim is a transfer that waits for its offer, in a room that its host has drawn. The scheduler serves one for each
embedding, and names the memory there by the room. On the wire it is a transfer like any other.

The name of a claim says which host has made it, and proves that the host belongs to this start of this engine: another
program, another engine with the same cluster key and a host that is left of an earlier start get no embedding. The
proof is made with a secret that all workers of the engine agree on when they start.
"""

from __future__ import annotations

import hmac
import re
import secrets
from typing import NamedTuple

from embferry import Field, Layout
from embferry.protocol.messages import MAX_ID
from embferry.trust.keys import Key

from ..shared.shape import Shape

CLAIMS = 8
"""Claims that each host keeps open, so as many embeddings travel to it at once."""
SECRET = r"[0-9a-f]{64}"
_NAME = re.compile(r"vllm-host-([1-9][0-9]{0,5})-([0-9a-f]{64})")
_LABEL = b"embferry host claim"


class HostClaim(NamedTuple):
    """The room of a claim, and the name under which the host asks for it."""

    room: int
    name: str


def new_secret() -> str:
    """Returns a secret for one start of an engine."""
    return Key.new().written()


def new_claim(host: int, secret: str) -> HostClaim:
    """Returns a new claim of this host. Its room is not 0, which is no key of memory."""
    room = secrets.randbelow(MAX_ID) + 1
    return HostClaim(room, f"vllm-host-{host}-{_proof(host, room, secret)}")


def host_of(claim: HostClaim, secret: str) -> int | None:
    """Returns the number of the host that has made a claim; None if no host of the engine with this secret has."""
    match = _NAME.fullmatch(claim.name)
    if match is None:
        return None
    host = int(match[1])
    return host if hmac.compare_digest(match[2], _proof(host, claim.room, secret)) else None


def slices(hidden: int, dtype: str) -> Layout:
    """Returns the layout of all embeddings between hosts.

    A token may be several times as wide as the model, with deepstack. So that the host need not know in advance, an
    embedding travels in slices of the model's width.
    """
    return Layout((Field("input_embeddings", dtype, hidden),))


def in_slices(shape: Shape, hidden: int) -> Shape:
    """Returns the shape of an embedding in slices."""
    return Shape(shape.tokens * shape.width // hidden, hidden, shape.dtype)


def _proof(host: int, room: int, secret: str) -> str:
    return Key(bytes.fromhex(secret)).mac(_LABEL, str(host).encode(), str(room).encode()).hex()
