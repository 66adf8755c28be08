"""The common base of the handles of both ends of a room: change callbacks and the error of a failed transfer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError, shown
from embferry.protocol.states import KVPoll

from .callbacks import Notifier

log = logging.getLogger(__name__)

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
        """Raises LocalProtocolError if the manager is closed."""

    def run_callback(self, call: Callable[[], None]) -> None:
        """Runs a user's callback soon, on a thread of its own, without locks."""


class NoHandle:
    """Takes the place of the handle in a record that is forgotten, so that the two do not refer to each other.

    Otherwise only the garbage collector could free them, and would have work with every transfer.
    """

    def has_changed(self) -> bool:
        return False

    def notify(self) -> None:
        pass

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        pass

    def let_go(self) -> None:
        pass


NO_HANDLE = NoHandle()


class Handle(ABC):
    """One end of one room, as the caller holds it. Methods may be called from any thread and return at once.

    Args:
        room: The ``bootstrap_room``.
        host: The manager that drives the transfer.
    """

    def __init__(self, room: int, host: Host) -> None:
        self.room = room
        self._host = host
        self._notifier = Notifier(host.run_callback)
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

    def on_change(self, callback: Callable[[], object]) -> Callable[[], object]:
        """Registers a callback that is called after the state of this end has changed.

        It runs on the manager's callback thread, without locks, one callback at a time and in the order of the changes.
        It may use this end and its manager. While it blocks, other callbacks of the manager wait, transfers do not. If
        it raises, this transfer fails with an error that names the exception.

        Returns:
            A function that removes the callback.
        """
        return self._notifier.add(callback, self._callback_failed)

    def wake_on_change(self, wake: Callable[[], object]) -> Callable[[], object]:
        """Calls ``wake`` after every change of the state.

        It runs on the driver thread, or on the thread that closes the manager or opens the room again. No lock of the
        manager is held, except on the origin's wire. It is for waking a thread or an event loop, and must return at
        once. If it raises, it is removed.

        Returns:
            A function that removes it.
        """
        return self._notifier.wait_with(wake)

    def has_changed(self) -> bool:
        """Returns whether the state has changed since the last call. The lock is held."""
        state = self._state()
        changed, self._reported = state != self._reported, state
        return changed

    def report(self) -> None:
        """Reports a change, if there is one. The lock is held."""
        if self.has_changed():
            self.notify()

    def notify(self) -> None:
        """Reports a change."""
        self._notifier.fire()

    def let_go(self) -> None:
        """The manager has forgotten the transfer, whose state is final."""
        self._notifier.clear()

    def _callback_failed(self, error: Exception) -> None:
        """A callback has raised. Runs on the callback thread."""
        extra = {"room": self.room}
        log.error("room %d: a callback raised %s", self.room, shown(error), exc_info=error, extra=extra)
        self.abort(LocalProtocolError(f"an on_change callback raised {shown(error)}; the log has its traceback"))

    def failure_exception(self) -> EmbeddingTransferError:
        """Returns the error with which the transfer failed.

        Raises:
            LocalProtocolError: It has not failed.
        """
        with self._host.lock:
            if self.error is None:
                raise LocalProtocolError("the transfer has not failed", room=self.room)
            return self.error
