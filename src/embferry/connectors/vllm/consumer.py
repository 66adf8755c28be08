"""Consumer, in the scheduler: receives into memory that its workers can map. Threads of the library move the bytes;
nothing here waits for a step of a worker."""

from __future__ import annotations

import time
from collections import OrderedDict

import numpy as np

from embferry.disaggregation.base.conn_multimodal import KVPoll
from embferry.disaggregation.common.conn_multimodal import EmbeddingReceiveManager, EmbeddingReceiver, GatherSink
from embferry.disaggregation.protocol.errors import (
    EmbeddingTransferError,
    IntegrityError,
    LayoutMismatch,
    RemoteProtocolError,
)
from embferry.disaggregation.protocol.layout import Geometry, Layout

from .config import ConnectorConfig
from .coordinates import Coordinates, digest_of
from .shared import Place, SharedRows

GRACE_S = 10.0
"""A worker may still be about to map what a request that was aborted just now had loaded."""


class Arrival:
    """One embedding on its way, or here."""

    def __init__(self, where: Coordinates, manager: EmbeddingReceiveManager) -> None:
        self.where = where
        self.users: set[str] = set()
        self.used_at = time.monotonic()
        self.ready = False
        self.transfers = 0
        """How many it took: one initial, the others resumed."""
        self._shared: SharedRows | None = None
        self._receiver: EmbeddingReceiver | None = manager.open(where.room, where.endpoint, GatherSink(make=self._make))
        self._receiver.init()

    def poll(self) -> bool:
        """Whether it is here, whole and verified.

        :raises EmbeddingTransferError: it will not come; this is why.
        """
        if self._receiver is None:
            return self.ready
        status, tokens = self._receiver.poll(), self._receiver.total_embedding_length
        if tokens not in (-1, self.where.tokens):
            why = f"the producer has {tokens} tokens where {self.where.tokens} were announced; encode it again"
            raise RemoteProtocolError(why, room=self.where.room)
        if status is KVPoll.Failed:
            raise self._receiver.failure_exception()
        if status is KVPoll.Success:
            self._finish(self._receiver)
        return self.ready

    @property
    def place(self) -> Place:
        assert self._shared is not None  # asked for only when it is ready
        return self._shared.place

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.abort()
            self._receiver.clear()
            self._receiver = None
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _make(self, tokens: int) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        if tokens != self.where.tokens:
            return {}  # refused by the sink; poll() says why
        if self._shared is None:
            self._shared = SharedRows(tokens, self.where.layout.token_bytes)
        return {"input_embeddings": self._shared.rows}

    def _finish(self, receiver: EmbeddingReceiver) -> None:
        self.transfers = receiver.transfers
        rows = receiver.arrays()["input_embeddings"]
        same = digest_of(rows, self.where.dtype, self.where.width).hex() == self.where.digest
        receiver.clear()
        self._receiver = None
        if not same or self._shared is None:
            raise IntegrityError("what arrived is not what was announced; encode it again", room=self.where.room)
        self.ready = True


class Consumer:
    """All embeddings of one engine; one pool a layout."""

    def __init__(self, config: ConnectorConfig) -> None:
        self._config = config
        self._managers: dict[Layout, EmbeddingReceiveManager] = {}
        self._arrivals: OrderedDict[str, Arrival] = OrderedDict()

    def want(self, request: str, mm_hash: str, where: Coordinates) -> bool:
        """Whether the embedding is here; begins its transfer if need be. One of that name that is here already, or on
        its way for somebody else, will do, though its bytes may differ in the last bit: vLLM's own cache goes by name.

        :raises EmbeddingTransferError: it cannot be had.
        """
        arrival = self._arrivals.get(mm_hash)
        if arrival is None:
            arrival = self._arrivals[mm_hash] = Arrival(where, self._manager(where.layout))
        elif (arrival.where.tokens, arrival.where.layout) != (where.tokens, where.layout):
            raise LayoutMismatch(f"another embedding is called {mm_hash} here, and has another shape")
        arrival.users.add(request)
        try:
            return arrival.poll()
        except EmbeddingTransferError:
            self._drop(mm_hash)
            raise

    def is_here(self, mm_hash: str) -> bool:
        arrival = self._arrivals.get(mm_hash)
        return arrival is not None and arrival.ready

    def load(self, mm_hash: str) -> Arrival:
        """One that is here, for a worker."""
        arrival = self._arrivals[mm_hash]
        arrival.used_at = time.monotonic()
        return arrival

    def finished(self, request: str) -> None:
        """It needs nothing any more. What is here stays for others, within the budget; what is on its way for it alone
        is given up."""
        for mm_hash, arrival in list(self._arrivals.items()):
            if request in arrival.users:
                arrival.users.discard(request)
                self._arrivals.move_to_end(mm_hash)
                if not arrival.ready and not arrival.users:
                    self._drop(mm_hash)
        self._evict()

    def close(self) -> None:
        for mm_hash in list(self._arrivals):
            self._drop(mm_hash)
        for manager in self._managers.values():
            manager.close()

    def _evict(self) -> None:
        total = sum(arrival.where.nbytes for arrival in self._arrivals.values() if arrival.ready)
        before = time.monotonic() - GRACE_S
        for mm_hash, arrival in list(self._arrivals.items()):
            if total <= self._config.cache_bytes:
                return
            if arrival.ready and not arrival.users and arrival.used_at < before:
                total -= arrival.where.nbytes
                self._drop(mm_hash)

    def _drop(self, mm_hash: str) -> None:
        self._arrivals.pop(mm_hash).close()

    def _manager(self, layout: Layout) -> EmbeddingReceiveManager:
        manager = self._managers.get(layout)
        if manager is None:
            config = self._config
            geometry = Geometry(layout, config.num_blocks, config.block_size)
            manager = self._managers[layout] = EmbeddingReceiveManager(
                geometry, config.roads(), name="vllm", settings=config.receiving
            )
        return manager
