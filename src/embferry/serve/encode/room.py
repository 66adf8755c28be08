"""One request of an encode worker: the items still to encode, and the embedding so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from embferry.engine.cache import Pin
from embferry.engine.embedding import FieldSpec
from embferry.engine.media import PreparedItem
from embferry.engine.prompt import stream_digest
from embferry.transfer.fields import Fields
from embferry.transfer.send_handle import EmbeddingSender


class Room:
    """The items of a request. Their embeddings, in order, are one stream of tokens.

    Args:
        number: the ``bootstrap_room``.
        request_id: the router's id of the request.

    Attributes:
        claimed: an HTTP client has asked for the embedding, so it is encoded even if no language worker asks.
        sender: the sending end of the transfer; None until :meth:`set_items` and the announcement.
        encoded: the rows of all fields, and the number of tokens of them that are encoded. Replaced as one tuple, so
            any thread may read it; it stays valid for a download that outlives the room.
        waiting: items still to encode.
    """

    def __init__(self, number: int, request_id: str) -> None:
        self.number = number
        self.request_id = request_id
        self.aborted = False
        self.claimed = False
        self.sender: EmbeddingSender | None = None
        self.waiting: deque[PreparedItem] = deque()
        self.encoded: tuple[Fields, int] = ({}, 0)
        self.total_tokens = 0
        self.ready_tokens = 0
        self.digest = b""
        self._single_item = False
        self._rows: dict[str, np.ndarray] = {}
        self._pin: Pin | None = None

    def set_items(self, items: Sequence[PreparedItem]) -> None:
        """Sets the prepared items, and with them length and digest of the embedding.

        The digest is the hash of the items' digests. Those cover the weights, the number format and the way the vision
        tower runs, so equal digests promise equal bytes; the layout follows from the same inputs.
        """
        self.waiting.extend(items)
        self.total_tokens = sum(item.num_tokens for item in items)
        self.digest = stream_digest([item.digest for item in items])
        self._single_item = len(items) == 1

    def add(self, pin: Pin, fields: Sequence[FieldSpec]) -> Fields:
        """Appends the embedding of the next waiting item.

        The embedding of a single item is sent from the cache's own memory, and its pin is held until :meth:`release`.
        Those of several items are copied one behind the other, because a transfer reads one array per field.

        Args:
            pin: the item's embedding in the cache, pinned.
            fields: the encoder's fields.

        Returns:
            The rows of all fields, uint8 ``[total_tokens, row_bytes]``; the first ``ready_tokens`` are encoded.
        """
        item = self.waiting.popleft()
        embedding = pin.embedding
        start, self.ready_tokens = self.ready_tokens, self.ready_tokens + item.num_tokens
        if self._single_item:
            self._pin = pin
            self._rows = embedding.fields()
        else:
            with pin:
                if not self._rows:
                    self._rows = {f.name: np.empty((self.total_tokens, f.row_bytes), np.uint8) for f in fields}
                for name, rows in embedding.fields().items():
                    self._rows[name][start : self.ready_tokens] = rows
        self.encoded = (self._rows, self.ready_tokens)
        return self._rows

    def release(self) -> None:
        """Drops the items and the rows once the transfer has ended. Idempotent."""
        self.waiting.clear()
        self._rows = {}
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.release()
