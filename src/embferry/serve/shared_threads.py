"""Threads that the clients of a process share: each client has its turns, and work leaves with its client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_CLIENT: ContextVar[str] = ContextVar("client", default="")
_THREAD = threading.local()


class UnwantedError(Exception):
    """The result of the work is not wanted any more: its client has left."""


def current_client() -> str:
    """Returns the client for which this code runs; empty if it runs for none."""
    return _CLIENT.get()


@contextlib.contextmanager
def acting_for(client: str) -> Iterator[None]:
    """Names the client for a block of code and the tasks that it starts."""
    token = _CLIENT.set(client)
    try:
        yield
    finally:
        _CLIENT.reset(token)


def stop_if_unwanted() -> None:
    """Ends work in the middle. Long work calls it between its pieces. Does nothing on other threads.

    Raises:
        UnwantedError: the work that this thread does has been cancelled.
    """
    work: SharedWork[Any] | None = getattr(_THREAD, "work", None)
    if work is not None and work.is_unwanted:
        raise UnwantedError


class SharedWork(Future[T], Generic[T]):
    """A piece of work of one client. ``cancel`` removes it from its queue; if it runs already, it is told to stop."""

    def __init__(self, client: str, call: Callable[[], T]) -> None:
        super().__init__()
        self.client = client
        self.is_unwanted = False
        self._call: Callable[[], T] | None = call

    def cancel(self) -> bool:
        self.is_unwanted = True
        is_cancelled = super().cancel()
        if is_cancelled:
            self._call = None
        return is_cancelled

    def run(self) -> None:
        """Does the work on this thread, unless it was cancelled."""
        call, self._call = self._call, None
        if call is None or not self.set_running_or_notify_cancel():
            return
        _THREAD.work = self
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller
            self.set_exception(error)
        else:
            self.set_result(result)
        finally:
            _THREAD.work = None


class SharedThreads:
    """A few threads, and a queue for each client. Thread-safe.

    The next piece of work is one of the client that occupies the fewest threads; of several, the client whose last
    turn was longest ago. So a client waits for one piece of each other client, however many those have sent. Work that
    has begun counts until it ends, also if its client has left.

    Where a piece may take very long, ``most`` and ``spares`` keep threads free, so that a new client does not wait
    for another client's piece.

    Args:
        count: pieces that run at the same time.
        name: the threads' names begin with it.
        most: pieces of one client that run at the same time; None: as many as there are threads.
        spares: a client gets a further thread only while more are free than it has: of three, one client has two.
        options: of :class:`~concurrent.futures.ThreadPoolExecutor`.
    """

    def __init__(self, count: int, name: str, *, most: int | None = None, spares: bool = False, **options: Any) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name, **options)
        self._count, self._most, self._spares = count, most or count, spares
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[SharedWork[Any]]] = {}  # in the order of turns; no queue is empty
        self._running: Counter[str] = Counter()
        self._is_closed = False

    @property
    def waiting(self) -> int:
        """The pieces of work that have not begun."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def submit(self, client: str, call: Callable[[], T]) -> SharedWork[T]:
        """Queues ``call`` for a client. After :meth:`close` it returns cancelled work."""
        work = SharedWork(client, call)
        work.add_done_callback(self._remove)
        with self._lock:
            if not self._is_closed:
                self._waiting.setdefault(client, deque()).append(work)
                self._executor.submit(self._run_waiting)
                return work
        work.cancel()
        return work

    async def run(self, call: Callable[[], T]) -> T:
        """Returns the result of ``call``, which is work of the current client. Ends with the task that waits for it."""
        return await asyncio.wrap_future(self.submit(current_client(), call))

    def close(self) -> None:
        """Cancels the work that has not begun, and ends the threads, each after its work."""
        with self._lock:
            self._is_closed = True
            waiting = [work for queue in self._waiting.values() for work in queue]
        for work in waiting:
            work.cancel()
        self._executor.shutdown(wait=False)

    def _run_waiting(self) -> None:
        """Does work while any may begin. Called once for each piece, also for those that were removed."""
        while (work := self._next()) is not None:
            try:
                work.run()
            finally:
                with self._lock:
                    self._running[work.client] -= 1
                    if not self._running[work.client]:
                        del self._running[work.client]

    def _next(self) -> SharedWork[Any] | None:
        """Takes the next piece from its queue; None if no client that waits may have another thread."""
        with self._lock:
            client = min(self._waiting, key=self._running.__getitem__, default=None)
            if client is None or self._running[client] >= self._limit():
                return None
            queue = self._waiting.pop(client)
            work = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind the others
            self._running[client] += 1
            return work

    def _limit(self) -> int:
        """Returns how many pieces of one client must be running for it to wait."""
        return min(self._most, self._count - self._running.total()) if self._spares else self._most

    def _remove(self, work: Future[Any]) -> None:
        """Takes cancelled work out of its queue, so that nothing holds what it would have needed."""
        if not (isinstance(work, SharedWork) and work.cancelled()):
            return
        with self._lock:
            queue = self._waiting.get(work.client)
            if queue is not None and work in queue:
                queue.remove(work)
                if not queue:
                    del self._waiting[work.client]
