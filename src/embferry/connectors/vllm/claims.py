"""The rooms of claims: how several consumers fetch one offer, each in a room of its own.

An offer has a number, which is in the coordinates as their room. A proxy may hand the same coordinates to any number of
consumers, and a room has one receiver. So a consumer opens the room of its claim: the number, combined with a digest of
the name under which it introduces itself there. The producer sees room and name in the request and finds the number.
On the wire, a claim is a transfer like any other.

- The room of a claim tells the number only to who knows the name too, and no offer is found without its number: the
  mapping is one to one for each name.
- Each claim has a new random name, so no two claims share a room.
- The name begins with that of the consumer, which fetches an embedding once at a time: its new claim of an offer ends
  an earlier one, which may have lost its connection.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import NamedTuple

from embferry.protocol.messages import MAX_ID

_CONTEXT = b"embferry claim"


class Claim(NamedTuple):
    """The room in which a consumer fetches an offer, and the name under which it asks for it."""

    room: int
    name: str


def new_consumer() -> str:
    """Returns a new name for a consumer, under which it makes its claims."""
    return f"vllm-{secrets.token_hex(8)}"


def new_claim(number: int, consumer: str) -> Claim:
    """Returns a new claim of the offer with this number."""
    name = f"{consumer}-{secrets.token_hex(8)}"
    return Claim(claim_room(number, name), name)


def consumer_of(name: str) -> str:
    """Returns the consumer that has made the claim with this name."""
    return name.rpartition("-")[0]


def claim_room(number: int, name: str) -> int:
    """Returns the room of the claim of an offer under ``name``; with the room, it returns the offer's number."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=_CONTEXT).digest()
    return number ^ (int.from_bytes(digest) & MAX_ID)


def content_number(secret: bytes, mm_hash: str, digest: bytes) -> int:
    """Returns the number by which a producer names this content. It cannot be computed without the secret."""
    content = digest + mm_hash.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=secret).digest()) & MAX_ID
