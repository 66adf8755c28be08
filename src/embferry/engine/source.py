"""The seam to the transfer: where a sequence gets the rows of its visual tokens from."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from embferry.engine.embedding import Embedding, concatenate
from embferry.engine.prompt import stream_digest


class EmbeddingSource(Protocol):
    """The stream of a prompt's visual tokens, of which a prefix has arrived.

    ``release`` and the end of a request say only what is no longer needed; whoever made the source closes it.
    """

    @property
    def total_tokens(self) -> int:
        """Length of the stream; -1 while unknown."""

    def available_tokens(self) -> int:
        """Tokens of the verified prefix that can be read. Raises the transfer's error once it has failed."""

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of a field, ``[stop - start, width]``. They may be views, good until released."""

    def release(self, upto: int) -> None:
        """Rows below ``upto`` are not needed any more."""


@runtime_checkable
class DigestedSource(Protocol):
    """A source that knows what it carries. It is then compared with what the prompt is about."""

    @property
    def digest(self) -> bytes:
        """As ``stream_digest`` of the items' digests; empty while unknown."""


class ResidentSource:
    """A source that is whole from the start."""

    def __init__(self, *embeddings: Embedding) -> None:
        self._fields = concatenate(list(embeddings))
        self._digest = stream_digest([embedding.shape.digest for embedding in embeddings])
        self.released = 0

    @property
    def total_tokens(self) -> int:
        return int(self._fields["input_embeddings"].shape[0])

    @property
    def digest(self) -> bytes:
        return self._digest

    def available_tokens(self) -> int:
        return self.total_tokens

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        return self._fields[field][start:stop]

    def release(self, upto: int) -> None:
        self.released = max(self.released, upto)
