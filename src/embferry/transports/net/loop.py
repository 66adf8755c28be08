"""The event loop of a transport: one thread that waits for file descriptors and timers."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
Ready = Callable[[int], None]

LIVENESS_CHECK_S = 1.0


class Loop:
    """Runs callbacks on its own thread, one at a time, without locks. No callback may block.

    The thread starts with the first use. An exception that leaves a callback is a bug: it ends the loop.

    Args:
        name: Of the thread.
        on_failure: Called on the loop's thread with the exception that ended the loop.
    """

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._selector = selectors.DefaultSelector()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wakeup, READ, lambda _: self._clear_wakeup())
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._stopping = False
        self._lock = threading.Lock()  # guards the attributes below against close()
        self._closed = False
        self._started = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)

    def call(self, what: Callable[[], None]) -> None:
        """Runs ``what`` on the loop's thread soon, in the order of the calls. Any thread.

        ``what`` is never lost: after :meth:`close` it runs at once, on the calling thread.
        """
        with self._lock:
            if not self._closed:
                self._calls.append(what)
                if not self._started:
                    self._started = True
                    self._thread.start()
                os.eventfd_write(self._wakeup, 1)
                return
        what()

    # Loop thread only

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        """Runs ``what`` after ``delay_s`` seconds."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), what))

    def watch(self, fd: int, events: int, ready: Ready) -> None:
        """Calls ``ready(events)`` whenever ``fd`` is ready. A second call replaces events and callback."""
        if self._closed:
            return
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, ready)
        else:
            self._selector.register(fd, events, ready)

    def unwatch(self, fd: int) -> None:
        """Stops watching ``fd``, if it is watched."""
        if not self._closed and fd in self._selector.get_map():
            self._selector.unregister(fd)

    # Any other thread

    def close(self) -> None:
        """Runs the remaining calls, ends the thread and closes its descriptors. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._stopping = True
            os.eventfd_write(self._wakeup, 1)
        if self._started:
            self._thread.join()
        self._run_calls()
        self._selector.close()
        os.close(self._wakeup)

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, events in self._selector.select(self._wait_s()):
                    current = self._selector.get_map().get(key.fd)
                    if current is not None:  # an earlier callback may have unwatched it, or its number is reused:
                        current.data(events)  # a callback must tolerate a spurious call
                self._run_calls()
                self._run_timers()
        except Exception as error:
            log.exception("the thread %s has ended", threading.current_thread().name)
            self._on_failure(error)

    def _wait_s(self) -> float:
        # A program that ends without closing its transport must end nevertheless: check the main thread.
        if not threading.main_thread().is_alive():
            self._stopping = True
            return 0.0
        if not self._timers:
            return LIVENESS_CHECK_S
        return min(LIVENESS_CHECK_S, max(0.0, self._timers[0][0] - time.monotonic()))

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def _clear_wakeup(self) -> None:
        os.eventfd_read(self._wakeup)


class Timeout:
    """A time-out that is set again far more often than it expires.

    It calls ``on_expiry`` once, at the time that was set last. Setting it again moves a number; the loop gets a new
    timer only for an earlier time. For the loop's thread only.
    """

    def __init__(self, loop: Loop, on_expiry: Callable[[], None]) -> None:
        self._loop, self._on_expiry = loop, on_expiry
        self._at = math.inf
        self._timer_at = math.inf  # the loop's earliest outstanding timer

    def set(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds
        if self._at < self._timer_at:
            self._timer_at = self._at
            self._loop.later(max(0.0, seconds), self._check)

    def clear(self) -> None:
        self._at = math.inf

    def _check(self) -> None:
        now = time.monotonic()
        if now < self._timer_at:
            return  # a timer that an earlier one has replaced
        self._timer_at = math.inf
        if now >= self._at:
            self._at = math.inf
            self._on_expiry()
        elif self._at < math.inf:
            self.set(self._at - now)
