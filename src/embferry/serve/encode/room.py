"""One request of an encode worker: the items still to encode, and the embedding so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from embferry.disaggregation.queues import SendingEnd
from embferry.engine.cache import Pin
from embferry.engine.media import PreparedItem
from embferry.engine.prompt import stream_digest
from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.layout import Field
from embferry.serve.byte_budget import Hold
from embferry.serve.encode.room_trace import RoomTrace
from embferry.serve.encode.shared_cache import Lookup
from embferry.serve.media.decoding.cancellation import Cancellation
from embferry.transfer.fields import Fields


def pixel_bytes(item: PreparedItem) -> int:
    """Returns the bytes of an item's pixels."""
    return int(item.pixel_values.nbytes)


class Room:
    """The items of a request. Their embeddings, in order, are one stream of tokens.

    Attributes:
        number: the ``bootstrap_room``.
        caller: the address of the client whose request it is.
        client: the client whose turn the decoding of its media takes; ``caller`` unless a router names it.
        hold: the bytes that the room holds, counted against ``encode.max_held_bytes``.
        failure: why the room was aborted, if it was.
        decoding: ends the decoding of its media, when the room is aborted.
        claimed: an HTTP client has asked for the embedding, so it is encoded even if no language worker asks.
        sender: the sending end of the transfer; None until :meth:`set_items` and the announcement.
        announced_at: the time of that, in monotonic seconds.
        encoded: the rows of all fields, and the number of tokens of them that are encoded. Replaced as one tuple, so
            any thread may read it; it stays valid for a download that outlives the room.
        waiting: items still to encode.
        lookups: for each of them, its search in the cache that encoders share; empty before they begin or without one.
        aux: int32 values that are announced with the length.
        sha256: the digest of all bytes of the embedding, once a client has asked for it.
        trace: its spans; None unless they are wanted.
    """

    def __init__(self, number: int, hold: Hold, caller: str = "") -> None:
        self.number, self.caller, self.client = number, caller, caller
        self.hold = hold
        self.failure: EmbeddingTransferError | None = None
        self.decoding = Cancellation()
        self.claimed = False
        self.sender: SendingEnd | None = None
        self.announced_at = 0.0
        self.waiting: deque[PreparedItem] = deque()
        self.lookups: deque[Lookup | None] = deque()
        self.encoded: tuple[Fields, int] = ({}, 0)
        self.total_tokens = 0
        self.digest = b""
        self.aux: tuple[int, ...] = ()
        self.sha256: bytes | None = None
        self.trace: RoomTrace | None = None
        self._single_item = False
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

    def add(self, pin: Pin, fields: Sequence[Field]) -> tuple[Fields, int]:
        """Appends the embedding of the next waiting item.

        The embedding of a single item is sent from the cache's own memory, and its pin is held until :meth:`release`.
        Those of several items are copied one behind the other, because a transfer reads one array per field.

        Args:
            pin: the item's embedding in the cache, pinned.
            fields: the encoder's fields.

        Returns:
            ``encoded``: the rows of all fields, uint8 ``[total_tokens, row_bytes]``, and the number of encoded tokens.
        """
        item = self.waiting.popleft()
        rows, start = self.encoded
        stop = start + item.num_tokens
        if self._single_item:
            self._pin = pin
            rows = pin.embedding.fields()
        else:
            with pin:
                rows = rows or {f.name: np.empty((self.total_tokens, f.token_bytes), np.uint8) for f in fields}
                for name, part in pin.embedding.fields().items():
                    rows[name][start:stop] = part
        self.encoded = (rows, stop)
        return self.encoded

    def end_lookup(self) -> None:
        """Releases what the lookup of the item that was added last has found: the room has it."""
        if self.lookups and (lookup := self.lookups.popleft()) is not None:
            lookup.give_up()

    def abort(self, error: EmbeddingTransferError) -> None:
        """Ends the decoding of the media, or the transfer if it has been announced. The first error counts."""
        self.failure = self.failure or error
        self.decoding.cancel()
        if self.sender is not None:
            self.sender.abort(error)

    def release(self) -> None:
        """Drops the items and the pin once the transfer has ended. Idempotent."""
        self.waiting.clear()
        while self.lookups:
            self.end_lookup()
        self.hold.release()
        pin, self._pin = self._pin, None
        if pin is not None:
            pin.release()

    def count_bytes(self, token_bytes: int) -> None:
        """Counts the pixels of the items that are left, and the whole embedding.

        Raises:
            ServeError: capacity_exhausted. Not if less is left than before.
        """
        self.hold.set(self.total_tokens * token_bytes + sum(map(pixel_bytes, self.waiting)))
