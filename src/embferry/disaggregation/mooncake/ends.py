"""What both ends of a transfer have in common: who is told of a change, and waiting for the end."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from embferry.protocol.errors import EmbeddingTransferError, LeaseExpired, LocalProtocolError
from embferry.protocol.states import KVPoll

from .manager import MooncakeEmbeddingManager

ENDED = (KVPoll.Success, KVPoll.Failed)


class End(ABC):
    """One room at one end. Every method but :meth:`wait` returns at once."""

    def __init__(self, manager: MooncakeEmbeddingManager, bootstrap_room: int) -> None:
        self.manager = manager
        self.room = bootstrap_room
        self._on_change: list[Callable[[], object]] = []
        self._error: EmbeddingTransferError | None = None

    @abstractmethod
    def poll(self) -> KVPoll:
        """Where the transfer stands."""

    def failure_exception(self) -> EmbeddingTransferError:
        """Why it failed.

        :raises LocalProtocolError: it has not failed.
        """
        with self.manager.lock:
            if self._error is None:
                raise LocalProtocolError("the transfer has not failed", room=self.room)
            return self._error

    def on_change(self, callback: Callable[[], object]) -> None:
        """``callback`` is called, from the manager's thread, when ``poll()`` or what has arrived has changed."""
        self._on_change.append(callback)

    def wait(self, timeout: float) -> None:
        """Blocks the calling thread until the transfer has succeeded.

        :param timeout: seconds.
        :raises EmbeddingTransferError: it failed; this is why.
        :raises LeaseExpired: ``timeout`` has passed; the transfer goes on.
        """
        changed = threading.Event()
        self.on_change(changed.set)
        deadline = self.manager.now() + timeout
        while self.poll() not in ENDED:
            if not changed.wait(max(0.0, deadline - self.manager.now())):
                raise LeaseExpired(f"not transferred within {timeout:g} s; it is still going on", room=self.room)
            changed.clear()
        if self._error is not None:
            raise self._error

    def notify(self) -> None:
        for callback in self._on_change:
            callback()
