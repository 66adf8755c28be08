"""Surroundings of a manager: a clock, a control plane, its thread and the thread of its callbacks.

A manager is given one, so that a test can run whole managers in virtual time, without threads and sockets.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from embferry.protocol.errors import shown
from embferry.transports.net.loop import Loop

from .callbacks import CallbackThread
from .control.contract import ControlPlane
from .failures import attempt

log = logging.getLogger(__name__)

IDLE_SECONDS = 60.0
AFTER_BUG_SECONDS = 0.1  # pause after a turn that raised, so that a bug that recurs does not use up a core

Turn = Callable[[], float | None]
"""Handles everything that has happened. Returns when it is due again without an event, or None."""


class Runtime(ABC):
    """The surroundings of a manager.

    Attributes:
        control: The control plane. For the driver thread only.
    """

    control: ControlPlane

    @abstractmethod
    def now(self) -> float:
        """Returns the time of the state machines, in seconds. It never goes back."""

    @abstractmethod
    def start(self, turn: Turn) -> None:
        """Begins to call ``turn``, one call at a time, whenever something may have happened or it is due."""

    @abstractmethod
    def wake(self) -> None:
        """Causes a turn soon. Any thread; never blocks; harmless after :meth:`stop`."""

    @abstractmethod
    def run_callback(self, call: Callable[[], None]) -> None:
        """Runs a user's callback soon, without locks, in the order of the calls. It must not raise."""

    @property
    @abstractmethod
    def is_own_thread(self) -> bool:
        """Whether the calling thread is the one that makes the turns, which must not call :meth:`stop`."""

    @abstractmethod
    def stop(self) -> None:
        """Makes a last turn, sends what is queued, and ends. Idempotent.

        Raises:
            Exception: The control plane has raised it while it was closed; everything else is closed.
        """


class ThreadRuntime(Runtime):
    """A driver thread with an event loop, on which the control plane lives, and a thread for callbacks.

    Args:
        name: Of the driver thread.
        make_control: Makes the control plane on the loop.
    """

    def __init__(self, name: str, make_control: Callable[[Loop], ControlPlane]) -> None:
        self._loop = Loop()
        try:
            self.control = make_control(self._loop)
        except BaseException:
            self._loop.close()
            raise
        self._callbacks = CallbackThread(f"{name}-callbacks")
        self._turn: Turn = lambda: None
        self._stopping = self._is_over = False
        self._close_error: Exception | None = None
        self._wait = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def now(self) -> float:
        return time.monotonic()

    def start(self, turn: Turn) -> None:
        self._turn = turn
        self._thread.start()

    def wake(self) -> None:
        self._loop.wake()

    def run_callback(self, call: Callable[[], None]) -> None:
        self._callbacks.post(call)

    @property
    def is_own_thread(self) -> bool:
        return self._thread is threading.current_thread()

    def stop(self) -> None:
        self._stopping = True
        self._loop.wake()
        if self._thread.is_alive():
            self._thread.join()
        elif not self._is_over:  # it was never started
            self._end()
        self._callbacks.close()
        if (error := self._close_error) is not None:
            self._close_error = None
            raise error

    def _run(self) -> None:
        self._wait = 0.0
        while not self._stopping:
            for step in (lambda: self._loop.run_once(self._wait), self._one_turn):
                if (error := attempt(step)) is not None:
                    log.critical("a turn of the driver has failed; this is a bug: %s", shown(error), exc_info=error)
                    time.sleep(AFTER_BUG_SECONDS)
        if (error := attempt(self._one_turn)) is not None:
            log.critical("the last turn of the driver has failed; this is a bug: %s", shown(error), exc_info=error)
        self._end()

    def _one_turn(self) -> None:
        """Runs a turn, and takes note of the seconds to wait before the next."""
        due = self._turn()
        self._wait = IDLE_SECONDS if due is None else min(max(0.0, due - self.now()), IDLE_SECONDS)

    def _end(self) -> None:
        self._is_over = True
        self._close_error = attempt(self.control.close)
        self._loop.close()
