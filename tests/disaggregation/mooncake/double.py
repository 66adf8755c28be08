"""Engines that copy memory inside this process, by address, as the Mooncake engine does between processes.

Like it, they refuse what is not registered when the write begins, and report a write when it is made.
"""

from __future__ import annotations

import ctypes
import itertools
import threading

from embferry.protocol.errors import TransportError
from embferry.transports.leased.mooncake.engine import Engine


class World:
    """Engines that reach each other. ``open_gate``: writes are made at once; otherwise when it is opened."""

    def __init__(self) -> None:
        self.engines: dict[str, EngineDouble] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.fail_next = 0
        """So many writes that begin from now on fail."""
        self.opened = 0
        self._ports = itertools.count(20001)

    def open(self) -> EngineDouble:
        self.opened += 1
        return EngineDouble(self, next(self._ports))


class EngineDouble(Engine):
    def __init__(self, world: World, port: int) -> None:
        self.world, self.port = world, port
        self.segment = f"127.0.0.1:{port}"
        self.regions: dict[int, int] = {}
        self._tickets = itertools.count(1)
        self._flying: dict[int, tuple[int, int, int] | None] = {}
        world.engines[self.segment] = self

    def register(self, address: int, length: int) -> None:
        if address in self.regions:
            raise TransportError("registered already")
        self.regions[address] = length

    def unregister(self, address: int) -> None:
        del self.regions[address]

    def submit(self, segment: str, source: int, target: int, length: int) -> int:
        peer = self.world.engines.get(segment)
        inside = peer is not None and any(
            base <= target and target + length <= base + size for base, size in peer.regions.items()
        )
        if self.world.fail_next:
            self.world.fail_next -= 1
            inside = False
        ticket = next(self._tickets)
        self._flying[ticket] = (source, target, length) if inside else None
        return ticket

    def outcome(self, ticket: int) -> int:
        if not self.world.gate.is_set():
            return 0
        write = self._flying.pop(ticket)
        if write is None:
            return -1
        source, target, length = write
        ctypes.memmove(target, source, length)
        return 1

    def close(self) -> None:
        self.world.engines.pop(self.segment, None)
        self.regions.clear()
