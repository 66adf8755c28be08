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
from embferry.transfer.control.endpoint import tcp_endpoint
from embferry.transfer.failures import attempt
from embferry.trust.occasions import Occasions, more

from ..shared.counters import Counters
from ..shared.managers import Managers
from ..shared.shape import Shape
from ..shared.shared_rows import ByteRows, SharedRows
from .config import ConnectorConfig
from .host_claims import CLAIMS, new_claim, slices
from .other_hosts import Dropped
from .workers import MAP_S, Workers

log = logging.getLogger(__name__)

RETRY_S = 0.2
"""Pause after a claim that has failed: vLLM starts the workers before the scheduler."""
OFFER_S = 600.0
"""How long a claim waits for an embedding before it is made anew."""


@dataclass(frozen=True, slots=True)
class OtherHost:
    """A host without the scheduler.

    Attributes:
        number: 1 or more.
        ranks: The number of ranks there.
        endpoint: Where the scheduler takes claims.
        secret: Of this start of the engine, by which the scheduler knows the claims.
    """

    number: int
    ranks: int
    endpoint: str
    secret: str


def endpoint_of_scheduler(config: ConnectorConfig, address: str) -> str:
    """Returns where a scheduler with these settings takes claims. ``address`` is that of its host."""
    return tcp_endpoint(address, config.ranks_port or 0, "tls" if config.trust.demands_tls else "tcp")


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

    def __init__(self, config: ConnectorConfig, name: str, host: OtherHost, hidden: int, dtype: str) -> None:
        """Starts, on this ``host``. ``hidden`` and ``dtype`` are those of the model.

        Raises:
            TransportError: The engine's name is taken on this host.
        """
        self._config, self._host, self._hidden, self._dtype = config, host, hidden, dtype
        self._layout = slices(hidden, dtype)
        self._lock = threading.Lock()  # guards the three below
        self._failures = Occasions()
        self._incoming: dict[int, _Incoming] = {}  # by room
        self._is_closed = False
        self.workers = Workers(name, host.ranks)
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
        if (error := attempt(self._open)) is not None:
            self._report("cannot be made", error)
            self._claim_later()

    def _claim_later(self) -> None:
        if not self._is_closed:
            self.workers.later(RETRY_S, self._claim)

    def _open(self) -> None:
        manager, claim = self._managers.get(self._layout), new_claim(self._host.number, self._host.secret)
        incoming = _Incoming(claim.room)
        receiver = incoming.receiver = manager.open(
            claim.room,
            self._host.endpoint,
            GatherSink(make=partial(self._make_rows, incoming)),
            name=claim.name,
            offer_timeout=OFFER_S,
        )
        receiver.init()
        with self._lock:
            self._incoming[incoming.room] = incoming
        receiver.on_change(partial(self._changed, incoming))
        self._changed(incoming)  # it may have ended before it could be watched

    def _make_rows(self, incoming: _Incoming, tokens: int) -> dict[str, ByteRows]:
        """Allocates the memory and waits until every rank here has mapped it, so that success means that too.

        Runs on the manager's callback thread with the sink's lock held. Other transfers go on meanwhile.

        Raises:
            TransportError: A rank cannot map it.
            OSError: There is no memory.
        """
        if incoming.shared is not None:  # the transfer begins again; the ranks have mapped this
            return {"input_embeddings": incoming.shared.rows}
        shared = SharedRows.make(Shape(tokens, self._hidden, self._dtype), self._host.ranks)
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
            failure = incoming.receiver.failure_exception() if status is KVPoll.Failed else None
        except EmbeddingTransferError as stopped:  # the manager is closed, or has failed
            status, failure = KVPoll.Failed, stopped
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
            self.drop(())  # the ranks and the scheduler may have been faster than this callback
            self._claim()
        else:
            if incoming.shared is not None:
                incoming.shared.close()
            self._report("has failed", failure)
            self._claim_later()
        incoming.receiver.clear()

    def _report(self, what: str, error: Exception | None) -> None:
        """Logs the end of a claim, once a minute for each kind: hosts claim again and again while none answers."""
        with self._lock:
            count = None if self._is_closed else self._failures.count(f"{what} {getattr(error, 'code', '')}")
        if count is not None:
            log.warning("asks %s for embeddings again: a claim %s: %s%s", self._host.endpoint, what, error, more(count))

    def _new_manager(self, layout: Layout) -> ReceiveManager:
        config = self._config
        geometry = Geometry(layout, config.num_blocks, config.block_size)
        transports = config.make_transports()
        return ReceiveManager(geometry, transports, name="vllm", settings=config.receiving, trust=config.trust)
