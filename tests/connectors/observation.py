"""Observes what the connector does inside an engine, at the managers and transports of the library."""

from __future__ import annotations

from collections import Counter
from typing import Any

from embferry import ReceiveManager


class Observation:
    """Observes every receive manager that this process makes from now on."""

    def __init__(self) -> None:
        self._managers: list[ReceiveManager] = []
        self._windows: Counter[str] = Counter()
        self._rooms: Counter[int] = Counter()
        make, begin = ReceiveManager.__init__, ReceiveManager.begin

        def init(manager: ReceiveManager, geometry: Any, transports: Any, **more: Any) -> None:
            for transport in transports:
                self._watch(transport)
            make(manager, geometry, transports, **more)
            self._managers.append(manager)

        def opened(manager: ReceiveManager, record: Any, allocation: Any) -> None:
            self._rooms[record.room] += 1
            begin(manager, record, allocation)

        ReceiveManager.__init__ = init  # type: ignore[method-assign]
        ReceiveManager.begin = opened  # type: ignore[method-assign]

    def windows(self) -> int:
        """Returns how often blocks were opened to a transport. Data can only arrive through a window."""
        return self._windows.total()

    def status(self) -> dict[str, Any]:
        """Returns ``windows`` by transport, the ``transfers`` begun, and ``whole``: whether all blocks are free."""
        whole = []
        for manager in self._managers:
            with manager.lock:
                manager.allocator.check_integrity()
                whole.append(manager.allocator.available == manager.geometry.num_blocks)
        return {"windows": dict(self._windows), "transfers": self._rooms.total(), "whole": all(whole)}

    def _watch(self, transport: Any) -> None:
        admit = transport.admit

        def admitted(window: Any) -> None:
            self._windows[transport.name] += 1
            admit(window)

        transport.admit = admitted
