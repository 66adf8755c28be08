"""The rows of a transfer, as the engine reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from embferry.engine.embedding import from_bytes
from embferry.protocol.errors import IntegrityError
from embferry.protocol.layout import Field
from embferry.transfer.receive_handle import EmbeddingReceiver


class TransferSource:
    """A :class:`~embferry.engine.scheduler.DigestedSource` over the receiving end of a room.

    Args:
        receiver: the receiving end.
        fields: the model's.
        released: called when the embedding's memory is not needed any more.
    """

    def __init__(self, receiver: EmbeddingReceiver, fields: Sequence[Field], released: Callable[[], None]) -> None:
        self._receiver = receiver
        self._released = released
        self._fields = {field.name: field for field in fields}

    @property
    def total_tokens(self) -> int:
        return self._receiver.total_embedding_length

    @property
    def digest(self) -> bytes:
        return self._receiver.machine.content_digest or b""

    def available_tokens(self) -> int:
        return self._receiver.transferred_tokens

    def read(self, field: str, start: int, stop: int) -> torch.Tensor:
        """Returns rows ``start`` to ``stop`` of a field, in the field's dtype.

        Raises:
            IntegrityError: another content replaced the embedding after the rows arrived and before the first read.
        """
        receiver = self._receiver
        rows = receiver.arrays()[field]  # commits: from here on the content cannot be replaced
        if receiver.transferred_tokens < stop:
            why = "the embedding was replaced just before its first use; ask again"
            raise IntegrityError(why, room=receiver.room, retryable=True)
        return from_bytes(self._fields[field], rows[start:stop])

    def release(self, upto: int) -> None:
        """Frees the embedding's memory once the last row has been read, long before the answer ends."""
        if upto >= self.total_tokens >= 0:
            self._receiver.clear()
            self._released()
