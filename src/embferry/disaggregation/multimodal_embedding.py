"""The encode side's queues: announce, encode, transfer.

    BootstrapQueue --pop_bootstrapped--> (the encoder runs) --> InflightQueue --pop_transferred--> the memory is free

No method blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.states import KVPoll

from .queues import RequestQueue, SendingEnd

__all__ = [
    "EmbeddingTransferError",
    "MultimodalEmbeddingBootstrapQueue",
    "MultimodalEmbeddingInflightQueue",
    "MultimodalEmbeddingRequest",
]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class MultimodalEmbeddingRequest:
    """A request whose embedding this worker computes and sends."""

    req: Any
    embedding_sender: SendingEnd


class _Queue(RequestQueue[MultimodalEmbeddingRequest]):
    def _fail(self, request: MultimodalEmbeddingRequest) -> None:
        error = request.embedding_sender.failure_exception()
        log.warning("room %d: failed: %s", request.embedding_sender.room, error)
        self.failed(request, error)


class MultimodalEmbeddingBootstrapQueue(_Queue):
    """Requests whose length is announced and whose language side has not asked yet."""

    def add(
        self,
        req: Any,
        embedding_sender: SendingEnd,
        total_tokens: int,
        content_digest: bytes,
        aux: Sequence[int] = (),
    ) -> None:
        """Announces the embedding of ``req`` and adds the request; see the ``init()`` of the sending end.

        Args:
            req: The request of the caller.
            embedding_sender: The sending end of its transfer.
            total_tokens: Length of the embedding.
            content_digest: Digest of the embedding.
            aux: Up to 16 int32 for the language side's ``aux_datas``. [0] is set to the length, [1] is the mrope
                position delta.
        """
        embedding_sender.init(total_tokens, content_digest, aux)
        self.queue.append(MultimodalEmbeddingRequest(req, embedding_sender))

    def pop_bootstrapped(self) -> list[MultimodalEmbeddingRequest]:
        """Removes and returns the requests whose language side has asked, so that it is time to encode them."""

        def result(request: MultimodalEmbeddingRequest) -> KVPoll | None:
            status = request.embedding_sender.poll()
            return None if status is KVPoll.Bootstrapping else status

        return self._pop(result)


class MultimodalEmbeddingInflightQueue(_Queue):
    """Requests whose embedding is computed and being transferred. Its memory is in use until they are removed."""

    def add(self, request: MultimodalEmbeddingRequest) -> None:
        """Adds a request after its ``send_embedding()``."""
        self.queue.append(request)

    def pop_transferred(self) -> list[MultimodalEmbeddingRequest]:
        """Removes and returns the requests whose embedding has arrived and whose memory is not read any more."""

        def result(request: MultimodalEmbeddingRequest) -> KVPoll | None:
            return request.embedding_sender.poll() if request.embedding_sender.source_released else None

        return self._pop(result)
