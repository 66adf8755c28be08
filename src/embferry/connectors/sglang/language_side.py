"""The plug-in's part of one rank of a language server: its managers, and the parts that it receives."""

from __future__ import annotations

import itertools
import sys

from embferry import Geometry, Layout, ReceiveManager
from embferry.transfer.failures import attempt

from ..shared.counters import Counters, MetricsServer
from ..shared.managers import Managers
from .incoming import IncomingPart
from .request_trace import RequestTrace
from .settings import PluginSettings

SWITCH_S = 0.0005
"""Longest time for which one thread keeps the interpreter while others wait for it, in seconds.

SGLang's scheduler never waits: with Python's own 5 ms, each step of a transfer takes as long before it begins.
"""


class LanguageSide:
    """One rank of a language server. The scheduler's thread calls the methods.

    Args:
        settings: The settings.
        rank: Number of the rank.
        ranks: Ranks of the language server, on all its hosts.
        hosts: Its hosts, each with as many ranks.

    Attributes:
        host: Number of this rank's host.
        receives: Whether this rank receives for its host. The others map what it has received.
    """

    def __init__(self, settings: PluginSettings, rank: int, ranks: int, hosts: int) -> None:
        self._settings, self.ranks = settings, ranks
        self._ranks_of_host = max(1, ranks // max(1, hosts))
        self.host, place = divmod(rank, self._ranks_of_host)
        self.receives = place == 0
        self.counters = Counters()
        self._managers: Managers[ReceiveManager] = Managers(self._new_manager, self.counters)
        self._names = itertools.count(1)
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self._metrics = None
        if settings.metrics_port is not None:
            port = settings.metrics_port and settings.metrics_port + rank
            self._metrics = MetricsServer(self.counters, settings.host, port)

    def incoming(self, rid: str, trace: RequestTrace | None = None) -> IncomingPart:
        """Returns a new part of a request, which no encoder has been named for yet. ``trace``: if it has spans."""
        timeout = self._settings.failover_timeout
        return IncomingPart(rid, self.host, self._ranks_of_host, self._managers, self.counters, timeout, trace)

    def close(self) -> None:
        """Ends every transfer."""
        attempt(self._managers.close)
        if self._metrics is not None:
            attempt(self._metrics.close)

    def _new_manager(self, layout: Layout) -> ReceiveManager:
        settings = self._settings
        return ReceiveManager(
            Geometry(layout, num_blocks=settings.num_blocks, block_size=settings.block_size),
            settings.make_transports(),
            name=f"sglang-{next(self._names)}",
            settings=settings.receiving,
            trust=settings.trust,
        )
