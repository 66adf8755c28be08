"""The interface through which a sequence reads its visual tokens from a transfer."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from embferry.engine.embedding import Embedding
from embferry.engine.prompt import stream_digest


class EmbeddingSource(Protocol):
    """The stream of a prompt's visual tokens, of which a prefix has arrived.

    Neither ``release`` nor the end of a request closes the source; that is up to its owner.
    """

    @property
    def total_tokens(self) -> int:
        """Length of the stream in tokens; -1 while unknown."""

    def available_tokens(self) -> int:
        """Returns the number of tokens of the verified prefix. Does not block.

        Raises:
            Exception: The transfer has failed; the error is the transfer's.
        """

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        """Returns tokens ``[start, stop)`` of a field, ``[stop - start, width]``: a copy, or a view until released."""

    def release(self, upto: int) -> None:
        """Releases the tokens below ``upto``; they are not read again."""


@runtime_checkable
class DigestedSource(Protocol):
    """A source that knows the digest of its content. The scheduler compares it with the prompt's."""

    @property
    def digest(self) -> bytes:
        """``stream_digest`` of the items' digests; empty while unknown."""


class ResidentSource:
    """A source whose tokens are all there from the start."""

    def __init__(self, *embeddings: Embedding) -> None:
        fields = [embedding.tensors() for embedding in embeddings]
        self._fields = {name: torch.cat([each[name] for each in fields]) for name in fields[0]}
        self.digest = stream_digest([embedding.shape.digest for embedding in embeddings])
        self.total_tokens = len(self._fields["input_embeddings"])

    def available_tokens(self) -> int:
        return self.total_tokens

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        return self._fields[field][start:stop]

    def release(self, upto: int) -> None:
        """Does nothing: the tokens are the caller's."""
