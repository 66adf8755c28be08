"""Engines that copy memory inside this process by address, as the Mooncake engine does between processes.

Like the Mooncake engine they refuse memory that is not registered when the write begins, and report a write when its
bytes are in place.
"""

from __future__ import annotations

import ctypes
import itertools
import threading

from embferry.protocol.errors import TransportError
from embferry.transports.leased.mooncake.engine import Engine


class EngineNetwork:
    """Engines that reach each other.

    Attributes:
        engines: The open engines by session id.
        writes_finish: While it is not set, writes that have begun stay in flight.
        fail_next: Number of writes that fail from now on.
    """

    def __init__(self) -> None:
        self.engines: dict[str, EngineDouble] = {}
        self.writes_finish = threading.Event()
        self.writes_finish.set()
        self.fail_next = 0
        self._ports = itertools.count(20001)

    def open(self) -> EngineDouble:
        return EngineDouble(self, next(self._ports))


class EngineDouble(Engine):
    def __init__(self, network: EngineNetwork, port: int) -> None:
        self.network, self.port = network, port
        self.segment = f"127.0.0.1:{port}"
        self.regions: dict[int, int] = {}
        self._tickets = itertools.count(1)
        self._in_flight: dict[int, tuple[int, int, int] | None] = {}
        network.engines[self.segment] = self

    def register(self, address: int, length: int) -> None:
        if address in self.regions:
            raise TransportError("registered already")
        self.regions[address] = length

    def unregister(self, address: int) -> None:
        del self.regions[address]

    def submit(self, segment: str, source: int, target: int, length: int) -> int:
        peer = self.network.engines.get(segment)
        inside = peer is not None and any(
            base <= target and target + length <= base + size for base, size in peer.regions.items()
        )
        if self.network.fail_next:
            self.network.fail_next -= 1
            inside = False
        ticket = next(self._tickets)
        self._in_flight[ticket] = (source, target, length) if inside else None
        return ticket

    def outcome(self, ticket: int) -> int:
        if not self.network.writes_finish.is_set():
            return 0
        write = self._in_flight.pop(ticket)
        if write is None:
            return -1
        source, target, length = write
        ctypes.memmove(target, source, length)
        return 1

    def close(self) -> None:
        self.network.engines.pop(self.segment, None)
        self.regions.clear()
