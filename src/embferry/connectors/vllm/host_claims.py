"""How hosts without the scheduler get embeddings: each keeps claims open at the scheduler's host.

A claim is a transfer that waits for its offer, in a room that its host has drawn. The scheduler serves one for each
embedding, and names the memory there by the room. Its name says which host has made it. On the wire it is a transfer
like any other.
"""

from __future__ import annotations

import re
import secrets

from embferry import Field, Layout
from embferry.protocol.messages import MAX_ID

from ..shared.shape import Shape

CLAIMS = 8
"""Claims that each host keeps open, so as many embeddings travel to it at once."""
_NAME = re.compile(r"vllm-host-([1-9][0-9]{0,5})-[0-9a-f]{16}")


def new_room() -> int:
    """Returns a room for a claim; 0 is no key of memory."""
    return secrets.randbelow(MAX_ID) + 1


def new_name(host: int) -> str:
    """Returns a name for a claim of this host."""
    return f"vllm-host-{host}-{secrets.token_hex(8)}"


def host_of(name: str) -> int | None:
    """Returns the number of the host that has made the claim with this name; None if it is not the name of one."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def slices(hidden: int, dtype: str) -> Layout:
    """Returns the layout of all embeddings between hosts.

    A token may be several times as wide as the model, with deepstack. So that the host need not know in advance, an
    embedding travels in slices of the model's width.
    """
    return Layout((Field("input_embeddings", dtype, hidden),))


def in_slices(shape: Shape, hidden: int) -> Shape:
    """Returns the shape of an embedding in slices."""
    return Shape(shape.tokens * shape.width // hidden, hidden, shape.dtype)
