"""The managers of one end: one for each layout of embeddings, nearly always one. One that has failed is replaced.

A layout comes from a peer, and the manager of a consumer has a pool of its own. So there are few managers at a time,
and an idle one makes room for another layout.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from embferry import CapacityError, Layout, LocalProtocolError, ReceiveManager, SendManager
from embferry.transfer.failures import attempt

from .counters import Counters

log = logging.getLogger(__name__)

M = TypeVar("M", bound="SendManager | ReceiveManager")
MAX_LAYOUTS = 2
"""Managers at a time. A model has one layout."""


class Managers(Generic[M]):
    """Makes a manager when one is needed first, and another one when it has failed. Any thread.

    Args:
        make: Makes the manager of a layout.
        counters: Counts the replaced managers.
        on_closed: Called when a manager that has failed or made room is closed, on a thread of its own.
        is_busy: Returns whether embeddings of a layout are under way. Called with the lock held, on any thread.
    """

    def __init__(
        self,
        make: Callable[[Layout], M],
        counters: Counters,
        on_closed: Callable[[M], object] = lambda manager: None,
        is_busy: Callable[[Layout], bool] = lambda layout: True,
    ) -> None:
        self._make, self._counters, self._on_closed, self._is_busy = make, counters, on_closed, is_busy
        self._lock = threading.Lock()  # guards the three below
        self._managers: dict[Layout, M] = {}
        self._retiring: list[threading.Thread] = []
        self._is_closed = False

    def get(self, layout: Layout) -> M:
        """Returns a manager that works.

        Raises:
            TransportError: None can be made now.
            CapacityError: Embeddings of too many other layouts are under way.
            LocalProtocolError: The engine is shutting down.
        """
        with self._lock:
            if self._is_closed:
                raise LocalProtocolError("this engine is shutting down")
            manager = self._managers.get(layout)
            if manager is not None and manager.fault is not None:
                del self._managers[layout]
                log.error("a manager has failed and is replaced: %s", manager.fault)
                self._counters.add("managers_replaced")
                self._retire(manager)
                manager = None
            if manager is None:
                self._make_room()
                manager = self._managers[layout] = self._make(layout)
            return manager

    def close(self) -> None:
        """Closes all. An error is logged, and the rest is closed nevertheless."""
        with self._lock:
            self._is_closed = True
            managers, retiring = list(self._managers.values()), self._retiring
            self._managers.clear()
        for manager in managers:
            _close(manager)
        for thread in retiring:
            thread.join()

    def _make_room(self) -> None:
        if len(self._managers) < MAX_LAYOUTS:
            return
        idle = next((layout for layout in self._managers if not self._is_busy(layout)), None)
        if idle is None:
            why = f"embeddings of {MAX_LAYOUTS} other layouts are under way; serve the same model on both sides"
            raise CapacityError(why)
        self._retire(self._managers.pop(idle))

    def _retire(self, manager: M) -> None:
        """Closes a manager without making the engine wait."""

        def retire() -> None:
            _close(manager)
            if (error := attempt(self._on_closed, manager)) is not None:
                log.error("the transfers of a manager that has failed could not be ended", exc_info=error)

        self._retiring = [thread for thread in self._retiring if thread.is_alive()]
        self._retiring.append(threading.Thread(target=retire, name="embferry-retire", daemon=True))
        self._retiring[-1].start()


def _close(manager: SendManager | ReceiveManager) -> None:
    if (error := attempt(manager.close)) is not None:
        log.error("a manager could not close everything: %s", error, exc_info=error)
