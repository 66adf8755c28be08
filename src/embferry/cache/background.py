"""Threads that do bounded work in the background, for callers that may not wait for a file system or a network."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

Job = Callable[[], object]


class Background:
    """Some threads with one queue. Any thread may call the methods; only :meth:`close` waits.

    A job that hangs, say in a file system that does not respond, occupies its thread but keeps no process alive.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        max_jobs: int,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the threads.

        Args:
            name: Their name.
            threads: Their number.
            max_jobs: Jobs in the queue at most.
            max_bytes: Bytes that the jobs of the queue may hold together. A single job may hold more.
            clock: Monotonic seconds.
        """
        self._max_jobs, self._max_bytes, self._clock = max_jobs, max_bytes, clock
        self._changed = threading.Condition()  # guards what follows
        self._queue: deque[tuple[Job, int]] = deque()
        self._bytes = 0
        self._began: dict[int, float] = {}  # by thread at work: when its job began
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=name, daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job, nbytes: int = 0) -> bool:
        """Queues a job, which runs on one of the threads and should not raise. Returns False if the queue is full."""
        with self._changed:
            is_full = len(self._queue) >= self._max_jobs or (self._queue and self._bytes + nbytes > self._max_bytes)
            if is_full or self._is_closing:
                return False
            self._queue.append((job, nbytes))
            self._bytes += nbytes
            self._changed.notify()
            return True

    def is_stalled(self, seconds: float) -> bool:
        """Returns whether every thread has been at its job for longer than this."""
        with self._changed:
            since = self._clock() - seconds
            return len(self._began) == len(self._threads) and all(began < since for began in self._began.values())

    def close(self, timeout: float) -> bool:
        """Ends the threads once the queue is empty. What has not begun after ``timeout`` seconds is dropped.

        Returns:
            Whether all threads have ended.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        with self._changed:
            self._queue.clear()
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, number: int) -> None:
        while (job := self._next(number)) is not None:
            try:
                job()
            except Exception:
                log.exception("work in the background has failed")
            del job

    def _next(self, number: int) -> Job | None:
        with self._changed:
            self._began.pop(number, None)
            while not self._queue:
                if self._is_closing:
                    return None
                self._changed.wait()
            job, nbytes = self._queue.popleft()
            self._bytes -= nbytes
            self._began[number] = self._clock()
            return job
