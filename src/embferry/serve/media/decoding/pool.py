"""The processes for decoding of a router or worker: a few, which are started when they are needed, and stay."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.decoding.cancellation import Cancellation, CancelledWorkError
from embferry.serve.media.decoding.child import BrokenChildError, Child
from embferry.serve.media.decoding.messages import Done, Task
from embferry.serve.media.video import Frames

log = logging.getLogger(__name__)

PROCESSES = 3
"""Files decoded at the same time. One client has two at most (:class:`.SharedThreads`), so that its slow files do not
delay another client's."""
JOBS = 1000
"""Jobs of a process; then another one takes its place, so that what a decoder leaks is bounded."""


class DecoderPool:
    """Decodes in processes of its own. Any thread; every call blocks until its job is done or cancelled.

    Args:
        processes: the most that there are.
        start: starts one.
    """

    def __init__(self, processes: int = PROCESSES, start: Callable[[], Child] = Child) -> None:
        self._processes = processes
        self._start = start
        self._changed = threading.Condition()
        self._idle: list[Child] = []
        self._count = 0
        self._is_closed = False

    def run(
        self,
        task: Task,
        files: Sequence[bytes],
        limits: MediaSettings,
        fps: float | None = None,
        cancellation: Cancellation | None = None,
        grow: Callable[[int], object] = lambda nbytes: None,
    ) -> Frames:
        """Does a job, and returns the decoded pictures or frames; none for the checks.

        ``grow`` is called with the bytes that each of them takes in memory, before it is received.

        Raises:
            ServeError: the file is refused, its decoder broke down or took too much, or ``grow`` has raised it.
            CancelledWorkError: the job is not wanted any more.
        """
        cancellation = cancellation or Cancellation()
        frames, fps_of_all = list[Image.Image](), 0.0
        with self._child(cancellation) as child:
            try:
                for answer in child.run(task, files, limits, fps, grow):
                    if isinstance(answer, Done):
                        fps_of_all = answer.fps
                        continue
                    picture, times = answer
                    frames += [picture] * times
                    if len(frames) > limits.max_video_frames:
                        raise BrokenChildError("the decoder sent too many frames")
            except BrokenChildError as error:
                child.kill()
                if cancellation.is_set:
                    raise CancelledWorkError from error
                log.warning("a file broke its decoder", extra={"reason": str(error), "task": task})
                raise ServeError("media_decoder_failed", f"the file cannot be decoded: {error}") from error
        return Frames(frames, fps_of_all)

    def close(self) -> None:
        """Ends the processes that do nothing. Those at work end with their jobs."""
        with self._changed:
            idle, self._idle, self._is_closed = self._idle, [], True
            self._count -= len(idle)
        for child in idle:
            child.close()

    @contextlib.contextmanager
    def _child(self, cancellation: Cancellation) -> Iterator[Child]:
        child = self._take(cancellation)
        try:
            with cancellation.calling(child.kill):
                yield child
        finally:
            self._give_back(child)

    def _take(self, cancellation: Cancellation) -> Child:
        """Waits for a process."""
        with cancellation.calling(self._wake), self._changed:
            while not self._idle and self._count >= self._processes:
                self._changed.wait()
                if cancellation.is_set:
                    self._changed.notify()  # the process that has become free may be another's
                    raise CancelledWorkError
            while self._idle:
                child = self._idle.pop()
                if child.is_usable:
                    return child
                self._count -= 1
                child.close()
            self._count += 1
        return self._started()

    def _started(self) -> Child:
        try:
            return self._start()
        except OSError as error:
            self._forget()
            why = f"no process for decoding could be started: {error}; try again later"
            raise ServeError("capacity_exhausted", why, status=503, retryable=True) from error

    def _give_back(self, child: Child) -> None:
        """Takes a process back. One that has ended is replaced at once, so that the next file need not wait for it."""
        if child.is_usable and child.jobs < JOBS:
            fresh = child
        else:
            child.close()
            try:
                fresh = self._start()
            except OSError:
                self._forget()
                return
        with self._changed:
            if not self._is_closed:
                self._idle.append(fresh)
                self._changed.notify()
                return
        fresh.close()
        self._forget()

    def _forget(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


POOL = DecoderPool()
"""The processes of this one. They end with it."""
atexit.register(POOL.close)
