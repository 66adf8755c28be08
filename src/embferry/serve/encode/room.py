"""One request of an encode worker: what is still to be encoded, and the rows made so far."""

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
    """All items of a request, in order, are one stream of tokens.

    Args:
        number: the ``bootstrap_room``.

    Attributes:
        claimed: somebody else than a language worker wants it encoded.
        sender: its end of the transfer; None while its media are being decoded.
        made: all rows, and how many tokens of them are there. Put in its place as a whole, so any thread may look; it
            stays for who is still downloading when the room ends.
        waiting: items that are still to be encoded.
    """

    def __init__(self, number: int, request_id: str) -> None:
        self.number = number
        self.request_id = request_id
        self.aborted = False
        self.claimed = False
        self.sender: EmbeddingSender | None = None
        self.waiting: deque[PreparedItem] = deque()
        self.made: tuple[Fields, int] = ({}, 0)
        self.total_tokens = 0
        self.ready_tokens = 0
        self.digest = b""
        self._whole = False
        self._rows: dict[str, np.ndarray] = {}
        self._lease: Pin | None = None

    def fill(self, items: Sequence[PreparedItem]) -> None:
        """The items have been prepared.

        The digest of the stream is the hash of its items' digests. Those cover the weights, the number format and how
        the tower is run, so equal digests promise equal bytes; the layout follows from the same things.
        """
        self.waiting.extend(items)
        self.total_tokens = sum(item.num_tokens for item in items)
        self.digest = stream_digest([item.digest for item in items])
        self._whole = len(items) == 1

    def add(self, lease: Pin, fields: Sequence[FieldSpec]) -> Fields:
        """Takes in the embedding of the next item; answers all rows, of which ``ready_tokens`` are there now.

        A single item is sent from where it lies in the cache, and its lease held until :meth:`release`. Several are
        copied one behind the other: the transfer reads one array a field.
        """
        item = self.waiting.popleft()
        embedding = lease.embedding
        start, self.ready_tokens = self.ready_tokens, self.ready_tokens + item.num_tokens
        if self._whole:
            self._lease = lease
            self._rows = embedding.fields()
        else:
            with lease:
                if not self._rows:
                    self._rows = {f.name: np.empty((self.total_tokens, f.row_bytes), np.uint8) for f in fields}
                for name, rows in embedding.fields().items():
                    self._rows[name][start : self.ready_tokens] = rows
        self.made = (self._rows, self.ready_tokens)
        return self._rows

    def release(self) -> None:
        """Nobody reads the rows any more. Idempotent."""
        self.waiting.clear()
        self._rows = {}
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()
