"""The receiver of a host without the scheduler: one rank fetches each embedding once, and all ranks there map it."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from functools import partial

from embferry import (
    EmbeddingReceiver,
    EmbeddingTransferError,
    GatherSink,
    Geometry,
    KVPoll,
    Layout,
    LocalProtocolError,
    ReceiveManager,
    TransportError,
)
from embferry.transfer.failures import attempt

from ..shared.counters import Counters
from ..shared.managers import Managers
from ..shared.shape import Shape
from ..shared.shared_rows import ByteRows, SharedRows
from .config import ConnectorConfig
from .host_claims import CLAIMS, new_name, new_room, slices
from .other_hosts import Dropped
from .workers import MAP_S, Workers

log = logging.getLogger(__name__)

RETRY_S = 0.2
"""Pause after a claim that has failed: vLLM starts the workers before the scheduler."""
OFFER_S = 600.0
"""How long a claim waits for an embedding before it is made anew."""


@dataclass(eq=False, slots=True)
class _Incoming:
    """A claim, and later the embedding that came in answer to it.

    Attributes:
        room: Its room, which is the key of the memory here.
        shared: The memory.
        is_complete: Whether it is verified and mapped.
        last_load: The load after which nothing needs it; None: the scheduler needs it still.
    """

    room: int
    receiver: EmbeddingReceiver | None = None
    shared: SharedRows | None = None
    is_complete: bool = False
    has_ended: bool = False
    last_load: int | None = None
    mapped: threading.Event = field(default_factory=threading.Event)

    @property
    def is_over(self) -> bool:
        """Whether neither the scheduler nor a rank here needs the memory any more."""
        if self.shared is None or self.last_load is None or not self.is_complete:
            return False
        return bool((self.shared.completed >= self.last_load).all())


class HostReceiver:
    """Keeps claims open at the scheduler's host, and gives what arrives to the ranks of this host.

    Attributes:
        workers: The ranks of this host.
    """

    def __init__(
        self, config: ConnectorConfig, name: str, ranks: int, host: int, endpoint: str, hidden: int, dtype: str
    ) -> None:
        """Starts. ``ranks`` is the number of ranks on this ``host``, whose scheduler is at ``endpoint``.

        Raises:
            TransportError: The engine's name is taken on this host.
        """
        self._config, self._ranks, self._host, self._endpoint = config, ranks, host, endpoint
        self._hidden, self._dtype = hidden, dtype
        self._layout = slices(hidden, dtype)
        self._lock = threading.Lock()  # guards the two below
        self._incoming: dict[int, _Incoming] = {}  # by room
        self._is_closed = False
        self.workers = Workers(name, ranks)
        self._managers: Managers[ReceiveManager] = Managers(self._new_manager, Counters())
        for _ in range(CLAIMS):
            self.workers.later(0, self._claim)

    def drop(self, dropped: tuple[Dropped, ...]) -> None:
        """Takes note of what the scheduler needs no longer, and closes what every rank here has loaded as well."""
        over: list[SharedRows] = []
        with self._lock:
            for each in dropped:
                if each.room in self._incoming:
                    self._incoming[each.room].last_load = each.number
            for incoming in list(self._incoming.values()):
                if incoming.is_over and incoming.shared is not None:
                    over.append(incoming.shared)
                    del self._incoming[incoming.room]
        for shared in over:
            shared.close()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            incoming = list(self._incoming.values())
        for each in incoming:
            each.mapped.set()
        self._managers.close()
        for each in incoming:
            if each.shared is not None:
                each.shared.close()
        self.workers.close()

    def _claim(self) -> None:
        """Opens a claim. Runs on a thread of the channel or of the manager."""
        if (error := attempt(self._open)) is not None and not self._is_closed:
            log.error("host %d cannot ask for embeddings: %s", self._host, error)
            self._claim_later()

    def _claim_later(self) -> None:
        if not self._is_closed:
            self.workers.later(RETRY_S, self._claim)

    def _open(self) -> None:
        manager, incoming = self._managers.get(self._layout), _Incoming(new_room())
        receiver = manager.open(
            incoming.room,
            self._endpoint,
            GatherSink(make=partial(self._make_rows, incoming)),
            name=new_name(self._host),
            offer_timeout=OFFER_S,
        )
        with self._lock:
            if self._is_closed:
                return
            incoming.receiver = receiver
            self._incoming[incoming.room] = incoming
        receiver.on_change(partial(self._changed, incoming))
        receiver.init()

    def _make_rows(self, incoming: _Incoming, tokens: int) -> dict[str, ByteRows]:
        """Allocates the memory and waits until every rank here has mapped it, so that success means that too.

        Runs on the manager's callback thread with the sink's lock held. Other transfers go on meanwhile.

        Raises:
            TransportError: A rank cannot map it.
            OSError: There is no memory.
        """
        if incoming.shared is not None:  # the transfer begins again; the ranks have mapped this
            return {"input_embeddings": incoming.shared.rows}
        shared = SharedRows.make(Shape(tokens, self._hidden, self._dtype), self._ranks)
        shared.key = incoming.room
        try:
            self.workers.share(shared, incoming.mapped.set)
            incoming.mapped.wait(MAP_S)
            if not self.workers.is_mapped(shared):
                raise TransportError(f"not every rank has mapped it within {MAP_S:g} s")
        except BaseException:
            shared.close()
            raise
        with self._lock:
            is_wanted = not self._is_closed and not incoming.has_ended
            incoming.shared = shared if is_wanted else None
        if not is_wanted:
            shared.close()
            raise LocalProtocolError("the transfer has ended")
        return {"input_embeddings": shared.rows}

    def _changed(self, incoming: _Incoming) -> None:
        """Replaces a claim that has ended. Runs on the manager's callback thread without locks."""
        assert incoming.receiver is not None
        try:
            status = incoming.receiver.poll()
        except EmbeddingTransferError:  # the manager is closed, or has failed
            status = KVPoll.Failed
        if status not in (KVPoll.Success, KVPoll.Failed):
            return
        with self._lock:
            if incoming.has_ended:
                return
            incoming.has_ended = True
            incoming.is_complete = status is KVPoll.Success
            if not incoming.is_complete:
                self._incoming.pop(incoming.room, None)
        if incoming.is_complete:
            self._claim()
        else:
            log.info("host %d: a claim has failed: %s", self._host, incoming.receiver.failure_exception())
            if incoming.shared is not None:
                incoming.shared.close()
            self._claim_later()
        incoming.receiver.clear()

    def _new_manager(self, layout: Layout) -> ReceiveManager:
        config = self._config
        geometry = Geometry(layout, config.num_blocks, config.block_size)
        transports = config.make_transports()
        return ReceiveManager(geometry, transports, name="vllm", settings=config.receiving, trust=config.trust)
