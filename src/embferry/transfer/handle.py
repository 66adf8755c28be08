"""What the handles of both ends of a room share: change callbacks and the error of a failed transfer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError
from embferry.protocol.receiver import Receiver
from embferry.protocol.sender import Sender


class Host(Protocol):
    """The manager of a handle, as far as every handle needs it."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Guards the state machines; reentrant."""
        ...

    def now(self) -> float:
        """Returns the time of the state machines, in seconds."""
        ...

    def check(self) -> None:
        """Raises LocalProtocolError if the manager is closed or has failed."""


class Handle(ABC):
    """One end of one room, as the caller holds it. Methods may be called from any thread and return at once.

    Args:
        room: The ``bootstrap_room``.
        host: The manager that drives the transfer.
    """

    def __init__(self, room: int, host: Host) -> None:
        self.room = room
        self._host = host
        self._on_change: list[Callable[[], object]] = []
        self._reported: object = None

    @property
    @abstractmethod
    def machine(self) -> Receiver | Sender:
        """The state machine. Guarded by the manager's lock."""

    @abstractmethod
    def _state(self) -> tuple[object, ...]:
        """Returns the values whose change is reported. The lock is held."""

    def now(self) -> float:
        """Returns the time of the manager's clock, in seconds."""
        return self._host.now()

    def on_change(self, callback: Callable[[], object]) -> None:
        """Registers a callback that is called whenever the state of this end has changed.

        It runs on the manager's thread, which holds the manager's lock, so it must not block, must not raise and must
        not wait for another thread that uses this manager. Setting an event or waking a loop is what it is for.
        """
        self._on_change.append(callback)

    def notify(self, *, force: bool = False) -> None:
        """Calls the callbacks if the state has changed since the last call, or if ``force``. The lock is held."""
        state = self._state()
        if force or state != self._reported:
            self._reported = state
            for callback in self._on_change:
                callback()

    def failure_exception(self) -> EmbeddingTransferError:
        """Returns the error with which the transfer failed.

        Raises:
            LocalProtocolError: It has not failed.
        """
        with self._host.lock:
            if self.machine.error is None:
                raise LocalProtocolError(f"the transfer has not failed: {self.machine.phase.value}", room=self.room)
            return self.machine.error
