"""Callbacks of users: on a thread of their own, without locks, so that a slow one harms no transfer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from embferry.protocol.errors import shown

from .failures import attempt

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long :meth:`CallbackThread.close` waits for a callback that is still running."""

Run = Callable[[Callable[[], None]], None]
"""Runs a call soon, in the order of the calls, without locks. Any thread; never blocks."""


class CallbackThread:
    """Runs calls in their order on one thread, which starts with the first. One that raises is a bug."""

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards the two attributes below
        self._started = self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def post(self, call: Callable[[], None]) -> None:
        """Queues a call. Any thread. After :meth:`close`, the call is dropped."""
        with self._lock:
            if self._closed:
                return
            if not self._started:
                self._thread.start()  # if the machine has no thread to give, the caller learns it here
                self._started = True
            self._queue.put(call)

    def close(self) -> None:
        """Waits until the queued calls have run, at most ``CLOSE_SECONDS``. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        if self._started and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                log.warning("a callback has been running for %g s; its thread is left behind", CLOSE_SECONDS)

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            if (error := attempt(call)) is not None:
                log.critical("the call of a callback has failed; this is a bug: %s", shown(error), exc_info=error)


class Notifier:
    """Reports changes of one end of a room to threads and tasks that wait, and to callbacks.

    Args:
        run: Runs a callback of the user (:meth:`CallbackThread.post`).
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._waiters: dict[object, Callable[[], object]] = {}
        self._callbacks: dict[object, _Callback] = {}

    def wait_with(self, wake: Callable[[], object]) -> Callable[[], object]:
        """Calls ``wake`` after every change, on the thread that calls :meth:`fire`; it must be quick and take no lock.

        If it raises, for example because its event loop has been closed, it is not called again.

        Returns:
            A function that ends this.
        """
        key = object()
        self._waiters[key] = wake
        return partial(self._waiters.pop, key, None)

    def add(self, callback: Callable[[], object], failed: Callable[[Exception], None]) -> Callable[[], object]:
        """Calls ``callback`` after every change, on the callback thread.

        Args:
            callback: The user's.
            failed: Called on the callback thread with what the callback has raised.

        Returns:
            A function that ends this.
        """
        key = object()
        self._callbacks[key] = _Callback(callback, failed)
        return partial(self._callbacks.pop, key, None)

    def clear(self) -> None:
        """Nothing changes any more: forgets whom to tell."""
        self._waiters.clear()
        self._callbacks.clear()

    def fire(self) -> None:
        """The state has changed. Any thread; takes no lock of a manager."""
        for key, wake in list(self._waiters.items()):
            error = attempt(wake)
            if error is not None:
                log.debug("a waiter is gone: %s", shown(error))
                self._waiters.pop(key, None)
        for callback in list(self._callbacks.values()):
            if not callback.queued:  # one that has not run yet will see this change too
                callback.queued = True
                if (error := attempt(self._run, callback.run)) is not None:
                    callback.queued = False
                    callback.failed(error)


class _Callback:
    def __init__(self, call: Callable[[], object], failed: Callable[[Exception], None]) -> None:
        self._call, self.failed = call, failed
        self.queued = False

    def run(self) -> None:
        self.queued = False  # before the call: a later change calls it once more
        if (error := attempt(self._call)) is not None:
            self.failed(error)
