"""The encode side's queues: announce, encode, transfer.

    BootstrapQueue --pop_bootstrapped--> (the encoder runs) --> InflightQueue --pop_transferred--> the memory is free

No method blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.states import KVPoll
from embferry.transfer.send_handle import EmbeddingSender

log = logging.getLogger(__name__)


@dataclass(eq=False)
class MultimodalEmbeddingRequest:
    """A request whose embedding this worker computes and sends."""

    req: Any
    embedding_sender: EmbeddingSender


Failed = Callable[[MultimodalEmbeddingRequest, EmbeddingTransferError], None]
"""Called with a request that has failed and its error, by the ``pop_`` method that removes it from its queue."""


class _Queue:
    """Requests in the order of their arrival. ``failed`` is called for each one that fails; the others go on."""

    def __init__(self, failed: Failed) -> None:
        self.failed = failed
        self.queue: list[MultimodalEmbeddingRequest] = []

    def __len__(self) -> int:
        return len(self.queue)

    def _fail(self, request: MultimodalEmbeddingRequest) -> None:
        error = request.embedding_sender.failure_exception()
        log.warning("room %d: failed: %s", request.embedding_sender.room, error)
        self.failed(request, error)


class MultimodalEmbeddingBootstrapQueue(_Queue):
    """Requests whose length is announced and whose language side has not asked yet."""

    def add(self, req: Any, embedding_sender: EmbeddingSender, total_tokens: int, content_digest: bytes) -> None:
        """Announces the embedding of ``req`` and adds the request; see :meth:`EmbeddingSender.init`."""
        embedding_sender.init(total_tokens, content_digest)
        self.queue.append(MultimodalEmbeddingRequest(req, embedding_sender))

    def pop_bootstrapped(self) -> list[MultimodalEmbeddingRequest]:
        """Removes and returns the requests whose language side has asked, so that it is time to encode them."""
        ready = []
        for request in list(self.queue):
            status = request.embedding_sender.poll()
            if status is KVPoll.Bootstrapping:
                continue
            self.queue.remove(request)
            if status is KVPoll.Failed:
                self._fail(request)
            else:
                ready.append(request)
        return ready


class MultimodalEmbeddingInflightQueue(_Queue):
    """Requests whose embedding is computed and being transferred. Its memory is in use until they are removed."""

    def add(self, request: MultimodalEmbeddingRequest) -> None:
        """Adds a request after its ``send_embedding()``."""
        self.queue.append(request)

    def pop_transferred(self) -> list[MultimodalEmbeddingRequest]:
        """Removes and returns the requests whose embedding has arrived and whose memory is not read any more."""
        done = []
        for request in list(self.queue):
            sender = request.embedding_sender
            if not sender.source_released:
                continue
            self.queue.remove(request)
            if sender.poll() is KVPoll.Failed:
                self._fail(request)
            else:
                done.append(request)
        return done
