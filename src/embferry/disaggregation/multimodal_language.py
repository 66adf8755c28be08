"""The language side's queues: preallocate, transfer, then wait and run in the engine.

    PreallocQueue --pop_preallocated--> TransferQueue --pop_arriving--> waiting, running (the engine may start)
                                                      --pop_transferred--> everything is here

Non-blocking throughout: a scheduler's loop calls the ``pop_`` methods at each turn. Progress never depends on it: the
manager's own thread grants, verifies and gathers meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embferry.memory.blocks import MetadataAllocation
from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.states import KVPoll
from embferry.transfer.receive_handle import EmbeddingReceiver

__all__ = [
    "EmbeddingTransferError",
    "MultimodalLanguagePreallocQueue",
    "MultimodalLanguageRequest",
    "MultimodalLanguageTransferQueue",
]

log = logging.getLogger(__name__)

ENDED = (KVPoll.Success, KVPoll.Failed)


@dataclass(eq=False)
class MultimodalLanguageRequest:
    """A request on its way to the language model, and what of its embedding has arrived."""

    req: Any
    embedding_receiver: EmbeddingReceiver
    waiting_for_input: bool = False
    """Blocks are granted; no token has arrived yet."""
    current_allocation: MetadataAllocation | None = None
    """The blocks of the latest grant."""
    total_embedding_length: int = -1
    """Tokens of the whole embedding; -1: not known yet."""
    transferred_tokens: int = 0
    """Tokens from the first on that are here and verified."""
    buffered_chunks: dict[str, npt.NDArray[np.uint8]] | None = None
    """What the transfers so far have delivered: field name to uint8 [transferred_tokens, bytes a token]."""
    needs_resume: bool = False
    """The transfer must be resumed for remaining data."""

    def update(self) -> KVPoll:
        """Takes over what the receiver knows now."""
        receiver = self.embedding_receiver
        status = receiver.poll()
        if status is KVPoll.Failed:
            return status
        self.total_embedding_length = receiver.total_embedding_length
        self.transferred_tokens = receiver.transferred_tokens
        self.current_allocation = receiver.current_allocation
        self.waiting_for_input = self.current_allocation is not None and self.transferred_tokens == 0
        self.buffered_chunks = receiver.buffered_chunks()
        needs_resume = status is not KVPoll.Success and self.transferred_tokens > 0
        if needs_resume and not self.needs_resume:
            log.info(
                "room %d: needs resume for remaining data: %d of %d tokens transferred",
                *(receiver.room, self.transferred_tokens, self.total_embedding_length),
            )
        self.needs_resume = needs_resume
        return status


Failed = Callable[[MultimodalLanguageRequest, EmbeddingTransferError], None]


class _Queue:
    """:param failed: told of every request that ends here with an error; the others go on."""

    def __init__(self, failed: Failed) -> None:
        self.failed = failed
        self.queue: list[MultimodalLanguageRequest] = []

    def __len__(self) -> int:
        return len(self.queue)

    def abort(self, req: Any) -> bool:
        """Ends a request that is in this queue, by its ``req``. Its blocks go back once they are drained."""
        for request in self.queue:
            if request.req is req:
                self.queue.remove(request)
                request.embedding_receiver.clear()
                return True
        return False

    def _fail(self, request: MultimodalLanguageRequest) -> None:
        error = request.embedding_receiver.failure_exception()
        log.warning("room %d: failed after %d tokens: %s", error.room or 0, request.transferred_tokens, error)
        request.embedding_receiver.clear()
        self.failed(request, error)


class MultimodalLanguagePreallocQueue(_Queue):
    """Requests that wait for their first blocks."""

    def add(self, req: Any, embedding_receiver: EmbeddingReceiver) -> MultimodalLanguageRequest:
        """Asks for the embedding of ``req``. The pool grants blocks in fair turn; the default allocation while the
        length is not known."""
        request = MultimodalLanguageRequest(req, embedding_receiver)
        embedding_receiver.init()
        self.queue.append(request)
        return request

    def pop_preallocated(self) -> list[MultimodalLanguageRequest]:
        """Takes out the requests that have blocks."""
        ready = []
        for request in list(self.queue):
            status = request.update()
            if status is KVPoll.Failed:
                self.queue.remove(request)
                self._fail(request)
            elif request.current_allocation is not None or status is KVPoll.Success:
                self.queue.remove(request)
                ready.append(request)
        return ready


class MultimodalLanguageTransferQueue(_Queue):
    """Requests whose embedding is being transferred."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed)
        self._arriving: list[MultimodalLanguageRequest] = []

    def add(self, request: MultimodalLanguageRequest) -> None:
        self.queue.append(request)
        self._arriving.append(request)

    def pop_arriving(self) -> list[MultimodalLanguageRequest]:
        """Each request once, as soon as tokens of it are here: the engine may start on them."""
        started = [r for r in self._arriving if r in self.queue and (r.update() in ENDED or r.transferred_tokens)]
        self._arriving = [r for r in self._arriving if r in self.queue and r not in started]
        return [r for r in started if r.embedding_receiver.poll() is not KVPoll.Failed]

    def pop_transferred(self) -> list[MultimodalLanguageRequest]:
        """Takes out the requests whose embedding is whole."""
        whole = []
        for request in list(self.queue):
            status = request.update()
            if status not in ENDED:
                continue
            self.queue.remove(request)
            if status is KVPoll.Failed:
                self._fail(request)
                continue
            transfers = request.embedding_receiver.transfers
            if transfers > 1:
                log.info(
                    "room %d: completed with resumed transfer: %d tokens, 1 initial and %d resumed",
                    *(request.embedding_receiver.room, request.transferred_tokens, transfers - 1),
                )
            whole.append(request)
        return whole
