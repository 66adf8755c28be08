"""Event loops: file descriptors, timers and calls from other threads, handled on one thread without locks.

A :class:`Loop` has no thread; its owner calls :meth:`Loop.run_once` again and again. A :class:`LoopThread` is a thread
that does so. A :class:`Scope` is a part of a loop that fails alone: an exception that leaves one of its callbacks ends
the scope and nothing else.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable

from embferry.protocol.errors import TransportError

log = logging.getLogger(__name__)

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
Ready = Callable[[int], None]

LIVENESS_CHECK_S = 1.0


def is_ctrl_c(error: BaseException) -> bool:
    """Returns whether an exception is the user's Ctrl-C. On another thread than the main one, foreign code made it."""
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


class Scope:
    """Descriptors, timers and calls of one loop that fail together. No callback may block.

    An exception that leaves a callback is logged and ends the scope. Calls still run then, each guarded on its own,
    so that what they release is released.

    Args:
        loop: Runs the callbacks.
        on_failure: Called once, on the loop's thread, with the exception that ended the scope.
    """

    def __init__(self, loop: Loop, on_failure: Callable[[BaseException], None]) -> None:
        self._loop, self._on_failure = loop, on_failure
        self._ended = False
        self._fds: set[int] = set()

    @property
    def loop(self) -> Loop:
        """The loop of the scope."""
        return self._loop

    def scope(self, on_failure: Callable[[BaseException], None]) -> Scope:
        """Returns a new part of the same loop that fails alone. It does not end with this scope."""
        return Scope(self._loop, on_failure)

    def call(self, what: Callable[[], object]) -> None:
        """Runs ``what`` on the loop's thread soon, in the order of the calls. Any thread.

        ``what`` is never lost: once the loop is closed, it runs at once, on the calling thread.
        """
        self._loop._submit(self, what)

    def now(self) -> float:
        """Returns the time of the timers, in seconds. Any thread."""
        return self._loop.now()

    # Loop thread only

    def later(self, delay_s: float, what: Callable[[], object]) -> bool:
        """Runs ``what`` after ``delay_s`` seconds, unless the scope has ended by then. Returns False if it has now."""
        if self._ended or self._loop._closed:
            return False
        self._loop._schedule(self, delay_s, what)
        return True

    def watch(self, fd: int, events: int, ready: Ready) -> None:
        """Calls ``ready(events)`` whenever ``fd`` is ready. A second call replaces events and callback."""
        if not self._ended:
            self._loop._register(self, fd, events, ready)

    def unwatch(self, fd: int) -> None:
        """Stops watching ``fd``, if it is watched. Must be called before ``fd`` is closed."""
        self._loop._unregister(fd)

    def end(self) -> None:
        """Unwatches all descriptors and drops all timers of the scope. Idempotent."""
        if not self._ended:
            self._ended = True
            self._loop._drop(self)

    def run(self, what: Callable[..., object], *arguments: object) -> bool:
        """Runs ``what`` now, as a callback of this scope. Returns False if an exception left it."""
        try:
            what(*arguments)
        except BaseException as error:  # also asyncio.CancelledError and SystemExit, which no Exception covers
            if is_ctrl_c(error):
                raise
            log.exception("a callback of an event loop failed")
            self._fail(error)
            return False
        return True

    def _fail(self, error: BaseException) -> None:
        if self._ended:
            return
        self.end()
        try:
            self._on_failure(error)
        except Exception:
            log.exception("a failure could not be reported")


_Watched = tuple[Scope, int, Ready]


class Loop(Scope):
    """Waits for descriptors, timers and calls, on the thread that runs :meth:`run_once`.

    The loop is a scope of its own that never ends: an exception of one of its callbacks is logged, and a descriptor
    whose callback failed is no longer watched.

    In a forked child the loop is closed from the start: it shares the kernel's list of watched descriptors with its
    parent and must not change it.

    Attributes:
        forked: Whether this is the copy in a forked child.
    """

    def __init__(self) -> None:
        super().__init__(self, lambda error: None)
        self.forked = False
        self._epoll = select.epoll()
        try:
            self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            self._epoll.close()
            raise
        self._epoll.register(self._wakeup, READ | select.EPOLLET)  # edge-triggered: it need not be read
        self._watched: dict[int, _Watched] = {}
        self._timers: list[tuple[float, int, Scope, Callable[[], object]]] = []
        self._order = itertools.count()
        self._before_wait: list[Callable[[], None]] = []
        self._calls: deque[tuple[Scope, Callable[[], object]]] = deque()
        self._wanted = False  # by wake(), since the last wait began
        self._awake = True  # or woken: neither needs the descriptor
        self._lock = threading.Lock()  # guards the descriptors against close(), and the attribute below
        self._closed = False
        _loops.add(self)

    def now(self) -> float:
        return time.monotonic()

    def wake(self) -> None:
        """Makes a :meth:`run_once` under way, or else the next one, return without a wait. Any thread; never blocks."""
        self._wanted = True
        if not self._awake:
            with self._lock:
                if not self._closed and not self._awake:
                    self._awake = True
                    os.eventfd_write(self._wakeup, 1)

    def before_wait(self, what: Callable[[], None]) -> Callable[[], None]:
        """Calls ``what`` at the start of every :meth:`run_once`, until the function that it returns is called.

        Loop thread only.
        """
        self._before_wait.append(what)
        return lambda: self._before_wait.remove(what) if what in self._before_wait else None

    def run_once(self, timeout_s: float | None = None) -> None:
        """Waits until something is ready, and runs the callbacks of all that is.

        Args:
            timeout_s: Longest wait in seconds; None: no limit.
        """
        for what in tuple(self._before_wait):
            self.run(what)
        self._awake = False  # from here on wake() writes to the descriptor; what came before is seen below
        try:
            ready = self._epoll.poll(0 if self._wanted or self._calls else self._wait_s(timeout_s))
        finally:
            self._awake = True
            self._wanted = False  # a wake() that came before is answered by the return
        for fd, events in ready:
            self._on_ready(fd, events)
        if self._calls:
            self._run_calls()
        self._run_timers()

    def close(self) -> None:
        """Runs the remaining calls on the calling thread and closes the loop's descriptors. Idempotent.

        :meth:`run_once` must not be running on another thread.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._run_calls()
        self._watched.clear()
        self._timers.clear()
        self._before_wait.clear()
        self._epoll.close()
        os.close(self._wakeup)

    def _submit(self, scope: Scope, what: Callable[[], object]) -> None:
        with self._lock:
            if not self._closed:
                self._calls.append((scope, what))
                if not self._awake:
                    self._awake = True
                    os.eventfd_write(self._wakeup, 1)
                return
        scope.run(what)

    def _schedule(self, scope: Scope, delay_s: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._timers, (self.now() + delay_s, next(self._order), scope, what))

    def _register(self, scope: Scope, fd: int, events: int, ready: Ready) -> None:
        if self._closed:
            return
        before = self._watched.get(fd)
        if before is None:
            self._epoll.register(fd, events)
        else:
            if before[1] != events:
                self._modify(fd, events)
            before[0]._fds.discard(fd)
        self._watched[fd] = scope, events, ready
        scope._fds.add(fd)

    def _modify(self, fd: int, events: int) -> None:
        try:
            self._epoll.modify(fd, events)
        except FileNotFoundError:  # the descriptor was closed while it was watched, and its number is used again
            self._epoll.register(fd, events)

    def _unregister(self, fd: int) -> None:
        watched = self._watched.pop(fd, None)
        if watched is not None and not self._closed:
            watched[0]._fds.discard(fd)
            with contextlib.suppress(OSError):  # it was closed already
                self._epoll.unregister(fd)

    def _drop(self, scope: Scope) -> None:
        for fd in list(scope._fds):
            self._unregister(fd)
        if any(timer[2] is scope for timer in self._timers):
            self._timers = [timer for timer in self._timers if timer[2] is not scope]
            heapq.heapify(self._timers)

    def end(self) -> None:
        """Does nothing: the loop's own scope ends with :meth:`close`."""

    def _fail(self, error: BaseException) -> None:
        """Does nothing more: the loop itself goes on."""

    def _wait_s(self, timeout_s: float | None) -> float:
        if not self._timers:
            return -1 if timeout_s is None else timeout_s
        due = max(0.0, self._timers[0][0] - self.now())
        return due if timeout_s is None else min(timeout_s, due)

    def _on_ready(self, fd: int, events: int) -> None:
        watched = self._watched.get(fd)
        if watched is None:  # the loop's own descriptor, or one that an earlier callback has unwatched
            return
        scope, interest, ready = watched  # possibly of a reused number: a callback must tolerate a spurious call
        if events & ~(READ | WRITE):  # an error or a hang-up: reading and writing report it
            events = READ | WRITE
        if not events & interest:
            return
        if not scope.run(ready, events & interest) and self._watched.get(fd) is watched:
            self._unregister(fd)

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):
            scope, what = self._calls.popleft()
            scope.run(what)

    def _run_timers(self) -> None:
        now = self.now() if self._timers else 0.0
        while self._timers and self._timers[0][0] <= now:
            _, _, scope, what = heapq.heappop(self._timers)
            scope.run(what)

    def _after_fork(self) -> None:
        """Closes the child's copies. The parent's list of watched descriptors is shared, and stays as it is."""
        closed = self._closed
        self.forked = self._closed = True
        self._lock = threading.Lock()  # another thread of the parent may have held it
        for collection in (self._calls, self._watched, self._timers, self._before_wait):
            collection.clear()
        if not closed:
            self._epoll.close()
            os.close(self._wakeup)


_loops: weakref.WeakSet[Loop] = weakref.WeakSet()


def _after_fork() -> None:
    for loop in list(_loops):
        loop._after_fork()


os.register_at_fork(after_in_child=_after_fork)


class LoopThread(Scope):
    """A loop on a thread of its own, which starts with the first call or scope, and a scope of that loop.

    If the loop itself fails, its thread ends, and calls run on the calling threads from then on.

    Args:
        name: Of the thread.
        on_failure: Called once, on the loop's thread, with the exception that ended the scope. Calls still run then.
    """

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        super().__init__(Loop(), on_failure)
        self._stopping = False
        self._started = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=False)

    def call(self, what: Callable[[], object]) -> None:
        if not self._started:
            self._start()
        super().call(what)

    def scope(self, on_failure: Callable[[BaseException], None]) -> Scope:
        if not self._started:
            self._start()
        return super().scope(on_failure)

    def close(self) -> None:
        """Runs the remaining calls, ends the thread and closes its descriptors. Idempotent. Any other thread."""
        with self._loop._lock:
            if self._stopping:
                return
            self._stopping = True
        self._loop.wake()
        if self._started:
            self._thread.join()
        self._loop.close()

    def _start(self) -> None:
        with self._loop._lock:
            if not self._started and not self._stopping and not self._loop.forked:
                try:
                    self._thread.start()
                except RuntimeError as error:
                    raise TransportError(f"no thread can be started: {error}") from error
                self._started = True

    def _main(self) -> None:
        # A program that ends without closing its transport must end nevertheless: check the main thread.
        while not self._stopping and threading.main_thread().is_alive():
            if not self.run(self._loop.run_once, LIVENESS_CHECK_S):
                self._loop.close()
                return
