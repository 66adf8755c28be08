"""The common base of the handles of both ends of a room: change callbacks and the error of a failed transfer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError
from embferry.protocol.states import KVPoll

ENDED = (KVPoll.Success, KVPoll.Failed)


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
    def error(self) -> EmbeddingTransferError | None:
        """The error with which the transfer has failed, or None. The lock is held."""

    @abstractmethod
    def poll(self) -> KVPoll:
        """Returns where the transfer stands."""

    @abstractmethod
    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer with an error. Does nothing if it has ended already."""

    @abstractmethod
    def clear(self) -> None:
        """Releases what the transfer holds. The caller does not use the handle any more."""

    @abstractmethod
    def _state(self) -> tuple[object, ...]:
        """Returns the values whose change is reported. The lock is held."""

    @property
    def has_ended(self) -> bool:
        """Whether the transfer has ended and the caller's arrays are its own again."""
        return self.poll() in ENDED

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
            if self.error is None:
                raise LocalProtocolError("the transfer has not failed", room=self.room)
            return self.error
