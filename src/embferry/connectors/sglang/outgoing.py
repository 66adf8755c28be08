"""The parts that an encoder sends: one transfer for each host of a language server."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from embferry import EmbeddingSender, EmbeddingTransferError, SendManager, as_fields, transferred

from ..shared.counters import Counters
from ..shared.managers import Managers
from ..shared.shape import Shape
from .parts import Content, Destination, PartId
from .request_trace import OutgoingTrace, RequestTrace

log = logging.getLogger(__name__)

MAX_UNUSED = 1024
"""Parts that ranks have asked for and that are not encoded here yet, at most: the oldest makes room."""

MAX_RANKS = 4096
"""Ranks that may ask for one part."""

Rows = npt.NDArray[np.uint8]
"""uint8 [tokens, bytes per token]"""


class OutgoingPart:
    """One part that an encoder sends. The event loop of the encoder calls the methods.

    The first encode of a part announces its length before the encoder runs, under a content digest that is the part's
    name. A later encode of it, after a failover, first compares its rows with those of the one before: if they are
    equal, the transfer resumes where it stopped, else it starts again. Encoders that put pictures together into batches
    differ in the last bits.
    """

    def __init__(self, part: PartId, managers: Managers[SendManager], counters: Counters) -> None:
        self.part = part
        self._managers, self._counters = managers, counters
        self._destinations: dict[str, Destination] = {}
        self._senders: dict[int, EmbeddingSender] = {}
        self._shape: Shape | None = None
        self._trace: OutgoingTrace | None = None
        self.rows: Rows | None = None
        self.content: Content | None = None

    @property
    def is_encoded(self) -> bool:
        return self.content is not None

    def add(self, destination: Destination) -> None:
        """Takes note of a rank that asks for the part. Beyond :data:`MAX_RANKS`, the first is forgotten."""
        self._destinations[destination.url] = destination
        if len(self._destinations) > MAX_RANKS:
            del self._destinations[next(iter(self._destinations))]

    def traced(self, trace: RequestTrace) -> OutgoingTrace:
        """Returns the spans of the part, which begin now: the dispatcher's call has come."""
        self._trace = OutgoingTrace(trace)
        return self._trace

    def announce(self, shape: Shape) -> None:
        """Tells the language server's first host the length, before the encoder runs.

        Raises:
            EmbeddingTransferError: No manager works, or the room is in use.
        """
        self._shape = shape
        if self._trace is not None:
            self._trace.announced()
        if self.part.attempt == 0:
            self._sender(0).init(shape.tokens, self._first_content())

    def encoded(self, shape: Shape, rows: Rows, digest: str) -> None:
        """Takes the embedding, whose rows do not change any more, and ``digest_of`` them, hexadecimal."""
        if self.rows is not None:
            return
        self._shape, self.rows = shape, rows
        self.content = Content(self._content(digest).hex(), digest)
        self._counters.add("items_encoded")
        if self._trace is not None:
            self._trace.encoded(shape.tokens)

    async def send(self, url: str) -> None:
        """Sends the embedding to the host of the rank at ``url``, and returns when it has arrived there.

        Returns as well if the language server does not want it any more, which it knows itself.

        Raises:
            EmbeddingTransferError: It could not be sent; another encoder may be able to.
        """
        destination = self._destinations.get(url)
        if destination is None or not destination.receives:
            return
        assert self.rows is not None
        assert self.content is not None
        assert self._shape is not None
        sender = self._sender(destination.host)
        sender.init(self._shape.tokens, bytes.fromhex(self.content.content))
        sender.send_embedding(as_fields({"input_embeddings": self.rows}))
        self._counters.add("items_offered")
        span = None if self._trace is None else self._trace.sends()
        outcome = "aborted"
        try:
            await transferred(sender)
        except EmbeddingTransferError as error:
            outcome = error.code
            self._counters.add("offers_ended", label="unfetched")
            if error.retryable:
                raise
            log.info("part %s is not wanted any more: %s", self.part.text, error)
        else:
            outcome = ""
            self._counters.add("offers_ended", label="fetched")
        finally:
            if span is not None:
                span.set(tokens=self._shape.tokens, bytes=sender.sent_bytes)
                span.end(outcome)

    def close(self) -> None:
        """Ends the transfers that are under way."""
        for sender in self._senders.values():
            sender.abort()

    def _sender(self, host: int) -> EmbeddingSender:
        if host not in self._senders:
            assert self._shape is not None
            self._senders[host] = self._managers.get(self._shape.layout).open(self.part.room(host))
        return self._senders[host]

    def _first_content(self) -> bytes:
        return hashlib.blake2b(self.part.text.encode(), digest_size=16).digest()

    def _content(self, digest: str) -> bytes:
        """Returns the content digest of rows: that of the encode before, if its rows are equal."""
        for destination in self._destinations.values():
            if destination.before is not None and destination.before.digest == digest:
                return bytes.fromhex(destination.before.content)
        return self._first_content()


class OutgoingParts:
    """All parts that an encoder sends or has been asked for. The event loop of the encoder calls the methods."""

    def __init__(self, managers: Managers[SendManager], counters: Counters) -> None:
        self._managers, self._counters = managers, counters
        self._parts: OrderedDict[str, OutgoingPart] = OrderedDict()

    def __len__(self) -> int:
        return len(self._parts)

    def held_bytes(self) -> int:
        """Returns the bytes of the embeddings that are held. Any thread may call it."""
        return sum(part.rows.nbytes for part in list(self._parts.values()) if part.rows is not None)

    def find(self, text: str) -> OutgoingPart | None:
        return self._parts.get(text)

    def get(self, part: PartId) -> OutgoingPart:
        """Returns the part, which is new if no rank has asked for it yet."""
        text = part.text
        if text not in self._parts:
            self._parts[text] = OutgoingPart(part, self._managers, self._counters)
            self._make_room()
        return self._parts[text]

    def drop(self, text: str) -> None:
        """Forgets a part, and ends its transfers."""
        if (part := self._parts.pop(text, None)) is not None:
            part.close()

    def close(self) -> None:
        for text in list(self._parts):
            self.drop(text)
        self._managers.close()

    def _make_room(self) -> None:
        unused = [text for text, part in self._parts.items() if not part.is_encoded]
        for text in unused[: max(0, len(unused) - MAX_UNUSED)]:
            self.drop(text)
