"""Consumer, in the scheduler: receives into memory that its workers can map. Threads of the library move the bytes;
nothing here waits for a step of a worker."""

from __future__ import annotations

import threading
from collections import OrderedDict

from embferry import ReceiveManager
from embferry.protocol.errors import EmbeddingTransferError, LayoutMismatch
from embferry.protocol.layout import Geometry, Layout

from .arrival import Arrival
from .config import ConnectorConfig
from .coordinates import Coordinates
from .router import Router
from .shelf import MAX_KEPT
from .tally import Tally


class Consumer:
    """All embeddings of one engine; one pool a layout."""

    def __init__(
        self, config: ConnectorConfig, tally: Tally | None = None, router: Router | None = None, ranks: int = 1
    ) -> None:
        self._config, self._tally, self._router, self._ranks = config, tally or Tally(), router, ranks
        self._managers: dict[Layout, ReceiveManager] = {}
        self._arrivals: OrderedDict[str, Arrival] = OrderedDict()
        self._news = threading.Event()
        self._tally.gauge("kept_bytes", self._kept_bytes)

    def want(self, request: str, mm_hash: str, where: Coordinates) -> bool:
        """Whether the embedding is here; begins its transfer if need be. One of that name that is here already, or on
        its way for somebody else, will do, though its bytes may differ in the last bit: vLLM's own cache goes by name.

        :raises EmbeddingTransferError: it cannot be had.
        """
        arrival = self._arrivals.get(mm_hash)
        if arrival is None:
            arrival = self._begin(mm_hash, where, frozenset())
        elif (arrival.where.tokens, arrival.where.layout) != (where.tokens, where.layout):
            raise LayoutMismatch(f"another embedding is called {mm_hash} here, and has another shape")
        elif request not in arrival.users:
            self._tally.add("cache_hits")
        arrival.users.add(request)
        try:
            return arrival.poll()
        except EmbeddingTransferError:
            self._drop(mm_hash, "failed")
            if where.room in arrival.rooms:
                raise
            self._begin(mm_hash, where, arrival.rooms).users.update(arrival.users)
            return False

    def wait(self, timeout: float) -> None:
        """Until something has come, or will not, or already has since the last call; at most ``timeout`` seconds."""
        self._news.wait(timeout)
        self._news.clear()

    def is_here(self, mm_hash: str) -> bool:
        arrival = self._arrivals.get(mm_hash)
        return arrival is not None and arrival.ready

    def load(self, mm_hash: str) -> Arrival:
        """One that is here, for the workers."""
        return self._arrivals[mm_hash]

    def finished(self, request: str) -> None:
        """It needs nothing any more. What is here stays for others, within the budget; what is on its way for it alone
        is given up."""
        for mm_hash, arrival in list(self._arrivals.items()):
            if request in arrival.users:
                arrival.users.discard(request)
                self._arrivals.move_to_end(mm_hash)
                if not arrival.ready and not arrival.users:
                    self._drop(mm_hash, "aborted")
        self._evict()

    def close(self) -> None:
        for mm_hash in list(self._arrivals):
            self._drop(mm_hash, "aborted")
        for manager in self._managers.values():
            manager.close()

    def _begin(self, mm_hash: str, where: Coordinates, tried: frozenset[int]) -> Arrival:
        """``tried``: rooms from which it could not be had, for others who need it too."""
        manager = self._manager(where.layout)
        arrival = Arrival(where, manager, self._router, self._ranks, self._tally, tried, self._news.set)
        self._arrivals[mm_hash] = arrival
        return arrival

    def _evict(self) -> None:
        """The oldest that nobody needs, and that no rank may still be about to copy for a request that was aborted."""
        total, count = self._kept_bytes(), len(self._arrivals)
        for mm_hash, arrival in list(self._arrivals.items()):
            if total <= self._config.cache_bytes and count <= MAX_KEPT:
                return
            if arrival.may_go:
                total, count = total - arrival.where.nbytes, count - 1
                self._drop(mm_hash, "")

    def _kept_bytes(self) -> int:
        return sum(arrival.where.nbytes for arrival in list(self._arrivals.values()) if arrival.ready)

    def _drop(self, mm_hash: str, outcome: str) -> None:
        self._arrivals.pop(mm_hash).close(outcome)

    def _manager(self, layout: Layout) -> ReceiveManager:
        manager = self._managers.get(layout)
        if manager is None:
            config = self._config
            geometry = Geometry(layout, config.num_blocks, config.block_size)
            manager = self._managers[layout] = ReceiveManager(
                geometry, config.make_transports(), name="vllm", settings=config.receiving
            )
        return manager
