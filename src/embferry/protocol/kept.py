"""Tokens that a receiver has before its transfer begins: another process has received them, and was killed.

To the receiver this is the loss of a sender. The tokens count once a sender has offered the same content, and are
dropped if it offers another.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LocalProtocolError
from .messages import MAX_DIGEST, MAX_TOKENS
from .ranges import RangeSet


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """Verified tokens of one embedding.

    Attributes:
        total_tokens: Length of the embedding.
        content_digest: The digest that its sender had announced.
        ranges: The tokens, as half-open ranges.

    Raises:
        LocalProtocolError: A sender could not have announced the length or the digest, or a range lies outside.
    """

    total_tokens: int
    content_digest: bytes
    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not 0 <= self.total_tokens <= MAX_TOKENS or not 1 <= len(self.content_digest) <= MAX_DIGEST:
            raise LocalProtocolError("no sender announces such a length or such a content digest")
        if any(not 0 <= start < stop <= self.total_tokens for start, stop in self.ranges):
            raise LocalProtocolError(f"kept tokens outside of an embedding of {self.total_tokens}: {self.ranges}")

    def verified(self) -> RangeSet:
        """Returns the tokens as a new set."""
        return RangeSet(*self.ranges)
