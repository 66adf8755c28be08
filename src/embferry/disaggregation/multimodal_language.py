"""The language side's queues: preallocate, transfer, then wait and run in the engine.

    PreallocQueue --pop_preallocated--> TransferQueue --pop_arriving--> waiting, running (the engine may start)
                                                      --pop_transferred--> the embedding is complete

No method blocks. The loop of a scheduler calls the ``pop_`` methods in each iteration. Transfers do not depend on these
calls, because the driver thread of the manager allocates, verifies and gathers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embferry.memory.blocks import MetadataAllocation
from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.states import KVPoll
from embferry.transfer.handle import ENDED

from .queues import ReceivingEnd, RequestQueue

__all__ = [
    "EmbeddingTransferError",
    "MultimodalLanguagePreallocQueue",
    "MultimodalLanguageRequest",
    "MultimodalLanguageTransferQueue",
]


@dataclass(eq=False)
class MultimodalLanguageRequest:
    """A request for the language model and the part of its embedding that has arrived.

    Attributes:
        req: The request of the caller.
        embedding_receiver: The receiving end of its transfer.
        waiting_for_input: Whether blocks are granted and no token has arrived yet.
        current_allocation: The blocks of the latest grant.
        total_embedding_length: Tokens of the whole embedding; -1 while it is not known.
        transferred_tokens: Number of leading tokens that have arrived and are verified.
        buffered_chunks: The arrived tokens, field name to uint8 [transferred_tokens, bytes a token].
        needs_resume: Whether the transfer must be resumed for remaining data.
    """

    req: Any
    embedding_receiver: ReceivingEnd
    waiting_for_input: bool = False
    current_allocation: MetadataAllocation | None = None
    total_embedding_length: int = -1
    transferred_tokens: int = 0
    buffered_chunks: dict[str, npt.NDArray[np.uint8]] | None = None
    needs_resume: bool = False

    def update(self) -> KVPoll:
        """Updates the fields from the receiver and returns its status."""
        receiver = self.embedding_receiver
        status = receiver.poll()
        if status is KVPoll.Failed:
            return status
        self.transferred_tokens = receiver.transferred_tokens
        self.current_allocation = receiver.current_allocation
        self.waiting_for_input = self.current_allocation is not None and self.transferred_tokens == 0
        self.buffered_chunks = receiver.buffered_chunks()
        self.needs_resume = status is not KVPoll.Success and self.transferred_tokens > 0
        # Last, as the transfer goes on between two reads: where tokens have arrived, the length is known.
        self.total_embedding_length = receiver.total_embedding_length
        return status


class _Queue(RequestQueue[MultimodalLanguageRequest]):
    def abort(self, req: Any) -> bool:
        """Ends the request with this ``req`` if it is here; returns whether it was. Drained blocks are freed."""
        for request in self.queue:
            if request.req is req:
                self.queue.remove(request)
                request.embedding_receiver.clear()
                return True
        return False

    def _fail(self, request: MultimodalLanguageRequest) -> None:
        error = request.embedding_receiver.failure_exception()
        self._log_failure(error, request.transferred_tokens)
        request.embedding_receiver.clear()
        self.failed(request, error)


class MultimodalLanguagePreallocQueue(_Queue):
    """Requests that wait for their first blocks."""

    def add(self, req: Any, embedding_receiver: ReceivingEnd) -> MultimodalLanguageRequest:
        """Asks for the embedding of ``req`` and adds the request.

        The pool grants blocks to its requests in fair turn, the default allocation while a length is not known.
        """
        request = MultimodalLanguageRequest(req, embedding_receiver)
        embedding_receiver.init()
        self.queue.append(request)
        return request

    def pop_preallocated(self) -> list[MultimodalLanguageRequest]:
        """Removes and returns the requests that have blocks."""

        def result(request: MultimodalLanguageRequest) -> KVPoll | None:
            status = request.update()
            return status if status in ENDED or request.current_allocation is not None else None

        return self._pop(result)


class MultimodalLanguageTransferQueue(_Queue):
    """Requests whose embedding is being transferred."""

    def __init__(self, failed: Callable[[MultimodalLanguageRequest, EmbeddingTransferError], None]) -> None:
        super().__init__(failed)
        self._arriving: list[MultimodalLanguageRequest] = []

    def add(self, request: MultimodalLanguageRequest) -> None:
        """Adds a request that has blocks."""
        self.queue.append(request)
        self._arriving.append(request)

    def pop_arriving(self) -> list[MultimodalLanguageRequest]:
        """Returns each request once, as soon as tokens of it have arrived: the engine may start on them."""
        waiting, self._arriving = self._arriving, []
        started = []
        for request in waiting:
            if request not in self.queue:
                continue
            try:
                status = request.update()
            except Exception:  # noqa: BLE001 - pop_transferred reports what recurs
                self._arriving.append(request)
                continue
            if status not in ENDED and not request.transferred_tokens:
                self._arriving.append(request)
            elif status is not KVPoll.Failed:
                started.append(request)
        return started

    def pop_transferred(self) -> list[MultimodalLanguageRequest]:
        """Removes and returns the requests whose embedding is complete."""

        def result(request: MultimodalLanguageRequest) -> KVPoll | None:
            status = request.update()
            return status if status in ENDED else None

        return self._pop(result)
